"""The directories of a folder of images: listed, or, if the folder is large, as they were when they were listed before.

An index in the user's cache holds what the directories of a large folder hold. A directory whose times are those of the
index has the same entries, and is not listed again. Files that were changed under the same name are noticed when they are
read, so that an index is used only for sets that are read during training.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cnn_jax import UsageError
from cnn_jax.data import lazy, listing, paths
from cnn_jax.data.index import Index
from cnn_jax.data.listing import File, Passed

MIN_FILES = 50_000  # fewer are listed in less than a second
_RECENT_SECONDS = 2.0  # a directory may change without another time so soon after a change
_SAMPLED = 256  # files that are compared with the index at every start
_WORTH = 0.01  # the share of files that were listed anew from which the index is written again


class _Directory(NamedTuple):
  """What a directory holds; the names are those of entries, and `lasting` tells whether an index may hold it."""

  stamp: tuple[int, ...]
  files: paths.Files
  folders: list[str]
  suffixes: dict[str, int]
  junk: list[str]
  lasting: bool


class Directories:
  """Lists the directories of a folder.

  Args:
    root: the folder.
    config_data: the section `config.data`; None: no index is used.
  """

  def __init__(self, root: str, config_data: Any = None):
    self._root, self._prefix, self._config = root, os.path.join(root, ''), config_data
    self._index = Index(os.path.realpath(root), ['directories'], '')
    self._known = self._recall() if config_data is not None else {}
    self._listed: dict[str, _Directory] = {}
    self._remembered = False

  def scan(self, path: str, passed: Passed, problems: list[File]) -> tuple[paths.Files, list[str]]:
    """Lists one directory.

    Args:
      path: the folder, and the way from there.
      passed: what is passed over is added to it.
      problems: entries that cannot be used are added to it.

    Returns:
      The images in it and the names of its sub-directories, both sorted.
    """
    place, stamp = self._relative(path), _stamp(path)
    found = self._known.get(place)
    if found is not None and found.stamp == stamp:
      self._remembered = self._remembered or len(found.files) > 0
    else:
      found = self._list(path, stamp, problems)
    self._listed[place] = found
    passed.suffixes.update(found.suffixes)
    passed.junk += [os.path.join(path, name) for name in found.junk]
    return found.files, found.folders

  def collect(self, path: str, passed: Passed, problems: list[File], seen: set[tuple[int, int]]) -> paths.Files:
    """Lists a directory and all below it.

    Args:
      path, passed, problems: see `scan`.
      seen: from `listing.identify`, of directories that are listed elsewhere; those that are listed here are added.

    Returns:
      The images at any depth, sorted by path.
    """
    seen |= listing.surroundings(path)
    first, folders = self.scan(path, passed, problems)
    found = [first]
    stack = [iter([os.path.join(path, name) for name in folders])]
    while stack:
      inner = next(stack[-1], None)
      if inner is None:
        stack.pop()
      elif (identity := listing.identify(inner)) in seen:
        passed.again.append(inner)
      else:
        seen.add(identity)
        files, folders = self.scan(inner, passed, problems)
        found.append(files)
        stack.append(iter([os.path.join(inner, name) for name in folders]))
    return merge(found)

  def keep(self) -> None:
    """Writes the index if that will save time; call it when all is listed. It frees the memory of the listing."""
    listed, known = self._listed, self._known
    self._listed, self._known = {}, {}
    lasting = {place: found for place, found in listed.items() if found.lasting}
    count = sum(len(found.files) for found in lasting.values())
    new = sum(len(found.files) for place, found in lasting.items() if known.get(place) is not found)
    if count < MIN_FILES or new < _WORTH * count or not self._suits(count):
      return
    about = [
      [place, found.stamp, len(found.files), found.folders, found.suffixes, found.junk]
      for place, found in lasting.items()
    ]
    files = paths.join([found.files for found in lasting.values()])
    encoded, ends = files.paths.arrays()
    described = np.frombuffer(json.dumps(about).encode(), np.uint8)
    self._index.write(directories=described, encoded=encoded, ends=ends, stamps=files.stamps)

  def confirmation(self) -> Callable[[str, np.ndarray], None] | None:
    """A check to call before a file is read; None if the index was not used.

    It takes the path relative to the folder and the stamp. If the file has another size or time of modification, it
    removes the index and raises a `UsageError`.
    """
    return functools.partial(_confirm, self._root, self._index) if self._remembered else None

  def _recall(self) -> dict[str, _Directory]:
    """The directories of the index."""
    arrays = self._index.read()
    if arrays is None or not self._suits(len(arrays['ends'])):
      return {}
    names, stamps = paths.from_arrays(arrays['encoded'], arrays['ends']), arrays['stamps']
    known, start, labels = {}, 0, np.zeros(len(names), np.int32)
    for place, stamp, count, folders, suffixes, junk in json.loads(arrays['directories'].tobytes()):
      some = slice(start, start := start + count)
      files = paths.Files(names[some], stamps[some], labels[some])
      known[place] = _Directory(tuple(stamp), files, folders, suffixes, junk, True)
    for index in np.linspace(0, len(names) - 1, _SAMPLED).astype(int):
      path = self._prefix + names[index]
      folder = os.path.dirname(path)
      if _differs(path, stamps[index]) and known[self._relative(folder)].stamp == _stamp(folder):
        return {}
    return known

  def _suits(self, count: int) -> bool:
    """Whether the decoded images of so many files are certainly not kept in memory."""
    data = self._config
    if data is None:
      return False
    return not lazy.fits(count * data.image_size**2 * (data.channels or 1), data)

  def _list(self, path: str, stamp: tuple[int, ...], problems: list[File]) -> _Directory:
    now, passed = time.time_ns(), Passed()
    found = listing.scan(path, passed)
    problems += [file for file in found.files if file.problem]
    good = [file for file in found.files if not file.problem]
    return _Directory(
      stamp,
      paths.make([self._relative(file.path) for file in good], [file.stamp for file in good]),
      found.folders,
      dict(passed.suffixes),
      [os.path.basename(folder) for folder in passed.junk],
      found.lasting and len(stamp) > 0 and max(stamp[1:]) < now - 1e9 * _RECENT_SECONDS,
    )

  def _relative(self, path: str) -> str:
    return '' if path == self._root else path.removeprefix(self._prefix)


def merge(found: Sequence[paths.Files]) -> paths.Files:
  """Joins the files of several directories, sorted by path."""
  some = [files for files in found if len(files)]
  files = paths.join(some)
  return files if len(some) < 2 else files.part(files.paths.order())


def _confirm(root: str, index: Index, path: str, stamp: np.ndarray) -> None:
  if _differs(os.path.join(root, path), stamp):
    index.remove()
    raise UsageError(
      f'{listing.text(path)} has changed since {listing.text(root)} was listed; start the command again, which lists the '
      'folder anew.'
    )


def _stamp(path: str) -> tuple[int, ...]:
  """Inode and times of a directory; () if it cannot be reached."""
  try:
    status = os.stat(path)
  except OSError:
    return ()
  return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _differs(path: str, stamp: np.ndarray) -> bool:
  """Whether a file has another size or time of modification. One that is missing is reported by whoever reads it."""
  try:
    status = os.stat(path)
  except OSError:
    return False
  return (status.st_size, status.st_mtime_ns) != tuple(stamp[:2].tolist())
