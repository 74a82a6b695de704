"""Workdirs as places: a new one, the one of a seed, owning one, and errors of writing there."""

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import cnn_jax
from cnn_jax import UsageError, files

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
  """Makes a workdir, with its parents, and owns it while the context lasts.

  The lock is on the file `.lock`, which holds the number of the last owner. The kernel releases it if the process dies.

  Args:
    workdir: of the run.

  Raises:
    UsageError: another process owns the workdir, or it cannot be written; its path is not UTF-8, which the files of a
      checkpoint need; or the system has no such locks.
  """
  if fcntl is None:
    raise UsageError(cnn_jax.SYSTEMS)
  path = Path(workdir)
  if not files.is_utf8(path):
    raise UsageError(f'the path of the workdir {path} is not UTF-8; use another --workdir.')
  with contextlib.ExitStack() as stack:
    with writing(path):
      path.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(os.fdopen(_open_lock(path / '.lock'), 'r+', errors='replace'))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        owner = re.match(r'\d{1,10}$', file.read(11).strip())
        raise UsageError(
          f'the workdir {path} is in use by {f"process {owner[0]}" if owner else "another process"}; '
          'wait for it, stop it or use another --workdir.'
        ) from None
      file.truncate(0)
      file.write(f'{os.getpid()}\n')
      file.flush()
    yield


def new_workdir(stem: str | os.PathLike) -> str:
  """Makes the workdir STEM-TIME, or STEM-TIME-2 and so on if other runs have started in the same second.

  Raises:
    UsageError: it cannot be made.
  """
  name, number = f'{stem}-{time.strftime("%Y%m%d-%H%M%S")}', 1
  while True:
    path = Path(name if number == 1 else f'{name}-{number}')
    with writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      try:
        path.mkdir()
        return str(path)
      except FileExistsError:
        number += 1


def seed_workdir(workdir: str | os.PathLike, seed: int) -> Path:
  """The workdir of one seed below the workdir of several."""
  return Path(workdir) / f'seed_{seed:05}'


def place(workdir: str | os.PathLike) -> tuple[int, int] | None:
  """What tells a workdir from another one that has its path later; None if there is no such directory."""
  try:
    found = os.stat(workdir)
  except (FileNotFoundError, NotADirectoryError):
    return None
  return found.st_dev, found.st_ino


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Turns errors of the file system inside the block into one that names a path.

  Args:
    path: that the block writes to.

  Raises:
    UsageError: the path cannot be written.
  """
  try:
    yield
  except OSError as error:
    raise UsageError(f'cannot write to {path}: {error.strerror}; correct that or use another --workdir.') from error


def _open_lock(path: Path) -> int:
  """Opens the lock file for reading and writing; never a link, which could make this process truncate any file."""
  try:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
  except OSError as error:
    if error.errno == errno.ELOOP:
      raise UsageError(f'{path} is a link; remove it or use another --workdir.') from error
    raise
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise UsageError(f'{path} is not a regular file; remove it or use another --workdir.')
  return descriptor
