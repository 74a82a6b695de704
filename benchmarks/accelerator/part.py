"""What every part of the benchmark does: rows that are written as they come, and failures that become rows."""

import json
import pathlib
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from cnn_jax import UsageError, command
from cnn_jax.files import write_atomically


class Rows:
  """The rows of a part, in a file that is whole at any time, so that a part that is killed keeps what it has.

  Args:
    path: of the file, JSON.
    seconds: that the part may take.
  """

  def __init__(self, path: pathlib.Path, seconds: float):
    self._path, self._end = path, time.monotonic() + seconds
    self.rows: list[dict[str, Any]] = []
    self._lock = threading.Lock()

  def add(self, **row: Any) -> None:
    """Adds a row, and shows it on stderr; threads may do so at the same time."""
    with self._lock:
      self.rows.append(row)
      write_atomically(self._path, json.dumps(self.rows))
    print(json.dumps(row)[:400], file=sys.stderr, flush=True)

  def attempt(self, make: Callable[[], Mapping[str, Any]], **about: Any) -> None:
    """Adds the row that a function returns; if it fails, its error.

    Args:
      make: measures.
      about: fields of the row in either case.
    """
    try:
      found = make()
    except Exception as error:  # whatever it is, the other rows are still worth having
      if not isinstance(error, (UsageError, subprocess.TimeoutExpired)):
        traceback.print_exc()
      found = {'error': one_line(error)}
    self.add(**about, **found)

  def left(self) -> float:
    """The seconds that are left of the part's."""
    return self._end - time.monotonic()


def parser(doc: str) -> command.Parser:
  """A parser with the arguments of every part.

  Args:
    doc: the text of `--help`.
  """
  made = command.Parser(doc)
  made.add_argument('--output', type=pathlib.Path, required=True, help='file of the rows')
  made.add_argument('--seconds', type=float, default=60, help='that the part may take (%(default)s)')
  made.add_argument('--small', action='store_true', help='reduced sizes, for a CPU')
  return made


def largest_error(pairs: Iterable[tuple[Any, Any]]) -> float:
  """The largest difference of two arrays, relative to the largest number of the second unless that is zero.

  Args:
    pairs: of arrays, none of them empty.

  Returns:
    NaN if any of the numbers is NaN, which the `max` of Python may pass over.
  """
  errors = []
  for a, b in pairs:
    found, expected = np.asarray(a), np.asarray(b)
    errors.append(float(np.abs(found - expected).max()) / (float(np.abs(expected).max()) or 1.0))
  return float(np.max(errors))


def one_line(error: BaseException, most: int = 300) -> str:
  """An error as one line of text."""
  if isinstance(error, subprocess.TimeoutExpired):
    return f'not finished in {error.timeout:.0f} s'
  text = ' '.join((str(error) if isinstance(error, UsageError) else f'{type(error).__name__}: {error}').split())
  return text if len(text) <= most else f'{text[: most - 3]}...'
