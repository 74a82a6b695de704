"""The file system: whole-or-nothing writes, guarded reads, JSON, the cache directory, and the files below a folder."""

import contextlib
import errno
import io
import json
import math
import os
import pathlib
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
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


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
  """Reads a JSON object, from a file that anybody may have written.

  Args:
    path: a regular file of at most 16 MiB, nested at most 32 levels deep.

  Returns:
    The object; None if there is no such file.

  Raises:
    UsageError: the file cannot be read, or is not such an object.
  """
  try:
    with open_regular(path) as file:
      text = file.read(_MAX_JSON_BYTES + 1)
    if len(text) > _MAX_JSON_BYTES:
      raise UsageError(f'{path} has more than {_MAX_JSON_BYTES:,} bytes; restore a copy or use another workdir.')
    value = json.loads(text)
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}; give the workdir of a run.') from error
  except ValueError as error:
    raise UsageError(f'{path} is not JSON ({error}); restore a copy or use another workdir.') from error
  except RecursionError:
    value = None
  if not isinstance(value, dict) or _is_deeper(value, _MAX_JSON_DEPTH):
    raise UsageError(
      f'{path} does not hold a JSON object of at most {_MAX_JSON_DEPTH} levels; restore a copy or use another workdir.'
    )
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


def walk(path: str, suffixes: Sequence[str]) -> Iterator[str]:
  """Yields the files below a folder, sorted, and yields any other path unchanged.

  Hidden entries, files with other suffixes and links to folders are skipped. Links to missing files are yielded, and so
  is a folder that contains no such file or that cannot be listed, so that whoever reads them reports the reason. Memory
  holds the names of one folder and its parents only.

  Args:
    path: of a folder, or of anything else.
    suffixes: lower-case endings of the wanted files, such as '.png'; the case of a file's own does not matter.
  """
  if not os.path.isdir(path):
    yield path
    return
  found = False
  folders = [_list(path, tuple(suffixes))]
  while folders:
    entry, is_folder = next(folders[-1], (None, False))
    if entry is None:
      folders.pop()
    elif is_folder:
      folders.append(_list(entry, tuple(suffixes)))
    else:
      found = True
      yield entry
  if not found:
    yield path


def _list(folder: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
  """The wanted entries of a folder, sorted, and whether each is a folder itself."""
  try:
    with os.scandir(folder) as entries:
      names = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries if _is_wanted(e, suffixes))
  except OSError:
    return iter([(folder, False)])
  return ((os.path.join(folder, name), is_folder) for name, is_folder in names)


def _is_wanted(entry: os.DirEntry, suffixes: tuple[str, ...]) -> bool:
  if entry.name.startswith('.'):
    return False
  if entry.is_dir(follow_symlinks=False):
    return True
  if not entry.name.lower().endswith(suffixes):
    return False
  try:
    # A link that leads nowhere is yielded, so that whoever reads it reports the reason.
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
  except OSError:  # such as a link to itself
    return True


def _is_deeper(value: Any, depth: int) -> bool:
  """Whether dicts and lists are nested deeper than a number of levels; not recursive, since they may be."""
  level = [value]
  for _ in range(depth):
    children = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
    level = [child for items in children for child in items]
  return any(isinstance(item, dict | list) for item in level)
