"""The arrays of a checkpoint as files, which orbax and TensorStore write and read."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


class UnreadableError(Exception):
  """Names the version of orbax that cannot read what is there, and why."""


def write(path: Path, arrays: Any) -> None:
  """Writes arrays to a new folder; it is not on the disk yet.

  Args:
    path: absolute.
    arrays: nested dicts of NumPy arrays.

  Raises:
    OSError: the disk is full or cannot be written.
  """
  import orbax.checkpoint as ocp  # takes 0.6 s, so only if it is needed
  from etils import epath

  # The handler alone, because orbax's Checkpointer adds a rename, a metadata file and 50 ms.
  handler = ocp.PyTreeCheckpointHandler()
  path.mkdir()
  with _quiet():
    try:
      # In a dict, because orbax refuses an empty tree.
      handler.save(epath.Path(path), args=ocp.args.PyTreeSave({'state': arrays}))
      handler.finalize(epath.Path(path))
    except ValueError as error:  # how TensorStore reports a failed write
      code = re.search(r"os_error_code='(\d+)'", str(error))
      if code is None:
        raise
      raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    finally:
      handler.close()


def read(path: Path) -> Any:
  """The arrays of a folder, bit for bit as written.

  Raises:
    UnreadableError: the installed version of orbax cannot read them.
  """
  import orbax.checkpoint as ocp

  return _call_orbax(lambda handler, place: handler.restore(place, args=ocp.args.PyTreeRestore())['state'], path)


def read_shapes(path: Path) -> Any:
  """The arrays of a folder as shapes and types, before memory is taken for them.

  TensorStore ends the process if it cannot get the memory for one.

  Raises:
    UnreadableError: see `read`.
  """

  def find(handler: Any, place: Any) -> Any:
    found = handler.metadata(place)
    return jax.tree.map(_as_shape, getattr(found, 'tree', found)['state'])

  return _call_orbax(find, path)


def _as_shape(array: Any) -> jax.ShapeDtypeStruct:
  """The shape and type of an array from its metadata; a chunk larger than the array would take the memory as well."""
  chunk = array.storage.chunk_shape if array.storage else array.shape
  if any(part > max(side, 1) for part, side in zip(chunk, array.shape, strict=True)):
    raise ValueError(f'{array.name} is stored in chunks larger than itself')
  return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _call_orbax(read: Callable[[Any, Any], Any], path: Path) -> Any:
  import orbax.checkpoint as ocp
  from etils import epath

  handler = ocp.PyTreeCheckpointHandler()
  with _quiet():
    try:
      return read(handler, epath.Path(path))
    except Exception as error:  # the files are as written, so this version of orbax cannot read another one's
      reason = next(iter(str(error).splitlines()), type(error).__name__).partition(' [tensorstore_spec')[0]
      raise UnreadableError(f'orbax {ocp.__version__} cannot read it: {reason}') from error
    finally:
      handler.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  # If the disk is full, orbax logs a traceback per thread; the exception reports it once.
  logger, hook = logging.getLogger('absl'), sys.unraisablehook
  level = logger.level
  logger.setLevel(logging.CRITICAL)

  def report(failure: Any) -> None:
    if failure.exc_type is not RuntimeError or str(failure.exc_value) != 'Event loop is closed':
      hook(failure)

  # If one array fails, orbax closes its event loop. What TensorStore's threads have to say about the others comes later,
  # even after this block, and the interpreter or asyncio prints a traceback for each.
  sys.unraisablehook = report
  logging.getLogger('asyncio').addFilter(_is_no_lost_future)
  try:
    yield
    sys.unraisablehook = hook
    logging.getLogger('asyncio').removeFilter(_is_no_lost_future)
  finally:
    logger.setLevel(level)


def _is_no_lost_future(line: logging.LogRecord) -> bool:
  return not line.getMessage().startswith('Future exception was never retrieved')
