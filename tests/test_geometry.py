"""Random crops and the geometric operations of TrivialAugment, and that they share one warp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from cnn_jax.config import default_config
from cnn_jax.data import augment, geometry, trivial
from tests.helpers import LEVELS, QUICK

pytestmark = pytest.mark.usefixtures('strict')


def settings(**fields):
  config = default_config().augment
  for name, value in fields.items():
    config[name] = value
  return config


def photograph(height=24, width=32, channels=3, n=1):
  shape = (n, height, width, channels)
  return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def ramp(height, width, rows, columns):
  """A picture whose levels rise evenly downwards and to the right, so that interpolation is exact."""
  levels = rows * np.arange(height)[:, None] + columns * np.arange(width)[None]
  assert levels.max() < 256
  return jnp.asarray(levels[None, :, :, None], jnp.uint8)


# Crops --------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def windows(smallest, draws, height, width):
  return geometry.random_window(smallest, draws, height, width)


def test_a_window_lies_in_the_image_and_has_the_area_and_the_aspect_that_are_asked_for():
  draws = jnp.asarray(np.random.default_rng(0).random((20_000, geometry.CROP_DRAWS)), jnp.float32)
  top, left, height, width = np.asarray(windows(0.25, draws, 300, 400)).T
  assert (top >= 0).all() and (left >= 0).all() and (top + height <= 300).all() and (left + width <= 400).all()
  area, aspect = height * width / (300 * 400), width / height
  assert 0.245 < area.min() < 0.26 and area.max() > 0.98
  assert 0.745 < aspect.min() < 0.755 and 1.325 < aspect.max() < 1.34
  small = area < 0.5  # smaller ones fit whatever their aspect
  # Both are uniform: mean 0.375 of area (standard error 0.001), and 0 of the logarithm of the aspect (0.002).
  assert abs(area[small].mean() - 0.375) < 0.004 and abs(np.log(aspect[small]).mean()) < 0.01
  place = (top / (300 - height + 1))[small]
  assert abs(place.mean() - 0.5) < 0.02 and place.min() < 0.01 and place.max() > 0.97


def test_an_image_in_which_no_window_fits_gives_the_largest_in_its_centre():
  draws = jnp.asarray(np.random.default_rng(0).random((5, geometry.CROP_DRAWS)), jnp.float32)
  expected = np.tile([0, 43, 10, 13], (5, 1))  # 13 / 10 is the largest aspect below 4/3
  np.testing.assert_array_equal(windows(0.9, draws, 10, 100), expected)
  np.testing.assert_array_equal(windows(0.9, draws, 100, 10), expected[:, [1, 0, 3, 2]])


CROP, WARP = (
  jax.jit(function, static_argnames='padding', compiler_options=QUICK) for function in (geometry.crop, geometry.warp)
)


def test_a_crop_enlarges_its_window_to_the_canvas():
  image = ramp(12, 10, 6, 17)
  window = jnp.array([[3.0, 2.0, 6.0, 4.0]])
  # Pixel centres: the canvas has 12 rows for 6, and 10 columns for 4.
  row, column = 3 + (np.arange(12) + 0.5) * 6 / 12 - 0.5, 2 + (np.arange(10) + 0.5) * 4 / 10 - 0.5
  expected = 6 * row[:, None] + 17 * column[None]
  moved = jnp.zeros((1, 2), jnp.int32)
  for mirror in (False, True):
    found = CROP(image, jnp.array([mirror]), moved, padding='constant', window=window)[0, :, :, 0]
    np.testing.assert_allclose(found, expected[:, ::-1] if mirror else expected, atol=1e-3)


@pytest.mark.parametrize('padding', ['constant', 'reflect'])
def test_a_crop_by_rows_is_the_warp_without_rotation(padding):
  n, (height, width) = 12, (24, 32)
  rng = np.random.default_rng(1)
  window = windows(0.2, jnp.asarray(rng.random((n, geometry.CROP_DRAWS)), jnp.float32), height, width)
  window = window.at[0].set(jnp.array([0.0, 0.0, height, width]))
  shift = jnp.asarray(rng.integers(-5, 6, (n, 2)), jnp.int32).at[0].set(0)
  images, mirror = photograph(n=n), jnp.arange(n) % 2 == 1
  found = CROP(images, mirror, shift, padding=padding, window=window)
  still = jnp.zeros(n), jnp.ones(n)
  np.testing.assert_allclose(found, WARP(images, mirror, *still, shift, padding=padding, window=window), atol=1e-2)
  np.testing.assert_array_equal(found[0], images[0])


def test_a_crop_at_the_border_shows_no_padding():
  image = jnp.full((1, 8, 8, 1), 200, jnp.uint8).at[:, :, 0].set(100)  # the corners differ from the rest
  image = image.at[:, 0].set(200).at[:, -1].set(200)
  window = jnp.array([[1.0, 4.0, 4.0, 4.0]])
  for mirror in (False, True):
    found = CROP(image, jnp.array([mirror]), jnp.zeros((1, 2), jnp.int32), padding='constant', window=window)
    np.testing.assert_array_equal(found, jnp.full(found.shape, 200.0))


# Elastic distortion ------------------------------------------------------------------------------


def test_a_smooth_field_has_the_covariance_of_smoothed_noise():
  noise = np.random.default_rng(0).normal(size=(4000, *geometry.ELASTIC_DRAWS)).astype(np.float32)
  field = np.asarray(geometry.smooth_field(jnp.asarray(noise), 29, 15))
  assert field.shape == (4000, 2, 29, 15)
  np.testing.assert_allclose(field.std(axis=0), 1, atol=0.05)
  np.testing.assert_allclose(np.corrcoef(field[:, 0].ravel(), field[:, 1].ravel())[0, 1], 0, atol=0.02)
  for distance in (1, 4, 10):  # down, 4 pixels are the width of the Gaussian; to the right, 2 are
    down = np.corrcoef(field[:, :, 5].ravel(), field[:, :, 5 + distance].ravel())[0, 1]
    assert down == pytest.approx(np.exp(-((distance / 8) ** 2)), abs=0.03)
  right = np.corrcoef(field[..., 5].ravel(), field[..., 7].ravel())[0, 1]
  assert right == pytest.approx(np.exp(-1 / 4), abs=0.03)
  assert geometry.smooth_field(jnp.asarray(noise[:2]), 1, 1).shape == (2, 2, 1, 1)


def test_a_displacement_reads_the_pixels_that_scipy_reads():
  image = np.asarray(photograph(14, 14))
  displacement = np.random.default_rng(0).normal(size=(1, 2, 14, 14)).astype(np.float32)
  still = jnp.array([False]), jnp.zeros(1), jnp.ones(1), jnp.zeros((1, 2), jnp.int32)
  found = WARP(image, *still, padding='reflect', displacement=displacement)
  places = np.mgrid[:14, :14] + displacement[0]
  for channel in range(image.shape[-1]):
    expected = scipy.ndimage.map_coordinates(image[0, ..., channel].astype(np.float64), places, order=1, mode='mirror')
    np.testing.assert_allclose(found[0, ..., channel], expected, atol=0.05)


def test_elastic_distortion_has_its_standard_deviation_in_pixels():
  images = jnp.tile(ramp(28, 28, 0, 8), (500, 1, 1, 1))
  (found,) = augmented(settings(elastic=0.5), images, range(500))
  moved_by = (np.asarray(found)[:, 4:-4, 4:-4, 0] * 127.5 + 127.5 - np.arange(4, 24) * 8) / 8
  assert moved_by.std() == pytest.approx(0.5, rel=0.05)
  assert moved_by.mean() == pytest.approx(0, abs=0.05)


# TrivialAugment -----------------------------------------------------------------------------------


def moved(image, name, strength):
  operation = jnp.array([trivial.OPERATIONS.index(name)])
  after = trivial.geometry(operation, jnp.array([strength]), *image.shape[1:3])
  still = jnp.array([False]), jnp.zeros(1), jnp.ones(1), jnp.zeros((1, 2), jnp.int32)
  return np.asarray(WARP(image, *still, padding='constant', after=after))[0]


def test_geometric_operations_read_the_pixels_that_they_should():
  image = np.asarray(photograph(14, 14))
  for name in trivial.OPERATIONS:
    np.testing.assert_allclose(moved(image, name, 0.0), image[0], atol=1e-3)
  # Two thirds of 135 degrees; a seventh of 14 pixels.
  np.testing.assert_allclose(moved(image, 'rotate', 2 / 3), np.rot90(image[0]), atol=0.05)
  np.testing.assert_allclose(moved(image, 'rotate', -2 / 3), np.rot90(image[0], -1), atol=0.05)
  np.testing.assert_allclose(moved(image, 'translate_x', 1.0)[:, :-2], image[0, :, 2:], atol=1e-2)
  np.testing.assert_allclose(moved(image, 'translate_y', -1.0)[2:], image[0, :-2], atol=1e-2)
  row, column = np.mgrid[:13, :13]
  inner = slice(4, 9), slice(4, 9)  # whose sources lie in the image
  for name, source in (
    ('shear_x', (row, column + 0.99 * 0.5 * (row - 6))),
    ('shear_y', (row + 0.99 * 0.5 * (column - 6), column)),
  ):
    expected = 5 * source[0] + 9 * source[1]
    np.testing.assert_allclose(moved(ramp(13, 13, 5, 9), name, 0.5)[..., 0][inner], expected[inner], atol=1e-2)


# All together -------------------------------------------------------------------------------------


def augmented(config, images, *positions):
  """Augments images at some positions of the global batch, once for each array of positions."""
  labels = jnp.zeros((len(images), 1))
  function = jax.jit(functools.partial(augment.augment, config, LEVELS), compiler_options=QUICK)
  return [np.asarray(function(jax.random.key(0), jnp.array(x), images[np.array(x)], labels)[0]) for x in positions]


def test_each_example_is_augmented_by_its_position_alone():
  everything = settings(
    crop=0.3, elastic=1.0, saturation=0.4, hue=0.1, trivial=True, flip=True, rotate=10.0, brightness=0.1, contrast=0.1
  )
  order = [5, 0, 7, 2, 1, 6, 3, 4]
  one, other = augmented(everything, photograph(n=8), list(range(8)), order)
  np.testing.assert_allclose(one[order], other, atol=1e-5)
  assert np.abs(one).max() <= 1 + 1e-6
  assert len({image.tobytes() for image in one}) == 8


def test_a_crop_of_the_whole_image_and_factors_of_one_change_nothing():
  images, positions = photograph(24, 24, n=8), list(range(8))  # a square: windows of other aspects do not fit
  (still,) = augmented(settings(flip=True, brightness=0.2), images, positions)
  (found,) = augmented(settings(flip=True, brightness=0.2, crop=1.0, saturation=1e-7, hue=1e-7), images, positions)
  np.testing.assert_allclose(found, still, atol=1e-4)
