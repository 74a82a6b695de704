"""The image files below a folder: one listing for training, evaluation and prediction.

Hidden entries, and what operating systems and other programs leave behind (`JUNK`), are not listed. Links are followed,
to folders too, but no folder is listed twice. Nothing is opened.
"""

import collections
import dataclasses
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from cnn_jax import UsageError
from cnn_jax.data import decode
from cnn_jax.data.images import IMAGE_EXTENSIONS

# Folders of other programs, in lower case: macOS archives, Synology, fsck, the bins of Windows and QNAP, Python.
JUNK = frozenset({
  '__macosx', '@eadir', 'lost+found', '$recycle.bin', '#recycle', 'system volume information', '__pycache__',
})  # fmt: skip
_JUNK_FILES = frozenset({'thumbs.db', 'desktop.ini'})
_SUFFIXES = frozenset(IMAGE_EXTENSIONS)
_KINDS = ((stat.S_ISFIFO, 'a pipe'), (stat.S_ISSOCK, 'a socket'))


class File(NamedTuple):
  """An image file, or an entry that cannot be used.

  Attributes:
    path: the folder that was given, and the way from there.
    size: in bytes.
    stamp: from `decode.stamp`, of the file itself, through links.
    problem: why the entry cannot be used, as 'is a pipe, not a file'; '' if it can.
  """

  path: str
  size: int = 0
  stamp: tuple[int, ...] = ()
  problem: str = ''


@dataclasses.dataclass
class Passed:
  """What a listing passes over.

  Attributes:
    suffixes: number of files by lower-case suffix; '' stands for none.
    junk: folders of other programs.
    again: links to folders that are listed elsewhere.
  """

  suffixes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  junk: list[str] = dataclasses.field(default_factory=list)
  again: list[str] = dataclasses.field(default_factory=list)

  def add(self, other: 'Passed') -> None:
    """Adds what another listing passed over."""
    self.suffixes.update(other.suffixes)
    self.junk += other.junk
    self.again += other.again

  def kinds(self) -> str:
    """The numbers of files by suffix, such as '12 .heic, 1 without a suffix'; '' if there are none."""
    most = self.suffixes.most_common(10)
    parts = [f'{count:,} {suffix or "without a suffix"}' for suffix, count in most]
    rest = self.suffixes.total() - sum(count for _, count in most)
    return ', '.join(map(text, parts + ([f'{rest:,} others'] if rest else [])))

  def notes(self) -> list[str]:
    """A line for each kind of thing that was passed over."""
    notes = []
    if self.suffixes:
      notes.append(f'Files passed over, because their suffix is not that of an image: {self.kinds()}.')
    for found, what in (
      (self.junk, 'Folders passed over, because they belong to other programs or to runs'),
      (self.again, 'Links passed over, because they lead to folders that are listed already'),
    ):
      if found:
        notes.append(f'{what}: {shorten(found)}.')
    return notes


class Scan(NamedTuple):
  """The entries of one folder.

  Attributes:
    files: sorted.
    folders: the names of its sub-folders, sorted.
    lasting: whether all that stays the same until the folder itself changes. Links to folders, and entries that cannot
      be used, may change without it.
  """

  files: list[File]
  folders: list[str]
  lasting: bool = True


def scan(folder: str, passed: Passed) -> Scan:
  """Lists one folder.

  Args:
    folder: its path.
    passed: what is passed over is added to it.

  Returns:
    The files and sub-folders. A folder that cannot be listed is a file with a problem.
  """
  files, folders, prefix, lasting = [], [], os.path.join(folder, ''), True
  try:
    with os.scandir(folder) as entries:
      for entry in entries:
        name = entry.name
        if name[0] == '.':
          continue
        try:
          if entry.is_dir():
            lasting = lasting and not entry.is_symlink()
            if name.lower() in JUNK:
              passed.junk.append(prefix + name)
            else:
              folders.append(name)
            continue
          dot = name.rfind('.')
          suffix = name[dot:].lower() if dot > 0 else ''
          # A link that leads nowhere may have been a folder, which has no suffix.
          if suffix not in _SUFFIXES and not (suffix == '' and entry.is_symlink() and not os.path.exists(entry.path)):
            if name.lower() not in _JUNK_FILES:
              passed.suffixes[suffix] += 1
            continue
          status = entry.stat()
        except OSError as error:
          files.append(File(prefix + name, problem=_describe(error)))
          continue
        files.append(_check(prefix + name, status))
  except OSError as error:
    return Scan([File(folder, problem=f'cannot be listed: {error.strerror}')], [], lasting=False)
  return Scan(sorted(files), sorted(folders), lasting and not any(file.problem for file in files))


