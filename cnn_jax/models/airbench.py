"""The networks of the CIFAR-10 speed records: fixed whitening filters, then groups of two or three convolutions.

Jordan, arXiv 2404.00498: "airbench94", with the initialisation of its later version for Muon, and "airbench96", whose groups
of three convolutions have a residual connection. The first layer is computed from training images by `initialize` and not
trained, except its bias. GELU is approximated by tanh, which differs from that of the published programs by up to 5e-4.
"""

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from ml_collections import ConfigDict

from cnn_jax import ops
from cnn_jax.models import layers

_PATCH = 2  # pixels a side of the patches that the first layer whitens
_FLOOR = 5e-4  # added to the variances, so that directions without variance are not amplified


def default_config() -> ConfigDict:
  """The fields of `config.model`."""
  config = ConfigDict()
  config.features = (64, 256, 256)  # channels of each group
  config.convs_per_group = 2  # the first of them is followed by the pooling
  config.residual = False  # add what the first convolution of a group gives to what the last one gives
  config.whitening = True  # fixed filters that whiten 2x2 patches, from training images; False: random and trained
  config.identity = True  # as many filters as a layer has inputs start as the identity; False: all are random
  config.activation = 'gelu'  # relu | gelu | silu
  config.norm_momentum = 0.6  # of the running statistics of batch norm
  config.norm_scale = False  # whether batch norm has a trained scale
  config.fixed_statistics = False  # normalise by the running statistics in training too, and keep them
  config.frozen_stages = 0  # the first stages that are not trained; for fine-tuning
  config.rematerialize = False  # compute a group again for its gradient: less memory, a third more time
  config.dtype = 'float32'  # of the arithmetic: float32 | bfloat16 | float16; parameters and the head stay float32
  return config


RULES = {
  'features': 'positive',
  'convs_per_group': range(2, 10),
  'activation': ('relu', 'gelu', 'silu'),
  'norm_momentum': 'below one',
  'dtype': ('float32', 'bfloat16', 'float16'),
}


def create(config: Any, num_classes: int) -> 'Airbench':
  """Makes the network that `config.model` describes; see `cnn_jax.models`."""
  return Airbench(
    num_classes=num_classes,
    features=tuple(config.features),
    convs_per_group=config.convs_per_group,
    residual=config.residual,
    whitening=config.whitening,
    identity=config.identity,
    activation=config.activation,
    norm_momentum=config.norm_momentum,
    norm_scale=config.norm_scale,
    fixed_statistics=config.fixed_statistics,
    frozen_stages=config.frozen_stages,
    rematerialize=config.rematerialize,
    dtype=jnp.dtype(config.dtype),
  )


def initialize(config: Any, variables: dict[str, Any], images: Array) -> dict[str, Any]:
  """Sets the filters of the first layer so that their outputs are uncorrelated and, but for the floor, of variance 1.

  They are the eigenvectors of the second moments of the patches, divided by the root of their eigenvalues, and the
  negatives of these, because an activation follows.

  Args:
    config: the section `config.model`.
    variables: of `models.init`.
    images: float32 (n, height, width, channels), normalised.
  """
  if not config.whitening:
    return variables
  kernel = _whitening(images)
  first = variables['params']['whiten'] | {'kernel': kernel}
  return variables | {'params': variables['params'] | {'whiten': first}}


