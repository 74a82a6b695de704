"""Each augmentation by itself, mixing across devices, and independence of the number of devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.config import default_config
from cnn_jax.data.augment import Statistics, augment, beta_quantile, mixing_weights, normalize
from cnn_jax.data.geometry import warp
from tests.helpers import LEVELS, QUICK

pytestmark = pytest.mark.usefixtures('strict')


def settings(**fields):
  config = default_config().augment
  for name, value in fields.items():
    config[name] = value
  return config


def batch(n=8, height=6, width=6, channels=1, seed=0):
  images = np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)
  labels = np.eye(4, dtype=np.float32)[np.arange(n) % 4]
  return jnp.asarray(images), jnp.asarray(labels), jnp.arange(n, dtype=jnp.int32)


def run(config, images, labels, positions, key=0):
  return jax.jit(functools.partial(augment, config, LEVELS), compiler_options=QUICK)(
    jax.random.key(key), positions, images, labels
  )


def run_sharded(config, images, labels, positions, shards=1):
  """Augments one global batch that is spread over some devices, here those of `vmap`."""
  mapped = jax.vmap(functools.partial(augment, config, LEVELS, jax.random.key(0)), axis_name='batch')
  parts = [array.reshape(shards, -1, *array.shape[1:]) for array in (positions, images, labels)]
  return [np.asarray(array).reshape(-1, *array.shape[2:]) for array in jax.jit(mapped, compiler_options=QUICK)(*parts)]


def pixels(images):
  """Undoes `normalize`."""
  return (np.asarray(images, np.float64) * 255 + 255) / 2


EVERYTHING = settings(
  shift=2, flip=True, rotate=15.0, scale=0.1, erase=0.5, brightness=0.2, contrast=0.2, mixup=0.4, cutmix=1.0
)
SHIFT_AND_FLIP = {'shift': 2, 'flip': True}


def test_normalize_maps_the_ends_and_the_middle():
  result = normalize(np.array([0, 51, 204, 255], np.uint8).reshape(1, 2, 2, 1), LEVELS)
  assert result.dtype == jnp.float32
  np.testing.assert_array_equal(result.ravel(), np.array([-1, -0.6, 0.6, 1], np.float32))


def test_each_channel_has_its_own_statistics():
  statistics = Statistics((50.0, 100.0, 0.0), (10.0, 100.0, 255.0))
  result = normalize(np.array([[[60, 200, 51]]], np.uint8), statistics)
  np.testing.assert_array_equal(result, np.array([[[1, 1, 0.2]]], np.float32))


def test_the_default_statistics_give_the_bits_of_one_formula():
  """Old runs continue with the same bits: (2 x - 255) / 255, also of levels between whole ones."""
  levels = np.random.default_rng(0).uniform(0, 255, 100_000).astype(np.float32)
  levels = np.concatenate([np.arange(256, dtype=np.float32), levels])
  for function in (lambda x: normalize(x, LEVELS), jax.jit(lambda x: normalize(x, LEVELS))):
    np.testing.assert_array_equal(function(levels), jax.jit(lambda x: (2 * x - 255) / 255)(levels))


def test_with_every_field_off_it_is_normalize():
  images, labels, positions = batch(channels=3)
  result, same = run(settings(), images, labels, positions)
  np.testing.assert_array_equal(result, jax.jit(normalize, static_argnums=1)(images, LEVELS))
  np.testing.assert_array_equal(result, normalize(images, LEVELS))
  np.testing.assert_array_equal(same, labels)


def test_the_result_does_not_depend_on_the_number_of_devices():
  images, labels, positions = batch(8, channels=3)
  one = run_sharded(EVERYTHING, images, labels, positions)
  two = run_sharded(EVERYTHING, images, labels, positions, shards=2)
  for whole, halves in zip(one, two, strict=True):
    np.testing.assert_allclose(whole, halves, atol=1e-6)
  np.testing.assert_allclose(one[1].sum(1), 1, atol=1e-6)
  assert np.abs(one[0]).max() <= 1 + 1e-6


def test_draws_differ_between_keys_and_between_positions():
  images, labels, positions = batch(8)
  images = jnp.broadcast_to(images[:1], images.shape)
  config = settings(shift=2)
  one, _ = run(config, images, labels, positions)
  other, _ = run(config, images, labels, positions, key=1)
  assert (np.asarray(one) != np.asarray(other)).any()
  assert len({image.tobytes() for image in np.asarray(one)}) > 4


@pytest.mark.parametrize('padding', ['constant', 'reflect'])
def test_shift_is_a_slice_of_the_padded_image_and_all_shifts_are_equally_likely(padding):
  n, limit = 2000, 2
  images, _, _positions = batch(1, 5, 7)
  image = np.asarray(images)[0, :, :, 0]
  level = int(np.rint(np.mean([image[0, 0], image[0, -1], image[-1, 0], image[-1, -1]])))
  padded = np.pad(image, limit, **({'constant_values': level} if padding == 'constant' else {'mode': 'reflect'}))
  candidates = {padded[top : top + 5, left : left + 7].tobytes(): (top, left) for top in range(5) for left in range(5)}
  assert len(candidates) == 25
  images = jnp.broadcast_to(images, (n, 5, 7, 1))
  result, _ = run(settings(shift=limit, padding=padding), images, jnp.zeros((n, 1)), jnp.arange(n, dtype=jnp.int32))
  levels = np.rint(pixels(result)).astype(np.uint8)[..., 0]
  counts = np.zeros((5, 5), int)
  for shifted in levels:
    counts[candidates[shifted.tobytes()]] += 1  # a KeyError means that the image is not a slice
  # 80 expected in each, standard deviation 8.8.
  assert counts.min() > 40 and counts.max() < 125


def test_flip_mirrors_half_of_the_images():
  n = 1000
  images, _, _positions = batch(1, 4, 5, 3)
  result, _ = run(settings(flip=True), jnp.broadcast_to(images, (n, 4, 5, 3)), jnp.zeros((n, 1)), jnp.arange(n))
  as_is = (np.asarray(result) == np.asarray(normalize(images, LEVELS))).all((1, 2, 3))
  mirrored = (np.asarray(result) == np.asarray(normalize(images[:, :, ::-1], LEVELS))).all((1, 2, 3))
  assert (as_is ^ mirrored).all()
  assert 420 < mirrored.sum() < 580


jitted_warp = jax.jit(warp, static_argnums=5, compiler_options=QUICK)


def warp_one(image, mirror=False, angle=0.0, zoom=1.0, shift=(0, 0), padding='constant'):
  arguments = [jnp.array([x]) for x in (mirror, angle, zoom)]
  return np.asarray(jitted_warp(jnp.asarray(image)[None], *arguments, jnp.array([shift]), padding))[0]


@pytest.mark.parametrize('channels', [1, 3])
def test_warp_by_a_quarter_turn_is_rot90(channels):
  image = np.asarray(batch(1, 7, 7, channels)[0])[0]
  np.testing.assert_allclose(warp_one(image, angle=math.pi / 2), np.rot90(image), atol=1e-2)
  np.testing.assert_allclose(warp_one(image, mirror=True, angle=math.pi / 2), np.rot90(image[:, ::-1]), atol=1e-2)


def test_warp_that_only_shifts_moves_whole_pixels():
  image = np.array(batch(1, 5, 6)[0])[0]
  image[[0, 0, -1, -1], [0, -1, 0, -1]] = 90
  expected = np.full((5, 6, 1), 90)
  expected[1:, :-2] = image[:-1, 2:]  # one down, two to the left
  np.testing.assert_allclose(warp_one(image, shift=(1, -2)), expected, atol=1e-3)
  expected = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode='reflect')[1:6, 4:10]
  np.testing.assert_allclose(warp_one(image, shift=(1, -2), padding='reflect'), expected, atol=1e-3)


@pytest.mark.faults
@pytest.mark.parametrize(('height', 'width', 'channels'), [(4200, 4200, 1), (5, 4_000_000, 3)])
def test_warp_of_a_very_large_image_takes_the_right_pixels(height, width, channels):
  """float32 does not hold an index above 2^24, nor int32 one above 2^31 into a whole batch."""
  image = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
  moved = np.asarray(warp_one(image, shift=(0, 3)))
  assert (moved[:, 3:] == image[:, :-3]).all()


def test_warp_interpolates_linearly_between_pixels():
  # Enlarged twice about the centre 3, the row 0 10 ... 60 is read at 1.5, 2, 2.5, 3, 3.5, 4, 4.5.
  image = np.tile(np.arange(0, 70, 10, dtype=np.uint8)[None, :, None], (7, 1, 1))
  np.testing.assert_allclose(warp_one(image, zoom=2.0)[1, :, 0], [15, 20, 25, 30, 35, 40, 45], atol=1e-4)


def test_rotation_and_zoom_stay_within_the_limits():
  # A single bright pixel to the right of the centre shows the angle and the zoom.
  n, size = 400, 41
  image = np.zeros((size, size, 1), np.uint8)
  image[20, 35] = 255
  images = jnp.broadcast_to(jnp.asarray(image), (n, size, size, 1))
  result, _ = run(settings(rotate=30.0, scale=0.2), images, jnp.zeros((n, 1)), jnp.arange(n))
  levels = pixels(result)[..., 0]
  y, x = np.mgrid[:size, :size] - 20.0
  mass = levels.sum((1, 2))
  angle = np.degrees(np.arctan2((levels * -y).sum((1, 2)) / mass, (levels * x).sum((1, 2)) / mass))
  radius = np.hypot((levels * y).sum((1, 2)) / mass, (levels * x).sum((1, 2)) / mass) / 15
  assert np.abs(angle).max() < 32 and angle.min() < -25 and angle.max() > 25
  assert 0.76 < radius.min() < 0.84 and 1.16 < radius.max() < 1.24


def test_brightness_adds_one_number_to_the_whole_image():
  images = jnp.full((200, 4, 4, 1), 128, jnp.uint8)
  result, _ = run(settings(brightness=0.25), images, jnp.zeros((200, 1)), jnp.arange(200))
  added = pixels(result) / 255 - 128 / 255
  np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-6)
  assert np.abs(added).max() <= 0.25 + 1e-6 and added.min() < -0.2 and added.max() > 0.2


def test_contrast_scales_the_distance_to_the_mean():
  image = np.array([[100, 120], [140, 160]], np.uint8)[None, :, :, None]
  images = jnp.broadcast_to(jnp.asarray(image), (200, 2, 2, 1))
  result, _ = run(settings(contrast=0.5), images, jnp.zeros((200, 1)), jnp.arange(200))
  levels = pixels(result)
  np.testing.assert_allclose(levels.mean((1, 2, 3)), 130, atol=1e-3)
  factors = (levels - 130) / (np.asarray(image) - 130.0)
  np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1, :1], factors.shape), atol=1e-4)
  assert 0.5 - 1e-4 <= factors.min() < 0.6 and 1.4 < factors.max() <= 1.5 + 1e-4


def test_erasing_fills_one_rectangle_with_the_mean():
  n, size = 300, 20
  images, _, _ = batch(1, size, size, 3)
  image = np.asarray(images)[0].astype(float)
  result, _ = run(settings(erase=0.5), jnp.broadcast_to(images, (n, size, size, 3)), jnp.zeros((n, 1)), jnp.arange(n))
  levels = pixels(result)
  changed = (np.abs(levels - image) > 1e-2).any(-1)
  erased = changed.any((1, 2))
  assert 110 < erased.sum() < 190
  for one, mask in zip(levels[erased], changed[erased], strict=True):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert mask.sum() == area
    assert 0.01 * size**2 <= area <= 0.36 * size**2
    np.testing.assert_allclose(one[mask], np.broadcast_to(image.mean((0, 1)), (area, 3)), atol=1e-2)


def mix(config, n=200, size=8):
  """Black images of class 0, each mixed with a white one of class 1: every second of a global batch."""
  white = np.arange(2 * n) % 2
  images = np.broadcast_to(np.uint8(255 * white)[:, None, None, None], (2 * n, size, size, 1))
  labels = np.eye(2, dtype=np.float32)[white]
  images, labels = run_sharded(config, jnp.asarray(images), jnp.asarray(labels), jnp.arange(2 * n, dtype=jnp.int32))
  return pixels(images)[::2, ..., 0] / 255, labels[::2]


def test_mixup_mixes_images_and_labels_by_the_same_weights():
  images, labels = mix(settings(mixup=1.0))
  np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(images, np.broadcast_to(labels[:, 1, None, None], images.shape), atol=1e-5)
  # Beta(1, 1) is uniform: mean 1/2, standard deviation 0.289.
  assert abs(labels[:, 1].mean() - 0.5) < 0.08 and abs(labels[:, 1].std() - 0.289) < 0.04


@pytest.mark.parametrize('alpha', [0.2, 2.0])
def test_weights_are_beta_distributed(alpha):
  uniform = jnp.asarray((np.arange(100000) + 0.5) / 100000, jnp.float32)
  weights = np.asarray(beta_quantile(uniform, alpha), np.float64)
  assert abs(weights.mean() - 0.5) < 1e-4
  assert abs(weights.var() - 1 / (4 * (2 * alpha + 1))) < 1e-3  # of Beta(alpha, alpha)
  assert (np.diff(weights) >= 0).all() and weights.min() >= 0 and weights.max() <= 1


def test_cutmix_pastes_a_rectangle_and_weighs_labels_by_its_area():
  images, labels = mix(settings(cutmix=1.0))
  np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(np.minimum(np.abs(images), np.abs(images - 1)), 0, atol=1e-6)
  np.testing.assert_allclose(images.mean((1, 2)), labels[:, 1], atol=1e-6)
  for mask in images > 0.5:
    rows, columns = mask.any(1).sum(), mask.any(0).sum()
    assert mask.sum() == rows * columns
  assert len(np.unique(labels[:, 1])) > 20


def test_if_both_are_on_each_example_takes_one_of_them():
  images, labels = mix(settings(mixup=1.0, cutmix=1.0))
  np.testing.assert_allclose(images.mean((1, 2)), labels[:, 1], atol=1e-5)
  flat = np.ptp(images, axis=(1, 2)) < 1e-6
  blended = flat & (images[:, 0, 0] > 1e-4) & (images[:, 0, 0] < 1 - 1e-4)
  assert 70 < blended.sum() < 130
  binary = (np.minimum(np.abs(images), np.abs(images - 1)) < 1e-6).all((1, 2))
  assert (blended | binary).all()


@pytest.fixture(scope='module')
def mixed_by_hand():
  """A batch, and what mixing must make of it: each example with the one before it, both augmented in this step."""
  images, labels, positions = batch(16)
  config = settings(**SHIFT_AND_FLIP, mixup=1.0, cutmix=1.0)
  own, _ = run(settings(**SHIFT_AND_FLIP), images, labels, positions)
  weights = jax.jit(lambda key: mixing_weights(config, key, positions, images.shape), compiler_options=QUICK)
  weight, kept = map(np.asarray, weights(jax.random.key(0)))
  own, labels, weight, kept = np.asarray(own), np.asarray(labels), weight[:, None], kept[..., None]
  expected_images = kept * own + (1 - kept) * np.roll(own, 1, axis=0)
  expected_labels = weight * labels + (1 - weight) * np.roll(labels, 1, axis=0)
  return config, (images, jnp.asarray(labels), positions), expected_images, expected_labels


@pytest.mark.parametrize('shards', [1, 2, 4, 8])
def test_mixing_takes_the_previous_example_of_the_global_batch_on_any_number_of_devices(mixed_by_hand, shards):
  config, examples, expected_images, expected_labels = mixed_by_hand
  images, labels = run_sharded(config, *examples, shards=shards)
  np.testing.assert_allclose(images, expected_images, atol=1e-6)
  np.testing.assert_allclose(labels, expected_labels, atol=1e-6)


def test_switching_one_augmentation_on_does_not_change_the_draws_of_the_others():
  images, labels, positions = batch(32)
  shifted, _ = run(settings(shift=2), images, labels, positions)
  brighter, _ = run(settings(shift=2, brightness=1e-6), images, labels, positions)
  np.testing.assert_allclose(shifted, brighter, atol=1e-4)
