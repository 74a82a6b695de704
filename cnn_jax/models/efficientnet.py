"""EfficientNet-Lite0 to 4 (Tan and Le 2019, arXiv 1905.11946), for photographs on small machines.

The Lite variants (Liu 2020, github.com/tensorflow/tpu, efficientnet/lite) leave out squeeze-and-excitation, use ReLU6, and
keep the widths of the stem and the head. Padding is that of TensorFlow: more behind than before if the stride is 2.
"""

import functools
import math
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
  config.variant = 'lite0'  # lite0 | lite1 | lite2 | lite3 | lite4: more blocks of more channels
  config.width = 1.0  # multiplies all channels, for smaller networks; published weights need 1.0
  config.depth = 1.0  # multiplies the blocks of each stage, for shallower networks; published weights need 1.0
  config.pooled_stages = 1  # of the last stages whose averages the head gets; materials show in earlier ones
  config.dropout = 0.2  # before the head
  config.drop_path = 0.0  # probability of dropping the last residual branch; earlier ones less, in proportion
  config.norm_momentum = 0.99  # of the running statistics of batch norm
  config.fixed_statistics = False  # normalise by the running statistics in training too, and keep them
  config.frozen_stages = 0  # the first stages that are not trained, of 8; the stem belongs to the first
  config.rematerialize = False  # compute a block again for its gradient: less memory, a third more time
  config.dtype = 'float32'  # of the arithmetic: float32 | bfloat16; parameters stay float32
  return config


RULES = {
  'variant': ('lite0', 'lite1', 'lite2', 'lite3', 'lite4'),
  'width': 'positive',
  'depth': 'positive',
  'pooled_stages': range(1, 9),
  'dropout': 'below one',
  'drop_path': 'below one',
  'norm_momentum': 'below one',
  'dtype': ('float32', 'bfloat16'),
}

ARCHITECTURES = {f'tf_efficientnet_{variant}': {'variant': variant} for variant in RULES['variant']}
LEVELS = (3 * (127.5,), 3 * (127.5,))

# Width and depth of each variant, relative to lite0.
_SCALES = {'lite0': (1.0, 1.0), 'lite1': (1.0, 1.1), 'lite2': (1.1, 1.2), 'lite3': (1.2, 1.4), 'lite4': (1.4, 1.8)}
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
_STEM, _HEAD = 32, 1280  # channels


def create(config: Any, num_classes: int) -> 'EfficientNetLite':
  """Makes the network that `config.model` describes; see `cnn_jax.models`."""
  return EfficientNetLite(
    num_classes=num_classes,
    variant=config.variant,
    width=config.width,
    depth=config.depth,
    pooled_stages=config.pooled_stages,
    dropout=config.dropout,
    drop_path=config.drop_path,
    norm_momentum=config.norm_momentum,
    fixed_statistics=config.fixed_statistics,
    frozen_stages=config.frozen_stages,
    rematerialize=config.rematerialize,
    dtype=jnp.dtype(config.dtype),
  )


def foreign_names(config: Any) -> dict[str, layers.ForeignNames]:
  """The names in the first PyTorch port of the published weights, and in timm; see `cnn_jax.models`."""
  return {'the PyTorch port': _port_names(config), 'timm': _timm_names(config)}


def _port_names(config: Any) -> layers.ForeignNames:
  names: layers.ForeignNames = {}
  names |= layers.conv_names('_conv_stem', 'stem_conv')
  names |= layers.norm_names('_bn0', 'stem_norm')
  number = 0
  for stage, (blocks, _, _, expansion, _) in enumerate(_stages(config.variant, config.width, config.depth), 1):
    for block in range(1, blocks + 1):
      theirs, ours = f'_blocks.{number}', f'stage{stage}_block{block}'
      if expansion > 1:
        names |= layers.conv_names(f'{theirs}._expand_conv', ours, 'expand_conv')
        names |= layers.norm_names(f'{theirs}._bn0', ours, 'expand_norm')
      names |= layers.conv_names(f'{theirs}._depthwise_conv', ours, 'depthwise_conv')
      names |= layers.norm_names(f'{theirs}._bn1', ours, 'depthwise_norm')
      names |= layers.conv_names(f'{theirs}._project_conv', ours, 'project_conv')
      names |= layers.norm_names(f'{theirs}._bn2', ours, 'project_norm')
      number += 1
  names |= layers.conv_names('_conv_head', 'top_conv')
  names |= layers.norm_names('_bn1', 'top_norm')
  return names | layers.dense_names('_fc', 'head')


