"""Arrays about a large set that are kept in the user's cache, so that a later start need not find them again.

Nothing is executed when an index is read. One that is stale or damaged in any way counts as missing.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cnn_jax import UsageError, files
from cnn_jax.data import cache

_VERSION = 1
_HEADER = 'header'  # the array that holds the fingerprint and the names of the others


class Index:
  """The arrays of one set and some settings, a file in the cache.

  Args:
    location: identifies the set, wherever its files lie.
    settings: JSON values; what else the arrays depend on, except for the state of the files.
    fingerprint: identifies the state of the set's files; an index with another one is stale.
  """

  def __init__(self, location: str, settings: Sequence[Any], fingerprint: str):
    self._fingerprint = fingerprint
    self._file: pathlib.Path | None = None
    with contextlib.suppress(UsageError):  # without a home directory nothing is kept
      key = json.dumps([location, *settings]).encode()
      self._file = files.cache_dir() / f'index-v{_VERSION}-{hashlib.sha256(key).hexdigest()[:32]}.npz'

  def read(self) -> dict[str, np.ndarray] | None:
    """Returns the arrays that `write` was given; None if they are missing, stale or damaged."""
    if self._file is None:
      return None
    try:
      with files.open_regular(self._file) as stream, np.load(stream, allow_pickle=False) as found:
        fingerprint, *names = found[_HEADER].tolist()
        if fingerprint != self._fingerprint:
          return None
        arrays = {name: found[name] for name in names}
    except Exception:  # a damaged file may hold anything, and its readers raise nearly anything
      return None
    with contextlib.suppress(OSError):
      os.utime(self._file)  # what was not used for the longest time is removed first
    return arrays

  def remove(self) -> None:
    """Removes the index, because it was found to be wrong."""
    if self._file is not None:
      with contextlib.suppress(OSError):
        self._file.unlink()

  def write(self, **arrays: np.ndarray) -> None:
    """Replaces the index; if the disk is full or read-only, the next start finds the arrays again.

    Args:
      arrays: of any shape; of numbers, or of strings of a fixed length. The name `header` is taken.
    """
    if self._file is None:
      return
    with contextlib.suppress(OSError):
      self._file.parent.mkdir(parents=True, exist_ok=True)
      if cache.make_room(self._file, sum(array.nbytes for array in arrays.values())):
        with files.open_atomically(self._file, private=True) as stream:
          np.savez(stream, allow_pickle=False, **{_HEADER: np.array([self._fingerprint, *arrays])}, **arrays)
