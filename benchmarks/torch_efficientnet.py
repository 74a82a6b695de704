"""EfficientNet-Lite0 in PyTorch, a peer of `cnn_jax.models.efficientnet`, and its published weights.

The interpreter of a PyTorch peer need not have JAX. So this module imports nothing of this project.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# Blocks, kernel size, stride, expansion and channels of each stage.
_STAGES = (
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)
_STEM, _TOP = 32, 1280  # channels


def layers(num_classes: int) -> list[nn.Module]:
  """The layers in order: the stem, the blocks, the last block with the 1x1 convolution after it, and the head.

  Args:
    num_classes: outputs of the head.
  """
  made: list[nn.Module] = [nn.Sequential(*_conv_norm(3, _STEM, 3, 2), nn.ReLU6(inplace=True))]
  channels = _STEM
  for blocks, kernel, stride, expansion, features in _STAGES:
    for block in range(blocks):
      made.append(_Block(channels, features, kernel, 1 if block else stride, expansion))
      channels = features
  top = nn.Sequential(made.pop(), *_conv_norm(channels, _TOP, 1, 1), nn.ReLU6(inplace=True))
  head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(_TOP, num_classes))
  return [*made, top, head]


def load(network: nn.Sequential, path: Path) -> None:
  """Loads published weights into a network made of `layers`; its head stays as it is if it has other classes.

  Args:
    network: changed.
    path: a file of PyTorch's, whose layers have the same order.

  Raises:
    ValueError: a layer of the file has another shape.
  """
  mine, theirs = network.state_dict(), torch.load(path, map_location='cpu', weights_only=True)
  counted = 'num_batches_tracked'
  names = [name for name in mine if not name.endswith(counted)]
  tensors = [(name, tensor) for name, tensor in theirs.items() if not name.endswith(counted)]
  if len(names) != len(tensors):
    raise ValueError(f'{path} has {len(tensors)} tensors instead of {len(names)}.')
  last = len(names) - 2  # weight and bias of the head
  for i, (name, (their_name, tensor)) in enumerate(zip(names, tensors, strict=True)):
    if mine[name].shape == tensor.shape:
      mine[name].copy_(tensor)
    elif i < last:
      raise ValueError(
        f'{their_name} of {path} has the shape {tuple(tensor.shape)} instead of {tuple(mine[name].shape)}.'
      )


class _Block(nn.Module):
  """1x1 expansion, depthwise convolution, 1x1 projection; added to its input if the shapes agree."""

  def __init__(self, channels: int, features: int, kernel: int, stride: int, expansion: int):
    super().__init__()
    inner = channels * expansion
    branch = [*_conv_norm(channels, inner, 1, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
    branch += [*_conv_norm(inner, inner, kernel, stride, groups=inner), nn.ReLU6(inplace=True)]
    self.branch = nn.Sequential(*branch, *_conv_norm(inner, features, 1, 1))
    self.adds = stride == 1 and channels == features

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x + self.branch(x) if self.adds else self.branch(x)


class _SamePadding(nn.Conv2d):
  """A convolution with the padding of TensorFlow: more behind than before if the stride is 2."""

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    (kernel, _), (stride, _) = self.kernel_size, self.stride
    missing = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2])]
    return super().forward(F.pad(x, [side for n in missing for side in (n // 2, n - n // 2)]))


def _conv_norm(channels: int, features: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
  if stride == 1:
    conv = nn.Conv2d(channels, features, kernel, padding=kernel // 2, groups=groups, bias=False)
  else:
    conv = _SamePadding(channels, features, kernel, stride, groups=groups, bias=False)
  return [conv, nn.BatchNorm2d(features, eps=1e-3)]