def _timm_names(config: Any) -> layers.ForeignNames:
  names = layers.conv_names('conv_stem', 'stem_conv') | layers.norm_names('bn1', 'stem_norm')
  for stage, (blocks, _, _, expansion, _) in enumerate(_stages(config.variant, config.width, config.depth)):
    parts = [('conv_dw', 'depthwise'), ('conv_pwl' if expansion > 1 else 'conv_pw', 'project')]
    parts = [('conv_pw', 'expand'), *parts] if expansion > 1 else parts
    for block in range(blocks):
      theirs, ours = f'blocks.{stage}.{block}', f'stage{stage + 1}_block{block + 1}'
      for i, (conv, part) in enumerate(parts, 1):
        names |= layers.conv_names(f'{theirs}.{conv}', ours, f'{part}_conv')
        names |= layers.norm_names(f'{theirs}.bn{i}', ours, f'{part}_norm')
  names |= layers.conv_names('conv_head', 'top_conv') | layers.norm_names('bn2', 'top_norm')
  return names | layers.dense_names('classifier', 'head')


class EfficientNetLite(nn.Module):
  """Classifies images of any size: (batch, height, width, channels) -> logits (batch, num_classes)."""

  num_classes: int
  variant: str = 'lite0'
  width: float = 1.0
  depth: float = 1.0
  pooled_stages: int = 1
  dropout: float = 0.2
  drop_path: float = 0.0
  norm_momentum: float = 0.99
  fixed_statistics: bool = False
  frozen_stages: int = 0
  skipped_stages: int = 0
  rematerialize: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, images: Array, train: bool = False, positions: Array | None = None
  ) -> tuple[Array, dict[str, Array]]:
    """Computes logits and maps; see `cnn_jax.models`. Stage 8 is the 1x1 convolution before the pooling."""
    maps, pooled = {}, []
    stages = _stages(self.variant, self.width, self.depth)
    total, number = sum(stage[0] for stage in stages), 0
    key = self.make_rng('dropout') if train and (self.dropout or self.drop_path) else None
    x = images.astype(self.dtype)
    if self._is_pooled(self.skipped_stages) and x.ndim == 4:
      pooled.append(_average(x))
    for stage, (blocks, kernel_size, stride, expansion, features) in enumerate(stages):
      if stage < self.skipped_stages:
        number += blocks
        continue
      frozen = stage < self.frozen_stages
      norm, again = self._norm_options(train and not frozen), self.rematerialize and train and not frozen
      if stage == 0:
        stem = functools.partial(_layer, 'stem', _channels(_STEM, self.width), 3, 2, norm)
        x = layers.rematerialized(stem, again)(self, x)
      for block in range(blocks):
        rate = self.drop_path * number / total if train and not frozen else 0.0
        x = layers.rematerialized(Block, again)(
          features=features,
          kernel_size=kernel_size,
          stride=stride if block == 0 else 1,
          expansion=expansion,
          drop_path=rate,
          name=f'stage{stage + 1}_block{block + 1}',
          **norm,
        )(x, jax.random.fold_in(key, number) if rate and key is not None else None, positions)
        number += 1
      maps[f'stage{stage + 1}'] = x = jax.lax.stop_gradient(x) if frozen else x
      if self._is_pooled(stage + 1):
        pooled.append(_average(x))
    if self.skipped_stages <= len(stages):
      frozen = self.frozen_stages > len(stages)
      norm, again = self._norm_options(train and not frozen), self.rematerialize and train and not frozen
      top = functools.partial(_layer, 'top', _channels(_HEAD, self.width), 1, 1, norm)
      x = layers.rematerialized(top, again)(self, x)
      maps[f'stage{len(stages) + 1}'] = x = jax.lax.stop_gradient(x) if frozen else x
      pooled.append(_average(x))
      x = jnp.concatenate(pooled, axis=-1)
    maps['pooled'] = x
    if self.dropout and key is not None:
      x = layers.drop(jax.random.fold_in(key, total), x, self.dropout, positions)
    x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x.astype(self.dtype))
    maps['logits'] = x.astype(jnp.float32)
    return maps['logits'], maps

  def _is_pooled(self, stage: int) -> bool:
    return stage > len(_STAGES) + 1 - self.pooled_stages

  def _norm_options(self, train: bool) -> dict[str, Any]:
    return {'momentum': self.norm_momentum, 'dtype': self.dtype, 'train': train and not self.fixed_statistics}


