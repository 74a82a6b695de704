"""Decoded copies of sets in the user's cache: one per set and settings, checked, locked between processes, bounded.

A copy is a line of JSON, the arrays that the line describes, and a checksum of all that. Nothing is executed when it is
read. A copy that is stale or damaged in any way counts as missing, and the next one replaces it.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

from cnn_jax import UsageError, distribute, files
from cnn_jax.progress import Line

MAX_BYTES = 20 * 2**30  # of all copies; less on a disk of under ten times as much
SILENT_SECONDS = 30.0  # after which a process that decodes but shows no sign of life is not waited for
RESIDENT_BYTES = 2**29  # larger arrays of a copy stay in its file, whose pages the system keeps in memory if it can
_VERSION = 3  # of the form, and of the rules by which pixels are read
_PIECE = 2**20  # bytes of an array that are read or written at a time, which fit into the processor's cache
_MAX_HEADER_BYTES = 2**28
_DAY = 86_400.0
_KEPT = ('decoded-', 'index-')  # how the names of the files begin that have their room in common
_UNFINISHED = tuple(f'.{begin}' for begin in _KEPT)

Arrays = Mapping[str, np.ndarray]


class Rows:
  """An array of a copy whose rows are read from the file when they are indexed; see `RandomAccessImages`.

  Args:
    descriptor: of the file, which is duplicated, so that the copy may be replaced in the meantime.
    start: where the array begins in the file.
    places: of the rows in the file.
    shape: of all rows.
    dtype: of the array.
  """

  def __init__(self, descriptor: int, start: int, places: np.ndarray, shape: tuple[int, ...], dtype: np.dtype):
    self._descriptor = os.dup(descriptor)
    weakref.finalize(self, os.close, self._descriptor)
    self._start, self._places = start, places
    self.shape, self.dtype = (len(places), *shape[1:]), dtype

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: Any) -> np.ndarray:
    places = self._places[index]
    return self._read(places.reshape(-1)).reshape(*np.shape(places), *self.shape[1:])

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return self._read(self._places).astype(dtype or self.dtype, copy=False)

  def part(self, indices: np.ndarray) -> 'Rows':
    """Returns the rows at some indices, still in the file."""
    return Rows(self._descriptor, self._start, self._places[indices], self.shape, self.dtype)

  def _read(self, places: np.ndarray) -> np.ndarray:
    found = distribute.empty((len(places), *self.shape[1:]), self.dtype)
    if not found.nbytes:
      return found
    row = found[:1].nbytes
    ends = [*(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    for first, end in itertools.pairwise([0, *ends]):
      rest = memoryview(found[first:end]).cast('B')
      position = self._start + int(places[first]) * row
      while rest:
        count = os.preadv(self._descriptor, [rest], position)
        if not count:
          raise UsageError('the decoded copy of the images has been cut off; start the command again.')
        rest, position = rest[count:], position + count
    return found


class Copy:
  """The decoded copy of a set.

  Args:
    location: identifies the set, wherever its files lie.
    settings: JSON values; the settings that change what is decoded.
    fingerprint: identifies the state of the set's files; a copy with another fingerprint is stale.
    order: the index of the example at each place of the copy. Copies are shared by all splits of a set, so this order
      must not depend on how the set is split.
  """

  def __init__(self, location: str, settings: Sequence[Any], fingerprint: str, order: np.ndarray):
    self._place, self._fingerprint, self._order = _hash(location), fingerprint, order
    self._file: pathlib.Path | None = None
    with contextlib.suppress(UsageError):  # without a home directory nothing is kept
      self._file = files.cache_dir() / f'decoded-v{_VERSION}-{self._place}-{_hash(json.dumps(settings))}'

  def read(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns the facts and arrays of the copy, large ones as `Rows`; None if it is missing, stale or damaged."""
    if self._file is None:
      return None
    try:
      with files.open_regular(self._file) as stream:
        found = _read(stream, os.fstat(stream.fileno()).st_size, self._fingerprint, self._order)
      if found:
        with contextlib.suppress(OSError):
          os.utime(self._file)  # the copies that were not used for the longest time are removed first
      return found
    except OSError:
      return None
    # A damaged header may hold anything.
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, MemoryError):
      return None

  def write(self, facts: Mapping[str, Any], arrays: Arrays) -> None:
    """Replaces the copy, and removes stale copies of the set and old ones of others; a full disk is no error.

    Args:
      facts: JSON values.
      arrays: their rows are the examples, in the order of their indices.
    """
    if self._file is None:
      return
    size = sum(array.nbytes for array in arrays.values())
    with contextlib.suppress(OSError):  # the home may be read-only: the next run decodes again
      self._file.parent.mkdir(parents=True, exist_ok=True)
      self._remove_stale()
      if not make_room(self._file, size):
        return
      with files.open_atomically(self._file, private=True) as stream:
        _write(stream, self._fingerprint, facts, arrays, self._order)

  @contextlib.contextmanager
  def lock(self) -> Iterator['Lock']:
    """Holds the right to make the copy, after waiting for a process that makes it already.

    If that process shows no sign of life, this one goes on without the right: it decodes too.
    """
    lock = Lock(self._file.with_name(f'.{self._file.name}.lock') if self._file else None)
    try:
      lock.wait()
      yield lock
    finally:
      lock.release()

  def _remove_stale(self) -> None:
    """Removes copies of the same set whose files have changed since, and those of other versions."""
    assert self._file is not None
    for path in self._file.parent.glob('decoded-*'):
      if path == self._file:
        continue
      if not path.name.startswith(f'decoded-v{_VERSION}-'):
        path.unlink(missing_ok=True)
      elif path.name.startswith(f'decoded-v{_VERSION}-{self._place}-'):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError), files.open_regular(path) as stream:
          if json.loads(stream.readline(_MAX_HEADER_BYTES))['fingerprint'] == self._fingerprint:
            continue
        path.unlink(missing_ok=True)


