"""Light and colour of images, on the device: (B, H, W, C) of float32 levels from 0 to 255, one factor per image."""

import jax.numpy as jnp
from jax import Array

_GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601


def grey(images: Array) -> Array:
  """The luma: float32 (B, H, W, 1). A grey image is its own."""
  if images.shape[3] == 1:
    return images
  red, green, blue = (weight * images[..., i : i + 1] for i, weight in enumerate(_GREY))
  return red + green + blue


def blend(images: Array, others: Array, factor: Array) -> Array:
  """Moves images away from others: 0 gives the others, 1 the images, more than 1 the opposite.

  Args:
    images: (B, H, W, C).
    others: of a shape that broadcasts.
    factor: float32 (B,).
  """
  factor = factor[:, None, None, None]
  return jnp.clip(factor * images + (1 - factor) * others, 0, 255)


def contrast_and_brightness(images: Array, factor: Array, added: Array) -> Array:
  """Multiplies the distance to the mean of each image by a factor, then adds a number of levels; both float32 (B,)."""
  mean = images.mean((1, 2, 3), keepdims=True)
  images = (images - mean) * factor[:, None, None, None] + mean + added[:, None, None, None]
  return jnp.clip(images, 0, 255)


def saturate(images: Array, factor: Array) -> Array:
  """Multiplies the distance of each pixel to its grey; grey images stay. The definition is torchvision's.

  Args:
    images: (B, H, W, C).
    factor: float32 (B,); 0 gives grey images.
  """
  return images if images.shape[3] == 1 else blend(images, grey(images), factor)


def turn_hue(images: Array, turn: Array) -> Array:
  """Turns the hue of the HSV model; value and saturation stay, and so do grey images.

  Args:
    images: (B, H, W, C).
    turn: float32 (B,), as a part of the full circle.
  """
  if images.shape[3] == 1:
    return images
  red, green, blue = (images[..., i] for i in range(3))
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  scale = 1 / jnp.where(chroma > 0, chroma, 1)
  # In sixths of the circle, from red on. A grey pixel has chroma 0, which makes its hue irrelevant.
  hue = jnp.where(
    value == red,
    (green - blue) * scale,
    jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
  )
  hue = hue + 6 * turn[:, None, None]

  def channel(offset: int) -> Array:
    # Distance below the value, in parts of the chroma: 0 for a third of the circle, then up, 1 for a third, down.
    place = hue + offset
    place = place - 6 * jnp.floor(place * (1 / 6))
    return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)

  return jnp.stack([channel(5), channel(3), channel(1)], axis=-1)
