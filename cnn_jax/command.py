"""What all commands share: arguments, exit statuses, one-line errors, signals, the compile cache."""

import argparse
import contextlib
import ctypes
import errno
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from cnn_jax import Diverged, Stopped, UsageError, files

DONE, USAGE, DIVERGED, STOPPED = 0, 2, 3, 143


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are `UsageError`s.

  Args:
    description: of the command, for `--help`; its line breaks are kept.
  """

  def __init__(self, description: str):
    super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

  def error(self, message: str) -> NoReturn:
    raise UsageError(f'{message}; see --help.')


def add_config(parser: argparse.ArgumentParser) -> None:
  """Adds `--config`; the arguments that the parser does not recognise are the overrides for `config.load`."""
  parser.add_argument(
    '--config', metavar='FILE[:VARIANT]', help='the experiment; --config.NAME=VALUE sets one of its fields'
  )


def run(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
  """Runs a command with the process's arguments and exits with its status; see `call`."""
  sys.exit(call(main, sys.argv[1:]))


def call(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
  """Runs a command and returns its exit status.

  Args:
    main: takes the arguments after the program's name; returns the exit status, None for 0. `UsageError` and a full
      disk become one line on stderr and the status 2, `Diverged` 3, `Stopped` and Ctrl-C 143. Any other exception is
      a bug and keeps its traceback.
    argv: the arguments.
  """
  try:
    status = main(argv)
    sys.stdout.flush()
    return DONE if status is None else status
  except UsageError as error:
    fail(error)
    return USAGE
  except Diverged as error:
    fail(error)
    return DIVERGED
  except Stopped as stopped:
    _print_error(str(stopped))
    return STOPPED
  except KeyboardInterrupt:
    _print_error('stopped')
    return STOPPED
  except BrokenPipeError:  # the reader of our output has ended (`| head`)
    _discard_output()
    return STOPPED
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    _discard_output()
    fail(f'cannot write {error.filename or "the output"}: {error.strerror}; free some space.')
    return USAGE


def fail(error: object) -> None:
  """Prints an error on stderr: one line, in which control characters are escaped."""
  _print_error('error: ' + ' '.join(str(error).split()))


def _print_error(text: str) -> None:
  with contextlib.suppress(OSError):  # a terminal that was closed; the exit status remains
    print(printable(text), file=sys.stderr, flush=True)


def _discard_output() -> None:
  """Sends standard output nowhere, because Python would try to write what it has buffered, and fail again, at exit."""
  descriptor = os.open(os.devnull, os.O_WRONLY)
  os.dup2(descriptor, sys.stdout.fileno())
  os.close(descriptor)


def printable(text: str) -> str:
  """Escapes the characters that move the cursor, reverse or hide text: files and classes may have any name."""
  return ''.join(
    character
    if character.isprintable() or unicodedata.category(character) == 'Zs'
    else character.encode('unicode_escape').decode()
    for character in text
  )


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
  """Turns the first SIGTERM, Ctrl-C or SIGHUP (a closed terminal) into a flag; a second one has its usual effect.

  A signal that the process ignores, such as SIGHUP under nohup, stays ignored. Outside the main thread, where Python
  delivers no signals, the flag is never set.

  Yields:
    A function that returns whether a signal has arrived.
  """
  if threading.current_thread() is not threading.main_thread():
    yield lambda: False
    return
  received: list[int] = []
  signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  before = {s: handler for s in signals if (handler := signal.getsignal(s)) not in (signal.SIG_IGN, None)}

  def restore() -> None:
    for number, earlier in before.items():
      signal.signal(number, earlier)

  def handle(number, frame):
    del frame
    received.append(number)
    restore()

  for number in before:
    signal.signal(number, handle)
  try:
    yield lambda: bool(received)
  finally:
    restore()


def prepare_backend() -> None:
  """Makes JAX start and run faster; call it before the first computation.

  Compiled programs are kept in the user's cache directory; the variable JAX_COMPILATION_CACHE_DIR sets another
  directory, or none if it is empty. Freed memory stays with the process, unless CNN_JAX_KEEP_MEMORY is 0.
  """
  _keep_freed_memory()
  _use_compile_cache()


def _use_compile_cache() -> None:
  """Keeps compiled programs in the cache directory, so that only the first run of a config compiles."""
  import jax

  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    with contextlib.suppress(UsageError):  # no home directory, so no cache
      jax.config.update('jax_compilation_cache_dir', str(files.cache_dir() / 'compiled'))
  # The default keeps programs that took more than a second to compile; these are smaller.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def _keep_freed_memory() -> None:
  """Lets the C library keep the memory that a step has freed for the next step; Linux with glibc only.

  glibc returns large blocks to Linux, which hands them out again page by page, at about 1 GB/s; a training step on the
  CPU uses hundreds of megabytes. The process keeps the memory of its largest step until it ends.
  """
  if sys.platform != 'linux' or os.environ.get('CNN_JAX_KEEP_MEMORY') == '0':
    return
  library = ctypes.CDLL(None)
  if not hasattr(library, 'mallopt'):
    return
  trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX of malloc.h
  for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
    library.mallopt(parameter, value)
