"""What every command does the same way: exit statuses, one-line errors, the compile cache."""

import argparse
import ctypes
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from cnn_jax import UsageError

DONE, USAGE, DIVERGED, STOPPED = 0, 2, 3, 143


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are `UsageError`s, one line like all others."""

  def __init__(self, description: str):
    super().__init__(description=description, allow_abbrev=False)

  def error(self, message: str) -> NoReturn:
    raise UsageError(f'{message}; see --help.')


def run(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
  """Runs a command with the process's arguments and exits with its status.

  Args:
    main: takes the arguments after the program's name; returns the exit status, None for 0.
      A `UsageError` of it becomes one line on stderr and status 2, Ctrl-C status 143; any other
      exception is a bug and keeps its traceback.
  """
  try:
    status = main(sys.argv[1:])
    sys.stdout.flush()
  except UsageError as error:
    fail(error)
    status = USAGE
  except KeyboardInterrupt:
    print('stopped', file=sys.stderr)
    status = STOPPED
  except BrokenPipeError:
    # The reader of our output has gone (`| head`). Python would complain once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = STOPPED
  sys.exit(status)


def fail(error: object) -> None:
  """Prints an error as one line on stderr."""
  print('error: ' + ' '.join(str(error).split()), file=sys.stderr, flush=True)


def prepare_backend() -> None:
  """Sets what makes JAX start and run faster; before the first computation.

  See `_use_compile_cache` and `_keep_freed_memory` for what, and for the variables that switch it off.
  """
  _keep_freed_memory()
  _use_compile_cache()


def _use_compile_cache() -> None:
  """Keeps compiled programs in the user's cache directory, so that only the first run of a config compiles.

  JAX's own variable JAX_COMPILATION_CACHE_DIR overrides the place; set to nothing, there is no cache.
  """
  import jax

  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(home) / 'cnn_jax' / 'compiled'))
  # The default keeps only what took more than a second to compile, and these programs are small.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def _keep_freed_memory() -> None:
  """Lets the C library keep the memory that a step has freed for the next step.

  glibc gives large blocks back to Linux, which hands them out again page by page, at about 1 GB/s; a
  training step on the CPU takes hundreds of megabytes. Costs what the largest step needs, for as
  long as the process lives. Linux with glibc only; CNN_JAX_KEEP_MEMORY=0 switches it off.
  """
  if sys.platform != 'linux' or os.environ.get('CNN_JAX_KEEP_MEMORY') == '0':
    return
  library = ctypes.CDLL(None)
  if not hasattr(library, 'mallopt'):
    return
  trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX of malloc.h
  for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
    library.mallopt(parameter, value)
