"""The workers of a sweep, and the loop that keeps them busy."""

import contextlib
import dataclasses
import multiprocessing.connection
import time
from collections.abc import Callable
from typing import Any

import optuna

from cnn_jax import UsageError
from experiments.sweeps.progress import Progress
from experiments.sweeps.trials import Lost, Trials
from experiments.sweeps.worker import Share, Task, Worker, shares

_DEATHS = 3  # of workers over one run, after which it is the run's fault
_SECONDS_TO_STOP = 60.0


class StoppedError(Exception):
  """SIGTERM or Ctrl-C; all runs were saved."""


@dataclasses.dataclass
class _Running:
  name: str
  trial: optuna.Trial
  trial_id: int
  begun: float


class Pool:
  """Worker processes, started when there is work.

  Args:
    workers: how many.
    heartbeat: seconds between two signs of life of the trials that run.
    stopping: says whether to stop.
  """

  def __init__(self, workers: int, heartbeat: float, stopping: Callable[[], bool]):
    self._heartbeat, self._stopping = heartbeat, stopping
    self._spare: list[Share] = shares(workers)  # of workers that have not been started
    self._workers: list[Worker] = []
    self._busy: dict[Worker, _Running] = {}
    self._deaths: dict[str, int] = {}

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, *_: object) -> None:
    for worker in self._workers:
      worker.kill()

  def finish(self, trials: Trials, task_of: Callable[[str, int], tuple[optuna.Trial, Task]], show: Progress) -> None:
    """Works until every run of a study is finished, here or elsewhere.

    Args:
      trials: the study.
      task_of: from the name of a run and the id of its trial, both just claimed.
      show: told what happens.

    Raises:
      StoppedError: SIGTERM or Ctrl-C, after all runs were saved.
      UsageError: of a run.
    """
    try:
      self._finish(trials, task_of, show)
    except Exception:
      with contextlib.suppress(Exception):  # what is on its way out is the reason, and the storage may be down
        self._stop(trials)
      raise
    finally:
      show.close()

  def _finish(self, trials: Trials, task_of: Callable[[str, int], tuple[optuna.Trial, Task]], show: Progress) -> None:
    beaten = looked = float('-inf')
    while True:
      now = time.monotonic()
      if now - beaten >= self._heartbeat:
        beaten = now
        self._beat(trials)
      if len(self._busy) < len(self._workers) + len(self._spare) and now - looked >= 1.0:
        while len(self._busy) < len(self._workers) + len(self._spare):
          if (claimed := trials.claim()) is None:
            looked = now  # what is left is in other hands: look again in a second
            break
          self._start(trials, claimed, task_of)
        if not self._busy and len(trials.finished()) == len(trials.runs):
          trials.tidy()
          return
      for worker in self._ready():
        event = self._receive(trials, worker)
        if event[0] not in ('began', 'validation'):
          looked = float('-inf')
        show.event(*event)
      show.draw()
      if self._stopping():
        self._stop(trials)
        raise StoppedError

  def _start(
    self, trials: Trials, claimed: tuple[str, int], task_of: Callable[[str, int], tuple[optuna.Trial, Task]]
  ) -> None:
    try:
      trial, task = task_of(*claimed)
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

  def _receive(self, trials: Trials, worker: Worker, stopping: bool = False) -> tuple[Any, ...]:
    """Handles a message of a worker; returns what happened, to which run, and what there is to say about it."""
    try:
      kind, *values = worker.connection.recv()
    except (EOFError, OSError):
      return self._died(trials, worker, stopping)
    if worker not in self._busy:
      return 'late', '', None, 0.0
    running = self._busy[worker]
    if kind not in ('began', 'validation'):
      del self._busy[worker]
    seconds = time.monotonic() - running.begun
    try:
      if kind == 'began':
        _check_dataset(trials.study, values[0])
        return 'began', running.name, None, seconds
      if kind == 'validation':
        prune = False
        try:
          prune = trials.report(running.trial, *values)
        finally:
          worker.reply(prune and not stopping)  # in any case: it waits
        return 'validation', running.name, values, seconds
      if kind == 'done':
        accuracy = values[0].get('validation_accuracy')
        if accuracy is None:
          trials.release(running.trial_id)
          raise UsageError('there is no validation split to compare trials on; raise config.data.validation.')
        kept = ('num_parameters', 'validation_accuracy', 'validation_loss', 'test_accuracy', 'test_loss')
        trials.finish(running.trial, accuracy, {name: values[0][name] for name in kept if name in values[0]})
        return 'done', running.name, accuracy, seconds
      if kind in ('pruned', 'diverged'):
        trials.finish(running.trial, None, {'diverged': values[0]} if kind == 'diverged' else {})
        return kind, running.name, None, seconds
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

  def _died(self, trials: Trials, worker: Worker, stopping: bool) -> tuple[Any, ...]:
    running = self._busy.get(worker)
    status = self._end(worker)
    if running is None:
      return 'late', '', None, 0.0
    trials.release(running.trial_id)
    self._deaths[running.name] = self._deaths.get(running.name, 0) + 1
    how = f'by signal {-status}' if status < 0 else f'with status {status}'
    if self._deaths[running.name] == _DEATHS and not stopping:
      raise UsageError(
        f'{_DEATHS} workers died while training {running.name}, the last {how}; see its log.txt, free memory or use '
        'fewer --workers.'
      )
    return 'died', running.name, how, time.monotonic() - running.begun

  def _end(self, worker: Worker) -> int:
    """Ends a worker now; another one will have its share."""
    self._busy.pop(worker, None)
    self._workers.remove(worker)
    self._spare.append(worker.share)
    return worker.kill()

  def _beat(self, trials: Trials) -> None:
    workers = {running.trial_id: worker for worker, running in self._busy.items()}
    for trial_id in trials.beat(list(workers)):
      self._end(workers[trial_id])

  def _stop(self, trials: Trials) -> None:
    """Stops all runs; they save, and whoever comes next goes on with them."""
    for worker in self._busy:
      worker.stop()
    end = time.monotonic() + _SECONDS_TO_STOP
    while self._busy and time.monotonic() < end:
      for worker in self._ready():
        with contextlib.suppress(Exception):  # runs are saved even if nobody can be told
          self._receive(trials, worker, stopping=True)
    for worker, running in list(self._busy.items()):
      self._end(worker)
      trials.release(running.trial_id)


def _check_dataset(study: optuna.Study, name: str) -> None:
  begun = study.user_attrs.get('dataset')
  if begun is None:
    study.set_user_attr('dataset', name)
  elif begun != name:
    raise UsageError(
      f'this study was begun on "{begun}", but its config finds "{name}" here; set TFDS_DATA_DIR as it was there.'
    )
