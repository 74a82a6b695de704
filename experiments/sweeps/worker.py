"""The processes that train for a sweep, each on its own share of the machine.

The sweep's own process keeps the books and never starts JAX; a worker trains one run after another
and asks at each validation whether to go on. It keeps the data set from run to run, and ends when
the sweep does, however that ends.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax import UsageError


@dataclasses.dataclass(frozen=True)
class Task:
  """A run to be made."""

  config: dict[str, Any]  # of the ConfigDict, which a worker makes of it again
  workdir: str
  evaluate_test: bool


class Worker:
  """A process that takes one task at a time.

  What it sends is a tuple: ('began', data set's name), ('validation', epoch, accuracy), which waits
  for `reply(prune)`, and in the end one of ('done', result), ('pruned',), ('diverged', why),
  ('stopped',), ('usage', error) or ('bug', traceback).

  Args:
    share: of the machine; see `shares`.
  """

  def __init__(self, share: 'Share'):
    context = multiprocessing.get_context('spawn')  # JAX's threads do not survive a fork
    self.share = share
    self.connection, theirs = context.Pipe()
    self._process = context.Process(target=_work, args=(theirs, share), daemon=True)
    self._process.start()
    theirs.close()  # so that its end is seen here as the end of the connection

  def give(self, task: Task) -> None:
    """Starts a task."""
    self._send(task)

  def reply(self, prune: bool) -> None:
    """Answers a validation."""
    self._send(prune)

  def stop(self) -> None:
    """Asks for an end: a run that is in progress is saved first."""
    self._process.terminate()

  def kill(self) -> int:
    """Ends it now, if it has not ended; returns its exit status (negative: the signal)."""
    self._process.kill()
    self._process.join()
    self.connection.close()
    return self._process.exitcode or 0

  def _send(self, value: Any) -> None:
    with contextlib.suppress(OSError):  # it has died, which the next look at the connection shows
      self.connection.send(value)


@dataclasses.dataclass(frozen=True)
class Share:
  """What one of several workers has for itself; None: all there is."""

  cores: tuple[int, ...] | None
  gpus: tuple[str, ...] | None
  alone_on_gpu: bool


def shares(workers: int) -> list[Share]:
  """Divides the machine's cores and GPUs evenly; where there are fewer than workers, they share."""
  if workers == 1:
    return [Share(None, None, True)]
  cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, 'sched_getaffinity') else ()
  gpus = _gpus()
  return [
    Share(_part(cores, i, workers) or None, _part(gpus, i, workers) or None, len(gpus) >= workers)
    for i in range(workers)
  ]


def _part(items: Sequence[Any], i: int, n: int) -> tuple[Any, ...]:
  if len(items) < n:
    return tuple(items[i % len(items) :][:1]) if items else ()
  return tuple(items[i * len(items) // n : (i + 1) * len(items) // n])


def _gpus() -> tuple[str, ...]:
  if 'CUDA_VISIBLE_DEVICES' in os.environ:
    return tuple(name.strip() for name in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if name.strip())
  if shutil.which('nvidia-smi') is None:
    return ()
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=20, check=True).stdout
    return tuple(str(i) for i, line in enumerate(line for line in listed.splitlines() if line.startswith('GPU ')))
  return ()


def _work(connection: multiprocessing.connection.Connection, share: Share) -> None:
  os.setsid()  # a terminal's Ctrl-C is for the sweep, which then asks its workers to stop, once
  threading.Thread(target=_end_with_parent, daemon=True).start()
  # All of this before JAX looks.
  if share.cores:
    os.sched_setaffinity(0, share.cores)
  if share.gpus:
    os.environ['CUDA_VISIBLE_DEVICES'] = ','.join(share.gpus)
  if not share.alone_on_gpu:
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

  import jax

  from cnn_jax import command
  from cnn_jax.data import load_dataset

  command.prepare_backend()
  loaded: dict[str, Any] = {}  # the last data set, by the part of the config that says which
  while True:
    try:
      task = connection.recv()
    except EOFError:
      return
    try:
      _write_to(Path(task.workdir) / 'log.txt')
      which = json.dumps(task.config['data'], sort_keys=True)
      if which not in loaded:
        loaded = {which: load_dataset(_config(task.config).data)}
      outcome = _run(task, loaded[which], connection)
    except Exception as error:
      traceback.print_exc()
      outcome = ('usage', str(error)) if isinstance(error, UsageError) else ('bug', traceback.format_exc())
    jax.clear_caches()  # a program is for one config; hundreds of them would fill the memory
    connection.send(outcome)


def _run(task: Task, dataset: Any, connection: multiprocessing.connection.Connection) -> tuple[Any, ...]:
  from cnn_jax import main, train

  def on_validation(epoch: int, metrics: dict[str, float]) -> None:
    connection.send(('validation', epoch, metrics['accuracy']))
    if connection.recv():
      raise _PrunedError

  connection.send(('began', dataset.name))
  _wait_for(task.workdir)
  try:
    result = main.train_and_evaluate(
      _config(task.config), task.workdir,
      dataset=dataset, evaluate_test=task.evaluate_test, on_validation=on_validation,
    )  # fmt: skip
  except _PrunedError:
    return ('pruned',)
  except train.Diverged as diverged:
    return ('diverged', str(diverged))
  except train.Stopped:
    return ('stopped',)
  return ('done', result)


class _PrunedError(Exception):
  pass


def _config(values: dict[str, Any]) -> Any:
  from ml_collections import ConfigDict

  return ConfigDict(values).lock()


def _wait_for(workdir: str) -> None:
  """Waits for a process that was too long without a sign of life to notice that the run is no longer its own."""
  from cnn_jax import record

  end = time.monotonic() + 60
  while time.monotonic() < end:
    with contextlib.suppress(UsageError), record.lock(workdir):
      return
    time.sleep(0.5)


def _write_to(log: Path) -> None:
  """Sends all that this process prints to a file: several runs at once would be unreadable on a terminal."""
  try:
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
  except OSError as error:
    raise UsageError(f'cannot write to {log}: {error.strerror}; mend that or choose another --workdir.') from error
  sys.stdout.flush()
  for descriptor in (1, 2):
    os.dup2(file, descriptor)
  os.close(file)


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  multiprocessing.connection.wait([parent.sentinel])
  os.kill(os.getpid(), signal.SIGKILL)  # as the sweep was; the run goes on from its last checkpoint
