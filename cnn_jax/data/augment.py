"""On-device augmentation and normalisation: uint8 images to the network's float images.

Each example has its own key, `fold_in(key, position in the global batch)`, so the result does not depend on the number
of devices. The order is: geometry (crop, elastic distortion, flip, rotation, zoom, shift and that of TrivialAugment, as
one bilinear warp), light and colour of TrivialAugment, contrast, brightness, saturation, hue, erasing, mixing.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import Array

from cnn_jax import distribute
from cnn_jax.data import colour, geometry, trivial

# The use of each draw of an example, by index. Switching one augmentation on does not change the draws of the others.
_SHIFT_Y, _SHIFT_X, _FLIP, _ROTATE, _SCALE, _CONTRAST, _BRIGHTNESS = range(7)
_ERASE, _ERASE_AREA, _ERASE_ASPECT, _ERASE_Y, _ERASE_X, _MIXUP, _CUTMIX, _CHOOSE, _CUT_Y, _CUT_X = range(7, 17)
_NUM_DRAWS = 17
# Those of a second block, of a key of its own.
_SATURATION, _HUE = range(2)
_CROP = slice(2, 2 + geometry.CROP_DRAWS)
_TRIVIAL = slice(_CROP.stop, _CROP.stop + trivial.DRAWS)
_NUM_NEWER_DRAWS = _TRIVIAL.stop
# Random erasing as published (Zhong et al., arXiv 1708.04896): area and aspect of the rectangle.
_ERASE_AREAS = (0.02, 1 / 3)
_ERASE_ASPECTS = (0.3, 1 / 0.3)


class Statistics(NamedTuple):
  """How images become a network's input; hashable, so static under jit.

  Attributes:
    mean: level from 0 to 255 that becomes 0; one number, or one per channel.
    std: levels that become a difference of 1; as many numbers.
    crop: pixels a side of the centre that is cut out of larger images; 0: nothing is cut off.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop: int = 0


def input_shape(image_shape: Sequence[int], statistics: Statistics, config: Any = None) -> tuple[int, int, int]:
  """The shape of a network's input, (height, width, channels).

  Args:
    image_shape: of the images of the data set, likewise.
    statistics: of the run; see `config.statistics`.
    config: `config.augment`, for the input in training; None: for that of `normalize`.
  """
  height, width, channels = image_shape
  if config is not None and config.image_size:
    return config.image_size, config.image_size, channels
  most = statistics.crop or max(height, width)
  return min(height, most), min(width, most), channels


def centre_crop(images: Any, statistics: Statistics) -> Any:
  """Cuts the centre of `statistics.crop` pixels a side out of images; sides that are not longer stay.

  Args:
    images: (..., H, W, C), of NumPy or JAX.
    statistics: of the run.
  """
  if not statistics.crop:
    return images
  (height, width), (tall, wide) = images.shape[-3:-1], input_shape(images.shape[-3:], statistics)[:2]
  top, left = (height - tall) // 2, (width - wide) // 2
  return images[..., top : top + tall, left : left + wide, :]


def normalize(images: Array | np.ndarray, statistics: Statistics) -> Array:
  """Maps images of a data set to the network's input: cuts out the centre, and normalises the levels.

  There is no other preprocessing. Evaluation, prediction, reports and exports all use this function, and so does
  training, whose images `transform` has brought to their size before.

  Args:
    images: uint8 (..., H, W, C), or float levels.
    statistics: of the run; see `config.statistics`. 127.5 and 127.5 map 0 to -1 and 255 to 1.

  Returns:
    float32 (x - mean) / std, of the shape that `input_shape` returns.
  """
  levels = jnp.asarray(centre_crop(images, statistics)).astype(jnp.float32)
  # A scalar where there is one number: XLA compiles it as it does a constant in a formula.
  shape = () if len(statistics.mean) == 1 else (1,) * (levels.ndim - 1) + (-1,)
  mean, std = (np.array(x, np.float32).reshape(shape) for x in statistics[:2])
  return (levels - mean) / std


