"""Saturation, hue and the photometric operations of TrivialAugment, against Pillow and the standard library."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cnn_jax.data import colour, trivial
from tests.helpers import QUICK

pytestmark = pytest.mark.usefixtures('strict')

BLENDS = {
  'brightness': ImageEnhance.Brightness,
  'colour': ImageEnhance.Color,
  'contrast': ImageEnhance.Contrast,
  'sharpness': ImageEnhance.Sharpness,
}
jitted_photometry = jax.jit(trivial.photometry, compiler_options=QUICK)


def picture(channels=3, height=20, width=26):
  """A dull picture: smooth, with noise, and without the darkest and the lightest levels."""
  rng = np.random.default_rng(0)
  slope = np.linspace(30, 150, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
  return (slope + rng.integers(0, 30, (height, width, channels))).astype(np.uint8)


def expected(image, name, strength):
  """What Pillow makes of a picture."""
  pillow = Image.fromarray(image.squeeze())
  if name in BLENDS:
    pillow = BLENDS[name](pillow).enhance(1 + 0.99 * strength)
  elif name == 'posterize':
    pillow = ImageOps.posterize(pillow, 8 - round(6 * abs(strength)))
  elif name == 'solarize':
    pillow = ImageOps.solarize(pillow, 256 * (1 - abs(strength)))
  elif name == 'autocontrast':
    pillow = ImageOps.autocontrast(pillow)
  elif name == 'equalize':
    pillow = ImageOps.equalize(pillow)
  return np.asarray(pillow).reshape(image.shape)


@pytest.mark.parametrize('channels', [1, 3])
def test_photometric_operations_are_those_of_pillow(channels):
  image, count = picture(channels), len(trivial.OPERATIONS)
  strengths = (0.0, 0.6, -0.9)
  operation = jnp.tile(jnp.arange(count), len(strengths))
  strength = jnp.repeat(jnp.array(strengths), count)
  images = jnp.broadcast_to(jnp.asarray(image, jnp.float32), (len(operation), *image.shape))
  found = np.asarray(jitted_photometry(images, operation, strength))
  for made, index, amount in zip(found, operation.tolist(), strength.tolist(), strict=True):
    name = trivial.OPERATIONS[index]
    # Pillow rounds the grey before it is multiplied, by 0.89 at most, and cuts the fractions of the result off.
    np.testing.assert_allclose(made, expected(image, name, amount), atol=1.5, err_msg=f'{name} {amount}')
    if name in ('autocontrast', 'equalize'):
      assert np.abs(made - image).max() > 20
    elif index < trivial.OPERATIONS.index('brightness') or not amount or (name == 'colour' and channels == 1):
      np.testing.assert_allclose(made, image, atol=1e-4, err_msg=f'{name} {amount}')
    else:
      assert np.abs(made - image).max() > 5, (name, amount)


def test_one_level_is_neither_stretched_nor_equalized():
  images = jnp.full((2, 4, 5, 3), 77.0)
  operation = jnp.array([trivial.OPERATIONS.index(name) for name in ('autocontrast', 'equalize')])
  np.testing.assert_array_equal(jitted_photometry(images, operation, jnp.zeros(2)), images)


def test_every_operation_and_strength_is_equally_likely():
  draws = jnp.asarray(np.random.default_rng(0).random((28_000, trivial.DRAWS)), jnp.float32)
  operation, strength = (np.asarray(x) for x in trivial.choose(draws))
  # 2,000 expected of each operation, standard deviation 43.
  counts = np.bincount(operation)
  assert len(counts) == 14 and counts.min() > 1800 and counts.max() < 2200
  levels, counts = np.unique(np.round(strength * 30).astype(int), return_counts=True)
  assert levels.tolist() == list(range(-30, 31))
  # 903 of zero, 452 of each other, standard deviation 21.
  assert counts[30] > 750 and np.delete(counts, 30).min() > 340 and np.delete(counts, 30).max() < 560


def test_saturation_is_that_of_pillow():
  image, factors = picture(), (0.0, 0.7, 1.0, 1.9)
  images = jnp.broadcast_to(jnp.asarray(image, jnp.float32), (len(factors), *image.shape))
  found = np.asarray(colour.saturate(images, jnp.array(factors)))
  for made, factor in zip(found, factors, strict=True):
    np.testing.assert_allclose(made, ImageEnhance.Color(Image.fromarray(image)).enhance(factor), atol=1.5)
  np.testing.assert_array_equal(found[2], image)


def test_the_hue_turns_as_in_the_standard_library():
  colours = [
    (0, 0, 0),
    (255, 255, 255),
    (90, 90, 90),
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (200, 50, 50),
    (10, 200, 60),
    (3, 4, 200),
    (250, 250, 3),
    (20, 240, 240),
  ]
  turns = (-0.5, -0.1, 0.0, 0.3)
  images = jnp.broadcast_to(jnp.array(colours, jnp.float32)[None, :, None], (len(turns), len(colours), 1, 3))
  found = np.asarray(jax.jit(colour.turn_hue, compiler_options=QUICK)(images, jnp.array(turns)))
  for made, turn in zip(found[:, :, 0], turns, strict=True):
    for rgb, pixel in zip(colours, made, strict=True):
      hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
      np.testing.assert_allclose(pixel, colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), atol=1e-3)


def test_grey_images_have_no_colour_to_change():
  images = jnp.asarray(picture(1), jnp.float32)[None]
  assert colour.saturate(images, jnp.zeros(1)) is images
  assert colour.turn_hue(images, jnp.ones(1)) is images
