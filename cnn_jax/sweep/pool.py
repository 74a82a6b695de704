"""The workers of a sweep, and the loop that gives them runs to train."""

import contextlib
import dataclasses
import itertools
import multiprocessing.connection
import time
from collections.abc import Callable
from typing import Any, Self

import optuna

from cnn_jax import Stopped, UsageError, shares
from cnn_jax.sweep.progress import Progress
from cnn_jax.sweep.trials import Exhausted, Lost, Repeated, Trials
from cnn_jax.sweep.worker import Task, Worker

# How many workers may die, or fall silent, while training one run, before the run has failed.
_DEATHS, _SILENCES = 3, 2
_SECONDS_TO_STOP = 60.0
_LEAST_USE = 0.001  # processor seconds per second of a worker that does something

Event = tuple[str, str, Any, float]  # what happened, the name of the run, details, and seconds since the run started


@dataclasses.dataclass
class _Running:
  name: str
  trial: optuna.Trial
  trial_id: int
  started: float
  silent: float = 0.0  # seconds since the last sign that the worker does something
  used: float = 0.0  # its processor seconds then


class Pool:
  """Worker processes, which are started when there is work for them.

  Args:
    workers: how many.
    heartbeat: seconds between two heartbeats of the running trials.
    deadline: seconds after which a worker that has sent nothing and used no processor time is killed.
    stopping: returns whether to stop.
  """

  def __init__(self, workers: int, heartbeat: float, deadline: float, stopping: Callable[[], bool]):
    self._heartbeat, self._deadline, self._stopping = heartbeat, deadline, stopping
    self._spare = shares.divide(workers)  # of workers that have not been started
    self._workers: list[Worker] = []
    self._busy: dict[Worker, _Running] = {}
    self._deaths: dict[str, int] = {}

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    for worker in self._workers:
      if worker in self._busy:
        worker.kill()
      else:
        worker.close()

  def finish(self, trials: Trials, task_of: Callable[[str, int], tuple[optuna.Trial, Task]], show: Progress) -> None:
    """Works until every run of a study is finished, here or elsewhere.

    Args:
      trials: the study.
      task_of: returns the trial and the task for the name of a run and the id of its trial, which was just claimed.
      show: receives the events.

    Raises:
      Stopped: SIGTERM or Ctrl-C, after all runs were saved.
      UsageError: the data, the storage or the machine do not allow to train.
    """
    try:
      self._finish(trials, task_of, show)
    except Exception:
      with contextlib.suppress(Exception):  # the first exception is the cause; the storage may be down
        self._stop(trials)
      raise
    finally:
      show.close()

  def _finish(self, trials: Trials, task_of: Callable[[str, int], tuple[optuna.Trial, Task]], show: Progress) -> None:
    last_beat = last_claim = float('-inf')
    before = time.monotonic()
    while True:
      now = time.monotonic()
      events = self._end_silent(trials, now - before, self._deadline)
      before = now
      if now - last_beat >= self._heartbeat:
        last_beat = now
        self._beat(trials)
      if len(self._busy) < len(self._workers) + len(self._spare) and now - last_claim >= 1.0:
        while len(self._busy) < len(self._workers) + len(self._spare):
          if (claimed := trials.claim()) is None:
            last_claim = now  # other processes train what is left: look again in a second
            break
          self._start(trials, claimed, task_of)
        if not self._busy and len(trials.finished()) == len(trials.runs):
          trials.tidy()
          return
      for event in itertools.chain(events, (self._receive(trials, worker) for worker in self._ready())):
        if event[0] not in ('began', 'validation'):
          last_claim = float('-inf')
        show.event(*event)
      show.draw()
      if self._stopping():
        raise Stopped('The sweep was stopped.')

  def _start(
    self, trials: Trials, claimed: tuple[str, int], task_of: Callable[[str, int], tuple[optuna.Trial, Task]]
  ) -> None:
    try:
      trial, task = task_of(*claimed)
    except (Lost, Repeated):
      return
    except Exhausted:
      trials.drop_the_rest(claimed[1])
      return
    except Exception:
      with contextlib.suppress(Exception):
        trials.release(claimed[1])
      raise
    worker = next((worker for worker in self._workers if worker not in self._busy), None)
    if worker is None:
      worker = Worker(self._spare.pop(0))
      self._workers.append(worker)
    self._busy[worker] = _Running(claimed[0], trial, claimed[1], time.monotonic())
    worker.give(task)

  def _ready(self) -> list[Worker]:
    if not self._workers:
      time.sleep(0.2)
    workers: dict[Any, Worker] = {worker.connection: worker for worker in self._workers}
    return [workers[connection] for connection in multiprocessing.connection.wait(list(workers), 0.2)]

  def _receive(self, trials: Trials, worker: Worker, stopping: bool = False) -> Event:
    """Handles one message of a worker."""
    try:
      kind, *values = worker.connection.recv()
    except (EOFError, OSError):
      return self._died(trials, worker, stopping)
    if worker not in self._busy:
      return 'late', '', None, 0.0
    running = self._busy[worker]
    running.silent = 0.0
    if kind not in ('began', 'validation'):
      del self._busy[worker]
    seconds = time.monotonic() - running.started
    try:
      if kind == 'began':
        try:
          _check_dataset(trials.study, values[0])
        except UsageError:
          self._end(worker)  # before it sends the result of another data set
          trials.release(running.trial_id)
          raise
        return 'began', running.name, None, seconds
      if kind == 'validation':
        prune = False
        try:
          prune = trials.report(running.trial, *values)
        finally:
          worker.reply(prune and not stopping)  # always: the worker waits for it
        return 'validation', running.name, values, seconds
      if kind == 'done':
        kept = ('num_parameters', 'validation_accuracy', 'validation_loss', 'test_accuracy', 'test_loss')
        accuracy = values[0]['validation_accuracy']
        trials.finish(running.trial, accuracy, {name: values[0][name] for name in kept if name in values[0]})
        return 'done', running.name, accuracy, seconds
      if kind == 'pruned':
        trials.finish(running.trial, None, {})
        return 'pruned', running.name, None, seconds
      if kind in ('diverged', 'infeasible', 'failed'):
        if kind == 'failed':  # the process may have no memory left
          self._end(worker)
        trials.finish(running.trial, None, {kind: values[0]})
        return kind, running.name, values[0], seconds
    except Lost:
      if worker in self._busy:
        self._end(worker)
      return 'lost', running.name, None, seconds
    trials.release(running.trial_id)
    if kind == 'usage':
      raise UsageError(f'{running.name}: {values[0]}')
    if kind == 'bug':
      raise RuntimeError(f'{running.name} failed:\n{values[0]}')
    return 'stopped', running.name, None, seconds

  def _died(self, trials: Trials, worker: Worker, stopping: bool, silent: bool = False) -> Event:
    running = self._busy.get(worker)
    status = self._end(worker)
    if running is None:
      return 'late', '', None, 0.0
    deaths = self._deaths[running.name] = self._deaths.get(running.name, 0) + 1
    cause = f'by signal {-status}' if status < 0 else f'with status {status}'
    cause = f'was silent for {running.silent:.0f} s and was killed' if silent else f'ended {cause}'
    seconds = time.monotonic() - running.started
    if deaths < (_SILENCES if silent else _DEATHS) or stopping:
      trials.release(running.trial_id)
      return 'died', running.name, cause, seconds
    reason = f'{deaths} workers were lost while training it, the last one {cause}'
    try:
      trials.finish(running.trial, None, {'failed': reason})
    except Lost:
      return 'lost', running.name, None, seconds
    return 'failed', running.name, reason, seconds

  def _end_silent(self, trials: Trials, seconds: float, limit: float, stopping: bool = False) -> list[Event]:
    """Kills the workers that neither send nor compute anything.

    Args:
      trials: of the runs.
      seconds: since the last call.
      limit: seconds of silence that are allowed.
      stopping: see `_died`.
    """
    events = []
    for worker, running in list(self._busy.items()):
      running.silent += min(seconds, 1.0)  # more than that: this process was stopped as well
      if (used := worker.processor_seconds()) - running.used > _LEAST_USE * running.silent:
        running.silent, running.used = 0.0, used
      elif running.silent > limit:
        events.append(self._died(trials, worker, stopping, silent=True))
    return events

  def _end(self, worker: Worker) -> int:
    """Kills a worker; another one gets its share."""
    self._busy.pop(worker, None)
    self._workers.remove(worker)
    self._spare.append(worker.share)
    return worker.kill()

  def _beat(self, trials: Trials) -> None:
    workers = {running.trial_id: worker for worker, running in self._busy.items()}
    for trial_id in trials.beat(list(workers)):
      self._end(workers[trial_id])

  def _stop(self, trials: Trials) -> None:
    """Stops all runs. They save their state, and the next process that claims them continues from it."""
    for worker in self._busy:
      worker.stop()
    before = time.monotonic()
    end = before + _SECONDS_TO_STOP
    while self._busy and before < end:
      with contextlib.suppress(Exception):
        self._end_silent(trials, time.monotonic() - before, min(self._deadline, _SECONDS_TO_STOP / 4), stopping=True)
      before = time.monotonic()
      for worker in self._ready():
        with contextlib.suppress(Exception):  # runs are saved even if the storage cannot be told
          self._receive(trials, worker, stopping=True)
    for worker, running in list(self._busy.items()):
      self._end(worker)
      trials.release(running.trial_id)


def _check_dataset(study: optuna.Study, name: str) -> None:
  first = study.user_attrs.get('dataset')
  if first is None:
    study.set_user_attr('dataset', name)
  elif first != name:
    raise UsageError(
      f'this study began with the data set "{first}", but its config finds "{name}" here; set TFDS_DATA_DIR as it '
      'was there.'
    )
