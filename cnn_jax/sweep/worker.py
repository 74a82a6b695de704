"""The processes that train for a sweep, each on its own share of the machine.

The process of the sweep keeps the study and never starts JAX. A worker trains one run after another, and asks at each
validation whether to continue. It keeps the data set from run to run, and ends if the sweep ends for any reason.
"""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnn_jax import Diverged, Stopped, UsageError, passwords, shares, workdirs
from cnn_jax.shares import Share

NO_VALIDATION = 'there is no validation split to compare trials on; raise config.data.validation.'
_SECONDS_TO_EXIT = 5.0


@dataclasses.dataclass(frozen=True)
class Task:
  """A run to train."""

  config: dict[str, Any]  # a ConfigDict as a plain dict, which pickles
  workdir: str
  evaluate_test: bool
  data: dict[str, Any] | None = None  # the section `data` of the config that the trials vary


class Worker:
  """A process that trains one task at a time; see `serve` for the messages that it sends.

  Args:
    share: of the machine; see `shares.divide`.

  Attributes:
    connection: receives the messages; it reports end of file if the process has died.
  """

  def __init__(self, share: Share):
    context = multiprocessing.get_context('spawn')  # JAX's threads do not survive a fork
    self.share = share
    self.connection, theirs = context.Pipe()
    self._used = context.RawValue('d', 0.0)
    self._process = context.Process(target=_work, args=(theirs, share, self._used), daemon=True)
    self._process.start()
    theirs.close()  # otherwise the end of the process would not end the connection

  def give(self, task: Task) -> None:
    """Starts a task."""
    self._send(task)

  def reply(self, prune: bool) -> None:
    """Answers a validation."""
    self._send(prune)

  def processor_seconds(self) -> float:
    """The processor time of the process, which grows unless it is stopped or waits for something."""
    return self._used.value

  def stop(self) -> None:
    """Asks the process to stop; it saves the run in progress first."""
    self._process.terminate()

  def close(self) -> None:
    """Ends an idle process; one that has not exited after five seconds is killed."""
    self.connection.close()
    self._process.join(_SECONDS_TO_EXIT)
    self._process.kill()
    self._process.join()

  def kill(self) -> int:
    """Kills the process if it still runs; returns its exit status (negative: the number of the signal)."""
    self._process.kill()
    self._process.join()
    self.connection.close()
    return self._process.exitcode or 0

  def _send(self, value: Any) -> None:
    with contextlib.suppress(OSError):  # the process has died, which the next read of the connection reports
      self.connection.send(value)


def serve(connection: multiprocessing.connection.Connection, before_task: Callable[[Task], None]) -> None:
  """Trains the tasks that arrive on a connection, one after another, until the other end is closed.

  Sends for each task ('began', name of the data set), then ('validation', epoch, accuracy) after each validation,
  which waits for the answer whether to prune, and at the end one of ('done', result), ('pruned',), ('diverged', message),
  ('infeasible', message), ('failed', message), ('stopped',), ('usage', message) and ('bug', traceback). A run that
  cannot be trained is infeasible, one that ends with an error of its own has failed; `usage` is a fault of the data or
  the machine, which concerns all runs.

  Args:
    connection: to the process of the sweep.
    before_task: called with each task before anything is loaded or trained; its exceptions are outcomes of the task.
  """
  import jax

  loaded: dict[str, Any] = {}  # the last data set, by the section `data` of its config as JSON
  while True:
    try:
      task = connection.recv()
    except EOFError:
      return
    try:
      before_task(task)
      outcome = _train(task, loaded, connection)
    except Exception as error:
      with contextlib.suppress(OSError):  # a full disk
        print(passwords.mask(traceback.format_exc()), file=sys.stderr, flush=True)
      kind, reason = _outcome_of(error)
      outcome = kind, passwords.mask(reason)  # it may quote the address of a tracker
    jax.clear_caches()  # a program serves one config; hundreds of them would fill the memory
    connection.send(outcome)


class _PrunedError(Exception):
  pass


class _FailedError(Exception):
  """Training ended with an exception, which is the cause of this one."""


