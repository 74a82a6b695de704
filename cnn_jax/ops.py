"""Convolution and pooling that train fast on every backend.

The functions compute what `lax.conv_general_dilated`, `flax.linen.max_pool` and `flax.linen.avg_pool` do and
take the same arguments. On GPU and TPU they are those functions. On the CPU their gradients are written by
hand, because XLA:CPU turns a convolution into a fast one only when its dimension numbers are NHWC, HWIO, NHWC;
JAX's transpose rules give both gradients others, which XLA rewrites at the top level of a program but not in the
body of a `lax.scan` (there they fall to naive loops). Of a convolution with a kernel of three rows and enough channels
all three products take half the multiplications (Winograd; rounding errors are some four times as large), and a first
convolution is computed together with the pooling behind it. The platform is chosen when the program is lowered.

The gradients are those of reverse mode, of any order; forward mode (`jax.jvp`) is not defined.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

Padding = str | Sequence[tuple[int, int]]
_YNNPACK = jax.__version_info__ >= (
  0,
  11,
)  # XLA:CPU has it since; what is fast, and what it fuses, is other than before


def conv_general_dilated(
  lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Padding, **options: Any
) -> Array:
  """Convolves images with kernels; `flax.linen.Conv(conv_general_dilated=...)` takes it.

  Args:
    lhs: images (batch, height, width, channels).
    rhs: kernels (height, width, channels, features), of the same dtype.
    window_strides, padding: as `lax.conv_general_dilated` has them.
    options: the rest of its arguments, by name. Dilation, groups, other numbers of spatial dimensions and other
      layouts are left to it, gradients and all.

  Returns:
    (batch, height, width, features), of the dtype of `lhs` or `preferred_element_type`.
  """
  if not _is_plain(lhs, rhs, **options):
    return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
  strides = tuple(window_strides)
  pads = _pads(padding, lhs.shape[1:3], rhs.shape[:2], strides)
  return _conv(lhs, rhs, strides, pads, options.get('precision'))


def conv_max_pool(lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Padding, **options: Any) -> Array:
  """Convolves images with kernels and takes the maximum over windows of 2x2; `flax.linen.Conv` takes it too.

  It is `max_pool(conv_general_dilated(...), (2, 2), (2, 2))`, gradients and ties and all. On the CPU, images of at
  most four channels never become maps of their full size: one matrix product makes the four places of every window
  side by side (four kernels in one of one row and one column more), and the maximum and its place are all that is kept.
  A bias that follows may as well come before: it moves all places of a window alike.

  Args:
    lhs, rhs, window_strides, padding, options: as of `conv_general_dilated`.

  Returns:
    (batch, height // 2, width // 2, features) where that gives (batch, height, width, features).
  """
  # Decided here and not when the program is lowered: the platforms do not keep the same arrays for the gradient.
  narrow = rhs.ndim == 4 and rhs.shape[2] <= 4 and all(stride == 1 for stride in window_strides)
  if jax.default_backend() == 'cpu' and narrow and _is_plain(lhs, rhs, **options):
    pads = _pads(padding, lhs.shape[1:3], rhs.shape[:2], (1, 1))
    if min(_output_size(lhs, rhs, pads)) >= 2:
      return _conv_max_pool(lhs, rhs, pads, options.get('precision'))
  return max_pool(conv_general_dilated(lhs, rhs, window_strides, padding, **options), (2, 2), (2, 2))


def max_pool(x: Array, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = 'VALID'):
  """Takes the maximum over windows, as `flax.linen.max_pool` does.

  Where several elements of a window are the maximum (there are many: ReLU's zeros, a black background), the
  gradient goes to the first of them in row-major order, as XLA's select-and-scatter sends it.

  Args:
    x: (batch, height, width, channels); other ranks are left to `flax.linen.max_pool`.
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
  return _max_pool(x, window, strides, _pads(padding, x.shape[1:3], window, strides))


def avg_pool(
  x: Array,
  window_shape: Sequence[int],
  strides: Sequence[int] | None = None,
  padding: Padding = 'VALID',
  count_include_pad: bool = True,
):
  """Takes the average over windows, as `flax.linen.avg_pool` does.

  Windows that tile the image are averaged by a reshape, which is fast on every backend, and so is its gradient.

  Args:
    x: (batch, height, width, channels); other ranks are left to `flax.linen.avg_pool`.
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
  if not tiles or _pads(padding, x.shape[1:3], window, strides) != ((0, 0), (0, 0)):
    return nn.avg_pool(x, window, strides, padding, count_include_pad)
  (height, width), (kh, kw) = x.shape[1:3], window
  x = x[:, : height // kh * kh, : width // kw * kw]
  return x.reshape(x.shape[0], height // kh, kh, width // kw, kw, x.shape[3]).mean((2, 4))


def _is_plain(
  lhs: Array,
  rhs: Array,
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> bool:
  """Whether a convolution is one of images with channels last, of one dtype, undilated and in one group."""
  del precision
  return (
    lhs.ndim == 4
    and _is_channels_last(lhs, rhs, dimension_numbers)
    and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    and feature_group_count == batch_group_count == 1
    and preferred_element_type in (None, lhs.dtype)
    and lhs.dtype == rhs.dtype
  )


def _is_channels_last(lhs: Array, rhs: Array, dimension_numbers: Any) -> bool:
  if dimension_numbers is None:
    return False  # lax then means channels first
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  return tuple(numbers) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def _pads(padding: Padding, shape, window, strides) -> tuple[tuple[int, int], ...]:
  pads = lax.padtype_to_pads(shape, window, strides, padding) if isinstance(padding, str) else padding
  return tuple((int(low), int(high)) for low, high in pads)


def _output_size(x: Array, kernel: Array, pads) -> list[int]:
  """Height and width of a convolution's outputs, for strides of 1."""
  return [size + sum(p) - k + 1 for size, p, k in zip(x.shape[1:3], pads, kernel.shape[:2], strict=True)]


def _slices(x: Array, window, strides) -> list[Array]:
  """The windows' elements at each offset (row-major) of padded images: one (batch, height, width, channels) each."""
  height, width = ((size - k) // s + 1 for size, k, s in zip(x.shape[1:3], window, strides, strict=True))
  return [
    x[:, i : i + (height - 1) * strides[0] + 1 : strides[0], j : j + (width - 1) * strides[1] + 1 : strides[1]]
    for i in range(window[0])
    for j in range(window[1])
  ]


# --- convolution ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: Array, kernel: Array, strides, pads, precision) -> Array:
  if not _YNNPACK:  # XLA then is fastest left alone with all of a network that no gradient follows
    return _lax_conv(strides, pads, precision, x, kernel)
  return _conv_forward(x, kernel, strides, pads, precision)[0]


def _conv_forward(x, kernel, strides, pads, precision):
  cpu = functools.partial(_fast_conv, strides, pads, precision)
  default = functools.partial(_lax_conv, strides, pads, precision)
  return lax.platform_dependent(x, kernel, cpu=cpu, default=default), (x, kernel)


def _conv_backward(strides, pads, precision, saved, g):
  cpu = functools.partial(_conv_gradients, strides, pads, precision)
  default = functools.partial(_lax_conv_gradients, strides, pads, precision)
  return lax.platform_dependent(*saved, g, cpu=cpu, default=default)


_conv.defvjp(_conv_forward, _conv_backward)


def _lax_conv(strides, pads, precision, x: Array, kernel: Array) -> Array:
  return lax.conv_general_dilated(
    x, kernel, strides, pads, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=precision
  )


def _lax_conv_gradients(strides, pads, precision, x, kernel, g):
  return jax.vjp(functools.partial(_lax_conv, strides, pads, precision), x, kernel)[1](g)


def _conv_gradients(strides, pads, precision, x, kernel, g):
  # Without the barrier XLA would compute x and g again in each of the many places that use them.
  x, g = lax.optimization_barrier((x, g))
  return (
    _conv_input_gradient(strides, pads, precision, x, kernel, g),
    _conv_kernel_gradient(strides, pads, precision, x, kernel, g),
  )


def _fast_conv(strides, pads, precision, x, kernel):
  wide = kernel.shape[2] >= 16 and kernel.shape[3] >= _WIDE_FEATURES
  if not (wide and _is_winograd(strides, x, kernel, _output_size(x, kernel, pads)[0])):
    return _lax_conv(strides, pads, precision, x, kernel)
  part = _part(x)
  if part == x.shape[0]:
    return _winograd_conv(pads, precision, kernel, lax.optimization_barrier(x))
  conv = functools.partial(_winograd_conv, pads, precision, kernel)
  y = lax.map(conv, x.reshape(-1, part, *x.shape[1:]))
  return y.reshape(x.shape[0], *y.shape[2:])


def _conv_input_gradient(strides, pads, precision, x, kernel, g):
  """The convolution of `g`, spread out by the strides, with the kernel turned by 180 degrees."""
  back = []
  for size, k, stride, (low, _), outputs in zip(
    x.shape[1:3], kernel.shape[:2], strides, pads, g.shape[1:3], strict=True
  ):
    back.append((k - 1 - low, size - ((outputs - 1) * stride + 1) + low))
  turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
  if strides == (1, 1):
    return _fast_conv(strides, tuple(back), precision, g, turned)
  return lax.conv_general_dilated(
    g, turned, (1, 1), back, strides, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=precision
  )


def _conv_kernel_gradient(strides, pads, precision, x, kernel, g):
  """In one of four ways; which is fastest at which shapes was measured (experiments/step_time)."""
  wide = kernel.shape[2] >= _WIDE_CHANNELS and kernel.shape[3] >= 16
  if wide and _is_winograd(strides, x, kernel, g.shape[1]):
    gradient, part = functools.partial(_winograd_kernel_gradient, pads, precision, kernel), _part(x)
    if part == x.shape[0]:
      return gradient(x, g)
    parts = [array.reshape(-1, part, *array.shape[1:]) for array in (x, g)]
    return lax.scan(lambda so_far, each: (so_far + gradient(*each), None), jnp.zeros_like(kernel), parts)[0]
  if kernel.shape[2] > 4 and strides == (1, 1):
    # The convolution of each channel with the gradient of each feature, batch and channels in each other's place.
    product = lax.conv_general_dilated(
      x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), strides, pads,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=precision, preferred_element_type=_accumulator(g),
    )  # fmt: skip
    return product.transpose(1, 2, 0, 3).astype(kernel.dtype)
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  features = g.shape[-1]
  if kernel.shape[2] <= 4:
    # The columns (im2col) of so few channels are cheaper to make, and to multiply, as rows.
    slices = [s.transpose(3, 0, 1, 2) for s in _slices(x, kernel.shape[:2], strides)]
    product = _matmul(jnp.concatenate(slices).reshape(-1, g.size // features), g.reshape(-1, features), precision)
  else:
    columns = jnp.concatenate(_slices(x, kernel.shape[:2], strides), axis=-1)
    product = _transposed_product(columns, g, precision)
  return product.reshape(kernel.shape).astype(kernel.dtype)


# Winograd's transforms of 6 pixels, 3 weights and 4 outputs at the points 0, 1, -1, 2, -2 and infinity
# (Lavin and Gray 2016, Fast Algorithms for Convolutional Neural Networks, F(4, 3)).
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
# From so many on enough share the transforms: features those of the images, channels those of the kernel's gradient.
# YNNPACK's own convolution, the other choice, is a fast one.
_WIDE_FEATURES, _WIDE_CHANNELS = (64, 32) if _YNNPACK else (16, 16)
_PART_SIZE = 2**19  # numbers of x; the transforms of so many still lie in the caches (experiments/step_time)


def _is_winograd(strides, x, kernel, height: int) -> bool:
  """Whether a convolution with outputs of a height can be computed so, and more cheaply."""
  return kernel.shape[0] == 3 and strides == (1, 1) and height >= 3 and x.dtype in (jnp.float32, jnp.float64)


def _part(x: Array) -> int:
  """Images to take at a time: as many as the caches have room for, or all where no such number divides the batch."""
  batch, most = x.shape[0], max(1, _PART_SIZE // max(1, math.prod(x.shape[1:])))
  if not isinstance(batch, int):  # a program for batches of any size
    return batch
  part = next((part for part in range(min(batch, most), 0, -1) if batch % part == 0), 0)
  return part if 4 * part >= most else batch


def _winograd_conv(pads, precision, kernel, x):
  """A convolution with a kernel of three rows, in tiles of four rows of outputs.

  Rows of pixels and of weights are transformed to 6 numbers a tile, whose products, transformed back, are the 4 rows.
  Along the width it is im2col. That is half the multiplications and half the memory of im2col alone, at four times
  its rounding error (some 6e-6 of the root mean square in float32).
  """
  tiles = -(-(x.shape[1] + sum(pads[0]) - 2) // 4)
  products = [
    _matmul(columns, weights.reshape(-1, kernel.shape[-1]), precision)
    for columns, weights in zip(_winograd_columns(pads, tiles, kernel, x), _combine(_WEIGHTS, kernel), strict=True)
  ]
  y = jnp.stack(_combine(_OUTPUTS, products), axis=2)
  return y.reshape(x.shape[0], 4 * tiles, *y.shape[3:])[:, : x.shape[1] + sum(pads[0]) - 2]


def _winograd_kernel_gradient(pads, precision, kernel, x, g):
  """The gradient of a kernel of three rows: the transpose of `_winograd_conv`, with the same rounding error."""
  tiles = -(-g.shape[1] // 4)
  g = jnp.pad(g, ((0, 0), (0, 4 * tiles - g.shape[1]), (0, 0), (0, 0)))
  outputs = _combine(_OUTPUTS.T, [g[:, i::4] for i in range(4)])
  products = jnp.stack(
    [
      _transposed_product(columns, output, precision)
      for columns, output in zip(_winograd_columns(pads, tiles, kernel, x), outputs, strict=True)
    ]
  )
  gradient = _matmul(jnp.asarray(_WEIGHTS.T, g.dtype), products.reshape(6, -1), lax.Precision.HIGHEST)
  return gradient.reshape(kernel.shape)


def _winograd_columns(pads, tiles: int, kernel, x) -> list[Array]:
  """The 6 transforms of the rows of each tile, (batch, tiles, width, kernel width * channels)."""
  (top, _), sides = pads
  bottom = 4 * tiles + 2 - top - x.shape[1]
  x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom, 0), (*sides, 0), (0, 0, 0)))
  pixels = _combine(_PIXELS, [x[:, i : i + 4 * tiles - 3 : 4] for i in range(6)])
  return [jnp.concatenate(_slices(p, (1, kernel.shape[1]), (1, 1)), axis=-1) for p in pixels]


def _combine(matrix: np.ndarray, parts) -> list[Array]:
  """The matrix times the vector of the parts."""
  return [sum(part * weight for weight, part in zip(row, parts, strict=True) if weight) for row in matrix.tolist()]


def _accumulator(x: Array) -> Any:
  """The dtype for sums over a batch: of bfloat16 they are taken in float32."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _matmul(a: Array, b: Array, precision) -> Array:
  return jnp.matmul(a, b, precision=precision, preferred_element_type=_accumulator(b))


def _transposed_product(columns: Array, g: Array, precision) -> Array:
  """`columns.T @ g`, summed over all axes but the last, computed in the order in which it is faster."""
  columns, g = columns.reshape(-1, columns.shape[-1]), g.reshape(-1, g.shape[-1])
  dimensions = (((0,), (0,)), ((), ()))
  return lax.dot_general(g, columns, dimensions, precision=precision, preferred_element_type=_accumulator(g)).T


# --- convolution of few channels and 2x2 maximum ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_max_pool(x: Array, kernel: Array, pads, precision) -> Array:
  if not _YNNPACK:  # as in _conv
    return _lax_conv_max_pool(pads, precision, x, kernel)
  cpu = functools.partial(_conv_max_pool_forward, pads=pads, precision=precision)
  return lax.platform_dependent(
    x, kernel, cpu=lambda *a: cpu(*a)[0], default=functools.partial(_lax_conv_max_pool, pads, precision)
  )


def _lax_conv_max_pool(pads, precision, x: Array, kernel: Array) -> Array:
  return nn.max_pool(_lax_conv((1, 1), pads, precision, x, kernel), (2, 2), (2, 2))


def _conv_max_pool_forward(x, kernel, pads, precision):
  rows, columns = kernel.shape[:2]
  corners = [((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)) for i in range(2) for j in range(2)]
  four = jnp.concatenate([jnp.pad(kernel, corner) for corner in corners], axis=-1)
  patches = jnp.concatenate(_slices(jnp.pad(x, ((0, 0), *pads, (0, 0))), (rows + 1, columns + 1), (2, 2)), axis=-1)
  y = _matmul(patches.reshape(-1, patches.shape[-1]), four.reshape(patches.shape[-1], -1), precision)
  places = jnp.split(y.astype(x.dtype).reshape(*patches.shape[:3], -1), 4, axis=-1)
  y = functools.reduce(jnp.maximum, places)
  return y, (x, kernel, _first_maximum(places, y), patches)


def _conv_max_pool_backward(pads, precision, saved, g):
  x, kernel, winner, patches = saved
  rows, columns = kernel.shape[:2]
  # Without the first barrier XLA would compute g anew for each place, without the second element by element.
  g = lax.optimization_barrier(g)
  at_place = winner[..., None, :] == jnp.arange(4, dtype=winner.dtype)[:, None]
  places = lax.optimization_barrier(jnp.where(at_place, g[..., None, :], 0))
  gradient = _transposed_product(patches, places.reshape(*g.shape[:3], -1), precision)
  gradient = gradient.reshape(rows + 1, columns + 1, kernel.shape[2], 4, kernel.shape[3])
  gradient = sum(gradient[i : i + rows, j : j + columns, :, 2 * i + j] for i in range(2) for j in range(2))
  # In training nobody takes the gradient of the images themselves, and then none of what follows is computed.
  spread = _spread(winner, g, (2, 2), ((0, 0), (0, 0)), _output_size(x, kernel, pads))
  return _conv_input_gradient((1, 1), pads, precision, x, kernel, spread), gradient.astype(kernel.dtype)


_conv_max_pool.defvjp(_conv_max_pool_forward, _conv_max_pool_backward)


# --- max pooling ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: Array, window, strides, pads) -> Array:
  """Without a gradient to follow: as XLA:CPU fuses it with the convolution before and the norm behind it."""
  default = functools.partial(nn.max_pool, window_shape=window, strides=strides, padding=pads)
  tiles = window == strides and not any(map(any, pads))
  # YNNPACK fuses the reduction over the axes of a reshape, XLA alone that over windows.
  cpu = functools.partial(_max_of_tiles, window) if tiles and _YNNPACK else default
  return lax.platform_dependent(x, cpu=cpu, default=default)


def _max_pool_forward(x, window, strides, pads):
  default = functools.partial(nn.max_pool, window_shape=window, strides=strides, padding=pads)
  cpu = functools.partial(_max_of_slices, window, strides, pads)
  y = lax.platform_dependent(x, cpu=cpu, default=default)
  return y, (x, y)


def _max_pool_backward(window, strides, pads, saved, g):
  cpu = functools.partial(_max_pool_gradient, window, strides, pads)
  default = functools.partial(_lax_max_pool_gradient, window, strides, pads)
  return (lax.platform_dependent(*saved, g, cpu=cpu, default=default),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _lax_max_pool_gradient(window, strides, pads, x, y, g):
  return jax.vjp(lambda x: nn.max_pool(x, window, strides, pads), x)[1](g)[0]


def _max_of_tiles(window, x):
  (batch, height, width, channels), (rows, columns) = x.shape, window
  x = x[:, : height // rows * rows, : width // columns * columns]
  return x.reshape(batch, height // rows, rows, width // columns, columns, channels).max((2, 4))


def _max_of_slices(window, strides, pads, x):
  x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)))
  return functools.reduce(jnp.maximum, _slices(x, window, strides))


def _max_pool_gradient(window, strides, pads, x, y, g):
  padded = lax.pad(x, jnp.array(-jnp.inf, x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)))
  winner = _first_maximum(_slices(padded, window, strides), y)
  zero = jnp.zeros((), g.dtype)
  if window == strides:
    return _spread(winner, g, window, pads, x.shape[1:3])
  gradient = jnp.zeros(x.shape, g.dtype)
  for k in range(math.prod(window)):
    first = [offset - low for offset, (low, _) in zip(divmod(k, window[1]), pads, strict=True)]
    ends = [
      (start, size - start - ((outputs - 1) * stride + 1))
      for start, size, stride, outputs in zip(first, x.shape[1:3], strides, g.shape[1:3], strict=True)
    ]
    steps = [(*e, stride - 1) for e, stride in zip(ends, strides, strict=True)]
    gradient += lax.pad(jnp.where(winner == k, g, 0), zero, ((0, 0, 0), *steps, (0, 0, 0)))
  return gradient


def _first_maximum(values: Sequence[Array], maximum: Array) -> Array:
  """Which of some arrays is the first to hold the maximum, by element: the number of each, int8 or int32."""
  first = jnp.full(maximum.shape, len(values) - 1, jnp.int8 if len(values) < 128 else jnp.int32)
  for k, value in reversed(list(enumerate(values))):
    first = jnp.where(value == maximum, first.dtype.type(k), first)
  return first


def _spread(winner: Array, g: Array, window, pads, size) -> Array:
  """Puts each element of `g` at its place in its window of zeros; windows tile padded images of a size."""
  batch, height, width, channels = g.shape
  place = jnp.arange(math.prod(window), dtype=winner.dtype).reshape(1, 1, window[0], 1, window[1], 1)
  spread = jnp.where(winner[:, :, None, :, None] == place, g[:, :, None, :, None], 0)
  spread = spread.reshape(batch, height * window[0], width * window[1], channels)
  ends = [(-low, side + low - tiled, 0) for (low, _), side, tiled in zip(pads, size, spread.shape[1:3], strict=True)]
  return lax.pad(spread, jnp.zeros((), g.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
