"""Training from images that are read while it runs: the same examples, the same bits, bounded memory."""

import contextlib
import threading
import time

import jax
import numpy as np
import pytest

from cnn_jax import Stopped, UsageError, checkpoint, progress, train
from cnn_jax.config import default_config
from cnn_jax.data import Dataset, Split, drawings, feed
from cnn_jax.data.images import UnreadableError
from cnn_jax.data.lazy import LazyImages


def _split(count, side=4, decode=None):
  random = np.random.default_rng(count)
  images = random.integers(0, 256, (count, side, side, 1), np.uint8)
  lazy = LazyImages(decode or images.__getitem__, np.arange(count), images.shape[1:])
  return images, Split(lazy, random.integers(0, 3, count).astype(np.int32))


def _examples(source, steps_per_epoch, first, total, count):
  """The images and labels of each step, as one device takes them."""
  step = first
  while step < total:
    epoch, offset = divmod(step, steps_per_epoch)
    (images, labels, indices), taken = source.take(epoch, offset, min(count, steps_per_epoch - offset))
    if source.sharded:
      images, labels = images[0], labels[0]
    assert indices.shape[:2] == (source.capacity, 1)
    for rows in indices[:taken, 0]:
      yield np.asarray(images[rows]), np.asarray(labels[rows])
    step += taken