def _layer(
  name: str, features: int, kernel_size: int, stride: int, norm: dict[str, Any], network: EfficientNetLite, x: Array
) -> Array:
  x = _conv(features, kernel_size, stride, network.dtype, f'{name}_conv')(x)
  return ops.relu6(_norm(f'{name}_norm', **norm)(x))


class Block(nn.Module):
  """An inverted residual: 1x1 expansion, depthwise convolution, 1x1 projection; added to its input if shapes agree."""

  features: int
  kernel_size: int
  stride: int
  expansion: int
  drop_path: float  # the probability that the branch is dropped
  momentum: float
  dtype: Any
  train: bool

  @nn.compact
  def __call__(self, x: Array, key: Array | None, positions: Array | None) -> Array:
    norm = {'momentum': self.momentum, 'dtype': self.dtype, 'train': self.train}
    shortcut, inner = x, x.shape[-1] * self.expansion
    if self.expansion > 1:
      x = _conv(inner, 1, 1, self.dtype, 'expand_conv')(x)
      x = ops.relu6(_norm('expand_norm', **norm)(x))
    x = _conv(inner, self.kernel_size, self.stride, self.dtype, 'depthwise_conv', groups=inner)(x)
    x = ops.relu6(_norm('depthwise_norm', **norm)(x))
    x = _conv(self.features, 1, 1, self.dtype, 'project_conv')(x)
    x = _norm('project_norm', **norm)(x)
    if shortcut.shape != x.shape:
      return x
    if key is not None:
      x = layers.drop_path(key, x, self.drop_path, positions)
    return x + shortcut


def _stages(variant: str, width: float, depth: float) -> list[tuple[int, int, int, int, int]]:
  """`_STAGES` of a variant; the first and the last stage have one block each."""
  wider, deeper = _SCALES[variant]
  return [
    (blocks if i in (0, len(_STAGES) - 1) else math.ceil(deeper * depth * blocks), k, s, e, _channels(c, wider * width))
    for i, (blocks, k, s, e, c) in enumerate(_STAGES)
  ]


def _channels(channels: int, width: float) -> int:
  """Channels times the width, rounded to a multiple of 8, but not by more than a tenth downwards."""
  scaled = channels * width
  rounded = max(8, int(scaled + 4) // 8 * 8)
  return rounded if rounded >= 0.9 * scaled else rounded + 8


def _average(x: Array) -> Array:
  return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)  # hundreds of bfloat16 numbers are summed in float32


def _conv(features: int, kernel_size: int, stride: int, dtype: Any, name: str, groups: int = 1) -> nn.Conv:
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=stride,
    padding='SAME',
    feature_group_count=groups,
    use_bias=False,  # the norm that follows has one
    kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'truncated_normal'),
    dtype=dtype,
    conv_general_dilated=ops.conv_general_dilated,
    name=name,
  )


def _norm(name: str, *, momentum: float, dtype: Any, train: bool) -> layers.BatchNorm:
  return layers.BatchNorm(
    use_running_average=not train,
    momentum=momentum,
    epsilon=1e-3,
    dtype=dtype,
    axis_name='batch' if train else None,  # N devices take the step that one would take
    name=name,
  )