class Airbench(nn.Module):
  """Classifies images: (batch, height, width, channels) -> logits (batch, num_classes).

  Stage 1 is the whitening and its activation; every other stage is a group. The input of the head is the maximum of
  each map of the last stage, divided by their number.
  """

  num_classes: int
  features: Sequence[int] = (64, 256, 256)
  convs_per_group: int = 2
  residual: bool = False
  whitening: bool = True
  identity: bool = True
  activation: str = 'gelu'
  norm_momentum: float = 0.6
  norm_scale: bool = False
  fixed_statistics: bool = False
  frozen_stages: int = 0
  skipped_stages: int = 0
  rematerialize: bool = False
  dtype: Any = jnp.float32

  @property
  def fixed_parameters(self) -> Collection[tuple[str, ...]]:
    """The whitening filters; see `cnn_jax.models`."""
    return {('whiten', 'kernel')} if self.whitening else ()

  @nn.compact
  def __call__(
    self, images: Array, train: bool = False, positions: Array | None = None
  ) -> tuple[Array, dict[str, Array]]:
    """Computes logits and maps; see `cnn_jax.models`."""
    del positions
    maps = {}
    x = images.astype(self.dtype)
    for stage in range(self.skipped_stages + 1, len(self.features) + 2):
      trained = train and stage > self.frozen_stages
      compute = partial(Airbench._compute_stage, stage=stage, train=trained)
      x = layers.rematerialized(compute, self.rematerialize and trained)(self, x)
      if stage <= self.frozen_stages:
        x = lax.stop_gradient(x)  # so no gradient is computed below
      maps[f'stage{stage}'] = x
    if x.ndim == 4:  # not if all stages are skipped
      x = jnp.max(x, axis=(1, 2)).astype(jnp.float32) / x.shape[-1]
    maps['pooled'] = x = x.astype(jnp.float32)
    maps['logits'] = nn.Dense(self.num_classes, kernel_init=_unit_variance, name='head')(x)
    return maps['logits'], maps

  def _compute_stage(self, x: Array, stage: int, train: bool) -> Array:
    return self._whiten(x) if stage == 1 else self._group(x, stage - 1, train)

  def _whiten(self, x: Array) -> Array:
    channels = x.shape[-1]
    x = nn.Conv(
      2 * _PATCH**2 * channels,
      (_PATCH, _PATCH),
      padding='VALID',
      kernel_init=_uniform,
      bias_init=partial(_uniform, inputs=_PATCH**2 * channels),
      dtype=self.dtype,
      conv_general_dilated=_conv_with_fixed_kernel if self.whitening else ops.conv_general_dilated,
      name='whiten',
    )(x)
    return layers.ACTIVATIONS[self.activation](x)

  def _group(self, x: Array, number: int, train: bool) -> Array:
    activation, last = layers.ACTIVATIONS[self.activation], self.convs_per_group
    x = shortcut = activation(self._conv_and_norm(x, number, 1, train))
    for i in range(2, last):
      x = activation(self._conv_and_norm(x, number, i, train))
    x = self._conv_and_norm(x, number, last, train)
    return activation(x + shortcut if self.residual else x)

  def _conv_and_norm(self, x: Array, group: int, i: int, train: bool) -> Array:
    x = nn.Conv(
      self.features[group - 1],
      (3, 3),
      use_bias=False,  # the norm has one
      kernel_init=_identity if self.identity else _uniform,
      dtype=self.dtype,
      conv_general_dilated=ops.conv_max_pool if i == 1 else ops.conv_general_dilated,
      name=f'group{group}_conv{i}',
    )(x)
    return nn.BatchNorm(
      use_running_average=not train or self.fixed_statistics,
      momentum=self.norm_momentum,
      epsilon=1e-12,
      use_scale=self.norm_scale,
      dtype=self.dtype,
      axis_name='batch' if train and not self.fixed_statistics else None,
      name=f'group{group}_norm{i}',
    )(x)


def _conv_with_fixed_kernel(images: Array, kernel: Array, *args: Any, **options: Any) -> Array:
  return ops.conv_general_dilated(images, lax.stop_gradient(kernel), *args, **options)


def _whitening(images: Array) -> Array:
  """The filters (patch, patch, channels, 2 * patch * patch * channels); see `initialize`."""
  rows, columns = (size - _PATCH + 1 for size in images.shape[1:3])
  channels = images.shape[-1]
  patches = jnp.concatenate(
    [images[:, i : i + rows, j : j + columns] for i in range(_PATCH) for j in range(_PATCH)], axis=-1
  ).reshape(-1, _PATCH**2 * channels)
  moments = jnp.matmul(patches.T, patches, precision='highest') / len(patches)
  variances, directions = jnp.linalg.eigh(moments)
  filters = directions / jnp.sqrt(variances + _FLOOR)
  return jnp.concatenate([filters, -filters], axis=1).reshape(_PATCH, _PATCH, channels, -1)


def _uniform(key: Array, shape: Sequence[int], dtype: Any = jnp.float32, inputs: int | None = None) -> Array:
  """Uniform up to 1 / sqrt(inputs of a filter) each way, the default of PyTorch."""
  bound = 1 / math.sqrt(inputs or math.prod(shape[:-1]))
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def _identity(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
  """Filters that pass on one input each, as far as there are inputs; the others are random."""
  height, width, inputs, features = shape
  passed = jnp.arange(min(inputs, features))
  ones = jnp.zeros(shape, dtype).at[height // 2, width // 2, passed, passed].set(1)
  return jnp.where(jnp.arange(features) < inputs, ones, _uniform(key, shape, dtype))


def _unit_variance(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
  kernel = _uniform(key, shape, dtype)
  return kernel / jnp.std(kernel, ddof=1)
