"""The decoded copy in the cache, lazy images, reading ahead."""

import threading

import numpy as np
import pytest
from PIL import Image

from cnn_jax import UsageError
from cnn_jax.data import cache, decode, identity, images, jpeg, load_dataset
from tests.datasets import make_folder, make_tfds, settings, write

pytestmark = pytest.mark.usefixtures('offline')


@pytest.fixture
def cached(tmp_path, monkeypatch):
  """Loads a folder and counts the images decoded; every decoded copy is kept."""
  calls = []
  read_image = images.read_image
  monkeypatch.setattr(images, 'read_image', lambda *a, **k: (calls.append(1), read_image(*a, **k))[1])
  monkeypatch.setattr(decode, 'MIN_CACHED_SECONDS', -1)

  def load(**fields):
    calls.clear()
    return load_dataset(settings('folder', dir=str(tmp_path / 'pets'), **fields)), len(calls)

  make_folder(tmp_path / 'pets', count=10)
  return load


def test_nothing_is_decoded_the_second_time(cached):
  first, calls = cached()
  assert calls == 41
  again, calls = cached()
  assert calls == 0
  for split in ('train', 'validation', 'test'):
    np.testing.assert_array_equal(getattr(again, split).images, getattr(first, split).images)
    np.testing.assert_array_equal(getattr(again, split).labels, getattr(first, split).labels)
  larger, calls = cached(image_size=8)
  assert calls == 41
  assert larger.train.images.shape[1] == 8


def test_a_large_set_stays_in_its_copy(cached, monkeypatch):
  first, _ = cached()
  expected = {name: getattr(first, name) for name in ('train', 'validation', 'test')}
  monkeypatch.setattr(cache, 'RESIDENT_BYTES', 0)
  for size in (0, 8):  # a copy that was there, and one that is made
    dataset, _ = cached(image_size=size)
    assert isinstance(dataset.train.images, cache.Rows)
    if size:
      monkeypatch.setattr(cache, 'RESIDENT_BYTES', 2**30)
      small, calls = cached(image_size=size)
      assert calls == 0
      expected = {name: getattr(small, name) for name in expected}
    for name, split in expected.items():
      rows = getattr(dataset, name).images
      assert rows.shape == split.images.shape and len(rows) == len(split)
      np.testing.assert_array_equal(rows, split.images)
      np.testing.assert_array_equal(rows[1:3], split.images[1:3])
      np.testing.assert_array_equal(rows[0], split.images[0])
      np.testing.assert_array_equal(rows[np.array([1, 0, 0])], split.images[[1, 0, 0]])
      assert rows[:0].shape == split.images[:0].shape
    if not size:
      assert identity.identify(dataset) == identity.identify(first)


def test_a_changed_file_is_decoded_again(cached, tmp_path):
  cached()
  write(tmp_path / 'pets' / 'test' / 'dog' / '09.png', 33)
  dataset, calls = cached()
  assert calls == 41
  assert dataset.test.images[-1, 0, 0, 0] == 33


def test_a_damaged_copy_is_decoded_again(cached, tmp_path):
  cached()
  (file,) = (tmp_path / 'cache' / 'cnn_jax').glob('decoded-*')
  assert file.stat().st_mode & 0o077 == 0  # the images may be private
  whole = file.read_bytes()
  damaged = bytearray(whole)
  damaged[len(whole) // 2] ^= 1
  for content in (b'', b'not a copy', whole[:-100], bytes(damaged)):
    file.write_bytes(content)
    _, calls = cached()
    assert calls == 41
  assert cached()[1] == 0


def test_a_cache_that_cannot_be_written_is_not_needed(cached, tmp_path):
  (tmp_path / 'cache').write_text('a file where the directory should be')
  assert cached()[1] == cached()[1] == 41


@pytest.mark.parametrize('limit', [{'resident': 'never'}, {'megabytes': 0}])
def test_a_set_that_is_too_large_is_decoded_when_it_is_indexed(cached, monkeypatch, limit):
  whole, _ = cached(validation=0.2)
  monkeypatch.setenv('XDG_CACHE_HOME', '/dev/null')
  monkeypatch.setattr(decode, '_SAMPLE', 5)
  lazy, calls = cached(validation=0.2, **limit)
  assert calls == 6
  for split in ('train', 'validation', 'test'):
    images, expected = getattr(lazy, split).images, getattr(whole, split).images
    assert images.shape == expected.shape
    assert images.dtype == np.uint8
    assert len(images) == len(expected)
    np.testing.assert_array_equal(images[np.array([2, 0])], expected[[2, 0]])
    np.testing.assert_array_equal(images[1], expected[1])
    np.testing.assert_array_equal(images[-2:], expected[-2:])
    assert images[:0].shape == expected[:0].shape
    np.testing.assert_array_equal(getattr(lazy, split).labels, getattr(whole, split).labels)


def test_a_lazy_tfds_set_equals_a_decoded_one_and_its_labels_are_read_once(tmp_path, monkeypatch):
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1] * 20, 'test': [1, 0, 0]})
  config_data = settings('tfds', name='toy', dir=str(root))
  whole = load_dataset(config_data)
  config_data.resident = 'never'
  monkeypatch.setattr(decode, 'MIN_CACHED_SECONDS', -1)
  load_dataset(config_data)
  monkeypatch.setattr(decode, '_run', None)  # nothing is looked at again
  lazy = load_dataset(config_data)
  for split in ('train', 'validation', 'test'):
    assert isinstance(getattr(lazy, split).images, decode.LazyImages)
    np.testing.assert_array_equal(getattr(lazy, split).images[:], getattr(whole, split).images)
    np.testing.assert_array_equal(getattr(lazy, split).labels, getattr(whole, split).labels)


