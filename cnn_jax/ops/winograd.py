"""Convolution with a kernel of three rows by Winograd's minimal filtering.

Lavin and Gray 2016, Fast Algorithms for Convolutional Neural Networks, F(4, 3), along the height; im2col along the
width. Rows of pixels and of weights are transformed to 6 numbers per tile. The products of these, transformed back, are
4 rows of outputs. That takes half the multiplications and half the memory of im2col alone. The rounding error is four
times as large: about 6e-6 of the root mean square in float32.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cnn_jax.ops.im2col import Pads, matmul, slices, transposed_product

PART_SIZE = 2**19  # elements of x whose transforms still fit into the caches (benchmarks/step_time)

# The transforms of 6 pixels, 3 weights and 4 outputs at the points 0, 1, -1, 2, -2 and infinity.
_PIXELS = np.array(
  [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
  ]
)
_WEIGHTS = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_OUTPUTS = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def is_applicable(strides: Sequence[int], x: Array, kernel: Array, height: int) -> bool:
  """Whether a convolution whose outputs have some height can be computed in this way, and more cheaply."""
  return kernel.shape[0] == 3 and strides == (1, 1) and height >= 3 and x.dtype in (jnp.float32, jnp.float64)


def images_at_a_time(x: Array) -> int:
  """The number of images per part: as many as the caches can hold, or all if no such number divides the batch."""
  batch, most = x.shape[0], max(1, PART_SIZE // max(1, math.prod(x.shape[1:])))
  if not isinstance(batch, int):  # a program for batches of any size
    return batch
  part = next((part for part in range(min(batch, most), 0, -1) if batch % part == 0), 0)
  return part if 4 * part >= most else batch


def convolve(pads: Pads, precision: Any, x: Array, kernel: Array) -> Array:
  """Convolves images with a kernel of three rows, strides of 1.

  Args:
    pads: ((top, bottom), (left, right)).
    precision: of the matrix products.
    x: (batch, height, width, channels).
    kernel: (3, columns, channels, features).

  Returns:
    (batch, height, width, features).
  """
  part = images_at_a_time(x)
  if part == x.shape[0]:
    return _convolve_part(pads, precision, kernel, lax.optimization_barrier(x))
  y = lax.map(functools.partial(_convolve_part, pads, precision, kernel), x.reshape(-1, part, *x.shape[1:]))
  return y.reshape(x.shape[0], *y.shape[2:])


def kernel_gradient(pads: Pads, precision: Any, x: Array, kernel: Array, cotangent: Array) -> Array:
  """The gradient of the kernel: the transpose of `convolve`, with the same rounding error.

  Args:
    pads, precision, x, kernel: as for `convolve`.
    cotangent: (batch, height, width, features), of the outputs.

  Returns:
    The shape of the kernel.
  """
  gradient, part = functools.partial(_kernel_gradient_of_part, pads, precision, kernel), images_at_a_time(x)
  if part == x.shape[0]:
    return gradient(x, cotangent)
  parts = [array.reshape(-1, part, *array.shape[1:]) for array in (x, cotangent)]
  return lax.scan(lambda total, part: (total + gradient(*part), None), jnp.zeros_like(kernel), parts)[0]


def _convolve_part(pads: Pads, precision: Any, kernel: Array, x: Array) -> Array:
  rows = x.shape[1] + sum(pads[0]) - 2
  tiles = -(-rows // 4)
  products = [
    matmul(columns, weights.reshape(-1, kernel.shape[-1]), precision)
    for columns, weights in zip(_columns(pads, tiles, kernel, x), _combine(_WEIGHTS, kernel), strict=True)
  ]
  y = jnp.stack(_combine(_OUTPUTS, products), axis=2)
  return y.reshape(x.shape[0], 4 * tiles, *y.shape[3:])[:, :rows]


def _kernel_gradient_of_part(pads: Pads, precision: Any, kernel: Array, x: Array, cotangent: Array) -> Array:
  tiles = -(-cotangent.shape[1] // 4)
  cotangent = jnp.pad(cotangent, ((0, 0), (0, 4 * tiles - cotangent.shape[1]), (0, 0), (0, 0)))
  outputs = _combine(_OUTPUTS.T, [cotangent[:, i::4] for i in range(4)])
  products = jnp.stack(
    [
      transposed_product(columns, output, precision)
      for columns, output in zip(_columns(pads, tiles, kernel, x), outputs, strict=True)
    ]
  )
  gradient = matmul(jnp.asarray(_WEIGHTS.T, cotangent.dtype), products.reshape(6, -1), lax.Precision.HIGHEST)
  return gradient.reshape(kernel.shape)


def _columns(pads: Pads, tiles: int, kernel: Array, x: Array) -> list[Array]:
  """The 6 transforms of the rows of each tile: (batch, tiles, width, kernel columns * channels) each."""
  (top, _), sides = pads
  bottom = 4 * tiles + 2 - top - x.shape[1]
  x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom, 0), (*sides, 0), (0, 0, 0)))
  pixels = _combine(_PIXELS, [x[:, i : i + 4 * tiles - 3 : 4] for i in range(6)])
  return [jnp.concatenate(slices(p, (1, kernel.shape[1]), (1, 1)), axis=-1) for p in pixels]


def _combine(matrix: np.ndarray, parts: Any) -> list[Array]:
  """The matrix times the vector of the parts."""
  return [sum(part * weight for weight, part in zip(row, parts, strict=True) if weight) for row in matrix.tolist()]