def augment(
  config: Any,
  statistics: Statistics,
  key: Array,
  positions: Array,
  images: Array,
  labels: Array,
  mirror: Array | None = None,
) -> tuple[Array, Array]:
  """Augments and normalises a batch; with every field off it is `normalize`.

  Images that are larger than the network's input are sampled as a whole, by one interpolation: a random crop may be
  anywhere in them, and what a shift moves in is the image around the centre.

  Mixing (mixup, Zhang et al., arXiv 1710.09412; CutMix, Yun et al., arXiv 1905.04899) blends each example with the one
  before it in the global batch, as that one is augmented in this step, each with a Beta draw of its own. If both
  are on, each example takes one of them with probability 1/2.

  Args:
    config: `config.augment`; static under jit. With `mixup` or `cutmix` the function must be mapped over the axis
      `batch`, since the example before the first of a device is the last of another device.
    statistics: for `normalize`; static under jit.
    key: typed key, already folded with the purpose and the step.
    positions: int32 (B,), place of each example in the global batch.
    images: uint8 (B, H, W, C).
    labels: float32 (B, K), one-hot or any distribution.
    mirror: bool (B,), the images to mirror, from `alternate`; None: at random, if the config says so.

  Returns:
    float32 images (B, h, w, C), normalised, of the size of `input_shape`; float32 labels (B, K), whose rows have the
    same sums as before.
  """
  return mix(config, key, positions, transform(config, statistics, key, positions, images, mirror), labels)


def transform(
  config: Any, statistics: Statistics, key: Array, positions: Array, images: Array, mirror: Array | None = None
) -> Array:
  """Augments and normalises images, but does not mix them; see `augment`."""
  images = _transform(config, statistics, key, positions, images, mirror)
  return normalize(images, statistics._replace(crop=0))


def alternate(key: Array, images: Array, epoch: Array) -> Array:
  """Which images an epoch mirrors: a random half, then the other half, and so on, so that two epochs show both forms.

  An image is recognised by the sum of its levels, so that no reader has to tell which one it is (Jordan, arXiv 2404.00498,
  section 3.6).

  Args:
    key: of the seed, folded with the purpose, the same in all steps.
    images: uint8 (B, H, W, C), as they are stored.
    epoch: int32, from 0.

  Returns:
    bool (B,).
  """
  sums = images.astype(jnp.uint32).sum((1, 2, 3))
  first = jax.vmap(lambda x: jax.random.bits(jax.random.fold_in(key, x), (), jnp.uint8) % 2)(sums)
  return (first + epoch) % 2 == 1


def mix(config: Any, key: Array, positions: Array, images: Array, labels: Array) -> tuple[Array, Array]:
  """Mixes examples as `augment` does; without `mixup` and `cutmix` it does nothing.

  Args:
    config, key, positions, labels: see `augment`.
    images: float (B, H, W, C), or the maps of images, or features (B, C), which count as one pixel.
  """
  if not (config.mixup or config.cutmix):
    return images, labels
  shape = images.shape
  images = images.reshape(len(images), *(shape[1:] if len(shape) == 4 else (1, 1, -1)))
  weight, pixels = mixing_weights(config, key, positions, images.shape)
  weight, pixels = weight[:, None], pixels[..., None]
  images = pixels * images + (1 - pixels) * distribute.previous_example(images)
  return images.reshape(shape), weight * labels + (1 - weight) * distribute.previous_example(labels)


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


