"""The file system: whole or nothing, no planted link followed, nothing waited for."""

import errno
import json
import os
import pathlib
import stat
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import UsageError, files
from tests.helpers import largest_file

# --- writing


def test_contents_are_replaced_and_nothing_else_is_left(tmp_path):
  path = tmp_path / ('ä' * 120)  # 240 bytes; a name may have 255
  for contents, expected in (('å\n', b'\xc3\xa5\n'), (b'\0\xff', b'\0\xff'), ('', b'')):
    files.write_atomically(path, contents)
    assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_permissions_of_an_ordinary_one(tmp_path):
  (tmp_path / 'ordinary').write_text('')
  files.write_atomically(tmp_path / 'ours', '')
  assert (tmp_path / 'ours').stat().st_mode == (tmp_path / 'ordinary').stat().st_mode
  before = os.umask(0o077)
  try:
    files.write_atomically(tmp_path / 'private', '')
  finally:
    os.umask(before)
  assert stat.S_IMODE((tmp_path / 'private').stat().st_mode) == 0o600
  with files.open_atomically(tmp_path / 'ours', private=True) as file:
    file.write(b'x')
  assert stat.S_IMODE((tmp_path / 'ours').stat().st_mode) == 0o600


def test_a_link_in_place_of_the_file_is_replaced(tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('precious')
  (tmp_path / 'result.json').symlink_to(victim)
  files.write_atomically(tmp_path / 'result.json', 'new')
  assert victim.read_text() == 'precious'
  assert (tmp_path / 'result.json').read_text() == 'new'
  assert not (tmp_path / 'result.json').is_symlink()


def test_a_planted_temporary_is_not_followed(tmp_path, monkeypatch):
  victim = tmp_path / 'victim'
  victim.write_text('precious')
  monkeypatch.setattr(files.secrets, 'token_hex', lambda _: 'guessed')
  (tmp_path / '.result.json.guessed.tmp').symlink_to(victim)
  with pytest.raises(FileExistsError):
    files.write_atomically(tmp_path / 'result.json', 'new')
  assert victim.read_text() == 'precious'
  assert (tmp_path / '.result.json.guessed.tmp').is_symlink()  # it is not ours to remove
  assert not (tmp_path / 'result.json').exists()


def no_space(*_):
  raise OSError(errno.ENOSPC, 'No space left on device')


def killed(*_):
  raise KeyboardInterrupt


@pytest.mark.parametrize(('name', 'failure'), [('fsync', no_space), ('replace', no_space), ('fsync', killed)])
def test_a_failed_write_leaves_the_old_contents_and_nothing_else(tmp_path, monkeypatch, name, failure):
  path = tmp_path / 'result.json'
  files.write_atomically(path, 'old')
  with monkeypatch.context() as patch:
    patch.setattr(os, name, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
      files.write_atomically(path, 'new')
  with largest_file(1000), pytest.raises(OSError, match='File too large'):
    files.write_atomically(path, 'x' * 2000)
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]
  with pytest.raises(FileNotFoundError):
    files.write_atomically(tmp_path / 'missing' / 'file', '')


def test_many_threads_may_write_one_file(tmp_path):
  contents = [str(i) * 100_000 for i in range(8)]
  threads = [threading.Thread(target=files.write_atomically, args=(tmp_path / 'file', text)) for text in contents]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (tmp_path / 'file').read_text() in contents
  assert len(list(tmp_path.iterdir())) == 1


def test_sync_waits_for_files_and_directories_and_reports_a_bad_disk(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('x')
  files.sync(tmp_path / 'file')
  files.sync(tmp_path)

  def fail(code):
    def fsync(_):
      raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, 'fsync', fsync)

  fail(errno.EINVAL)  # a file system that cannot sync directories
  files.sync(tmp_path)
  fail(errno.EIO)
  with pytest.raises(OSError, match='Input/output error'):
    files.sync(tmp_path)


# --- reading


def test_only_regular_files_are_opened(tmp_path):
  (tmp_path / 'file').write_bytes(b'x')
  (tmp_path / 'link').symlink_to(tmp_path / 'file')
  os.mkfifo(tmp_path / 'pipe')
  for name in ('file', 'link'):
    with files.open_regular(tmp_path / name) as file:
      assert file.read() == b'x'
  for path in (tmp_path / 'pipe', tmp_path, pathlib.Path('/dev/zero')):
    with pytest.raises(OSError, match='Not a regular file'):
      files.open_regular(path)


def test_json_comes_back(tmp_path):
  assert files.read_json(tmp_path / 'missing') is None
  value = {'a': [1, 2.5, None, 'å'], 'b': {'c': True}}
  (tmp_path / 'file').write_text(json.dumps(value))
  assert files.read_json(tmp_path / 'file') == value


@pytest.mark.parametrize(
  ('contents', 'message'),
  [
    (b'', 'is not JSON'),
    (b'{"a": 1', 'is not JSON'),
    (b'{"a": \xff}', 'is not JSON'),
    (b'{"a": ' + b'9' * 5000 + b'}', 'is not JSON'),
    (b'[1]', 'does not hold a JSON object'),
    (b'null', 'does not hold a JSON object'),
    (b'{"a": ' + b'[' * 32 + b']' * 32 + b'}', 'does not hold a JSON object of at most 32 levels'),
    (b'{"a":' * 200_000 + b'1' + b'}' * 200_000, 'does not hold a JSON object of at most 32 levels'),
    (b'{"a": 1, "b": {"c": 2, "c": 3}}', 'is not JSON .a field is there twice.'),
  ],
  ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_what_is_no_small_json_object_is_one_line(tmp_path, contents, message):
  path = tmp_path / 'config.json'
  path.write_bytes(contents)
  with pytest.raises(UsageError, match=f'^{path} {message}.*; restore a copy or use another workdir.$'):
    files.read_json(path)


def test_json_in_a_pipe_a_device_or_a_folder_is_one_line(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for path in (tmp_path / 'pipe', tmp_path, '/dev/zero'):
    with pytest.raises(UsageError, match=f'^cannot read {path}: Not a regular file; restore a copy.*$'):
      files.read_json(path)


def test_a_large_file_is_one_line(tmp_path):
  (tmp_path / 'config.json').write_bytes(b'{"a": "' + b'x' * 2**24 + b'"}')
  with pytest.raises(UsageError, match=r'It has more than 16,777,216 bytes; try another\.$'):
    files.read_json(tmp_path / 'config.json', advice='try another')


def test_plain_values():
  value = {
    'number': np.float32(0.1), 'nan': float('nan'), 'device': jnp.int32(7), 'tuple': ('a', None),
    'array': np.array([[1.0, np.inf]]), 'true': np.True_, 3: {0: -float('inf')},
  }  # fmt: skip
  assert files.plain(value) == {
    'number': float(np.float32(0.1)), 'nan': None, 'device': 7, 'tuple': ['a', None],
    'array': [[1.0, None]], 'true': True, '3': {'0': None},
  }  # fmt: skip
  json.dumps(files.plain(value), allow_nan=False)


# --- places


def test_the_cache_directory(monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', '/a/cache')
  assert files.cache_dir() == pathlib.Path('/a/cache/cnn_jax')
  monkeypatch.setenv('HOME', '/home/her')
  for value in ('', 'relative'):
    monkeypatch.setenv('XDG_CACHE_HOME', value)
    assert files.cache_dir() == pathlib.Path('/home/her/.cache/cnn_jax')

  def homeless():
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.setattr(pathlib.Path, 'home', homeless)
  with pytest.raises(UsageError, match='there is no home directory for the cache; set XDG_CACHE_HOME'):
    files.cache_dir()
