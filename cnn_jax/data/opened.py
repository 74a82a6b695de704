"""Open files of a large set: a bounded number of them, shared by threads, and opened again in another process."""

import collections
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

MAX_OPEN = 256  # a process may usually have 1,024, and a set may have thousands of files

T = TypeVar('T')


class Opened(Generic[T]):
  """Keeps the files that were used last open. A file is closed when nobody holds it any more.

  It can be pickled, if `open_file` can be; the copy has no file open.

  Args:
    open_file: opens the file of a number; what it returns must close itself when it is deleted, and may be used by
      several threads at a time.
  """

  def __init__(self, open_file: Callable[[int], T]):
    self._open_file = open_file
    self._files: collections.OrderedDict[int, T] = collections.OrderedDict()
    self._lock = threading.Lock()

  def get(self, number: int) -> T:
    """Returns an open file; hold it only while reading. Raises what `open_file` raises."""
    with self._lock:
      if number in self._files:
        self._files.move_to_end(number)
        return self._files[number]
    made = self._open_file(number)  # without the lock: the disk of another machine may take a while
    with self._lock:
      made = self._files.setdefault(number, made)
      if len(self._files) > MAX_OPEN:
        self._files.popitem(last=False)
    return made

  def __getstate__(self) -> dict[str, Any]:
    return {'_open_file': self._open_file}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__init__(state['_open_file'])  # type: ignore[misc]
