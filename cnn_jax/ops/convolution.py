"""Convolution whose gradients are fast on the CPU too; see `cnn_jax.ops`."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from cnn_jax.ops import winograd
from cnn_jax.ops.depthwise import depthwise_conv
from cnn_jax.ops.im2col import (
  Padding,
  Pads,
  accumulator,
  is_usual,
  matmul,
  output_size,
  slices,
  to_pads,
  transposed_product,
)

# From this version XLA:CPU uses YNNPACK, which changes what is fast and what is fused.
YNNPACK = jax.__version_info__ >= (0, 11)

# Winograd is used from these numbers on: the features share the transforms of the images, and the channels share those
# of the kernel's gradient. The alternative, YNNPACK's own convolution, is fast.
WIDE_FEATURES, WIDE_CHANNELS = (64, 32) if YNNPACK else (16, 16)

# The same for the gradient of the images, from this number of pixels per channel on.
PIXELS_PER_CHANNEL = 2

# Up to this number of multiplications per position of the kernel, its direct gradient takes less time than Winograd's 30
# operators.
FEW_PRODUCTS = 2**19

_NHWC = ('NHWC', 'HWIO', 'NHWC')


def conv_general_dilated(
  lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Padding, **options: Any
) -> Array:
  """Convolves images with kernels; pass it as `flax.linen.Conv(conv_general_dilated=...)`.

  Args:
    lhs: images (batch, height, width, channels).
    rhs: kernels (height, width, channels, features), of the same dtype.
    window_strides, padding: as for `lax.conv_general_dilated`.
    options: its other arguments, by name. Groups of more than one channel, dilation, negative padding, kernels larger
      than the image, other numbers of spatial dimensions and other layouts are passed on to it, and so are their gradients.

  Returns:
    (batch, height, width, features), of the dtype of `lhs` or `preferred_element_type`.
  """
  depthwise = options.get('feature_group_count', 1) == lhs.shape[-1] == rhs.shape[-1] > 1
  if is_plain(lhs, rhs, **(options | ({'feature_group_count': 1} if depthwise else {}))):
    strides = tuple(window_strides)
    pads = to_pads(padding, lhs.shape[1:3], rhs.shape[:2], strides)
    if is_usual(lhs.shape[1:3], rhs.shape[:2], pads):
      return (depthwise_conv if depthwise else _conv)(lhs, rhs, strides, pads, options.get('precision'))
  return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)


def is_plain(
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
  """Whether a convolution is one of images with channels last, of one dtype, without dilation and groups.

  Args: as for `lax.conv_general_dilated`.
  """
  del precision
  return (
    lhs.ndim == 4
    and _is_channels_last(lhs, rhs, dimension_numbers)
    and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    and feature_group_count == batch_group_count == 1
    and preferred_element_type in (None, lhs.dtype)
    and lhs.dtype == rhs.dtype
  )


def lax_conv(strides: Sequence[int], pads: Pads, precision: Any, x: Array, kernel: Array) -> Array:
  """A plain convolution by `lax.conv_general_dilated`."""
  return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_NHWC, precision=precision)


def input_gradient(
  strides: Sequence[int], pads: Pads, precision: Any, x: Array, kernel: Array, cotangent: Array
) -> Array:
  """The gradient of the images: the cotangent, dilated by the strides, convolved with the kernel turned by 180 degrees.

  Args:
    strides, pads, precision, x, kernel: of the convolution.
    cotangent: (batch, height, width, features), of its outputs.

  Returns:
    The shape of `x`.
  """
  back = []
  for size, k, stride, (low, _), outputs in zip(
    x.shape[1:3], kernel.shape[:2], strides, pads, cotangent.shape[1:3], strict=True
  ):
    back.append((k - 1 - low, size - ((outputs - 1) * stride + 1) + low))
  turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
  if strides == (1, 1):
    # Winograd's transforms of a turned kernel are slow. They must not outweigh the images, as in the last stage of a ResNet.
    pixels = math.prod(cotangent.shape[:3])
    conv = _fast_conv if pixels >= PIXELS_PER_CHANNEL * kernel.shape[2] else lax_conv
    return conv(strides, tuple(back), precision, cotangent, turned)
  return lax.conv_general_dilated(
    cotangent, turned, (1, 1), back, strides, dimension_numbers=_NHWC, precision=precision
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: Array, kernel: Array, strides, pads, precision) -> Array:
  if not YNNPACK:  # XLA then compiles a network without gradients best if all of it is left to XLA
    return lax_conv(strides, pads, precision, x, kernel)
  return _conv_forward(x, kernel, strides, pads, precision)[0]


def _conv_forward(x, kernel, strides, pads, precision):
  cpu = functools.partial(_fast_conv, strides, pads, precision)
  default = functools.partial(lax_conv, strides, pads, precision)
  return lax.platform_dependent(x, kernel, cpu=cpu, default=default), (x, kernel)


def _conv_backward(strides, pads, precision, saved, cotangent):
  cpu = functools.partial(_conv_gradients, strides, pads, precision)
  default = functools.partial(_lax_conv_gradients, strides, pads, precision)
  return lax.platform_dependent(*saved, cotangent, cpu=cpu, default=default)


_conv.defvjp(_conv_forward, _conv_backward)


def _lax_conv_gradients(strides, pads, precision, x, kernel, cotangent):
  return jax.vjp(functools.partial(lax_conv, strides, pads, precision), x, kernel)[1](cotangent)


def _conv_gradients(strides, pads, precision, x, kernel, cotangent):
  if _is_pointwise(kernel, pads):
    return _pointwise_gradients(strides, precision, x, kernel, cotangent)
  # Without the barrier XLA would compute both arrays again in each of the many places that use them.
  x, cotangent = lax.optimization_barrier((x, cotangent))
  return (
    input_gradient(strides, pads, precision, x, kernel, cotangent),
    _kernel_gradient(strides, pads, precision, x, kernel, cotangent),
  )


def _is_pointwise(kernel, pads):
  return kernel.shape[:2] == (1, 1) and not any(map(any, pads))


def _pointwise(strides, precision, x, kernel):
  """A 1x1 convolution as a matrix product, whose gradients take XLA:CPU a quarter of the time."""
  return _along_channels(x[:, :: strides[0], :: strides[1]], kernel[0, 0], precision)


def _pointwise_gradients(strides, precision, x, kernel, cotangent):
  x_gradient = _along_channels(cotangent, kernel[0, 0].T, precision)
  ends = [
    (0, size - ((outputs - 1) * stride + 1), stride - 1)
    for size, outputs, stride in zip(x.shape[1:3], cotangent.shape[1:3], strides, strict=True)
  ]
  x_gradient = lax.pad(x_gradient, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
  kernel_gradient = transposed_product(x[:, :: strides[0], :: strides[1]], cotangent, precision)
  return x_gradient, kernel_gradient.reshape(kernel.shape).astype(kernel.dtype)


def _along_channels(x, matrix, precision):
  return matmul(x, matrix, precision).astype(x.dtype)


def _fast_conv(strides, pads, precision, x, kernel):
  if YNNPACK and x.dtype != jnp.float32:
    # YNNPACK returns what it finds in memory if it fuses two convolutions, the conversions between them, and a reduction.
    x = lax.optimization_barrier(x)
  if _is_pointwise(kernel, pads):
    return _pointwise(strides, precision, x, kernel)
  wide = kernel.shape[2] >= 16 and kernel.shape[3] >= WIDE_FEATURES
  if wide and winograd.is_applicable(strides, x, kernel, output_size(x, kernel, pads)[0]):
    return winograd.convolve(pads, precision, x, kernel)
  return lax_conv(strides, pads, precision, x, kernel)


def _kernel_gradient(strides, pads, precision, x, kernel, cotangent):
  """Computes it in one of four ways; which is fastest for which shapes was measured (benchmarks/step_time)."""
  wide = kernel.shape[2] >= WIDE_CHANNELS and kernel.shape[3] >= 16 and cotangent.size * kernel.shape[2] > FEW_PRODUCTS
  if wide and winograd.is_applicable(strides, x, kernel, cotangent.shape[1]):
    return winograd.kernel_gradient(pads, precision, x, kernel, cotangent)
  if kernel.shape[2] > 4 and strides == (1, 1):
    return _kernel_gradient_by_convolution(strides, pads, precision, x, kernel, cotangent)
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  if kernel.shape[2] <= 4:
    product = _product_of_rows(slices(x, kernel.shape[:2], strides), cotangent, precision)
  else:
    columns = jnp.concatenate(slices(x, kernel.shape[:2], strides), axis=-1)
    product = transposed_product(columns, cotangent, precision)
  return product.reshape(kernel.shape).astype(kernel.dtype)


def _kernel_gradient_by_convolution(strides, pads, precision, x, kernel, cotangent):
  """Convolves each channel with the cotangent of each feature, with the axes of batch and channels swapped."""
  product = lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), strides, pads,
    dimension_numbers=_NHWC, precision=precision, preferred_element_type=accumulator(cotangent),
  )  # fmt: skip
  return product.transpose(1, 2, 0, 3).astype(kernel.dtype)


def _product_of_rows(parts: list[Array], cotangent: Array, precision: Any) -> Array:
  """im2col as rows: for few channels, columns take longer to make and to multiply."""
  features = cotangent.shape[-1]
  rows = jnp.concatenate([part.transpose(3, 0, 1, 2) for part in parts])
  return matmul(rows.reshape(-1, cotangent.size // features), cotangent.reshape(-1, features), precision)


def _is_channels_last(lhs: Array, rhs: Array, dimension_numbers: Any) -> bool:
  if dimension_numbers is None:
    return False  # for lax this means channels first
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  return tuple(numbers) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
