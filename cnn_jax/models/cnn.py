"""A small network: blocks of convolution, pooling, norm and activation; global average pooling; a linear layer."""

from collections.abc import Callable, Sequence
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
  config.features = (32, 64, 128)  # channels of each block
  config.convs_per_block = 1
  config.kernel_size = 3
  config.stride = 1  # of the first convolution of every block after the first
  config.pool = 'max'  # 2x2 at the end of every block but the last: max | avg | none
  config.norm = 'batch'  # batch | group | none
  config.norm_momentum = 0.9  # of the running statistics of batch norm
  config.activation = 'relu'  # relu | gelu | silu
  config.dropout = 0.0  # probability, before the head
  config.residual = False  # add each block's input to its output
  config.aggregate = 'gap'  # gap (global average pooling) | flatten
  config.head = 'dense'  # dense | conv1x1
  config.fixed_statistics = False  # normalise by the running statistics in training too, and keep them
  config.frozen_stages = 0  # the first stages, here blocks, that are not trained; for fine-tuning
  config.rematerialize = False  # compute a block again for its gradient: less memory, a third more time
  config.dtype = 'float32'  # of the arithmetic: float32 | bfloat16; parameters stay float32
  return config


RULES = {
  'features': 'positive',
  'convs_per_block': range(1, 65),
  'kernel_size': range(1, 64),  # the convolution of small images takes a slice per position of the kernel
  'stride': 'positive',
  'pool': ('max', 'avg', 'none'),
  'norm': ('batch', 'group', 'none'),
  'norm_momentum': 'below one',
  'activation': ('relu', 'gelu', 'silu'),
  'dropout': 'below one',
  'aggregate': ('gap', 'flatten'),
  'head': ('dense', 'conv1x1'),
  'dtype': ('float32', 'bfloat16'),
}


def create(config: Any, num_classes: int) -> 'CNN':
  """Makes the network that `config.model` describes; see `cnn_jax.models`."""
  return CNN(
    num_classes=num_classes,
    features=tuple(config.features),
    convs_per_block=config.convs_per_block,
    kernel_size=config.kernel_size,
    stride=config.stride,
    pool=config.pool,
    norm=config.norm,
    norm_momentum=config.norm_momentum,
    activation=config.activation,
    dropout=config.dropout,
    residual=config.residual,
    aggregate=config.aggregate,
    head=config.head,
    fixed_statistics=config.fixed_statistics,
    frozen_stages=config.frozen_stages,
    rematerialize=config.rematerialize,
    dtype=jnp.dtype(config.dtype),
  )


class CNN(nn.Module):
  """Classifies images of any size: (batch, height, width, channels) -> logits (batch, num_classes).

  A stage is a block. With `aggregate='gap'` the input of the head is the average of the last block's maps, so neither
  the number of parameters nor the output for a uniform image depends on the image's size (Lin et al. 2014, Network
  in Network). The heads `dense` and `conv1x1` are the same function; their kernels differ by two axes of length one.
  """

  num_classes: int
  features: Sequence[int] = (32, 64, 128)
  convs_per_block: int = 1
  kernel_size: int = 3
  stride: int = 1
  pool: str = 'max'
  norm: str = 'batch'
  norm_momentum: float = 0.9
  activation: str = 'relu'
  dropout: float = 0.0
  residual: bool = False
  aggregate: str = 'gap'
  head: str = 'dense'
  fixed_statistics: bool = False
  frozen_stages: int = 0
  skipped_stages: int = 0
  rematerialize: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, images: Array, train: bool = False, positions: Array | None = None
  ) -> tuple[Array, dict[str, Array]]:
    """Computes logits and maps; see `cnn_jax.models`. Dropout needs the rng `dropout` and `positions`."""
    maps = {}
    x = images.astype(self.dtype)
    for i, features in enumerate(self.features):
      if i < self.skipped_stages:
        continue
      last, frozen = i == len(self.features) - 1, i < self.frozen_stages
      again = self.rematerialize and train and not frozen
      x = layers.rematerialized(ConvBlock, again)(
        features=features,
        convs=self.convs_per_block,
        kernel_size=self.kernel_size,
        stride=1 if i == 0 else self.stride,
        pool='none' if last else self.pool,
        norm=self.norm,
        norm_momentum=self.norm_momentum,
        activation=self.activation,
        residual=self.residual,
        dtype=self.dtype,
        train=train and not frozen and not self.fixed_statistics,
        name=f'block{i + 1}',
      )(x)
      if frozen:
        x = jax.lax.stop_gradient(x)  # so no gradient is computed below
      maps[f'stage{i + 1}'] = x
    if self.aggregate == 'gap' and x.ndim == 4:  # not if all stages are skipped
      # Hundreds of bfloat16 numbers are summed in float32.
      x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
    else:
      x = x.reshape(x.shape[0], -1)
    maps['pooled'] = x
    if train and self.dropout:
      x = layers.drop(self.make_rng('dropout'), x, self.dropout, positions)
    x = x.astype(self.dtype)
    if self.head == 'dense':
      x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
    else:
      x = nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name='head')(x[:, None, None, :])[:, 0, 0, :]
    maps['logits'] = x.astype(jnp.float32)
    return maps['logits'], maps


class ConvBlock(nn.Module):
  """Convolution, norm and activation, `convs` times; the last convolution is pooled before its norm.

  Pooling first gives the same class of functions at a quarter of the elementwise work: a maximum commutes with every
  non-decreasing function, and norm followed by ReLU is one if the scale is positive.
  """

  features: int
  convs: int
  kernel_size: int
  stride: int
  pool: str
  norm: str
  norm_momentum: float
  activation: str
  residual: bool
  dtype: Any
  train: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shortcut = x
    activation = layers.ACTIVATIONS[self.activation]
    for i in range(self.convs):
      last = i == self.convs - 1
      pool = self.pool if last else 'none'
      conv = ops.conv_max_pool if pool == 'max' else ops.conv_general_dilated
      x = self._conv(self.kernel_size, self.stride if i == 0 else 1, f'conv{i + 1}', conv)(x)
      x = _avg_pool(x) if pool == 'avg' else x
      x = self._norm(f'norm{i + 1}')(x)
      if not (last and self.residual):
        x = activation(x)
    if self.residual:
      shortcut = self._resize_shortcut(shortcut, x.shape)
      x = activation(x + shortcut)
    return x

  def _conv(self, kernel_size: int, stride: int, name: str, conv: Callable = ops.conv_general_dilated) -> nn.Conv:
    return nn.Conv(
      self.features,
      (kernel_size, kernel_size),
      strides=stride,
      use_bias=self.norm == 'none',  # a norm has a bias of its own
      kernel_init=nn.initializers.he_normal(),
      dtype=self.dtype,
      conv_general_dilated=conv,
      name=name,
    )

  def _norm(self, name: str) -> Callable[[Array], Array]:
    return layers.norm(
      self.norm, self.features, train=self.train, momentum=self.norm_momentum, dtype=self.dtype, name=name
    )

  def _resize_shortcut(self, x: Array, shape: Sequence[int]) -> Array:
    """Brings a block's input to its output's shape: subsampled, average-pooled, projected if channel counts differ."""
    x = x[:, :: self.stride, :: self.stride, :]
    x = x if self.pool == 'none' or x.shape[1] == shape[1] else _avg_pool(x)
    if x.shape[-1] != shape[-1]:
      x = self._conv(1, 1, 'projection')(x)
    return x


def _avg_pool(x: Array) -> Array:
  return ops.avg_pool(x, (2, 2), strides=(2, 2))
