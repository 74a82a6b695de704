"""The cache of compiled programs: JAX's, with files that are checked, replaced if they are damaged, and never a reason to fail.

JAX compiles again if it cannot read a file of its cache, but never replaces that file, and prints a warning per program
at each start. A flipped bit it may not notice at all.
"""

import contextlib
import secrets
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any


def warn(path: Any, reason: str | None) -> None:
  """Says that a directory cannot keep compiled programs, and why."""
  shown = str(path).encode(errors='backslashreplace').decode()  # it may not be UTF-8
  print(f'warning: compiled programs are not kept in {shown}: {reason}.', file=sys.stderr)


def check_files() -> None:
  """Makes JAX check the files of its cache; does nothing if this version of JAX has no such place."""
  with contextlib.suppress(ImportError, AttributeError):
    from jax._src import compilation_cache

    make = compilation_cache.get_file_cache
    if not isinstance(make, _Maker):
      compilation_cache.get_file_cache = _Maker(make)
      warnings.filterwarnings('ignore', 'Error reading persistent compilation cache entry')  # it is replaced


class _Maker:
  """Makes JAX's cache of a directory, checked; none if the directory cannot be made."""

  def __init__(self, make: Any):
    self._make = make

  def __call__(self, path: str) -> tuple[Any, str] | None:
    try:
      made = self._make(path)
    except OSError as error:
      warn(path, error.strerror)
      return None
    return made and (_Checked(made[0], Path(path)) if '://' not in path else made[0], made[1])


class _Checked:
  """A cache whose files have a checksum beside them; what is damaged counts as missing.

  Args:
    cache: of JAX.
    path: its directory.
  """

  def __init__(self, cache: Any, path: Path):
    self._cache, self._path = cache, path
    self._given: set[str] = set()
    self._warned = False

  def get(self, key: str) -> bytes | None:
    """The contents of a file; None if there is no such file, or it is damaged or unreadable."""
    try:
      value = self._cache.get(key)
      if value is not None and self._sum(key) not in (None, _checksum(value)):
        value = None
        self._remove(key)
    except OSError:
      return None
    if value is not None:
      self._given.add(key)
    return value

  def put(self, key: str, value: bytes) -> None:
    """Writes a file. One that `get` has returned before could not be used, and is replaced."""
    try:
      if key in self._given:
        self._remove(key)
      temporary = self._path / f'.{secrets.token_hex(8)}.tmp'
      try:
        temporary.write_text(_checksum(value))
        temporary.replace(self._path / f'{key}-sum')
        self._cache.put(key, value)
      finally:
        temporary.unlink(missing_ok=True)
    except OSError as error:
      with contextlib.suppress(OSError):
        self._remove(key)  # half a file
      if not self._warned:
        self._warned = True
        warn(self._path, error.strerror)

  def clear(self) -> None:
    self._given.clear()

  def _sum(self, key: str) -> str | None:
    try:
      return (self._path / f'{key}-sum').read_text()
    except FileNotFoundError:  # written by JAX alone
      return None
    except (OSError, ValueError):
      return ''

  def _remove(self, key: str) -> None:
    for suffix in ('cache', 'sum'):
      (self._path / f'{key}-{suffix}').unlink(missing_ok=True)


def _checksum(value: bytes) -> str:
  return f'{zlib.crc32(value):08x} {len(value)}'
