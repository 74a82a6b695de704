"""Depthwise convolution for the CPU: each channel is convolved with a kernel of its own; see `cnn_jax.ops`.

XLA:CPU runs it as a naive loop, 10 to 50 times slower than the sums of shifted products below, which it fuses into one
loop. With a stride, images are viewed as (batch, rows, stride, columns, stride x channels), so that what an offset in the
window needs lies together in memory.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from cnn_jax.ops.im2col import Pads, accumulator

_NHWC = ('NHWC', 'HWIO', 'NHWC')
# The gradient of the kernel adds up products over blocks of at most so many rows and columns, which stay in the cache.
_ROWS, _COLUMNS = 14, 28


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def depthwise_conv(x: Array, kernel: Array, strides: tuple[int, int], pads: Pads, precision: Any) -> Array:
  """Convolves each channel with its kernel.

  Args:
    x: images (batch, height, width, channels).
    kernel: (height, width, 1, channels), of the same dtype.
    strides: between windows.
    pads: ((top, bottom), (left, right)).
    precision: for platforms other than the CPU.

  Returns:
    (batch, height, width, channels).
  """
  return _forward(x, kernel, strides, pads, precision)[0]


def _forward(x, kernel, strides, pads, precision):
  default = functools.partial(_lax_conv, strides, pads, precision)
  return lax.platform_dependent(x, kernel, cpu=functools.partial(_conv, strides, pads), default=default), (x, kernel)


def _backward(strides, pads, precision, saved, cotangent):
  def default(x, kernel, cotangent):
    return jax.vjp(functools.partial(_lax_conv, strides, pads, precision), x, kernel)[1](cotangent)

  def cpu(x, kernel, cotangent):
    # Without the barrier XLA would compute both arrays again in each of the many places that use them.
    x, cotangent = lax.optimization_barrier((x, cotangent))
    return _input_gradient(strides, pads, x, kernel, cotangent), _kernel_gradient(strides, pads, x, kernel, cotangent)

  return lax.platform_dependent(*saved, cotangent, cpu=cpu, default=default)


depthwise_conv.defvjp(_forward, _backward)


def _lax_conv(strides, pads, precision, x, kernel):
  return lax.conv_general_dilated(
    x, kernel, strides, pads, dimension_numbers=_NHWC, feature_group_count=x.shape[-1], precision=precision
  )


def _conv(strides: tuple[int, int], pads: Pads, x: Array, kernel: Array) -> Array:
  height, width = _output_size(x, kernel, strides, pads)
  view = _view(x, kernel, strides, pads, height, width)
  kind = accumulator(x)
  terms = [
    _tap(view, strides, x.shape[-1], i, j, height, width).astype(kind) * kernel[i : i + 1, j : j + 1].astype(kind)
    for i in range(kernel.shape[0])
    for j in range(kernel.shape[1])
  ]
  return sum(terms[1:], terms[0]).astype(x.dtype)


def _input_gradient(strides: tuple[int, int], pads: Pads, x: Array, kernel: Array, cotangent: Array) -> Array:
  """Convolves the cotangent with the turned kernel; with a stride, once per phase of the rows and columns of `x`."""
  phases = []
  for phase_y in range(strides[0]):
    row = []
    for phase_x in range(strides[1]):
      row.append(_phase_gradient(strides, pads, x.shape, kernel, cotangent, (phase_y, phase_x)))
    phases.append(jnp.stack(row, axis=3))
  batch, height, width, channels = x.shape
  stacked = jnp.stack(phases, axis=2)  # (batch, rows, stride, columns, stride, channels)
  whole = stacked.reshape(batch, stacked.shape[1] * strides[0], stacked.shape[3] * strides[1], channels)
  return whole[:, :height, :width].astype(x.dtype)


def _phase_gradient(
  strides: tuple[int, int], pads: Pads, shape: Sequence[int], kernel: Array, cotangent: Array, phase: tuple[int, int]
) -> Array:
  """The gradient of the pixels (stride m + phase) of the images, for all m.

  The output at position o has the pixel p = stride o + offset - pad below the offset of its window, so that
  o = m + (phase + pad - offset) / stride for the offsets for which that is whole.
  """
  counts = [-(-shape[axis + 1] // strides[axis]) for axis in (0, 1)]
  offsets = [
    [k for k in range(kernel.shape[axis]) if (phase[axis] + pads[axis][0] - k) % strides[axis] == 0] for axis in (0, 1)
  ]
  shifts = [[(phase[axis] + pads[axis][0] - k) // strides[axis] for k in offsets[axis]] for axis in (0, 1)]
  kind = accumulator(cotangent)
  if not offsets[0] or not offsets[1]:
    return jnp.zeros((shape[0], *counts, shape[3]), kind)
  low = [max(0, -min(shifts[axis])) for axis in (0, 1)]
  high = [max(0, max(shifts[axis]) + counts[axis] - cotangent.shape[axis + 1]) for axis in (0, 1)]
  padded = jnp.pad(cotangent, ((0, 0), (low[0], high[0]), (low[1], high[1]), (0, 0)))
  terms = [
    padded[:, low[0] + dy : low[0] + dy + counts[0], low[1] + dx : low[1] + dx + counts[1]].astype(kind)
    * kernel[i : i + 1, j : j + 1].astype(kind)
    for i, dy in zip(offsets[0], shifts[0], strict=True)
    for j, dx in zip(offsets[1], shifts[1], strict=True)
  ]
  return sum(terms[1:], terms[0])


def _kernel_gradient(strides: tuple[int, int], pads: Pads, x: Array, kernel: Array, cotangent: Array) -> Array:
  """Sums image times cotangent for each offset in the window, block by block.

  XLA:CPU adds up an axis slowly. Additions that are written out fuse with the products into one vectorised loop. They are
  written out for one row of the kernel, and a loop goes over the rows, because the time to compile grows with their number.
  """
  batch, height, width, channels = cotangent.shape
  blocks, rows = _divide(height, _ROWS)
  strips, columns = _divide(width, _COLUMNS)
  padding = ((0, 0), (0, blocks * rows - height), (0, strips * columns - width), (0, 0))
  cotangent = jnp.pad(cotangent, padding)
  height, width = blocks * rows, strips * columns
  view, kind = _view(x, kernel, strides, pads, height, width), accumulator(cotangent)

  def kernel_row(i: Array) -> Array:
    def add_block(block: Array, sums: Array) -> Array:
      image, first = block // blocks, block % blocks * rows
      g = lax.dynamic_slice(cotangent, (image, first, 0, 0), (1, rows, width, channels)).astype(kind)
      start = (image, first + i // strides[0], i % strides[0], 0, 0)
      y = lax.dynamic_slice(view, start, (1, rows, 1, *view.shape[3:])).astype(kind)
      return sums + jnp.concatenate([tap_sum(y[0, :, 0], g[0], j) for j in range(kernel.shape[1])])

    zeros = jnp.zeros((kernel.shape[1], columns, channels), kind)
    return lax.fori_loop(0, batch * blocks, add_block, zeros)

  def tap_sum(y: Array, g: Array, j: int) -> Array:
    skipped, channel = j // strides[1], j % strides[1] * channels
    terms = [
      lax.slice(y, (row, skipped + left, channel), (row + 1, skipped + left + columns, channel + channels))
      * lax.slice(g, (row, left, 0), (row + 1, left + columns, channels))
      for row in range(rows)
      for left in range(0, width, columns)
    ]
    return sum(terms[1:], terms[0])

  sums = lax.map(kernel_row, jnp.arange(kernel.shape[0]))
  return jnp.sum(sums, axis=2).reshape(kernel.shape).astype(kernel.dtype)


def _divide(size: int, most: int) -> tuple[int, int]:
  """The number of equal parts of at most some length that cover a size, and their length."""
  parts = -(-size // most)
  return parts, -(-size // parts)


def _output_size(x: Array, kernel: Array, strides: tuple[int, int], pads: Pads) -> list[int]:
  return [
    (size + sum(pad) - k) // stride + 1
    for size, pad, k, stride in zip(x.shape[1:3], pads, kernel.shape[:2], strides, strict=True)
  ]


def _view(x: Array, kernel: Array, strides: tuple[int, int], pads: Pads, height: int, width: int) -> Array:
  """Padded images as (batch, rows, stride, columns, stride x channels), large enough for height x width outputs."""
  rows, columns = (
    size + (k - 1) // stride for size, k, stride in zip((height, width), kernel.shape[:2], strides, strict=True)
  )
  (top, _), (left, _) = pads
  # A convolution need not reach the last pixels; negative padding cuts them off.
  bottom, right = rows * strides[0] - x.shape[1] - top, columns * strides[1] - x.shape[2] - left
  x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)))
  return x.reshape(x.shape[0], rows, strides[0], columns, strides[1] * x.shape[-1])


def _tap(view: Array, strides: tuple[int, int], channels: int, i: int, j: int, height: int, width: int) -> Array:
  """The pixel at offset (i, j) of every window: (batch, height, width, channels)."""
  first = j % strides[1] * channels
  return view[
    :,
    i // strides[0] : i // strides[0] + height,
    i % strides[0],
    j // strides[1] : j // strides[1] + width,
    first : first + channels,
  ]