def _splits(directory, **fields):
  dataset = load_dataset(settings('folder', dir=str(directory), validation=0.5, **fields))
  return [np.asarray(split.images) for split in (dataset.train, dataset.validation, dataset.test)]


@pytest.mark.parametrize('colours', [0, 1, 30])
def test_lazy_images_equal_decoded_ones_if_grey_coloured_or_mixed(tmp_path, colours):
  make_folder(tmp_path, count=15)
  for number in range(colours):
    write(tmp_path / 'train' / ('cat', 'dog')[number % 2] / f'{number // 2:02}.png', 50 + number, mode='RGB')
  for whole, lazy in zip(_splits(tmp_path), _splits(tmp_path, resident='never'), strict=True):
    assert whole.shape[3] == (3 if colours else 1)
    np.testing.assert_array_equal(lazy, whole)


def test_a_colour_that_the_sample_lacks_is_an_error_that_says_what_to_set(tmp_path, monkeypatch):
  make_folder(tmp_path, count=15)
  monkeypatch.setattr(decode, '_SAMPLE', 4)
  write(tmp_path / 'train' / 'cat' / '07.png', 50, mode='RGB')
  with pytest.raises(UsageError, match=r'train/cat/07.png is in colour, but .* set config.data.channels=3'):
    _splits(tmp_path, resident='never')
  for channels in (1, 3):
    for whole, lazy in zip(
      _splits(tmp_path, channels=channels), _splits(tmp_path, channels=channels, resident='never'), strict=True
    ):
      np.testing.assert_array_equal(lazy, whole)
  # If every image is looked at, colour is found.
  assert _splits(tmp_path, resident='never', on_bad_image='skip')[0].shape[3] == 3


def test_levels_of_lazy_images_are_those_of_decoded_ones(tmp_path):
  for name in ('cat', 'dog'):
    for number in range(9):
      write(tmp_path / 'set' / name / f'{number}.png')
      Image.fromarray(np.full((4, 4), 400 * number, np.uint16)).save(tmp_path / 'set' / name / f'{number}.png')
  for whole, lazy in zip(_splits(tmp_path / 'set'), _splits(tmp_path / 'set', resident='never'), strict=True):
    np.testing.assert_array_equal(lazy, whole)
    assert whole.max() > 100


def test_bad_images_of_a_lazy_set_are_looked_for_once(cached, tmp_path):
  (tmp_path / 'pets' / 'train' / 'cat' / '03.png').write_bytes(b'')
  for expected in (41, 2):  # the second start reads the first image alone, and the one that tells the size
    dataset, calls = cached(resident='never', on_bad_image='skip')
    assert calls <= expected
    assert dataset.skipped == (('train/cat/03.png', 'is empty'),)
    assert len(np.asarray(dataset.train.images)) == len(dataset.train)
  write(tmp_path / 'pets' / 'train' / 'cat' / '03.png', 3)
  dataset, calls = cached(resident='never', on_bad_image='skip')
  assert dataset.skipped == () and calls == 41
  (tmp_path / 'pets' / 'train' / 'cat' / '03.png').write_bytes(b'')
  with pytest.raises(UsageError, match='03.png is empty'):
    cached(resident='never')


def test_another_decoder_makes_another_copy(cached, monkeypatch):
  cached()
  monkeypatch.setattr(jpeg, 'decoder', lambda: 'another')
  assert cached()[1] == 41


def test_read_ahead_is_in_order_and_bounded():
  lock, taken, most, yielded = threading.Lock(), 0, 0, 0

  def items():
    nonlocal taken
    for i in range(2000):
      taken += 1
      yield i

  def read(i):
    nonlocal most
    with lock:
      most = max(most, taken - yielded)
    return -i

  for i, value in enumerate(decode.read_ahead(items(), read, ahead=64)):
    assert value == -i
    yielded += 1
  assert yielded == 2000
  assert most <= 64 + 2 * 16


def test_read_ahead_raises_and_stops():
  def read(i):
    if i == 40:
      raise RuntimeError('a bug')
    return i

  with pytest.raises(RuntimeError, match='a bug'):
    list(decode.read_ahead(range(1000), read, ahead=32))
  unfinished = decode.read_ahead(iter(range(10**9)), read, ahead=16)
  assert next(unfinished) == 0
  unfinished.close()  # returns, although most items are left
