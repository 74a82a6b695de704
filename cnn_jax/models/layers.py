"""Layers that several networks share."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

ACTIVATIONS = {'relu': nn.relu, 'gelu': nn.gelu, 'silu': nn.silu}


def norm(kind: str, features: int, *, train: bool, momentum: float, dtype: Any, name: str) -> Callable[[Array], Array]:
  """Makes a norm; call it inside a compact method.

  Args:
    kind: batch | group | none.
    features: channels.
    train: whether batch norm uses the statistics of the batch. They are synchronised over the axis `batch`, so that N
      devices take the step that one would take.
    momentum: of the running statistics of batch norm.
    dtype: of the arithmetic.
    name: of the layer.
  """
  if kind == 'batch':
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=momentum,
      dtype=dtype,
      axis_name='batch' if train else None,
      name=name,
    )
  if kind == 'group':
    return nn.GroupNorm(num_groups=num_groups(features), dtype=dtype, name=name)
  return lambda x: x


class BatchNorm(nn.BatchNorm):
  """Batch norm over the last axis that is fast in training too if it uses the running statistics.

  It is then one multiplication and one addition. `flax.linen.BatchNorm` subtracts the mean first, and its gradient
  keeps the difference, which costs two passes over memory in each layer.
  """

  @nn.compact
  def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
    """Normalises maps (..., features)."""
    if not (use_running_average or self.use_running_average):
      return super().__call__(x, use_running_average, mask=mask)
    features = (x.shape[-1],)
    mean = self.variable('batch_stats', 'mean', jnp.zeros, features, jnp.float32).value
    variance = self.variable('batch_stats', 'var', jnp.ones, features, jnp.float32).value
    scale = self.param('scale', self.scale_init, features, self.param_dtype)
    bias = self.param('bias', self.bias_init, features, self.param_dtype)
    multiplier = jax.lax.rsqrt(variance + self.epsilon) * scale
    per_channel = (1,) * (x.ndim - 1) + features
    shift = (bias - mean * multiplier).reshape(per_channel)
    y = x.astype(multiplier.dtype) * multiplier.reshape(per_channel) + shift
    return y.astype(self.dtype or y.dtype)


def rematerialized(layer: Any, active: bool) -> Any:
  """A layer of which only the input is kept for the gradient, which computes the rest again (Chen et al. 2016, arXiv 1604.06174).

  Args:
    layer: a class of modules, or a function of a module and arrays; it has the variables that it would have otherwise.
    active: False: the layer as it is.
  """
  return nn.remat(layer) if active else layer


def num_groups(features: int) -> int:
  """Groups of a group norm: at most 32, each of two channels or more."""
  return next(g for g in (32, 16, 8, 4, 2, 1) if (features % g == 0 and features // g >= 2) or g == 1)


def drop(key: Array, x: Array, rate: float, positions: Array | None) -> Array:
  """Dropout whose mask depends on the position of an example in the global batch, not on the device.

  Args:
    key: of this layer and step.
    x: (batch, ...).
    rate: the probability of dropping a unit, in [0, 1).
    positions: int32 (batch,).
  """
  keep = 1 - rate
  mask = _draw(key, keep, x.shape[1:], positions)
  return jnp.where(mask, x / keep, 0)


def drop_path(key: Array, branch: Array, rate: float, positions: Array | None) -> Array:
  """Drops whole residual branches (Huang et al. 2016, arXiv 1603.09382), each example by its position; see `drop`.

  Args:
    key: of this branch and step.
    branch: (batch, ...).
    rate: the probability of dropping the branch of an example, in [0, 1).
    positions: int32 (batch,).
  """
  keep = _draw(key, 1 - rate, (), positions)
  return jnp.where(keep.reshape(-1, *[1] * (branch.ndim - 1)), branch / (1 - rate), 0).astype(branch.dtype)


def _draw(key: Array, probability: float, shape: Sequence[int], positions: Array | None) -> Array:
  if positions is None:
    raise ValueError('dropout needs the positions of the images in the global batch')
  return jax.vmap(lambda p: jax.random.bernoulli(jax.random.fold_in(key, p), probability, shape))(positions)


# The mean and the standard deviation of the colours of ImageNet, in levels.
IMAGENET_LEVELS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))

# {name in PyTorch: (path in `{'params', 'batch_stats'}`, order of its axes here)}
ForeignNames = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]


def conv_names(theirs: str, *ours: str, bias: bool = False) -> ForeignNames:
  """The variables of a convolution under PyTorch's names; a depthwise one has the same axes."""
  names: ForeignNames = {f'{theirs}.weight': (('params', *ours, 'kernel'), (2, 3, 1, 0))}
  return names | ({f'{theirs}.bias': (('params', *ours, 'bias'), (0,))} if bias else {})


def dense_names(theirs: str, *ours: str) -> ForeignNames:
  """The variables of a linear layer under PyTorch's names."""
  return {
    f'{theirs}.weight': (('params', *ours, 'kernel'), (1, 0)),
    f'{theirs}.bias': (('params', *ours, 'bias'), (0,)),
  }


def norm_names(theirs: str, *ours: str, running: bool = True) -> ForeignNames:
  """The variables of a norm under PyTorch's names; `running`: with the running statistics of a batch norm."""
  names: ForeignNames = {
    f'{theirs}.weight': (('params', *ours, 'scale'), (0,)),
    f'{theirs}.bias': (('params', *ours, 'bias'), (0,)),
  }
  if running:
    names[f'{theirs}.running_mean'] = (('batch_stats', *ours, 'mean'), (0,))
    names[f'{theirs}.running_var'] = (('batch_stats', *ours, 'var'), (0,))
  return names
