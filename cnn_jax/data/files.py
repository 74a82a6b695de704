"""Many image files: which there are, and reading them ahead of whoever uses them."""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cnn_jax.data.images import IMAGE_EXTENSIONS

_CHUNK = 16  # images a thread reads at a time: fewer would cost more in hand-overs than in reading


def walk(path: str) -> Iterator[str]:
  """The image files below a folder, sorted; anything else is given back as it is.

  Hidden files, files of other kinds and links to folders are passed over. A folder without images,
  or one that cannot be listed, is given back itself, so that its reader says so. Only the names of
  one folder and its parents are in memory.
  """
  if not os.path.isdir(path):
    yield path
    return
  files = _below(path)
  first = next(files, path)
  yield first
  yield from files


def _below(folder: str) -> Iterator[str]:
  try:
    with os.scandir(folder) as entries:
      names = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries if _wanted(e))
  except OSError:
    yield folder
    return
  for name, is_folder in names:
    path = os.path.join(folder, name)
    if is_folder:
      yield from _below(path)
    else:
      yield path


def _wanted(entry: os.DirEntry) -> bool:
  if entry.name.startswith('.'):
    return False
  return entry.is_dir(follow_symlinks=False) or (entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file())


def read_ahead(items: Iterable[Any], read: Callable[[Any], Any], ahead: int) -> Iterator[Any]:
  """Yields `read(item)` for each item, in order, while threads read on.

  Pillow decodes outside Python's lock, and so does the network compute.

  Args:
    items: taken only as far as needed.
    read: called in threads; what it raises is raised here.
    ahead: how many items may have been read and not yet been yielded, about.
  """
  items = iter(items)
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  try:
    while True:
      while len(waiting) <= ahead // _CHUNK and (chunk := list(itertools.islice(items, _CHUNK))):
        waiting.append(pool.submit(lambda chunk: [read(item) for item in chunk], chunk))
      if not waiting:
        return
      yield from waiting.popleft().result()
  finally:
    pool.shutdown(wait=True, cancel_futures=True)
