"""The decoded copy of a set: never wrong pixels or labels, never in the way, and no more disk or work than needed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from cnn_jax import UsageError
from cnn_jax.data import cache, decode, images, load_dataset
from cnn_jax.data.lazy import LazyImages
from tests.datasets import settings
from tests.faults.tools import ROOT, wait_for, write_photographs

pytestmark = pytest.mark.usefixtures('offline')


@pytest.fixture
def cached(tmp_path, monkeypatch):
  """Loads a folder, and returns the set and how many images were decoded; every copy is kept."""
  decoded = []
  read_image = images.read_image
  monkeypatch.setattr(images, 'read_image', lambda *a, **k: (decoded.append(1), read_image(*a, **k))[1])
  monkeypatch.setattr(decode, 'MIN_CACHED_SECONDS', -1)
  write_photographs(tmp_path / 'set', ('bee', 'cat'))

  def load(directory='set', **fields):
    decoded.clear()
    return load_dataset(settings('folder', dir=str(tmp_path / directory), **fields)), len(decoded)

  return load


def copies(tmp_path):
  return sorted((tmp_path / 'cache' / 'cnn_jax').glob('decoded-*'))


def contents(dataset):
  """Pixels and class of each file."""
  splits = (dataset.train, dataset.validation, dataset.test)
  return {
    name: (image.tobytes(), dataset.class_names[label])
    for split in splits
    for image, label, name in zip(split.images, split.labels, split.names, strict=True)
  }


def test_labels_do_not_come_from_the_copy(cached, tmp_path):
  before, _ = cached()
  write_photographs(tmp_path / 'other', ('ant',), seed=5)
  shutil.move(tmp_path / 'other' / 'ant', tmp_path / 'set' / 'ant')
  after, _ = cached()
  assert all(name.split('/')[0] == label for name, (_, label) in contents(after).items())
  assert contents(before).items() <= contents(after).items()
  (tmp_path / 'set' / 'ant').rename(tmp_path / 'set' / 'zebra')
  renamed, _ = cached()
  assert all(name.split('/')[0] == label for name, (_, label) in contents(renamed).items())


@pytest.mark.parametrize('way', ['rename', 'copy'])
def test_two_exchanged_files_of_equal_size_and_time_are_noticed(cached, tmp_path, way):
  one, other = tmp_path / 'set' / 'cat' / '000.bmp', tmp_path / 'set' / 'cat' / '001.bmp'
  for path, level in ((one, 10), (other, 200)):
    Image.new('RGB', (16, 16), (level, 0, level)).save(path)
    os.utime(path, (1e9, 1e9))
  before = contents(cached()[0])
  if way == 'rename':
    one.rename(tmp_path / 'x')
    other.rename(one)
    (tmp_path / 'x').rename(other)
  else:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
  os.utime(one, (1e9, 1e9))
  os.utime(other, (1e9, 1e9))
  after = contents(cached()[0])
  assert after['cat/000.bmp'] == before['cat/001.bmp']
  assert after['cat/001.bmp'] == before['cat/000.bmp']


def test_one_copy_serves_every_way_to_split(cached, tmp_path):
  first, calls = cached()
  assert calls == 41
  for fields in ({'split_seed': 1}, {'validation': 0.3}, {'test': 0.4, 'split_seed': 9}, {'on_bad_image': 'skip'}):
    dataset, calls = cached(**fields)
    assert calls == 0
    assert contents(dataset) == contents(first)
  assert len(copies(tmp_path)) == 1


def test_copies_of_changed_files_are_removed(cached, tmp_path):
  cached()
  cached(image_size=8)
  assert len(copies(tmp_path)) == 2
  (tmp_path / 'cache' / 'cnn_jax' / 'decoded-v1-0123.npz').write_bytes(b'of an earlier version')
  (tmp_path / 'set' / 'cat' / '003.png').unlink()
  cached()
  assert len(copies(tmp_path)) == 1


def test_the_copies_that_were_not_used_for_longest_are_removed_first(cached, tmp_path, monkeypatch):
  for number in range(4):
    write_photographs(tmp_path / f'set{number}', seed=number)
  cached('set0')
  size = copies(tmp_path)[0].stat().st_size
  monkeypatch.setattr(cache, 'MAX_BYTES', 3 * size)
  for number in (1, 2):
    cached(f'set{number}')
  for age, path in enumerate(sorted(copies(tmp_path), key=lambda path: path.stat().st_mtime_ns)):
    os.utime(path, (1e9 + age, 1e9 + age))
  assert cached('set0')[1] == 0  # now the newest
  cached('set3')
  assert sum(path.stat().st_size for path in copies(tmp_path)) <= 3 * size
  assert cached('set0')[1] == 0 and cached('set3')[1] == 0
  assert cached('set1')[1] == 41


def test_a_set_that_exceeds_the_limit_is_not_kept(cached, tmp_path, monkeypatch):
  monkeypatch.setattr(cache, 'MAX_BYTES', 1000)
  assert cached()[1] == 41
  assert copies(tmp_path) == []


@pytest.mark.faults
def test_any_flipped_bit_is_noticed_and_the_copy_replaced(cached, tmp_path):
  """Every bit of the header and the end, and many of the pixels: the right pixels, and a whole copy afterwards."""
  expected = contents(cached()[0])
  (file,) = copies(tmp_path)
  whole = file.read_bytes()
  header = whole.index(b'\n') + 1
  rng = np.random.default_rng(0)
  places = [*range(8 * header), *range(8 * len(whole) - 32, 8 * len(whole)), *rng.integers(0, 8 * len(whole), 200)]
  arguments = ('here', [1], json.loads(whole[: header - 1])['fingerprint'], np.arange(40))
  for place in map(int, places):
    damaged = bytearray(whole)
    damaged[place // 8] ^= 1 << place % 8
    other = cache.Copy(*arguments)
    other._file.write_bytes(damaged)
    assert other.read() is None, place
  for place in rng.choice(places, 12):
    damaged = bytearray(whole)
    damaged[place // 8] ^= 1 << place % 8
    file.write_bytes(damaged)
    dataset, calls = cached()
    assert (contents(dataset), calls) == (expected, 41)
    assert cached()[1] == 0


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'\n',
    b'{"a": ' * 5000,
    b'[]\n',
    b'{"arrays": {"images": ["|u1", [99999999999, 9]]}, "fingerprint": 1, "facts": {}}\n',
    b'{"arrays": {"images": ["|O", [1]]}, "fingerprint": "", "facts": {}}\n' + bytes(12),
    b'\xff' * 3000,
  ],
)
def test_foreign_contents_count_as_missing(cached, tmp_path, content):
  cached()
  (file,) = copies(tmp_path)
  file.write_bytes(content)
  assert cached()[1] == 41
  assert cached()[1] == 0


def test_pipes_and_links_in_the_cache_do_no_harm(cached, tmp_path):
  cached()
  (file,) = copies(tmp_path)
  file.unlink()
  os.mkfifo(file)
  assert cached()[1] == 41
  victim = tmp_path / 'victim'
  victim.write_text('mine')
  (file,) = copies(tmp_path)
  file.unlink()
  file.symlink_to(victim)
  cached()
  assert victim.read_text() == 'mine' and not file.is_symlink()


def test_bad_files_are_remembered_with_the_copy(cached, tmp_path):
  (tmp_path / 'set' / 'cat' / 'bad.png').write_bytes(b'')
  with pytest.raises(UsageError, match='1 of 41 images .*cat/bad.png is empty'):
    cached()
  first, calls = cached(on_bad_image='skip')
  assert calls == 0
  assert first.skipped == (('cat/bad.png', 'is empty'),)
  again, _ = cached(on_bad_image='skip', split_seed=3)
  assert again.skipped == first.skipped
  assert contents(first) == contents(again)
  assert 'cat/bad.png' not in contents(first)


# Several processes --------------------------------------------------------------------------------

_LOAD = """
import sys, time
from cnn_jax.data import decode, images, load_dataset
from tests.datasets import settings
read_image, calls = images.read_image, []
images.read_image = lambda *a, **k: (calls.append(1), time.sleep(float(sys.argv[2])), read_image(*a, **k))[-1]
decode.MIN_CACHED_SECONDS = -1
load_dataset(settings('folder', dir=sys.argv[1]))
print(len(calls))
"""


def start_loading(directory, seconds):
  return subprocess.Popen(
    [sys.executable, '-c', _LOAD, str(directory), str(seconds)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.faults
def test_of_several_workers_one_decodes(tmp_path):
  write_photographs(tmp_path / 'set', count=60)
  workers = [start_loading(tmp_path / 'set', 0.05) for _ in range(3)]
  done = [worker.communicate(timeout=120) for worker in workers]
  assert [worker.returncode for worker in workers] == [0, 0, 0], done
  # The image that tells the size is read by each that finds no copy.
  assert sorted(int(stdout) for stdout, _ in done)[-1] == 121
  assert sum(int(stdout) for stdout, _ in done) <= 123
  assert any('Waiting for another process' in stderr for _, stderr in done)


@pytest.mark.faults
@pytest.mark.parametrize('number', [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_that_stops_does_not_stop_the_others(tmp_path, cached, monkeypatch, number):
  monkeypatch.setattr(cache, 'SILENT_SECONDS', 3)
  worker = start_loading(tmp_path / 'set', 0.5)
  try:
    wait_for(lambda: list((tmp_path / 'cache' / 'cnn_jax').glob('.*.lock')))
    time.sleep(1)
    worker.send_signal(number)
    start = time.monotonic()
    _, calls = cached()
    assert calls == 41
    assert time.monotonic() - start < 10
  finally:
    worker.kill()
    worker.communicate()


def test_a_holder_that_is_alive_is_waited_for(tmp_path, monkeypatch):
  monkeypatch.setattr(cache, 'SILENT_SECONDS', 0.4)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  copy = cache.Copy('here', [], 'f', np.arange(1))
  ended = []

  def hold():
    with copy.lock() as lock:
      held.set()
      for _ in range(12):
        time.sleep(0.1)
        lock._touched = 0.0
        lock.touch()
      ended.append(True)

  held, thread = threading.Event(), threading.Thread(target=hold)
  thread.start()
  held.wait()
  with copy.lock() as lock:
    assert lock.waited and ended
  thread.join()


# Sets that are too large to keep ------------------------------------------------------------------


def test_an_array_of_lazy_images_is_made_in_place_and_lists_all_bad_files(tmp_path):
  write_photographs(tmp_path / 'set', count=30)
  whole = load_dataset(settings('folder', dir=str(tmp_path / 'set')))
  lazy = load_dataset(settings('folder', dir=str(tmp_path / 'set'), resident='never'))
  assert isinstance(lazy.train.images, LazyImages)
  np.testing.assert_array_equal(np.asarray(lazy.train.images), whole.train.images)
  bad = [name for name in lazy.train.names if name.startswith('dog')][:3]
  for name in bad:
    (tmp_path / 'set' / name).write_bytes(b'%PDF-1.7')
  with pytest.raises(UsageError, match=f'3 of {len(lazy.train)} images') as error:
    np.asarray(lazy.train.images)
  assert all(f'{name} is a PDF document' in str(error.value) for name in bad)
  left = load_dataset(settings('folder', dir=str(tmp_path / 'set'), on_bad_image='skip', resident='never'))
  assert sorted(name for name, _ in left.skipped) == sorted(bad)
  assert np.asarray(left.train.images).shape[0] == len(left.train.labels) == len(left.train.names)


@pytest.mark.faults
def test_a_set_above_the_limit_takes_no_more_memory_than_one_below_it(tmp_path):
  code = (
    'import resource, sys, numpy as np\n'
    'from cnn_jax.data import load_dataset\n'
    'from tests.datasets import settings\n'
    "config = settings('folder', dir=sys.argv[1], image_size=512, channels=3, resident=sys.argv[2])\n"
    'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
    'array = np.asarray(load_dataset(config).train.images)\n'
    'print(array.nbytes, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))\n'
  )
  write_photographs(tmp_path / 'set', count=200, size=(32, 32))
  measured = []
  for resident in ('always', 'never'):
    done = subprocess.run(
      [sys.executable, '-c', code, str(tmp_path / 'set'), resident],
      cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    measured.append(list(map(int, done.stdout.split())))
  (size, below), (_, above) = measured
  assert size > 200e6
  assert above < 1.15 * below
