"""TrivialAugment (Mueller and Hutter, arXiv 2103.10158), the wide set: one random operation per image, on the device.

The operations and their strengths are those of the paper, with these differences. Geometry is about the centre of the
image, with bilinear interpolation, and fills what moves in as `augment.padding` says; it is part of the one warp. An
image is moved by up to a seventh of its side, which is the paper's 32 pixels at 224. Factors of light are applied in
floating point. No operation depends on the host or on the other images, so all are computed for all images and one is
taken: those that are a table of levels cost one look-up together.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from cnn_jax.data import colour
from cnn_jax.data.geometry import Affine

OPERATIONS = (
  'identity', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate', 'brightness', 'colour', 'contrast',
  'sharpness', 'posterize', 'solarize', 'autocontrast', 'equalize',
)  # fmt: skip
DRAWS = 3  # of `choose`
_STRENGTHS = 31
# At full strength.
_SHEAR, _SHIFT, _ANGLE, _FACTOR, _BITS = 0.99, 1 / 7, math.radians(135), 0.99, 6


def choose(draws: Array) -> tuple[Array, Array]:
  """Chooses an operation and its strength per image.

  Args:
    draws: float32 (B, DRAWS), uniform in [0, 1).

  Returns:
    int32 (B,), index of OPERATIONS; float32 (B,) in [-1, 1], whose sign is the direction of those that have two.
  """
  operation = jnp.floor(draws[:, 0] * len(OPERATIONS)).astype(jnp.int32)
  strength = jnp.floor(draws[:, 1] * _STRENGTHS) / (_STRENGTHS - 1)
  return operation, jnp.where(draws[:, 2] < 0.5, -strength, strength)


def geometry(operation: Array, strength: Array, height: int, width: int) -> Affine:
  """The geometric operations, for `geometry.warp`; nothing moves if the operation is another.

  Args:
    operation, strength: from `choose`.
    height, width: of the images.
  """

  def of(name: str, most: float) -> Array:
    return jnp.where(operation == OPERATIONS.index(name), most * strength, 0)

  angle, shear_x, shear_y = of('rotate', _ANGLE), of('shear_x', _SHEAR), of('shear_y', _SHEAR)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  matrix = jnp.stack([jnp.stack([cos, sin + shear_y], -1), jnp.stack([shear_x - sin, cos], -1)], 1)
  return Affine(matrix, jnp.stack([of('translate_y', _SHIFT * height), of('translate_x', _SHIFT * width)], -1))


def photometry(images: Array, operation: Array, strength: Array) -> Array:
  """The operations on light and colour; the image stays if the operation is another.

  Args:
    images: float32 (B, H, W, C), levels from 0 to 255.
    operation, strength: from `choose`.

  Returns:
    float32 (B, H, W, C).
  """

  def of(name: str, value: Array) -> Array:
    return jnp.where(operation == OPERATIONS.index(name), value, 0)

  # The first four blend the image with another one, which is black for brightness; the others are tables of levels.
  first, end = OPERATIONS.index('brightness'), OPERATIONS.index('posterize')
  factor = jnp.where((operation >= first) & (operation < end), 1 + _FACTOR * strength, 1)
  grey, smooth = jax.lax.optimization_barrier((colour.grey(images), _smooth(images)))
  added = of('contrast', (1 - factor) * grey.mean((1, 2, 3)))
  factors = factor, of('colour', 1 - factor), of('sharpness', 1 - factor), added
  # Without the barriers XLA computes the factors and tables once per pixel.
  own, greys, smooths, added = (x[:, None, None, None] for x in jax.lax.optimization_barrier(factors))
  blended = jnp.clip(own * images + greys * grey + smooths * smooth + added, 0, 255)
  levels = jnp.round(images).astype(jnp.int32)
  tables = jax.lax.optimization_barrier(_tables(_histograms(levels), operation, jnp.abs(strength)))
  looked_up = tables.reshape(-1).at[_bins(levels)].get(mode='promise_in_bounds')
  return jnp.where((operation >= end)[:, None, None, None], looked_up, blended)


def _smooth(images: Array) -> Array:
  """Pillow's filter SMOOTH: the mean of 3x3 pixels, of which the middle one counts five times; the border stays."""
  rows = jax.lax.optimization_barrier(images[:, :-2] + images[:, 1:-1] + images[:, 2:])
  box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
  widths = ((0, 0), (1, 1), (1, 1), (0, 0))
  inner = (box + 4 * images[:, 1:-1, 1:-1]) / 13
  return jnp.where(jnp.pad(jnp.ones(inner.shape, bool), widths), jnp.pad(inner, widths), images)


def _bins(levels: Array) -> Array:
  """The place of each pixel's level in arrays (B, C, 256)."""
  batch, channels = levels.shape[0], levels.shape[3]
  return levels + 256 * jnp.arange(batch * channels).reshape(batch, 1, 1, channels)


def _histograms(levels: Array) -> Array:
  """How many pixels have each level: int32 (B, C, 256)."""
  batch, channels = levels.shape[0], levels.shape[3]
  counts = jnp.zeros(batch * channels * 256, jnp.int32)
  return counts.at[_bins(levels).reshape(-1)].add(1, mode='promise_in_bounds').reshape(batch, channels, 256)


def _tables(counts: Array, operation: Array, amount: Array) -> Array:
  """What becomes of each level: float32 (B, C, 256), by the operations from `posterize` on, as Pillow defines them."""
  amount = amount[:, None, None]
  level = jnp.arange(256)[None, None].astype(jnp.float32)
  step = 2 ** jnp.round(_BITS * amount)
  level = jnp.broadcast_to(level, counts.shape)
  posterized = jnp.floor(level / step) * step
  solarized = jnp.where(level >= 256 * (1 - amount), 255 - level, level)
  low = jnp.argmax(counts > 0, axis=2, keepdims=True)
  high = 255 - jnp.argmax(counts[..., ::-1] > 0, axis=2, keepdims=True)
  scale = 255 / jnp.maximum(high - low, 1).astype(jnp.float32)
  stretched = jnp.where(high > low, (level - low.astype(jnp.float32)) * scale, level)
  # The sum of the levels below, in steps of a 255th of all pixels but those of the highest level.
  step = (counts.sum(2, keepdims=True) - jnp.take_along_axis(counts, high, 2)) // 255
  below = jnp.cumsum(counts, axis=2) - counts
  equalized = jnp.where(step > 0, ((step // 2 + below) // jnp.maximum(step, 1)).astype(jnp.float32), level)
  tables = (posterized, solarized, stretched, equalized)
  first = OPERATIONS.index('posterize')
  for i, table in enumerate(tables):
    level = jnp.where((operation == first + i)[:, None, None], table, level)
  return jnp.clip(level, 0, 255)