class Lock:
  """The right to make a copy, which ends with the process that holds it.

  Attributes:
    waited: whether another process held it.
  """

  def __init__(self, path: pathlib.Path | None):
    self._descriptor: int | None = None
    self._touched, self.waited = 0.0, False
    with contextlib.suppress(OSError):
      if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

  def wait(self) -> None:
    """Waits until the lock is free, or until its holder has shown no sign of life for a while."""
    start, told, line = time.time(), False, Line()
    while not self._try():
      self.waited = True
      assert self._descriptor is not None
      if time.time() - max(os.fstat(self._descriptor).st_mtime, start) > SILENT_SECONDS:
        line.print('The process that decodes the same images does not answer; decoding them here too.')
        self.release()
        return
      if not told and time.time() - start > 1:
        line.print('Waiting for another process, which is decoding the same images.')
        told = True
      time.sleep(0.05)

  def touch(self) -> None:
    """Shows that the holder is alive; call it often while making the copy."""
    if self._descriptor is not None and time.monotonic() - self._touched > 1:
      self._touched = time.monotonic()
      with contextlib.suppress(OSError):
        os.utime(self._descriptor)

  def release(self) -> None:
    """Gives the lock back; a second call does nothing."""
    if self._descriptor is not None:
      os.close(self._descriptor)
      self._descriptor = None

  def _try(self) -> bool:
    if self._descriptor is None:
      return True
    import fcntl  # which Windows lacks; commands say so when they start

    try:
      fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
    except OSError:  # a file system without locks
      self.release()
    return True


def make_room(file: pathlib.Path, size: int) -> bool:
  """Makes room for a decoded copy or an index; see `index.Index`.

  Those that were not used for the longest time are removed.

  Args:
    file: that will be written, in the cache.
    size: of it, in bytes.

  Returns:
    Whether there is room.

  Raises:
    OSError: the disk failed.
  """
  limit = min(MAX_BYTES, shutil.disk_usage(file.parent).total // 10)
  if size > min(limit, shutil.disk_usage(file.parent).free):
    return False
  _prune(file.parent, limit - size, file)
  return True


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]


def _write(stream: IO[bytes], fingerprint: str, facts: Mapping[str, Any], arrays: Arrays, order: np.ndarray) -> None:
  described = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
  header = json.dumps({'fingerprint': fingerprint, 'arrays': described, 'facts': facts}).encode() + b'\n'
  stream.write(header)
  checksum = zlib.crc32(header)
  for array in arrays.values():
    for places in _pieces(order, array[:1].nbytes):
      rows = np.ascontiguousarray(array[places])
      checksum = zlib.crc32(rows, checksum)
      stream.write(rows)
  stream.write(checksum.to_bytes(4, 'little'))


def _read(
  stream: IO[bytes], size: int, fingerprint: str, order: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]] | None:
  line = stream.readline(_MAX_HEADER_BYTES)
  header = json.loads(line)
  described = {name: (np.dtype(kind), tuple(shape)) for name, (kind, shape) in header['arrays'].items()}
  sizes = [kind.itemsize * math.prod(shape) for kind, shape in described.values()]
  if header['fingerprint'] != fingerprint or len(line) + sum(sizes) + 4 != size:
    return None
  if any(kind.hasobject or len(order) != shape[0] or min(shape) < 0 for kind, shape in described.values()):
    return None
  ordered = bool((order == np.arange(len(order))).all())
  checksum = zlib.crc32(line)
  arrays: dict[str, Any] = {}
  for (name, (kind, shape)), array_bytes in zip(described.items(), sizes, strict=True):
    in_file = array_bytes > RESIDENT_BYTES
    start, row_bytes = stream.tell(), kind.itemsize * math.prod(shape[1:])
    array = np.empty((0, *shape[1:]) if in_file else shape, kind)
    in_place = ordered and not in_file
    buffer = np.empty(0 if in_place else (len(next(_pieces(order, row_bytes))), *shape[1:]), kind)
    for places in _pieces(order, row_bytes):
      rows = array[places[0] : places[-1] + 1] if in_place else buffer[: len(places)]
      if rows.nbytes and stream.readinto(memoryview(rows).cast('B')) != rows.nbytes:  # type: ignore[attr-defined]
        return None
      checksum = zlib.crc32(rows, checksum)
      if not (in_place or in_file):
        array[places] = rows
    arrays[name] = Rows(stream.fileno(), start, np.argsort(order), shape, kind) if in_file else array
  return (header['facts'], arrays) if stream.read(4) == checksum.to_bytes(4, 'little') else None


def _pieces(order: np.ndarray, row_bytes: int) -> Iterator[np.ndarray]:
  """Cuts indices of rows into pieces of about `_PIECE` bytes of rows."""
  rows = max(1, _PIECE // max(1, row_bytes))
  return (order[start : start + rows] for start in range(0, len(order), rows))


def _prune(directory: pathlib.Path, limit: int, keep: pathlib.Path) -> None:
  """Removes what was not used for the longest time until the rest fits, and what stopped processes left."""
  copies = []
  for path in directory.iterdir():
    with contextlib.suppress(OSError):
      status = path.lstat()
      if path.name.startswith(_KEPT) and path != keep:
        copies.append((status.st_mtime, status.st_size, path))
      elif path.name.startswith(_UNFINISHED) and time.time() - status.st_mtime > _DAY:
        path.unlink()
  total = sum(size for _, size, _ in copies)
  for _, size, path in sorted(copies):
    if total <= limit:
      return
    with contextlib.suppress(OSError):
      path.unlink()
      total -= size
