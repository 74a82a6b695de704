"""Gradients from parts of a batch, one after another, so that what a part needs fits into the memory, or the caches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PIXELS = 128 * 128  # images with fewer fit into the caches by the batch
FORWARD, BACKWARD = 10, 4  # larger images at a time, without and with gradients; measured in benchmarks/step_time


def count(batch_size: int, num_pixels: int, independent: bool) -> int:
  """The number of parts in which a device of this machine computes a gradient fastest.

  Args:
    batch_size: examples of the device.
    num_pixels: of an image.
    independent: whether the loss of an example depends on no other example, as it does if batch norm uses the statistics
      of the batch. Otherwise there is one part.
  """
  if jax.default_backend() != 'cpu' or num_pixels < PIXELS or not independent:
    return 1
  return batch_size // next(size for size in range(min(BACKWARD, batch_size), 0, -1) if batch_size % size == 0)


def gradient(
  loss_function: Callable[[Any, Any], tuple[jax.Array, Any]],
  params: Any,
  examples: Any,
  parts: int,
  *,
  interleaved: bool = False,
) -> tuple[Any, Any]:
  """The gradient of a mean loss over examples.

  Args:
    loss_function: `(params, examples) -> (loss, sums)`, a mean over the examples, and sums over them.
    params: of which the gradient is taken.
    examples: arrays (n, ...).
    parts: divides n. The means of parts of equal size have the mean of all as their mean, to the rounding error.
    interleaved: whether a part holds every `parts`-th example in place of examples that follow one another. The parts of a
      batch over several devices are then those of the same batch on one device.

  Returns:
    The gradient, and the sums.
  """
  differentiate = jax.grad(loss_function, has_aux=True)
  if parts == 1:
    return differentiate(params, examples)
  if interleaved:
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), examples)
  else:
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), examples)
  shapes = jax.eval_shape(differentiate, params, jax.tree.map(lambda x: x[0], split))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def add(total, part):
    return jax.tree.map(jnp.add, total, differentiate(params, part)), None

  (total, sums), _ = lax.scan(add, zeros, split)
  return jax.tree.map(lambda x: x / parts, total), sums