@pytest.mark.parametrize('chunk_bytes', [1, 3 * 8 * 16, 2**26])
@pytest.mark.parametrize(('first', 'count'), [(0, 4), (3, 1), (13, 10)])
@pytest.mark.parametrize('sampling', ['uniform', 'balanced'])
def test_streamed_and_resident_splits_give_the_same_examples(monkeypatch, chunk_bytes, first, count, sampling):
  monkeypatch.setattr(feed, 'CHUNK_BYTES', chunk_bytes)
  images, split = _split(85)
  streamed = feed.Streamed(split, 8, 3, 10, sampling, 30)
  resident = feed.Resident(Split(images, split.labels), 8, 3, 10, sampling)
  assert streamed.capacity == min(10, max(1, chunk_bytes // (8 * 16)))
  found = list(_examples(streamed, 10, first, 30, count))
  expected = list(_examples(resident, 10, first, 30, count))
  assert len(found) == len(expected) == 30 - first
  for (image, label), (other, same) in zip(found, expected, strict=True):
    np.testing.assert_array_equal(image, other)
    np.testing.assert_array_equal(label, same)
  streamed.close()


def test_going_back_starts_the_stream_again():
  images, split = _split(40)
  streamed, resident = feed.Streamed(split, 8, 0, 2, 'uniform', 10), feed.Resident(Split(images, split.labels), 8, 0, 2)
  for epoch, offset in ((0, 0), (1, 3), (0, 1), (0, 2), (0, 0)):
    (chunk, _, indices), _ = streamed.take(epoch, offset, 1)
    np.testing.assert_array_equal(chunk[0][indices[0, 0]], images[resident.indices(epoch, offset, 1)[0, 0]])
  streamed.close()


def test_reading_ahead_is_bounded_and_ends_with_close(monkeypatch):
  """Of 100,000 images of 16 KB no more are read than the chunks and the queue of Grain hold."""
  monkeypatch.setattr(feed, 'CHUNK_BYTES', 2**20)
  lock, read = threading.Lock(), []

  def decode(index):
    with lock:
      read.append(index)
    return np.zeros((128, 128, 1), np.uint8)

  lazy = LazyImages(decode, np.arange(100_000), (128, 128, 1))
  threads = set(threading.enumerate())
  streamed = feed.Streamed(Split(lazy, np.zeros(100_000, np.int32)), 16, 0, 100, 'uniform', 6250)
  assert streamed.capacity == 4 and streamed.megabytes == pytest.approx(3 * 4 * 16 * 16384 / 1e6)
  for first, expected in ((0, 1), (1, 2), (3, 4)):  # the first chunks are small, so that training begins soon
    (images, _, _), count = streamed.take(0, first, 100)
    assert count == expected and images.nbytes == 2**20
  time.sleep(0.3)
  with lock:
    ahead = len(read) - 7 * 16
  group = 2**20 // 16384
  assert 64 <= ahead <= 2 * 64 + group * 20  # collected, queued, and in the hands of threads
  streamed.close()
  deadline = time.monotonic() + 5
  while set(threading.enumerate()) - threads and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not set(threading.enumerate()) - threads


@pytest.mark.parametrize(
  ('resident', 'megabytes', 'streamed', 'part'),
  [
    ('auto', 2, False, 'are kept in memory'),
    ('auto', 1, True, 'config.data.megabytes is 1'),
    ('always', 1, False, 'are kept in memory'),
    ('never', 2, True, "config.data.resident is 'never'"),
  ],
)
def test_the_choice_depends_on_size_and_setting_and_is_said(resident, megabytes, streamed, part):
  config = default_config()
  config.batch_size = 8
  config.data.resident, config.data.megabytes = resident, megabytes
  source, line = feed.choose(_split(100, 128)[1], config, 10, 20)
  assert isinstance(source, feed.Streamed) == streamed
  assert line.startswith('The 100 training images take 2 MB decoded') and part in line
  source.close()


def _config(resident):
  config = default_config()
  config.batch_size, config.epochs = 8, 3
  config.data.resident = resident
  config.model.features, config.model.dropout = (4,), 0.1
  config.augment.flip, config.augment.mixup = True, 0.2
  config.schedule.warmup_epochs = 0.5
  config.log.tensorboard = False
  return config


def _dataset(lazy, decode=None):
  parts = []
  for count in (85, 6, 7):
    images, split = _split(count, 6, decode)
    parts.append(split if lazy else Split(images, split.labels))
  return Dataset('made up', 'for a test', ('a', 'b', 'c'), *parts)


def _checkpoint(workdir):
  state, step, info = checkpoint.restore(workdir / 'checkpoints')
  return state, step, {name: value for name, value in info.items() if name.startswith('validation_')}


def test_streamed_training_ends_with_the_bits_of_resident_training(tmp_path, monkeypatch):
  """Also with calls of a few steps that end at other steps than the chunks, and stopped in the middle of an epoch."""
  for name in ('resident', 'streamed', 'stopped'):
    (tmp_path / name).mkdir()
  train.train(_config('always'), _dataset(lazy=False), tmp_path / 'resident')
  monkeypatch.setattr(feed, 'CHUNK_BYTES', 3 * 8 * 36)
  result = train.train(_config('never'), _dataset(lazy=True), tmp_path / 'streamed')
  assert result['steps'] == 30
  calls = []

  def stop_at(step):
    monkeypatch.setattr(progress, 'SECONDS_PER_CALL', 0.0)  # one step per call
    calls.clear()
    return lambda: calls.append(0) or len(calls) == step

  stopping = stop_at(14)
  stopping.nothing_to_save = contextlib.nullcontext
  with pytest.raises(Stopped, match='step 14 of 30'):
    train.train(_config('never'), _dataset(lazy=True), tmp_path / 'stopped', stopping=stopping)
  train.train(_config('never'), _dataset(lazy=True), tmp_path / 'stopped')
  expected = _checkpoint(tmp_path / 'resident')
  for name in ('streamed', 'stopped'):
    jax.tree.map(np.testing.assert_array_equal, _checkpoint(tmp_path / name), expected)


def test_an_image_that_cannot_be_read_ends_training_after_saving(tmp_path):
  """The error names it; after it is replaced, the same command continues."""
  good = np.random.default_rng(85).integers(0, 256, (85, 6, 6, 1), np.uint8)
  order = feed.epoch_indices(85, 8, 0, 0)
  broken = int(order[7, 3])

  def decode(index):
    if index == broken and bad:
      raise UnreadableError('cat/7.jpg', 'is a PDF document')
    return good[index]

  bad = True
  config = _config('never')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(feed, 'CHUNK_BYTES', 2 * 8 * 36)
    patch.setattr(drawings, 'measure', lambda _: None)  # it would read all images of so small a set
    with pytest.raises(UsageError, match=r'1 of 85 images in .* cannot be used: cat/7.jpg is a PDF document'):
      train.train(config, _dataset(True, decode), tmp_path)
    assert _checkpoint(tmp_path)[1] == 7  # the chunk of the steps 7 and 8 was not there
    bad = False
    train.train(config, _dataset(True, decode), tmp_path)
  assert _checkpoint(tmp_path)[1] == 30