def walk(folder: str, passed: Passed, seen: set[tuple[int, int]] | None = None) -> Iterator[File]:
  """Yields the image files below a folder, and the entries that cannot be used, in the order of their names.

  A sub-folder is listed when it is reached, so that memory holds one folder and the names of its parents.

  Args:
    folder: its path.
    passed: what is passed over is added to it.
    seen: from `identify`, of folders that are listed elsewhere; those that are listed here are added.
  """
  seen = set() if seen is None else seen
  seen |= surroundings(folder)
  stack = [_merge(scan(folder, passed), folder)]
  while stack:
    item = next(stack[-1], None)
    if item is None:
      stack.pop()
    elif isinstance(item, File):
      yield item
    elif (identity := identify(item)) in seen:
      passed.again.append(item)
    else:
      seen.add(identity)
      stack.append(_merge(scan(item, passed), item))


def look(path: str) -> File | None:
  """The file at a path; None if there is none, or a folder."""
  try:
    status = os.stat(path)
  except PermissionError as error:
    return File(path, problem=_describe(error))
  except (OSError, ValueError):
    return None
  return None if stat.S_ISDIR(status.st_mode) else _check(path, status)


def expand(path: str, passed: Passed) -> Iterator[str]:
  """Yields the paths of `walk` for a folder, and any other path unchanged.

  A folder without any image is yielded itself, so that whoever reads it reports that.
  """
  if not os.path.isdir(path):
    yield path
    return
  empty = True
  for file in walk(path, passed):
    empty = False
    yield file.path
  if empty:
    yield path


def check(problems: list[File], folder: str, *, skip: bool) -> None:
  """Checks that there are no entries that cannot be used.

  Args:
    problems: these entries.
    folder: that holds them.
    skip: whether image files may be left out. Folders may not: nobody knows what is in them.

  Raises:
    UsageError: names the first twenty.
  """
  if skip:
    problems = [file for file in problems if os.path.splitext(file.path)[1].lower() not in _SUFFIXES]
  if not problems:
    return
  if len(problems) == 1:
    raise UsageError(f'{problems[0].path} {problems[0].problem}; correct that or remove it.')
  some = shorten([f'{os.path.relpath(file.path, folder)} {file.problem}' for file in problems], 20)
  raise UsageError(f'{len(problems):,} entries of {folder} cannot be used: {some}; correct that or remove them.')


def surroundings(folder: str) -> set[tuple[int, int]]:
  """`identify` of a folder and of all that contain it: a link to one of them leads round in a circle."""
  path = os.path.realpath(folder)
  found = {identify(path)}
  while (parent := os.path.dirname(path)) != path:
    path = parent
    found.add(identify(path))
  return found


def identify(folder: str) -> tuple[int, int]:
  """Device and inode of a folder; (0, 0) if it cannot be reached."""
  try:
    status = os.stat(folder)
  except OSError:
    return 0, 0
  return status.st_dev, status.st_ino


def text(name: str) -> str:
  """A file name as text that can be written anywhere: bytes that are not UTF-8 become \\xNN."""
  return name if name.isascii() else name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def count(number: int, thing: str) -> str:
  """A number of things, such as '1 image' or '2 images'."""
  return f'{number:,} {thing}' if number == 1 else f'{number:,} {thing}s'


def shorten(items: list[str], most: int = 5) -> str:
  """The first few of some names as a list in a sentence, and how many more there are."""
  rest = f' and {len(items) - most:,} more' if len(items) > most else ''
  return ', '.join(map(text, items[:most])) + rest


def _check(path: str, status: os.stat_result) -> File:
  if stat.S_ISREG(status.st_mode):
    return File(path, status.st_size, decode.stamp(status))
  kind = next((kind for test, kind in _KINDS if test(status.st_mode)), 'a device')
  return File(path, problem=f'is {kind}, not a file')


def _merge(found: Scan, folder: str) -> Iterator[File | str]:
  """Files, and paths of sub-folders, in the order of their names."""
  prefix = os.path.join(folder, '')
  items: list[tuple[str, File | str]] = [(file.path, file) for file in found.files]
  items += [(prefix + name, prefix + name) for name in found.folders]
  return iter([item for _, item in sorted(items, key=lambda pair: pair[0])])


def _describe(error: OSError) -> str:
  if isinstance(error, FileNotFoundError):
    return 'is a link to something that does not exist'
  return f'cannot be read: {error.strerror}'