def _transform(
  config: Any, statistics: Statistics, key: Array, positions: Array, images: Array, mirror: Array | None
) -> Array:
  """Applies everything except mixing: uint8 (B, H, W, C) -> float32 levels (B, h, w, C)."""
  draws, new = _draws(key, positions), _newer_draws(key, positions)
  operation = trivial.choose(new[:, _TRIVIAL]) if config.trivial else None
  noise = _noise(key, positions) if config.elastic else None
  images = _move(config, statistics, draws, new, noise, operation, images, mirror).astype(jnp.float32)
  if config.trivial or config.contrast or config.brightness or config.saturation or config.hue:
    images = jax.lax.optimization_barrier(images)  # otherwise XLA moves them once for each use
  if operation is not None:
    images = trivial.photometry(images, *operation)
  if config.contrast or config.brightness:
    factor = 1 + config.contrast * (2 * draws[:, _CONTRAST] - 1)
    added = 255 * config.brightness * (2 * draws[:, _BRIGHTNESS] - 1)
    images = colour.contrast_and_brightness(images, factor, added)
  if config.saturation:
    images = colour.saturate(images, 1 + config.saturation * (2 * new[:, _SATURATION] - 1))
  if config.hue:
    images = colour.turn_hue(images, config.hue * (2 * new[:, _HUE] - 1))
  if config.erase:
    images, mean = jax.lax.optimization_barrier((images, images.mean((1, 2), keepdims=True)))
    images = jnp.where(_erased(config, draws, *images.shape[1:3])[..., None], mean, images)
  return images


def _move(
  config: Any,
  statistics: Statistics,
  draws: Array,
  new: Array,
  noise: Array | None,
  operation: tuple[Array, Array] | None,
  images: Array,
  mirror: Array | None,
) -> Array:
  """Applies the geometry, in the cheapest way that all of it can share: uint8 -> uint8 or float32 levels."""
  height, width = images.shape[1:3]
  size = input_shape(images.shape[1:], statistics, config)[:2]
  mirror = draws[:, _FLIP] < (0.5 if config.flip else 0) if mirror is None else mirror
  # A whole number of pixels; each of -shift..shift has the same probability.
  shift = jnp.floor(draws[:, (_SHIFT_Y, _SHIFT_X)] * (2 * config.shift + 1)).astype(jnp.int32) - config.shift
  window = None
  if config.crop:
    window = geometry.random_window(config.crop, new[:, _CROP], height, width)
  elif size != (height, width):  # what evaluation cuts out, at the size of training
    tall, wide = input_shape(images.shape[1:], statistics)[:2]
    centre = (height - tall) // 2, (width - wide) // 2, tall, wide
    window = jnp.broadcast_to(jnp.array(centre, jnp.float32), (len(images), 4))
  if config.rotate or config.scale or noise is not None or operation is not None:
    angle = math.radians(config.rotate) * (2 * draws[:, _ROTATE] - 1)
    zoom = 1 + config.scale * (2 * draws[:, _SCALE] - 1)
    after = None if operation is None else trivial.geometry(*operation, *size)
    displacement = None if noise is None else config.elastic * geometry.smooth_field(noise, *size)
    return geometry.warp(images, mirror, angle, zoom, shift, config.padding, window, after, size, displacement)
  if window is not None:
    return geometry.crop(images, mirror, shift, config.padding, window, size)
  if config.flip:
    images = jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)
  return geometry.translate(images, shift, config.shift, config.padding) if config.shift else images


def _draws(key: Array, positions: Array) -> Array:
  """Draws from the uniform distribution on [0, 1): float32 (B, _NUM_DRAWS), one row per position."""
  return jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p), (_NUM_DRAWS,)))(positions)


def _newer_draws(key: Array, positions: Array) -> Array:
  """The draws of augmentations that came later, by a key of their own: float32 (B, _NUM_NEWER_DRAWS). XLA drops what is not used."""

  def draw(position: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, position), 1), (_NUM_NEWER_DRAWS,))

  return jax.vmap(draw)(positions)


def _noise(key: Array, positions: Array) -> Array:
  """Normal draws of a third block: float32 (B, *geometry.ELASTIC_DRAWS)."""

  def draw(position: Array) -> Array:
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, position), 2), geometry.ELASTIC_DRAWS)

  return jax.vmap(draw)(positions)


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
