"""ResNet-18, 34, 50 and 101 (He et al. 2015, arXiv 1512.03385), for photographs and for small images.

The networks are those of torchvision, to the rounding error: the bottleneck is that of version 1.5, whose stride is in
the 3x3 convolution, and padding is symmetric. The scale of the last norm of each residual branch starts at zero, so
that a block starts as its shortcut (Goyal et al. 2017, arXiv 1706.02677).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from cnn_jax import ops
from cnn_jax.models import layers


def default_config() -> ConfigDict:
  """The fields of `config.model`."""
  config = ConfigDict()
  config.depth = 18  # layers: 18 | 34 | 50 | 101
  config.stem = '7x7'  # 7x7 (stride 2, then max pooling: 224 pixels a side) | 3x3 (full resolution: 32 pixels a side)
  config.width = 64  # channels of the stem and of the first stage's 3x3 convolutions; each stage doubles them
  config.norm_momentum = 0.9  # of the running statistics of batch norm
  config.fixed_statistics = False  # normalise by the running statistics in training too, and keep them
  config.frozen_stages = 0  # the first stages that are not trained, of 4; the stem belongs to the first
  config.rematerialize = False  # compute a block again for its gradient: less memory, a third more time
  config.dtype = 'float32'  # of the arithmetic: float32 | bfloat16; parameters stay float32
  return config


RULES = {
  'depth': (18, 34, 50, 101),
  'stem': ('7x7', '3x3'),
  'width': 'positive',
  'norm_momentum': 'below one',
  'dtype': ('float32', 'bfloat16'),
}

ARCHITECTURES = {f'resnet{depth}': {'depth': depth} for depth in (18, 34, 50, 101)}
LEVELS = layers.IMAGENET_LEVELS

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # of each stage
_BOTTLENECK_DEPTH = 50  # from this depth on, blocks are bottlenecks


def create(config: Any, num_classes: int) -> 'ResNet':
  """Makes the network that `config.model` describes; see `cnn_jax.models`."""
  return ResNet(
    num_classes=num_classes,
    depth=config.depth,
    stem=config.stem,
    width=config.width,
    norm_momentum=config.norm_momentum,
    fixed_statistics=config.fixed_statistics,
    frozen_stages=config.frozen_stages,
    rematerialize=config.rematerialize,
    dtype=jnp.dtype(config.dtype),
  )


def foreign_names(config: Any) -> dict[str, layers.ForeignNames]:
  """The names in torchvision, which are those in timm; see `cnn_jax.models`."""
  names: layers.ForeignNames = {}
  bottleneck = config.depth >= _BOTTLENECK_DEPTH
  names |= layers.conv_names('conv1', 'stem_conv')
  names |= layers.norm_names('bn1', 'stem_norm')
  for stage, blocks in enumerate(_BLOCKS[config.depth], 1):
    for block in range(1, blocks + 1):
      theirs, ours = f'layer{stage}.{block - 1}', f'stage{stage}_block{block}'
      for i in range(1, 4 if bottleneck else 3):
        names |= layers.conv_names(f'{theirs}.conv{i}', ours, f'conv{i}')
        names |= layers.norm_names(f'{theirs}.bn{i}', ours, f'norm{i}')
      if block == 1 and (stage > 1 or bottleneck):
        names |= layers.conv_names(f'{theirs}.downsample.0', ours, 'projection')
        names |= layers.norm_names(f'{theirs}.downsample.1', ours, 'projection_norm')
  return {'torchvision and timm': names | layers.dense_names('fc', 'head')}


class ResNet(nn.Module):
  """Classifies images of any size: (batch, height, width, channels) -> logits (batch, num_classes)."""

  num_classes: int
  depth: int = 18
  stem: str = '7x7'
  width: int = 64
  norm_momentum: float = 0.9
  fixed_statistics: bool = False
  frozen_stages: int = 0
  skipped_stages: int = 0
  rematerialize: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, images: Array, train: bool = False, positions: Array | None = None
  ) -> tuple[Array, dict[str, Array]]:
    """Computes logits and maps; see `cnn_jax.models`. Nothing is random, so `positions` is not used."""
    del positions
    maps = {}
    x = images.astype(self.dtype)
    for stage, blocks in enumerate(_BLOCKS[self.depth]):
      if stage < self.skipped_stages:
        continue
      frozen = stage < self.frozen_stages
      train_norm = train and not frozen and not self.fixed_statistics
      options = {'momentum': self.norm_momentum, 'dtype': self.dtype, 'train': train_norm}
      again = self.rematerialize and train and not frozen
      if stage == 0:
        x = layers.rematerialized(functools.partial(_stem, options), again)(self, x)
      for block in range(blocks):
        x = layers.rematerialized(Block, again)(
          features=self.width * 2**stage,
          stride=2 if stage > 0 and block == 0 else 1,
          bottleneck=self.depth >= _BOTTLENECK_DEPTH,
          name=f'stage{stage + 1}_block{block + 1}',
          **options,
        )(x)
      if frozen:
        x = jax.lax.stop_gradient(x)  # so no gradient is computed below
      maps[f'stage{stage + 1}'] = x
    # Hundreds of bfloat16 numbers are summed in float32.
    maps['pooled'] = x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32) if x.ndim == 4 else x
    x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x.astype(self.dtype))
    maps['logits'] = x.astype(jnp.float32)
    return maps['logits'], maps


def _stem(options: dict[str, Any], network: ResNet, x: Array) -> Array:
  small = network.stem == '3x3'
  x = _conv(network.width, 3 if small else 7, 1 if small else 2, network.dtype, 'stem_conv')(x)
  x = nn.relu(_norm('stem_norm', **options)(x))
  return x if small else ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class Block(nn.Module):
  """Adds a residual branch to its input.

  The branch is two 3x3 convolutions, or a bottleneck: a 3x3 convolution between two 1x1 convolutions, the last of which
  has four times as many features. The input is projected if its shape differs from the branch's.
  """

  features: int
  stride: int  # of the first 3x3 convolution
  bottleneck: bool
  momentum: float
  dtype: Any
  train: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    n, stride = self.features, self.stride
    layers = [(n, 1, 1), (n, 3, stride), (4 * n, 1, 1)] if self.bottleneck else [(n, 3, stride), (n, 3, 1)]
    options = {'momentum': self.momentum, 'dtype': self.dtype, 'train': self.train}
    shortcut = x
    for i, (features, kernel_size, stride) in enumerate(layers, 1):
      last = i == len(layers)
      x = _conv(features, kernel_size, stride, self.dtype, f'conv{i}')(x)
      x = _norm(f'norm{i}', zero=last, **options)(x)
      x = x if last else nn.relu(x)
    if shortcut.shape != x.shape:
      shortcut = _conv(x.shape[-1], 1, self.stride, self.dtype, 'projection')(shortcut)
      shortcut = _norm('projection_norm', **options)(shortcut)
    return nn.relu(x + shortcut)


def _conv(features: int, kernel_size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
  """A convolution with symmetric padding, where 'SAME' would pad less before than behind if the stride is 2."""
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=stride,
    padding=kernel_size // 2,
    use_bias=False,  # the norm that follows has one
    kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'truncated_normal'),
    dtype=dtype,
    conv_general_dilated=ops.conv_general_dilated,
    name=name,
  )


def _norm(name: str, *, momentum: float, dtype: Any, train: bool, zero: bool = False) -> layers.BatchNorm:
  return layers.BatchNorm(
    use_running_average=not train,
    momentum=momentum,
    dtype=dtype,
    scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
    axis_name='batch' if train else None,  # N devices take the step that one would take
    name=name,
  )
