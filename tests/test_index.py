"""Arrays in the cache: read back as they were written, or missing."""

import errno
import os
import shutil

import numpy as np
import pytest

from cnn_jax import files
from cnn_jax.data import cache
from cnn_jax.data.index import Index

pytestmark = pytest.mark.usefixtures('offline', 'no_waiting')

ARRAYS = {'numbers': np.arange(40), 'names': np.array(['a', 'bcd']), 'none': np.zeros((0, 3), np.uint8)}


def _stored():
  (file,) = files.cache_dir().glob('index-*')
  return file


def _same(found):
  assert list(found) == list(ARRAYS)
  for name, array in ARRAYS.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)


def test_arrays_are_read_back_by_the_same_key_and_fingerprint_alone():
  index = Index('/data', [1, 'x'], 'now')
  assert index.read() is None
  index.write(**ARRAYS)
  _same(index.read())
  _same(Index('/data', [1, 'x'], 'now').read())
  assert _stored().stat().st_mode & 0o777 == 0o600
  for other in (Index('/data', [1, 'x'], 'later'), Index('/data', [2, 'x'], 'now'), Index('/date', [1, 'x'], 'now')):
    assert other.read() is None
  Index('/data', [1, 'x'], 'later').write(numbers=np.zeros(1))
  assert index.read() is None
  index.remove()
  index.remove()
  assert not list(files.cache_dir().iterdir())


def test_a_damaged_index_is_missing():
  index = Index('/data', [], '')
  index.write(**ARRAYS)
  good = _stored().read_bytes()
  for place in range(0, len(good), 29):
    for damaged in (good[:place], good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :]):
      _stored().write_bytes(damaged)
      if (found := index.read()) is not None:
        _same(found)  # a byte that means nothing, such as the time of a member
  for damaged in (b'', b'\x93NUMPY', b'PK\x03\x04' + bytes(100), b'{}' * 1000):
    _stored().write_bytes(damaged)
    assert index.read() is None


def test_objects_are_never_read():
  index = Index('/data', [], '')
  index.write(**ARRAYS)
  with open(_stored(), 'wb') as stream:
    np.savez(stream, header=np.array(['', 'numbers']), numbers=np.array([{}], object))
  assert index.read() is None
  with pytest.raises(ValueError, match='[Oo]bject arrays'):
    index.write(numbers=np.array([{}], object))


def test_a_full_disk_and_a_missing_home_are_no_errors(monkeypatch):
  index = Index('/data', [], '')

  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(np, 'savez', full)
    index.write(**ARRAYS)
  assert not list(files.cache_dir().iterdir())
  with monkeypatch.context() as patch:
    patch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))
    index.write(**ARRAYS)
  assert index.read() is None
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.delenv('HOME')
  monkeypatch.setattr(os, 'getuid', lambda: 123_456)
  homeless = Index('/data', [], '')
  homeless.write(**ARRAYS)
  assert homeless.read() is None


def test_indexes_and_decoded_copies_share_their_room(monkeypatch):
  first, second = Index('/first', [], ''), Index('/second', [], '')
  first.write(**ARRAYS)
  copy = files.cache_dir() / f'decoded-v{cache._VERSION}-x-y'
  copy.write_bytes(bytes(2000))
  os.utime(copy, (1, 1))
  monkeypatch.setattr(cache, 'MAX_BYTES', 3000)
  second.write(**ARRAYS)
  assert not copy.exists() and first.read() is not None and second.read() is not None
  os.utime(first._file, (1, 1))
  monkeypatch.setattr(cache, 'MAX_BYTES', 2500)
  Index('/third', [], '').write(**ARRAYS)
  assert first.read() is None and second.read() is not None
