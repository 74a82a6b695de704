"""Windows of images: padding, the elements of all windows at one offset, and matrix products with them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

Padding = str | Sequence[tuple[int, int]]
Pads = tuple[tuple[int, int], ...]  # ((top, bottom), (left, right))


def to_pads(padding: Padding, shape: Sequence[int], window: Sequence[int], strides: Sequence[int]) -> Pads:
  """Converts 'SAME' or 'VALID' to numbers of pixels.

  Args:
    padding: a name, or numbers of pixels, which are returned.
    shape: height and width of the images.
    window: height and width of a window.
    strides: between windows.
  """
  pads = lax.padtype_to_pads(shape, window, strides, padding) if isinstance(padding, str) else padding
  return tuple((int(low), int(high)) for low, high in pads)


def is_usual(shape: Sequence[int], window: Sequence[int], pads: Pads) -> bool:
  """Whether no pixels are cut off by negative padding, and at least one window lies in the padded image.

  Args:
    shape: height and width of the images.
    window: height and width of a window.
    pads: from `to_pads`.
  """
  return all(min(pad) >= 0 and size + sum(pad) >= length for size, length, pad in zip(shape, window, pads, strict=True))


def output_size(x: Array, kernel: Array, pads: Pads) -> list[int]:
  """Height and width of the outputs of a convolution with strides of 1."""
  return [size + sum(p) - k + 1 for size, p, k in zip(x.shape[1:3], pads, kernel.shape[:2], strict=True)]


def slices(x: Array, window: Sequence[int], strides: Sequence[int]) -> list[Array]:
  """Splits padded images by the offset in a window.

  Args:
    x: (batch, height, width, channels), padded.
    window: height and width of a window.
    strides: between windows.

  Returns:
    For each offset, in row-major order, its element of every window: (batch, rows, columns, channels).
  """
  height, width = ((size - k) // s + 1 for size, k, s in zip(x.shape[1:3], window, strides, strict=True))
  return [
    x[:, i : i + (height - 1) * strides[0] + 1 : strides[0], j : j + (width - 1) * strides[1] + 1 : strides[1]]
    for i in range(window[0])
    for j in range(window[1])
  ]


def accumulator(x: Array) -> Any:
  """The dtype for sums over a batch: that of `x`, but at least float32."""
  return x.dtype if x.dtype.itemsize >= 4 else jnp.float32


def matmul(a: Array, b: Array, precision: Any) -> Array:
  """`a @ b` in the dtype of `accumulator`."""
  return jnp.matmul(a, b, precision=precision, preferred_element_type=accumulator(b))


def transposed_product(columns: Array, cotangent: Array, precision: Any) -> Array:
  """`columns.T @ cotangent`, summed over all axes but the last, in the order of operands that is faster."""
  columns = columns.reshape(-1, columns.shape[-1])
  cotangent = cotangent.reshape(-1, cotangent.shape[-1])
  dimensions = (((0,), (0,)), ((), ()))
  kind = accumulator(cotangent)
  return lax.dot_general(cotangent, columns, dimensions, precision=precision, preferred_element_type=kind).T
