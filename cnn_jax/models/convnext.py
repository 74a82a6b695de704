"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545), from atto to base, for photographs.

The networks are those of timm, to the rounding error; atto to nano are timm's own small variants.
"""

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
  config.variant = 'tiny'  # atto | femto | pico | nano | tiny | small | base
  config.width = 0  # channels of the first stage, which each stage doubles; 0: of the variant
  config.depth = 1.0  # multiplies the blocks of each stage, for shallower networks; published weights need 1.0
  config.drop_path = 0.0  # probability of dropping the last residual branch; earlier ones less, in proportion
  config.dropout = 0.0  # before the head
  config.frozen_stages = (
    0  # the first stages that are not trained, of 4; the stem belongs to the first, the last norm to the last
  )
  config.rematerialize = False  # compute a block again for its gradient: less memory, a third more time
  config.dtype = 'float32'  # of the arithmetic: float32 | bfloat16; parameters stay float32
  return config


# Blocks of each stage, and channels of the first.
_VARIANTS = {
  'atto': ((2, 2, 6, 2), 40),
  'femto': ((2, 2, 6, 2), 48),
  'pico': ((2, 2, 6, 2), 64),
  'nano': ((2, 2, 8, 2), 80),
  'tiny': ((3, 3, 9, 3), 96),
  'small': ((3, 3, 27, 3), 96),
  'base': ((3, 3, 27, 3), 128),
}

ARCHITECTURES = {f'convnext_{variant}': {'variant': variant} for variant in _VARIANTS}
LEVELS = layers.IMAGENET_LEVELS
RULES = {
  'variant': tuple(_VARIANTS),
  'depth': 'positive',
  'drop_path': 'below one',
  'dropout': 'below one',
  'dtype': ('float32', 'bfloat16'),
}


def create(config: Any, num_classes: int) -> 'ConvNeXt':
  """Makes the network that `config.model` describes; see `cnn_jax.models`."""
  return ConvNeXt(
    num_classes=num_classes,
    blocks=_blocks(config),
    width=config.width or _VARIANTS[config.variant][1],
    drop_path=config.drop_path,
    dropout=config.dropout,
    frozen_stages=config.frozen_stages,
    rematerialize=config.rematerialize,
    dtype=jnp.dtype(config.dtype),
  )


def foreign_names(config: Any) -> dict[str, layers.ForeignNames]:
  """The names in timm and in torchvision; see `cnn_jax.models`."""
  return {'timm': _timm_names(config), 'torchvision': _torchvision_names(config)}


def _timm_names(config: Any) -> layers.ForeignNames:
  names = layers.conv_names('stem.0', 'stem_conv', bias=True) | layers.norm_names('stem.1', 'stem_norm', running=False)
  for stage, blocks in enumerate(_blocks(config)):
    ours = f'stage{stage + 1}'
    if stage > 0:
      names |= layers.norm_names(f'stages.{stage}.downsample.0', f'{ours}_norm', running=False)
      names |= layers.conv_names(f'stages.{stage}.downsample.1', f'{ours}_conv', bias=True)
    for block in range(blocks):
      theirs, place = f'stages.{stage}.blocks.{block}', f'{ours}_block{block + 1}'
      names[f'{theirs}.gamma'] = (('params', place, 'scale'), (0,))
      names |= layers.conv_names(f'{theirs}.conv_dw', place, 'depthwise_conv', bias=True)
      names |= layers.norm_names(f'{theirs}.norm', place, 'branch_norm', running=False)
      names |= layers.dense_names(f'{theirs}.mlp.fc1', place, 'expand_dense')
      names |= layers.dense_names(f'{theirs}.mlp.fc2', place, 'project_dense')
  names |= layers.norm_names('head.norm', 'head_norm', running=False)
  return names | layers.dense_names('head.fc', 'head')


def _torchvision_names(config: Any) -> layers.ForeignNames:
  names = layers.conv_names('features.0.0', 'stem_conv', bias=True)
  names |= layers.norm_names('features.0.1', 'stem_norm', running=False)
  for stage, blocks in enumerate(_blocks(config)):
    ours = f'stage{stage + 1}'
    if stage > 0:
      names |= layers.norm_names(f'features.{2 * stage}.0', f'{ours}_norm', running=False)
      names |= layers.conv_names(f'features.{2 * stage}.1', f'{ours}_conv', bias=True)
    for block in range(blocks):
      theirs, place = f'features.{2 * stage + 1}.{block}', f'{ours}_block{block + 1}'
      names[f'{theirs}.layer_scale'] = (('params', place, 'scale'), (0,))
      names |= layers.conv_names(f'{theirs}.block.0', place, 'depthwise_conv', bias=True)
      names |= layers.norm_names(f'{theirs}.block.2', place, 'branch_norm', running=False)
      names |= layers.dense_names(f'{theirs}.block.3', place, 'expand_dense')
      names |= layers.dense_names(f'{theirs}.block.5', place, 'project_dense')
  names |= layers.norm_names('classifier.0', 'head_norm', running=False)
  return names | layers.dense_names('classifier.2', 'head')


class ConvNeXt(nn.Module):
  """Classifies images of any size: (batch, height, width, channels) -> logits (batch, num_classes)."""

  num_classes: int
  blocks: tuple[int, ...]
  width: int
  drop_path: float = 0.0
  dropout: float = 0.0
  frozen_stages: int = 0
  skipped_stages: int = 0
  rematerialize: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, images: Array, train: bool = False, positions: Array | None = None
  ) -> tuple[Array, dict[str, Array]]:
    """Computes logits and maps; see `cnn_jax.models`."""
    maps = {}
    key = self.make_rng('dropout') if train and (self.dropout or self.drop_path) else None
    total, number = sum(self.blocks), 0
    x = images.astype(self.dtype)
    for stage, blocks in enumerate(self.blocks):
      if stage < self.skipped_stages:
        number += blocks
        continue
      frozen = stage < self.frozen_stages
      if stage == 0:
        x = _conv(self.width, 4, 4, self.dtype, 'stem_conv')(x)
        x = _norm(self.dtype, 'stem_norm')(x)
      else:
        x = _norm(self.dtype, f'stage{stage + 1}_norm')(x)
        x = _conv(self.width * 2**stage, 2, 2, self.dtype, f'stage{stage + 1}_conv')(x)
      for block in range(blocks):
        rate = self.drop_path * number / max(total - 1, 1) if train and not frozen else 0.0
        again = self.rematerialize and train and not frozen
        branch = layers.rematerialized(Block, again)(self.dtype, name=f'stage{stage + 1}_block{block + 1}')(x)
        if rate and key is not None:
          branch = layers.drop_path(jax.random.fold_in(key, number), branch, rate, positions)
        x = x + branch
        number += 1
      maps[f'stage{stage + 1}'] = x = jax.lax.stop_gradient(x) if frozen else x
    if self.skipped_stages < len(self.blocks):
      x = _norm(jnp.float32, 'head_norm')(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))
      x = jax.lax.stop_gradient(x) if self.frozen_stages >= len(self.blocks) else x
    maps['pooled'] = x
    if self.dropout and key is not None:
      x = layers.drop(jax.random.fold_in(key, total), x, self.dropout, positions)
    x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x.astype(self.dtype))
    maps['logits'] = x.astype(jnp.float32)
    return maps['logits'], maps


class Block(nn.Module):
  """A residual branch: 7x7 depthwise convolution, norm, a layer of four times the channels, and a scale per channel."""

  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    x = _conv(channels, 7, 1, self.dtype, 'depthwise_conv', groups=channels)(x)
    x = _norm(self.dtype, 'branch_norm')(x)
    x = nn.gelu(_dense(4 * channels, self.dtype, 'expand_dense')(x), approximate=False)
    x = _dense(channels, self.dtype, 'project_dense')(x)
    return x * self.param('scale', nn.initializers.constant(1e-6), (channels,)).astype(self.dtype)


def _blocks(config: Any) -> tuple[int, ...]:
  return tuple(math.ceil(config.depth * blocks) for blocks in _VARIANTS[config.variant][0])


def _conv(features: int, size: int, stride: int, dtype: Any, name: str, groups: int = 1) -> nn.Conv:
  return nn.Conv(
    features,
    (size, size),
    strides=stride,
    padding='VALID' if groups == 1 else size // 2,
    feature_group_count=groups,
    kernel_init=nn.initializers.truncated_normal(0.02),
    dtype=dtype,
    conv_general_dilated=ops.conv_general_dilated,
    name=name,
  )


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
  return nn.Dense(features, kernel_init=nn.initializers.truncated_normal(0.02), dtype=dtype, name=name)


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)
