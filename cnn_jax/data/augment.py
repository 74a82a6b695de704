"""On-device augmentation and normalisation: uint8 images in, the model's float images out.

Each example draws from its own key, `fold_in(key, position in the global batch)`, so the result
does not depend on how a batch is spread over devices. The order is: geometry (flip, then rotation,
zoom and shift as one bilinear warp), light (contrast, brightness), erasing, mixing.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import Array

# What the draws of an example are used for, by index: switching one augmentation on leaves the
# draws of the others as they were.
_SHIFT_Y, _SHIFT_X, _FLIP, _ROTATE, _SCALE, _CONTRAST, _BRIGHTNESS = range(7)
_ERASE, _ERASE_AREA, _ERASE_ASPECT, _ERASE_Y, _ERASE_X, _MIXUP, _CUTMIX, _CHOOSE, _CUT_Y, _CUT_X = range(7, 17)
_NUM_DRAWS = 17
# Random erasing as published (Zhong et al., arXiv 1708.04896): area and aspect of the rectangle.
_ERASE_AREAS = (0.02, 1 / 3)
_ERASE_ASPECTS = (0.3, 1 / 0.3)


def normalize(images: Array) -> Array:
  """Maps pixels to the model's input, the same for every data set: 0 to -1 and 255 to 1.

  It is the only preprocessing; training, evaluation, prediction and export all use it.

  Args:
    images: uint8 (..., H, W, C).

  Returns:
    float32, the same shape: (2 x - 255) / 255.
  """
  return _to_input(jnp.asarray(images).astype(jnp.float32))


def needs_partners(config) -> bool:
  """Whether `augment` mixes examples and wants `partner_*`; `config` is `config.augment`."""
  return config.mixup > 0 or config.cutmix > 0


def augment(
  config,
  key: Array,
  positions: Array,
  images: Array,
  labels: Array,
  partner_positions: Array | None = None,
  partner_images: Array | None = None,
  partner_labels: Array | None = None,
) -> tuple[Array, Array]:
  """Augments and normalises a batch; with every field off it is `normalize`.

  Mixing (mixup, Zhang et al., arXiv 1710.09412; CutMix, Yun et al., arXiv 1905.04899) blends each
  example with its partner as the partner itself is augmented in this step, each with a Beta draw
  of its own. Where both are on, each example takes one of them with probability 1/2.

  Args:
    config: `config.augment`; static under jit.
    key: typed key, already folded with the purpose and the step.
    positions: int32 (B,), place of each example in the global batch.
    images: uint8 (B, H, W, C).
    labels: float32 (B, K), one-hot or any distribution.
    partner_positions, partner_images, partner_labels: the example of the same global batch that
      each one is mixed with, like the three above; read only where `needs_partners(config)`.

  Returns:
    float32 images (B, H, W, C), normalised; float32 labels (B, K) whose rows sum to what they did.
  """
  if not needs_partners(config):
    return _transform(config, key, positions, images), labels
  mine = _transform(config, key, positions, images)
  other = _transform(config, key, partner_positions, partner_images)
  weight, pixels = _mixing(config, key, positions, images.shape)
  weight, pixels = weight[:, None], pixels[..., None]
  return pixels * mine + (1 - pixels) * other, weight * labels + (1 - weight) * partner_labels


def warp(images: Array, mirror: Array, angle: Array, zoom: Array, shift: Array, padding: str) -> Array:
  """Mirrors left-right, rotates and zooms about the centre, then shifts, with bilinear interpolation.

  Args:
    images: uint8 (B, H, W, C).
    mirror: bool (B,).
    angle: float32 (B,), radians, anticlockwise as the image is seen.
    zoom: float32 (B,), greater than 1 enlarges.
    shift: (B, 2), pixels down and to the right.
    padding: what comes in from outside: 'constant' (mean level of the four corners) | 'reflect'.

  Returns:
    float32 (B, H, W, C) in [0, 255].
  """
  batch, height, width, channels = images.shape
  # For each pixel of the result, the place in the image that it comes from.
  centre = jnp.array([(height - 1) / 2, (width - 1) / 2], jnp.float32)
  row = jnp.arange(height)[None, :, None] - centre[0] - shift[:, 0, None, None]
  column = jnp.arange(width)[None, None, :] - centre[1] - shift[:, 1, None, None]
  cos, sin = (jnp.cos(angle) / zoom)[:, None, None], (jnp.sin(angle) / zoom)[:, None, None]
  from_row = cos * row + sin * column + centre[0]
  from_column = cos * column - sin * row + centre[1]
  from_column = jnp.where(mirror[:, None, None], width - 1 - from_column, from_column)
  if padding == 'reflect':
    from_row, from_column = _reflect(from_row, height), _reflect(from_column, width)
  # One pixel of frame before and two after, so that all four neighbours exist.
  framed = _pad(images, ((1, 2), (1, 2)), 'constant')
  from_row = jnp.clip(from_row, -1, height) + 1
  from_column = jnp.clip(from_column, -1, width) + 1
  top, left = jnp.floor(from_row), jnp.floor(from_column)
  # A gather costs the CPU about 10 ns an element, so the four neighbours of a pixel travel as the
  # four bytes of one: 1 ms instead of 4 for 128 images of 28x28.
  packed = framed.astype(jnp.uint32)
  packed = packed[:, :, :-1] | packed[:, :, 1:] << 8
  packed = packed[:, :-1] | packed[:, 1:] << 16
  rows, columns = height + 2, width + 2
  index = (top * columns + left).astype(jnp.int32) + (jnp.arange(batch) * rows * columns)[:, None, None]
  packed = packed.reshape(-1, channels)
  if channels == 1:
    neighbours = packed[:, 0].at[index].get(mode='promise_in_bounds')[..., None]
  else:
    neighbours = packed.at[index].get(mode='promise_in_bounds')
  # Without the barrier XLA may fuse the gather into each of its uses, and compute it as many times.
  neighbours, row_in, column_in = jax.lax.optimization_barrier((neighbours, from_row - top, from_column - left))
  y, x = row_in[..., None], column_in[..., None]
  # Through int32: its conversion to float is one vector instruction on the CPU, uint32's is not.
  corner = [(neighbours >> bits & 255).astype(jnp.int32).astype(jnp.float32) for bits in (0, 8, 16, 24)]
  above = corner[0] + (corner[1] - corner[0]) * x
  below = corner[2] + (corner[3] - corner[2]) * x
  return above + (below - above) * y


def _to_input(levels: Array) -> Array:
  # 2 x - 255 is exact for pixels, so the one rounding is the same however a compiler fuses this.
  return (2 * levels - 255) / 255


def _transform(config, key: Array, positions: Array, images: Array) -> Array:
  """Everything but mixing: uint8 (B, H, W, C) -> normalised float32 (B, H, W, C)."""
  draws = _draws(key, positions)
  mirror = draws[:, _FLIP] < (0.5 if config.flip else 0)
  # Whole pixels, each of -shift..shift with the same probability.
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
  """float32 (B, _NUM_DRAWS) uniform in [0, 1), a row per position."""
  return jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p), (_NUM_DRAWS,)))(positions)


def _shift(images: Array, shift: Array, limit: int, padding: str) -> Array:
  """Moves each image by whole pixels down and right; the same dtype, no interpolation."""
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
  """Folds coordinates into [0, size - 1] by mirrors at the first and the last pixel."""
  period = max(2 * (size - 1), 1)
  place = place - period * jnp.floor(place * (1 / period))  # jnp.mod costs the CPU three times as much
  return jnp.clip(jnp.minimum(place, period - place), 0, size - 1)


def _erased(config, draws: Array, height: int, width: int) -> Array:
  """bool (B, H, W): the rectangle of each image that is erased, mostly none."""
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


def _mixing(config, key: Array, positions: Array, shape: tuple) -> tuple[Array, Array]:
  """How much of itself each example keeps: (B,) of its label, (B, H, W) of its pixels."""
  batch, height, width = shape[:3]
  draws = _draws(key, positions)
  if config.mixup:
    weight = _beta_quantile(draws[:, _MIXUP], config.mixup)
    pixels = jnp.broadcast_to(weight[:, None, None], (batch, height, width))
    if not config.cutmix:
      return weight, pixels
  cut = jnp.sqrt(1 - _beta_quantile(draws[:, _CUTMIX], config.cutmix))
  # The rectangle keeps the image's aspect; its centre is anywhere, and what falls outside is cut off.
  tall, wide = jnp.round(cut * height), jnp.round(cut * width)
  top = jnp.floor(draws[:, _CUT_Y] * height) - jnp.floor(tall / 2)
  left = jnp.floor(draws[:, _CUT_X] * width) - jnp.floor(wide / 2)
  kept = 1 - _rectangle(top, left, top + tall, left + wide, height, width).astype(jnp.float32)
  if not config.mixup:
    return kept.mean((1, 2)), kept
  mixed = draws[:, _CHOOSE] < 0.5
  return jnp.where(mixed, weight, kept.mean((1, 2))), jnp.where(mixed[:, None, None], pixels, kept)


def _beta_quantile(uniform: Array, alpha: float) -> Array:
  """Quantiles of Beta(alpha, alpha) by linear interpolation in a table of 4,096 steps.

  `jax.random.beta` draws from the same distribution but takes the CPU's compiler 5 s, an example
  at a time.
  """
  table = jnp.asarray(scipy.special.betaincinv(alpha, alpha, np.linspace(0, 1, 4097)), jnp.float32)
  place = uniform * 4096
  low = jnp.floor(place).astype(jnp.int32)
  return table[low] + (table[low + 1] - table[low]) * (place - low)


def _rectangle(top: Array, left: Array, bottom: Array, right: Array, height: int, width: int) -> Array:
  """bool (B, height, width), true inside; bottom and right are exclusive."""
  y, x = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]
  edges = [edge[:, None, None] for edge in (top, left, bottom, right)]
  return (y >= edges[0]) & (x >= edges[1]) & (y < edges[2]) & (x < edges[3])