def _outcome_of(error: Exception) -> tuple[str, str]:
  cause = error.__cause__ if isinstance(error, _FailedError) and error.__cause__ else error
  root = cause.__cause__ if isinstance(cause, UsageError) else cause
  if isinstance(root, OSError) and root.errno != errno.ENOMEM:  # the disk is full or broken, or nothing can be written
    return 'usage', str(cause) if isinstance(cause, UsageError) else f'{root}; correct that'
  if isinstance(error, _FailedError) or isinstance(root, MemoryError | OSError):
    kind = '' if isinstance(cause, UsageError) else f'{type(cause).__name__}: '
    return 'failed', f'{kind}{next(iter(str(cause).splitlines()), "")}'.removesuffix(': ')
  return ('usage', str(error)) if isinstance(error, UsageError) else ('bug', traceback.format_exc())


def _train(task: Task, loaded: dict[str, Any], connection: multiprocessing.connection.Connection) -> tuple[Any, ...]:
  import jax
  from ml_collections import ConfigDict

  from cnn_jax import config as config_lib
  from cnn_jax import main, record
  from cnn_jax.data import load_dataset

  config = ConfigDict(task.config).lock()
  try:
    config_lib.check(config)
    config_lib.check_devices(config, jax.device_count())
  except UsageError as error:
    return 'infeasible', str(error)
  key = json.dumps(task.config['data'], sort_keys=True)
  if key not in loaded:
    loaded.clear()
    try:
      loaded[key] = load_dataset(config.data)
    except UsageError as error:
      if task.data is None or json.dumps(task.data, sort_keys=True) == key:
        raise
      load_dataset(ConfigDict(task.data))  # raises if it is no fault of the trial's values
      return 'infeasible', str(error)
  dataset = loaded[key]
  try:
    if not len(dataset.validation):
      raise UsageError(NO_VALIDATION)
    config_lib.check_data(config, len(dataset.train), len(dataset.class_names), dataset.train.images.shape[1:])
  except UsageError as error:
    return 'infeasible', str(error)

  def on_validation(epoch: int, metrics: dict[str, float]) -> None:
    connection.send(('validation', epoch, metrics['accuracy']))
    if connection.recv():
      raise _PrunedError

  connection.send(('began', dataset.name))
  _wait_for(task.workdir)
  record.check_config(task.workdir, config)
  record.read_result(task.workdir)
  try:
    result = main.train_and_evaluate(
      config, task.workdir, dataset=dataset, evaluate_test=task.evaluate_test, on_validation=on_validation
    )
  except _PrunedError:
    return ('pruned',)
  except Diverged as error:
    return 'diverged', str(error)
  except Stopped:
    return ('stopped',)
  except Exception as error:
    raise _FailedError from error
  return 'done', result


def _wait_for(workdir: str) -> None:
  """Waits until a process that missed its heartbeats has noticed that the run was reassigned, and unlocks its workdir."""

  end = time.monotonic() + 60
  while time.monotonic() < end:
    with contextlib.suppress(UsageError), workdirs.lock(workdir):
      return
    time.sleep(0.5)
  with workdirs.lock(workdir):  # raises
    pass


def _work(connection: multiprocessing.connection.Connection, share: Share, used: Any) -> None:
  os.setsid()  # Ctrl-C in a terminal reaches the sweep alone, which then stops its workers, once
  threading.Thread(target=_end_with_parent, daemon=True).start()
  threading.Thread(target=_measure, args=(used,), daemon=True).start()
  # All of this must precede the start of JAX.
  if share.cores:
    os.sched_setaffinity(0, share.cores)
  os.environ.update(shares.variables(share))

  from cnn_jax import command

  command.prepare_backend()
  serve(connection, _log_to_workdir)


def _log_to_workdir(task: Task) -> None:
  """Sends everything that this process prints to log.txt: the output of several runs would mix on a terminal."""
  log = Path(task.workdir) / 'log.txt'
  try:
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
  except OSError as error:
    raise UsageError(f'cannot write to {log}: {error.strerror}; correct that or choose another --workdir.') from error
  sys.stdout.flush()
  for descriptor in (1, 2):
    os.dup2(file, descriptor)
  os.close(file)


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  multiprocessing.connection.wait([parent.sentinel])
  os.kill(os.getpid(), signal.SIGKILL)  # as the sweep was killed; the run continues from its last checkpoint


def _measure(used: Any) -> None:
  while True:
    used.value = time.process_time()
    time.sleep(1.0)
