"""The same networks in PyTorch, eager or compiled, channels_last, one thread per CPU; peers of `photographs.py`.

    python -m benchmarks.step_time.photographs_torch_peer pytorch|pytorch_compiled resnet50 8 [OPTIONS]

The arguments and requests are those of `photographs_jax_peer.py`; OPTIONS also has `device`, cpu or cuda, see
`torch_device`. Frozen layers run without gradients.
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers
from benchmarks.step_time.photographs import CLASSES, SIZE, timed
from benchmarks.step_time.torch_device import Device


def main(argv: list[str]) -> None:
  """Reports the version of PyTorch, and answers requests."""
  name, network, count, *rest = argv
  options = json.loads(rest[0]) if rest else {}
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  device, side = Device(**options), options.get('size', SIZE)
  images = torch.rand(int(count), 3, side, side).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
  images, fixed = device.place(images), options.get('fixed_statistics', True)

  @functools.cache
  def run_of(work: str) -> Callable[[int], Any]:
    run = make(network, work, images, device, compiled=name == 'pytorch_compiled', fixed_statistics=fixed)
    run(2)
    return run

  peers.serve(
    lambda work, steps: timed(run_of(work.replace('_', ' ')), int(steps)) | {'device_mb': device.peak_mb()},
    version=torch.__version__,
  )


def make(
  network: str, work: str, images: torch.Tensor, device: Device, *, compiled: bool, fixed_statistics: bool
) -> Callable[[int], Any]:
  """A function that takes a number of steps.

  Args:
    network: a key of `photographs.NETWORKS`.
    work: a key of `photographs.WORKS`.
    images: float (batch, 3, height, width), on the device.
    device: where to compute.
    compiled: whether to use `torch.compile`.
    fixed_statistics: whether batch norms use their running statistics in training too, as fine-tuning does.
  """
  stages = efficientnet_lite0() if network == 'efficientnet_lite0' else resnet(int(network.removeprefix('resnet')))
  last = {'last stage': -2, 'head': -1}.get(work, 0)  # the last layers, the head among them, that are trained
  frozen, trained = (
    nn.Sequential(*part).eval().to(device.name, memory_format=torch.channels_last)
    for part in (stages[:last] if last else [], stages[last:])
  )
  trained.train(work != 'inference' and not fixed_statistics)
  labels = device.place(torch.arange(len(images)) % CLASSES)
  optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4, momentum=0.9)
  forward, features = (torch.compile(part) if compiled else part for part in (trained, frozen))

  @device.timed(full_precision=True)
  def inference(steps: int) -> None:
    with torch.inference_mode(), device.autocast():
      for _ in range(steps):
        forward(images)

  @device.timed(full_precision=False)
  def train(steps: int) -> None:
    for _ in range(steps):
      with torch.no_grad(), device.autocast():
        x = features(images) if last else images
      optimizer.zero_grad(set_to_none=True)
      with device.autocast():
        loss = F.cross_entropy(forward(x), labels)
      loss.backward()
      optimizer.step()

  return inference if work == 'inference' else train


def efficientnet_lite0() -> list[nn.Module]:
  """Layers in order; the last but one is what `photographs.NETWORKS` does not freeze, the last one the head."""
  layers, channels = [_conv_norm(3, 32, 3, 2, act=True)], 32
  stages = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
  )
  for blocks, kernel, stride, expansion, features in (*stages, (1, 3, 1, 6, 320)):
    for block in range(blocks):
      layers.append(_Inverted(channels, features, kernel, stride if block == 0 else 1, expansion))
      channels = features
  last = nn.Sequential(layers.pop(), _conv_norm(320, 1280, 1, 1, act=True))
  return [*layers, last, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, CLASSES))]


def resnet(depth: int) -> list[nn.Module]:
  """Layers in order; the last but one is the last stage, the last one the head."""
  bottleneck = depth >= 50
  stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
  layers: list[nn.Module] = [nn.Sequential(*stem)]
  channels = 64
  for stage, blocks in enumerate((2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)):
    made = []
    for block in range(blocks):
      made.append(_Residual(channels, 64 * 2**stage, 2 if stage and block == 0 else 1, bottleneck))
      channels = 64 * 2**stage * (4 if bottleneck else 1)
    layers.append(nn.Sequential(*made))
  return [*layers, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))]


class _Inverted(nn.Module):
  def __init__(self, channels: int, features: int, kernel: int, stride: int, expansion: int):
    super().__init__()
    inner = channels * expansion
    branch = [_conv_norm(channels, inner, 1, 1, act=True)] if expansion > 1 else []
    branch += [_conv_norm(inner, inner, kernel, stride, act=True, groups=inner), _conv_norm(inner, features, 1, 1)]
    self.branch = nn.Sequential(*branch)
    self.adds = stride == 1 and channels == features

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x + self.branch(x) if self.adds else self.branch(x)


class _Residual(nn.Module):
  def __init__(self, channels: int, width: int, stride: int, bottleneck: bool):
    super().__init__()
    features = 4 * width if bottleneck else width
    layers = [(channels, width, 3, stride), (width, features, 3, 1)]
    if bottleneck:
      layers = [(channels, width, 1, 1), (width, width, 3, stride), (width, features, 1, 1)]
    branch: list[nn.Module] = []
    for i, (before, after, kernel, step) in enumerate(layers):
      branch += [nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(after)]
      branch += [nn.ReLU(inplace=True)] if i < len(layers) - 1 else []
    self.branch = nn.Sequential(*branch)
    self.projection = nn.Sequential()
    if stride > 1 or channels != features:
      self.projection = nn.Sequential(nn.Conv2d(channels, features, 1, stride, bias=False), nn.BatchNorm2d(features))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return F.relu(self.branch(x) + self.projection(x))


def _conv_norm(channels: int, features: int, kernel: int, stride: int, *, act: bool = False, groups: int = 1):
  # Symmetric padding takes as long as that of TensorFlow.
  conv = nn.Conv2d(channels, features, kernel, stride, kernel // 2, groups=groups, bias=False)
  layers = [conv, nn.BatchNorm2d(features, eps=1e-3)]
  return nn.Sequential(*layers, nn.ReLU6(inplace=True)) if act else nn.Sequential(*layers)


if __name__ == '__main__':
  main(sys.argv[1:])
