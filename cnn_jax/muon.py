"""Muon as the CIFAR-10 speed record uses it: orthogonalised momentum for filters that are rescaled before each step.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", and its use in airbench94_muon.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

# A polynomial of odd degree that moves singular values between 0 and 1 close to 1 in few steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 3


def orthogonalized_momentum(momentum: float, nesterov: bool) -> optax.GradientTransformation:
  """The momentum of each filter tensor (height, width, channels, features), orthogonalised as a matrix.

  Args:
    momentum: the factor of the sum of earlier gradients.
    nesterov: whether the gradient is added to it once more.
  """
  return optax.chain(
    optax.trace(decay=momentum, nesterov=nesterov), optax.stateless(lambda updates, _: _orthogonalize_all(updates))
  )


def rescale(is_filter: Callable[[Any], Any]) -> optax.GradientTransformation:
  """Rescales each filter tensor to the norm sqrt(features) before its update is added; the last link of a chain.

  Args:
    is_filter: maps the parameters to a tree like them, True at filter tensors.
  """

  def add(chosen: bool, update: Array, param: Array) -> Array:
    return update + param * (math.sqrt(param.shape[-1]) / optax.tree.norm(param) - 1) if chosen else update

  return optax.stateless(lambda updates, params: jax.tree.map(add, is_filter(params), updates, params))


def orthogonalize(matrices: Array) -> Array:
  """Moves the singular values of matrices towards 1, between about 0.7 and 1.2, by Newton-Schulz steps in bfloat16.

  Args:
    matrices: (n, rows, columns), rows >= columns.

  Returns:
    The same shape and dtype.
  """
  a, b, c = COEFFICIENTS
  x = matrices.astype(jnp.bfloat16)
  x /= jnp.linalg.norm(x.astype(jnp.float32), axis=(1, 2), keepdims=True).astype(x.dtype) + 1e-7
  for _ in range(STEPS):
    gram = jnp.einsum('nij,nik->njk', x, x)
    x = a * x + x @ (b * gram + c * (gram @ gram))
  return x.astype(matrices.dtype)


def _orthogonalize_all(updates: Any) -> Any:
  """Tensors of the same shape form one batch of matrix products."""
  leaves, structure = jax.tree.flatten(updates)
  by_shape = defaultdict(list)
  for place, leaf in enumerate(leaves):
    by_shape[leaf.shape].append(place)
  for shape, places in by_shape.items():
    matrices = jnp.stack([leaves[place].reshape(-1, shape[-1]) for place in places])
    wide = matrices.shape[1] < matrices.shape[2]
    matrices = matrices.swapaxes(1, 2) if wide else matrices
    done = orthogonalize(matrices)
    done = done.swapaxes(1, 2) if wide else done
    for place, matrix in zip(places, done, strict=True):
      leaves[place] = matrix.reshape(shape)
  return jax.tree.unflatten(structure, leaves)
