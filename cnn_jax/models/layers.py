"""Layers that several networks share."""

from collections.abc import Callable
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


def num_groups(features: int) -> int:
  """Groups of a group norm: at most 32, each of two channels or more."""
  return next(g for g in (32, 16, 8, 4, 2, 1) if (features % g == 0 and features // g >= 2) or g == 1)


def drop(key: Array, x: Array, rate: float, positions: Array) -> Array:
  """Dropout whose mask depends on the position of an example in the global batch, not on the device.

  Args:
    key: of this layer and step.
    x: (batch, ...).
    rate: the probability of dropping a unit, in [0, 1).
    positions: int32 (batch,).
  """
  keep = 1 - rate
  mask = jax.vmap(lambda p: jax.random.bernoulli(jax.random.fold_in(key, p), keep, x.shape[1:]))(positions)
  return jnp.where(mask, x / keep, 0)
