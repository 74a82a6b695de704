"""Pooling, alone and together with the convolution before it; see `cnn_jax.ops`."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from cnn_jax.ops.convolution import YNNPACK, conv_general_dilated, input_gradient, is_plain, lax_conv
from cnn_jax.ops.im2col import Padding, is_usual, matmul, output_size, slices, to_pads, transposed_product


def max_pool(
  x: Array, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = 'VALID'
) -> Array:
  """Takes the maximum over windows, as `flax.linen.max_pool` does.

  If several elements of a window are the maximum, which is common (zeros of ReLU, a black background), the gradient
  goes to the first of them in row-major order, as in XLA's select-and-scatter.

  Args:
    x: (batch, height, width, channels); other ranks are passed on to `flax.linen.max_pool`.
    window_shape: (height, width) of a window.
    strides: between windows; None means 1, as in `flax.linen.max_pool`.
    padding: 'VALID', 'SAME' or ((top, bottom), (left, right)).

  Returns:
    (batch, height, width, channels), of the dtype of `x`.
  """
  window = tuple(window_shape)
  strides = tuple(strides or (1,) * len(window))
  if x.ndim != 4 or len(window) != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
    return nn.max_pool(x, window, strides, padding)
  pads = to_pads(padding, x.shape[1:3], window, strides)
  if not is_usual(x.shape[1:3], window, pads):
    return nn.max_pool(x, window, strides, pads)
  return _max_pool(x, window, strides, pads)


def avg_pool(
  x: Array,
  window_shape: Sequence[int],
  strides: Sequence[int] | None = None,
  padding: Padding = 'VALID',
  count_include_pad: bool = True,
) -> Array:
  """Takes the average over windows, as `flax.linen.avg_pool` does.

  Windows that tile the image are averaged by a reshape, which is fast on every backend, and so is its gradient.

  Args:
    x: (batch, height, width, channels); other ranks are passed on to `flax.linen.avg_pool`.
    window_shape: (height, width) of a window.
    strides: between windows; None means 1, as in `flax.linen.avg_pool`.
    padding: 'VALID', 'SAME' or ((top, bottom), (left, right)).
    count_include_pad: whether the padding counts in the average.

  Returns:
    (batch, height, width, channels), of the dtype of `x`.
  """
  window = tuple(window_shape)
  strides = tuple(strides or (1,) * len(window))
  tiles = x.ndim == 4 and window == strides and len(window) == 2
  if not tiles or to_pads(padding, x.shape[1:3], window, strides) != ((0, 0), (0, 0)):
    return nn.avg_pool(x, window, strides, padding, count_include_pad)
  return _tiles(window, x).mean((2, 4))


def conv_max_pool(lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Padding, **options: Any) -> Array:
  """Convolves images with kernels and takes the maximum over windows of 2x2; `flax.linen.Conv` accepts it too.

  It equals `max_pool(conv_general_dilated(...), (2, 2), (2, 2))`, including gradients and ties. On the CPU, images of at
  most four channels never become maps of their full size. One matrix product computes the four places of every window
  side by side, with the four shifts of the kernel in one that has one more row and column. Only the maximum and its
  place are kept. A bias may be added after the pooling, since it shifts all places of a window equally.

  Args:
    lhs, rhs, window_strides, padding, options: as for `conv_general_dilated`.

  Returns:
    (batch, height // 2, width // 2, features), where height and width are those of `conv_general_dilated`.
  """
  narrow = rhs.ndim == 4 and rhs.shape[2] <= 4 and all(stride == 1 for stride in window_strides)
  if narrow and is_plain(lhs, rhs, **options):
    pads, precision = to_pads(padding, lhs.shape[1:3], rhs.shape[:2], (1, 1)), options.get('precision')
    if is_usual(lhs.shape[1:3], rhs.shape[:2], pads) and min(output_size(lhs, rhs, pads)) >= 2:
      # Differentiated by JAX, because the platforms do not keep the same arrays for the gradient.
      cpu = functools.partial(_conv_max_pool, pads=pads, precision=precision)
      return lax.platform_dependent(lhs, rhs, cpu=cpu, default=functools.partial(_lax_conv_max_pool, pads, precision))
  return max_pool(conv_general_dilated(lhs, rhs, window_strides, padding, **options), (2, 2), (2, 2))


# --- max pooling ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: Array, window, strides, pads) -> Array:
  """Pooling that no gradient follows, in the form that XLA:CPU fuses with the convolution before and the norm after."""
  default = functools.partial(nn.max_pool, window_shape=window, strides=strides, padding=pads)
  tiles = window == strides and not any(map(any, pads))
  # YNNPACK fuses the reduction over the axes of a reshape; XLA without it fuses the reduction over windows.
  cpu = functools.partial(_max_of_tiles, window) if tiles and YNNPACK else default
  return lax.platform_dependent(x, cpu=cpu, default=default)


def _max_pool_forward(x, window, strides, pads):
  default = functools.partial(nn.max_pool, window_shape=window, strides=strides, padding=pads)
  cpu = functools.partial(_max_of_slices, window, strides, pads)
  y = lax.platform_dependent(x, cpu=cpu, default=default)
  return y, (x, y)


def _max_pool_backward(window, strides, pads, saved, cotangent):
  cpu = functools.partial(_max_pool_gradient, window, strides, pads)
  default = functools.partial(_lax_max_pool_gradient, window, strides, pads)
  # XLA:GPU computes it by atomic additions, one per window. If windows do not overlap, nothing has to be added.
  cuda = cpu if window == strides else default
  return (lax.platform_dependent(*saved, cotangent, cpu=cpu, cuda=cuda, default=default),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _lax_max_pool_gradient(window, strides, pads, x, y, cotangent):
  return jax.vjp(lambda x: nn.max_pool(x, window, strides, pads), x)[1](cotangent)[0]


def _max_of_tiles(window, x):
  return _tiles(window, x).max((2, 4))


def _tiles(window, x):
  """Splits images into windows: (batch, rows, window height, columns, window width, channels); the rest is dropped."""
  (batch, height, width, channels), (rows, columns) = x.shape, window
  x = x[:, : height // rows * rows, : width // columns * columns]
  return x.reshape(batch, height // rows, rows, width // columns, columns, channels)


def _max_of_slices(window, strides, pads, x):
  return functools.reduce(jnp.maximum, slices(_pad_with_infinity(pads, x), window, strides))


def _pad_with_infinity(pads, x):
  return lax.pad(x, jnp.array(-jnp.inf, x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)))


def _max_pool_gradient(window, strides, pads, x, y, cotangent):
  winner = _first_maximum(slices(_pad_with_infinity(pads, x), window, strides), y)
  if window == strides:
    return _spread(winner, cotangent, window, pads, x.shape[1:3])
  zero = jnp.zeros((), cotangent.dtype)
  gradient = jnp.zeros(x.shape, cotangent.dtype)
  for k in range(math.prod(window)):
    first = [offset - low for offset, (low, _) in zip(divmod(k, window[1]), pads, strict=True)]
    ends = [
      (start, size - start - ((outputs - 1) * stride + 1))
      for start, size, stride, outputs in zip(first, x.shape[1:3], strides, cotangent.shape[1:3], strict=True)
    ]
    steps = [(*e, stride - 1) for e, stride in zip(ends, strides, strict=True)]
    gradient += lax.pad(jnp.where(winner == k, cotangent, 0), zero, ((0, 0, 0), *steps, (0, 0, 0)))
  return gradient


def _first_maximum(values: Sequence[Array], maximum: Array) -> Array:
  """The number of the first array that holds the maximum, for each element: int8, or int32 if there are many."""
  first = jnp.full(maximum.shape, len(values) - 1, jnp.int8 if len(values) < 128 else jnp.int32)
  for k, value in reversed(list(enumerate(values))):
    first = jnp.where(value == maximum, first.dtype.type(k), first)
  return first


def _spread(winner: Array, cotangent: Array, window, pads, size) -> Array:
  """Puts each element of the cotangent at its place in a window of zeros.

  Args:
    winner: the place in the window, row-major, of each element.
    cotangent: (batch, rows, columns, channels).
    window: height and width of a window; the windows tile the padded images.
    pads: of the images.
    size: height and width of the images.
  """
  batch, height, width, channels = cotangent.shape
  place = jnp.arange(math.prod(window), dtype=winner.dtype).reshape(1, 1, window[0], 1, window[1], 1)
  spread = jnp.where(winner[:, :, None, :, None] == place, cotangent[:, :, None, :, None], 0)
  spread = spread.reshape(batch, height * window[0], width * window[1], channels)
  ends = [(-low, side + low - tiled, 0) for (low, _), side, tiled in zip(pads, size, spread.shape[1:3], strict=True)]
  return lax.pad(spread, jnp.zeros((), cotangent.dtype), ((0, 0, 0), *ends, (0, 0, 0)))


# --- convolution of few channels and 2x2 maximum ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_max_pool(x: Array, kernel: Array, pads, precision) -> Array:
  if not YNNPACK:  # as in convolution._conv
    return _lax_conv_max_pool(pads, precision, x, kernel)
  return _conv_max_pool_forward(x, kernel, pads, precision)[0]


def _lax_conv_max_pool(pads, precision, x: Array, kernel: Array) -> Array:
  return nn.max_pool(lax_conv((1, 1), pads, precision, x, kernel), (2, 2), (2, 2))


def _conv_max_pool_forward(x, kernel, pads, precision):
  rows, columns = kernel.shape[:2]
  corners = [((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)) for i in range(2) for j in range(2)]
  four = jnp.concatenate([jnp.pad(kernel, corner) for corner in corners], axis=-1)
  patches = jnp.concatenate(slices(jnp.pad(x, ((0, 0), *pads, (0, 0))), (rows + 1, columns + 1), (2, 2)), axis=-1)
  y = matmul(patches.reshape(-1, patches.shape[-1]), four.reshape(patches.shape[-1], -1), precision)
  places = jnp.split(y.astype(x.dtype).reshape(*patches.shape[:3], -1), 4, axis=-1)
  y = functools.reduce(jnp.maximum, places)
  return y, (x, kernel, _first_maximum(places, y), patches)


def _conv_max_pool_backward(pads, precision, saved, cotangent):
  x, kernel, winner, patches = saved
  rows, columns = kernel.shape[:2]
  # Without the first barrier XLA would compute the cotangent again for each place, without the second per element.
  cotangent = lax.optimization_barrier(cotangent)
  at_place = winner[..., None, :] == jnp.arange(4, dtype=winner.dtype).reshape(1, 1, 1, 4, 1)
  places = lax.optimization_barrier(jnp.where(at_place, cotangent[..., None, :], 0))
  gradient = transposed_product(patches, places.reshape(*cotangent.shape[:3], -1), precision)
  gradient = gradient.reshape(rows + 1, columns + 1, kernel.shape[2], 4, kernel.shape[3])
  total: Any = sum(gradient[i : i + rows, j : j + columns, :, 2 * i + j] for i in range(2) for j in range(2))
  # Training does not use the gradient of the images, and then nothing of what follows is computed.
  spread = _spread(winner, cotangent, (2, 2), ((0, 0), (0, 0)), output_size(x, kernel, pads))
  return input_gradient((1, 1), pads, precision, x, kernel, spread), total.astype(kernel.dtype)


_conv_max_pool.defvjp(_conv_max_pool_forward, _conv_max_pool_backward)
