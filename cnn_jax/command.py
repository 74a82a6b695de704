"""What all commands share: arguments, exit statuses, one-line errors, signals, the compile cache."""

import argparse
import contextlib
import ctypes
import errno
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from typing import NoReturn

from cnn_jax import SYSTEMS, Diverged, Stopped, UsageError, compiled, files, passwords, signals
from cnn_jax.files import local_path as local_path
from cnn_jax.signals import STOPPED
from cnn_jax.signals import stop_signal as stop_signal

DONE, USAGE, DIVERGED = 0, 2, 3


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
  """Runs a command with the process's arguments and exits with its status; see `call` and `signals.start`."""
  if sys.platform == 'win32':
    fail(SYSTEMS)
    sys.exit(USAGE)
  _open_streams()
  signals.start()
  try:
    status = call(main, sys.argv[1:])
  except Exception:
    if signals.ending() is None:
      raise
    traceback.print_exc()  # the other processes of the run have been told; Python would wait for them
    status = 1
  signals.finish(status)
  sys.exit(status)


def _open_streams() -> None:
  """Opens the standard streams that the parent has closed, as daemons do, so that what is printed goes nowhere.

  Otherwise the next file that is opened would become standard output.
  """
  for number, name in enumerate(('stdin', 'stdout', 'stderr')):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    if getattr(sys, name) is None:
      setattr(sys, name, os.fdopen(number, 'w' if number else 'r', closefd=False))


def call(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
  """Runs a command and returns its exit status.

  Args:
    main: takes the arguments after the program's name; returns the exit status, None for 0. An exception becomes what
      `outcome` says; any other is a bug and keeps its traceback.
    argv: the arguments.
  """
  try:
    status = main(argv)
    sys.stdout.flush()
    return DONE if status is None else status
  except BaseException as error:
    ended = outcome(error)
    if ended is None:
      raise
    if isinstance(error, OSError):
      _discard_output()
    status, line = ended
    if line:
      _print_error(line)
    return status


def outcome(error: BaseException) -> tuple[int, str] | None:
  """The exit status and the line on stderr of an exception that ends a command; None if it is a bug.

  `UsageError` and a full disk have status 2, `Diverged` 3, `Stopped` and Ctrl-C 143. If the reader of the output has
  ended (`| head`), the status is 143 and the line empty.
  """
  if isinstance(error, UsageError | Diverged):
    return USAGE if isinstance(error, UsageError) else DIVERGED, _one_line(error)
  if isinstance(error, Stopped):
    return STOPPED, str(error)
  if isinstance(error, KeyboardInterrupt):
    return STOPPED, 'stopped'
  if isinstance(error, BrokenPipeError):
    return STOPPED, ''
  if line := _missing_backend(error):
    return USAGE, _one_line(line)
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
    return USAGE, _one_line(f'cannot write {error.filename or "the output"}: {error.strerror}; free some space.')
  return None


def _missing_backend(error: BaseException) -> str:
  """What to say of an error of JAX about the devices that JAX_PLATFORMS asks for; '' if it is another error."""
  if isinstance(error, RuntimeError) and str(error).startswith('Unable to initialize backend'):
    return str(error)  # it says what to set
  # Without a GPU, 'cuda' is an assertion that fails, without a message.
  asked = os.environ.get('JAX_PLATFORMS')
  if asked and isinstance(error, AssertionError) and traceback.extract_tb(error.__traceback__)[-1].name == 'backends':
    return f'JAX finds no device for JAX_PLATFORMS={asked}; remove the variable, or set it to cpu.'
  return ''


def fail(error: object) -> None:
  """Prints an error on stderr: one line, in which control characters are escaped."""
  _print_error(_one_line(error))


def _one_line(error: object) -> str:
  return 'error: ' + ' '.join(str(error).split())


def _print_error(text: str) -> None:
  with contextlib.suppress(OSError):  # a terminal that was closed; the exit status remains
    print(printable(passwords.mask(text, passwords.find(sys.argv))), file=sys.stderr, flush=True)


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


def prepare_backend() -> None:
  """Makes JAX start and run faster; call it before the first computation.

  Compiled programs are kept in the user's cache directory; the variable JAX_COMPILATION_CACHE_DIR sets another
  directory, or none if it is empty. Freed memory stays with the process, unless CNN_JAX_KEEP_MEMORY is 0.
  """
  _keep_freed_memory()
  _use_compile_cache()


def return_freed_memory() -> None:
  """Returns the memory that the process has freed to the system, after something large; Linux with glibc only."""
  if sys.platform == 'linux' and hasattr(library := ctypes.CDLL(None), 'malloc_trim'):
    library.malloc_trim(ctypes.c_size_t(0))


def _use_compile_cache() -> None:
  """Keeps compiled programs in the cache directory, so that only the first run of a config compiles."""
  import jax

  path = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  if path is None:
    with contextlib.suppress(UsageError):  # no home directory, so no cache
      path = str(files.cache_dir() / 'compiled')
      jax.config.update('jax_compilation_cache_dir', path)
  if path and not files.is_utf8(path):  # XLA would refuse every program
    compiled.warn(path, 'its path is not UTF-8')
    jax.config.update('jax_compilation_cache_dir', None)
  # The default keeps programs that took more than a second to compile; these are smaller.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  compiled.check_files()


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
