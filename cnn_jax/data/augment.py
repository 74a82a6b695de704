"""On-device augmentation and normalisation: uint8 images to the network's float images.

Each example has its own key, `fold_in(key, position in the global batch)`, so the result does not depend on the number
of devices. The order is: geometry (flip, then rotation, zoom and shift as one bilinear warp), light (contrast,
brightness), erasing, mixing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import Array

from cnn_jax import distribute

# The use of each draw of an example, by index. Switching one augmentation on does not change the draws of the others.
_SHIFT_Y, _SHIFT_X, _FLIP, _ROTATE, _SCALE, _CONTRAST, _BRIGHTNESS = range(7)
_ERASE, _ERASE_AREA, _ERASE_ASPECT, _ERASE_Y, _ERASE_X, _MIXUP, _CUTMIX, _CHOOSE, _CUT_Y, _CUT_X = range(7, 17)
_NUM_DRAWS = 17
# Random erasing as published (Zhong et al., arXiv 1708.04896): area and aspect of the rectangle.
_ERASE_AREAS = (0.02, 1 / 3)
_ERASE_ASPECTS = (0.3, 1 / 0.3)


def normalize(images: Array | np.ndarray) -> Array:
  """Maps pixels to the network's input, in the same way for every data set: 0 to -1 and 255 to 1.

  There is no other preprocessing. Training, evaluation, prediction and export all use this function.

  Args:
    images: uint8 (..., H, W, C).

  Returns:
    float32, the same shape: (2 x - 255) / 255.
  """
  return _to_input(jnp.asarray(images).astype(jnp.float32))


def augment(config: Any, key: Array, positions: Array, images: Array, labels: Array) -> tuple[Array, Array]:
  """Augments and normalises a batch; with every field off it is `normalize`.

  Mixing (mixup, Zhang et al., arXiv 1710.09412; CutMix, Yun et al., arXiv 1905.04899) blends each example with the one
  before it in the global batch, as that one is augmented in this step, each with a Beta draw of its own. If both
  are on, each example takes one of them with probability 1/2.

  Args:
    config: `config.augment`; static under jit. With `mixup` or `cutmix` the function must be mapped over the axis
      `batch`, since the example before the first of a device is the last of another device.
    key: typed key, already folded with the purpose and the step.
    positions: int32 (B,), place of each example in the global batch.
    images: uint8 (B, H, W, C).
    labels: float32 (B, K), one-hot or any distribution.

  Returns:
    float32 images (B, H, W, C), normalised; float32 labels (B, K), whose rows have the same sums as before.
  """
  images = _transform(config, key, positions, images)
  if not (config.mixup or config.cutmix):
    return images, labels
  weight, pixels = mixing_weights(config, key, positions, images.shape)
  weight, pixels = weight[:, None], pixels[..., None]
  images = pixels * images + (1 - pixels) * distribute.previous_example(images)
  return images, weight * labels + (1 - weight) * distribute.previous_example(labels)


def warp(images: Array, mirror: Array, angle: Array, zoom: Array, shift: Array, padding: str) -> Array:
  """Mirrors left-right, rotates and zooms about the centre, then shifts, with bilinear interpolation.

  Args:
    images: uint8 (B, H, W, C).
    mirror: bool (B,).
    angle: float32 (B,), radians, anticlockwise on the screen.
    zoom: float32 (B,), greater than 1 enlarges.
    shift: int32 (B, 2), pixels down and to the right.
    padding: the pixels outside the image: 'constant' (mean level of the four corners) | 'reflect'.

  Returns:
    float32 (B, H, W, C) in [0, 255].
  """
  height, width = images.shape[1:3]
  row, column = _source_coordinates(height, width, mirror, angle, zoom, shift)
  if padding == 'reflect':
    row, column = _reflect(row, height), _reflect(column, width)
  # A frame of one pixel before and two after the image, so that all four neighbours of any place exist.
  framed = _pad(images, ((1, 2), (1, 2)), 'constant')
  row = jnp.clip(row, -1, height) + 1
  column = jnp.clip(column, -1, width) + 1
  top, left = jnp.floor(row), jnp.floor(column)
  neighbours = _gather_2x2(framed, top, left)
  # Without the barrier XLA may fuse the gather into each of its uses and compute it several times.
  neighbours, below_top, right_of_left = jax.lax.optimization_barrier((neighbours, row - top, column - left))
  return _bilinear(neighbours, below_top[..., None], right_of_left[..., None])


def mixing_weights(config: Any, key: Array, positions: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
  """The weight of each example when it is mixed with the one before it, whose weight is the rest to 1.

  Args:
    config, key, positions: as for `augment`; `mixup` or `cutmix` is positive.
    shape: (B, H, W, C) of the images.

  Returns:
    float32 weights (B,) of the labels and (B, H, W) of the pixels.
  """
  batch, height, width = shape[:3]
  draws = _draws(key, positions)
  if config.mixup:
    weight = beta_quantile(draws[:, _MIXUP], config.mixup)
    pixels = jnp.broadcast_to(weight[:, None, None], (batch, height, width))
    if not config.cutmix:
      return weight, pixels
  cut = jnp.sqrt(1 - beta_quantile(draws[:, _CUTMIX], config.cutmix))
  # The rectangle has the aspect ratio of the image. Its centre may be anywhere, and it is clipped to the image.
  tall, wide = jnp.round(cut * height), jnp.round(cut * width)
  top = jnp.floor(draws[:, _CUT_Y] * height) - jnp.floor(tall / 2)
  left = jnp.floor(draws[:, _CUT_X] * width) - jnp.floor(wide / 2)
  kept = 1 - _rectangle(top, left, top + tall, left + wide, height, width).astype(jnp.float32)
  if not config.mixup:
    return kept.mean((1, 2)), kept
  mixed = draws[:, _CHOOSE] < 0.5
  return jnp.where(mixed, weight, kept.mean((1, 2))), jnp.where(mixed[:, None, None], pixels, kept)


def beta_quantile(uniform: Array, alpha: float) -> Array:
  """Quantiles of the distribution Beta(alpha, alpha) by linear interpolation in a table of 4,096 steps.

  `jax.random.beta` draws from the same distribution, but its per-example form takes 5 s to compile on the CPU.

  Args:
    uniform: float32 probabilities in [0, 1).
    alpha: > 0.

  Returns:
    float32 in [0, 1], of the same shape.
  """
  table = jnp.asarray(scipy.special.betaincinv(alpha, alpha, np.linspace(0, 1, 4097)), jnp.float32)
  place = uniform * 4096
  low = jnp.floor(place).astype(jnp.int32)
  return table[low] + (table[low + 1] - table[low]) * (place - low.astype(jnp.float32))


def _source_coordinates(
  height: int, width: int, mirror: Array, angle: Array, zoom: Array, shift: Array
) -> tuple[Array, Array]:
  """Row and column, float32 (B, H, W), of the place in the image from which each pixel of the result comes."""
  centre = jnp.array([(height - 1) / 2, (width - 1) / 2], jnp.float32)
  down, right = (shift[:, axis, None, None].astype(jnp.float32) for axis in range(2))
  row = jnp.arange(height)[None, :, None].astype(jnp.float32) - centre[0] - down
  column = jnp.arange(width)[None, None, :].astype(jnp.float32) - centre[1] - right
  cos, sin = (jnp.cos(angle) / zoom)[:, None, None], (jnp.sin(angle) / zoom)[:, None, None]
  from_row = cos * row + sin * column + centre[0]
  from_column = cos * column - sin * row + centre[1]
  return from_row, jnp.where(mirror[:, None, None], width - 1 - from_column, from_column)


def _gather_2x2(images: Array, top: Array, left: Array) -> Array:
  """Reads 2x2 neighbouring pixels at once.

  A gather takes about 10 ns per element on the CPU, so the four pixels are packed into the four bytes of one element:
  1 ms instead of 4 for 128 images of 28x28.

  Args:
    images: uint8 (B, H, W, C).
    top, left: float32 (B, h, w), whole numbers: the first of the four pixels.

  Returns:
    uint32 (B, h, w, C); from the lowest byte: top left, top right, bottom left, bottom right.
  """
  packed = images.astype(jnp.uint32)
  packed = packed[:, :, :-1] | packed[:, :, 1:] << 8
  packed = packed[:, :-1] | packed[:, 1:] << 16
  batch, rows, columns, channels = packed.shape
  if rows * columns > 2**24 or batch * rows * columns >= 2**31:
    # float32 has no place for such an index, or int32 has none for the whole batch.
    index = top.astype(jnp.int32) * columns + left.astype(jnp.int32)
    gather = jax.vmap(lambda pixels, index: pixels.at[index].get(mode='promise_in_bounds'))
    return gather(packed.reshape(batch, rows * columns, channels), index)
  index = (top * columns + left).astype(jnp.int32) + (jnp.arange(batch) * rows * columns)[:, None, None]
  packed = packed.reshape(-1, channels)
  if channels == 1:
    return packed[:, 0].at[index].get(mode='promise_in_bounds')[..., None]
  return packed.at[index].get(mode='promise_in_bounds')


def _bilinear(neighbours: Array, y: Array, x: Array) -> Array:
  """Interpolates between 2x2 pixels.

  Args:
    neighbours: from `_gather_2x2`.
    y, x: float32 (B, h, w, 1) in [0, 1), the distance from the top and the left pixels.

  Returns:
    float32 (B, h, w, C).
  """
  # Through int32: the CPU converts it to float by one vector instruction, unlike uint32.
  corner = [(neighbours >> bits & 255).astype(jnp.int32).astype(jnp.float32) for bits in (0, 8, 16, 24)]
  above = corner[0] + (corner[1] - corner[0]) * x
  below = corner[2] + (corner[3] - corner[2]) * x
  return above + (below - above) * y


def _to_input(levels: Array) -> Array:
  # 2 x - 255 is exact for pixels, so the one rounding is the same however a compiler fuses this.
  return (2 * levels - 255) / 255


def _transform(config: Any, key: Array, positions: Array, images: Array) -> Array:
  """Applies everything except mixing: uint8 (B, H, W, C) -> normalised float32 (B, H, W, C)."""
  draws = _draws(key, positions)
  mirror = draws[:, _FLIP] < (0.5 if config.flip else 0)
  # A whole number of pixels; each of -shift..shift has the same probability.
  shift = jnp.floor(draws[:, (_SHIFT_Y, _SHIFT_X)] * (2 * config.shift + 1)).astype(jnp.int32) - config.shift
  if config.rotate or config.scale:
    angle = math.radians(config.rotate) * (2 * draws[:, _ROTATE] - 1)
    zoom = 1 + config.scale * (2 * draws[:, _SCALE] - 1)
    images = warp(images, mirror, angle, zoom, shift, config.padding)
  else:
    if config.flip:
      images = jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)
    if config.shift:
      images = _shift(images, shift, config.shift, config.padding)
  images = images.astype(jnp.float32)
  if config.contrast or config.brightness:
    mean = images.mean((1, 2, 3), keepdims=True)
    factor = 1 + config.contrast * (2 * draws[:, _CONTRAST] - 1)
    added = 255 * config.brightness * (2 * draws[:, _BRIGHTNESS] - 1)
    images = (images - mean) * factor[:, None, None, None] + mean + added[:, None, None, None]
    images = jnp.clip(images, 0, 255)
  if config.erase:
    images, mean = jax.lax.optimization_barrier((images, images.mean((1, 2), keepdims=True)))
    images = jnp.where(_erased(config, draws, *images.shape[1:3])[..., None], mean, images)
  return _to_input(images)


def _draws(key: Array, positions: Array) -> Array:
  """Draws from the uniform distribution on [0, 1): float32 (B, _NUM_DRAWS), one row per position."""
  return jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p), (_NUM_DRAWS,)))(positions)


def _shift(images: Array, shift: Array, limit: int, padding: str) -> Array:
  """Moves each image by whole pixels down and to the right, without interpolation; the dtype stays."""
  padded = _pad(images, ((limit, limit), (limit, limit)), padding)

  def window(image, offset):
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

  return jax.vmap(window)(padded, limit - shift)


def _pad(images: Array, widths: tuple, padding: str) -> Array:
  widths = ((0, 0), *widths, (0, 0))
  if padding == 'reflect':
    return jnp.pad(images, widths, mode='reflect')
  corners = images[:, :: max(images.shape[1] - 1, 1), :: max(images.shape[2] - 1, 1)]
  level = jnp.round(corners.astype(jnp.float32).mean((1, 2), keepdims=True)).astype(images.dtype)
  inside = jnp.pad(jnp.ones((1, *images.shape[1:3], 1), bool), widths)
  return jnp.where(inside, jnp.pad(images, widths), level)


def _reflect(place: Array, size: int) -> Array:
  """Folds coordinates into [0, size - 1] by reflection at the first and the last pixel."""
  period = max(2 * (size - 1), 1)
  place = place - period * jnp.floor(place * (1 / period))  # jnp.mod takes three times as long on the CPU
  return jnp.clip(jnp.minimum(place, period - place), 0, size - 1)


def _erased(config: Any, draws: Array, height: int, width: int) -> Array:
  """The pixels to erase, bool (B, H, W): a rectangle in some images, none in the others."""
  low, high = _ERASE_AREAS
  area = (low + (high - low) * draws[:, _ERASE_AREA]) * height * width
  low, high = (math.log(aspect) for aspect in _ERASE_ASPECTS)
  aspect = jnp.exp(low + (high - low) * draws[:, _ERASE_ASPECT])
  tall = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, height)
  wide = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, width)
  top = jnp.floor(draws[:, _ERASE_Y] * (height - tall + 1))
  left = jnp.floor(draws[:, _ERASE_X] * (width - wide + 1))
  inside = _rectangle(top, left, top + tall, left + wide, height, width)
  return inside & (draws[:, _ERASE] < config.erase)[:, None, None]


def _rectangle(top: Array, left: Array, bottom: Array, right: Array, height: int, width: int) -> Array:
  """The pixels inside, bool (B, height, width), from float32 edges (B,); bottom and right are exclusive."""
  y = jnp.arange(height)[None, :, None].astype(jnp.float32)
  x = jnp.arange(width)[None, None, :].astype(jnp.float32)
  edges = [edge[:, None, None] for edge in (top, left, bottom, right)]
  return (y >= edges[0]) & (x >= edges[1]) & (y < edges[2]) & (x < edges[3])
