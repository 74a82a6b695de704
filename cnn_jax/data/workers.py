"""Reading ahead with Grain, in threads or in processes that end with this one."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

import grain
from absl import flags

from cnn_jax import UsageError, signals

_DIED = 'Worker process was terminated'  # how the message of Grain begins
# Python removes the shared memory of a process that was killed, and would print a warning after the line about that.
_SILENCE = 'ignore:resource_tracker:UserWarning'


def read(
  function: Callable[[int], Any], numbers: range, threads: int, ahead: int, workers: int
) -> Generator[Any, None, None]:
  """Yields `function(number)` for each number, in order, while the next results are computed.

  Args:
    function: called in threads; it is sent to the processes, if there are any.
    numbers: consecutive.
    threads: that call it at a time, over all processes.
    ahead: results that may wait, over all processes.
    workers: number of processes; 0: threads of this process.

  Raises:
    UsageError: a process was killed. What the function raises is raised here.
  """
  results = grain.MapDataset.range(numbers.start, numbers.stop).map(function)
  if workers:
    if _SILENCE not in sys.warnoptions:
      sys.warnoptions.append(_SILENCE)  # processes that are started from here on inherit it
    flags.FLAGS.mark_as_parsed()  # Grain reads its flags, and commands of this package have none of absl's
    share = grain.ReadOptions(num_threads=-(-threads // workers), prefetch_buffer_size=-(-ahead // workers))
    processes = grain.MultiprocessingOptions(num_workers=workers)
    iterator = iter(results.to_iter_dataset(share).mp_prefetch(processes, worker_init_fn=_prepare))
  else:
    iterator = iter(results.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))
  try:
    yield from iterator
  except RuntimeError as error:
    if not str(error).startswith(_DIED):
      raise
    raise UsageError(
      'a process that reads images was killed, perhaps because memory ran out; start again with fewer '
      'config.data.workers.'
    ) from None
  finally:
    iterator.close()
    del iterator
    if workers:
      gc.collect()  # tracebacks in Grain hold arrays in shared memory, which would outlive this process


def _prepare(*_: int) -> None:
  """Lets a process that reads end with its parent alone, however that ends."""
  # A terminal and a scheduler send signals to all processes; the parent may still need images.
  for number in (*signals.ENDING, *signals.ANNOUNCING):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_follow, args=(multiprocessing.parent_process(),), daemon=True).start()


def _follow(parent: Any) -> None:
  parent.join()
  os._exit(1)
