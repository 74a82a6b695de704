"""The file system: whole-or-nothing writes, guarded reads, JSON, and the cache directory."""

import contextlib
import errno
import io
import json
import math
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from typing import IO, Any

from cnn_jax import UsageError

_MAX_JSON_BYTES = 2**24
_MAX_JSON_DEPTH = 32


def write_atomically(path: str | os.PathLike, contents: bytes | str) -> None:
  """Writes a file so that a reader, or a crash at any moment, finds the old contents or the new ones, complete.

  Args:
    path: see `open_atomically`.
    contents: text is encoded as UTF-8.

  Raises:
    OSError: the file cannot be written; nothing is left behind.
  """
  with open_atomically(path) as file:
    file.write(contents.encode() if isinstance(contents, str) else contents)


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike, *, private: bool = False) -> Iterator[IO[bytes]]:
  """Opens a new file that replaces `path` when the block ends; if the block raises, nothing changes.

  The contents go to a new file with a random name beside `path` and are on the disk before it is renamed.

  Args:
    path: where to write. A file or a link that is there is replaced; a link is never followed.
    private: whether only the owner may read the file. Otherwise it gets the permissions of an ordinary file.

  Raises:
    OSError: the file cannot be written; nothing is left behind.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name[:50]}.{secrets.token_hex(8)}.tmp')
  # O_EXCL fails if the name exists, even as a link. The kernel applies the umask to the mode.
  descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
  try:
    with open(descriptor, 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


def check_output(path: str | os.PathLike) -> None:
  """Checks that a command can write its output to a path, before the work for it is done.

  A link is allowed: the file replaces it, and what it points to stays as it is.

  Raises:
    UsageError: the folder is missing or cannot be written, or there is something that is no file, such as a folder, a
      device or a pipe.
  """
  path = pathlib.Path(path)
  try:
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
      raise UsageError(f'cannot write {path}: it is there and is not a file; choose another --output.')
  except FileNotFoundError:
    pass
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror}; choose another --output.') from error
  if not path.parent.is_dir():
    raise UsageError(f'cannot write {path}: its folder does not exist; create it or choose another --output.')
  if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
    raise UsageError(f'cannot write {path}: its folder is read-only; choose another --output.')


def open_regular(path: str | os.PathLike) -> io.BufferedReader:
  """Opens a regular file for reading.

  Raises:
    OSError: the file cannot be read, or is a pipe, a device or a directory, from which a read might never return.
  """
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise OSError(errno.EINVAL, 'Not a regular file', os.fspath(path))
  return open(descriptor, 'rb')


def read_limited(path: str | os.PathLike, limit: int = _MAX_JSON_BYTES) -> bytes:
  """Reads a regular file.

  Raises:
    OSError: the file cannot be read, is not regular, or has more than `limit` bytes.
  """
  with open_regular(path) as file:
    contents = file.read(limit + 1)
  if len(contents) > limit:
    raise OSError(errno.EFBIG, f'It has more than {limit:,} bytes', os.fspath(path))
  return contents


def read_json(path: str | os.PathLike, advice: str = 'restore a copy or use another workdir') -> dict[str, Any] | None:
  """Reads a JSON object, from a file that anybody may have written.

  Args:
    path: a regular file of at most 16 MiB, nested at most 32 levels deep.
    advice: what to do about a file that cannot be read, for the message.

  Returns:
    The object; None if there is no such file.

  Raises:
    UsageError: the file cannot be read, is not such an object, or names a field twice.
  """
  try:
    value = json.loads(read_limited(path), object_pairs_hook=_without_repeats)
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}; {advice}.') from error
  except ValueError as error:
    raise UsageError(f'{path} is not JSON ({error}); {advice}.') from error
  except RecursionError:
    value = None
  if not isinstance(value, dict) or _is_deeper(value, _MAX_JSON_DEPTH):
    raise UsageError(f'{path} does not hold a JSON object of at most {_MAX_JSON_DEPTH} levels; {advice}.')
  return value


def plain(value: Any) -> Any:
  """Converts a value to what JSON can hold.

  Args:
    value: mappings, lists and tuples of strings, numbers, None, and JAX or NumPy numbers and arrays.

  Returns:
    Dicts with string keys, lists, and Python's own numbers; None in place of numbers that are not finite.
  """
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, Mapping):
    return {str(name): plain(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def sync(path: str | os.PathLike) -> None:
  """Waits until a file or a directory is on the disk; does nothing if the file system cannot do that.

  Raises:
    OSError: the disk failed.
  """
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno != errno.EINVAL:  # a file system that cannot sync directories
      raise
  finally:
    os.close(descriptor)


def cache_dir() -> pathlib.Path:
  """The directory of files that can be made again: $XDG_CACHE_HOME/cnn_jax, or ~/.cache/cnn_jax.

  Raises:
    UsageError: the user has no home directory, and the variable is not set.
  """
  base = os.environ.get('XDG_CACHE_HOME', '')
  if os.path.isabs(base):  # the XDG specification says to ignore relative paths
    return pathlib.Path(base) / 'cnn_jax'
  try:
    return pathlib.Path.home() / '.cache' / 'cnn_jax'
  except RuntimeError as error:
    raise UsageError('there is no home directory for the cache; set XDG_CACHE_HOME to a directory.') from error


def local_path(path: str | os.PathLike) -> str:
  """A path that a user gave, with `~` replaced by the home directory.

  Raises:
    UsageError: it is the address of another machine or service, or begins with the name of a user who does not exist.
  """
  path = os.fspath(path)
  if re.match(r'[a-z][a-z0-9+.-]*://', path, re.IGNORECASE):
    raise UsageError(f'{path} is not a path on this machine; copy or mount it, and give its path.')
  expanded = os.path.expanduser(path)
  if expanded.startswith('~') and not os.path.exists(path):
    raise UsageError(f'{path} begins with ~, but there is no such user or home directory; give the full path.')
  return expanded


def is_utf8(path: str | os.PathLike) -> bool:
  """Whether the full path of a file or directory is UTF-8; the C++ libraries below JAX take no other."""
  try:
    return bool(os.path.abspath(path).encode())
  except UnicodeEncodeError:
    return False


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; of a field that is there twice, readers differ in which one they take."""
  value = dict(pairs)
  if len(value) != len(pairs):
    raise ValueError('a field is there twice')
  return value


def _is_deeper(value: Any, depth: int) -> bool:
  """Whether dicts and lists are nested deeper than a number of levels; not recursive, since they may be."""
  level = [value]
  for _ in range(depth):
    children = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
    level = [child for items in children for child in items]
  return any(isinstance(item, dict | list) for item in level)
