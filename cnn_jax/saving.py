"""When the state of a run is validated and saved, and what must hold before it is kept."""

import concurrent.futures
import copy
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnn_jax import checkpoint, distribute, evaluate, peers
from cnn_jax.data import Dataset, Split, drawings
from cnn_jax.metrics import diverged

_SHARE = 0.1  # the most of the time that saves by the epoch take


def epochs_between_validations(config_evaluation: Any, steps_per_epoch: int) -> int:
  """The number of epochs from one validation to the next.

  Validation never depends on the clock, because the record of an interrupted run is that of an uninterrupted one.

  Args:
    config_evaluation: the section `config.evaluation`; `min_steps` makes small epochs share a validation.
    steps_per_epoch: of the run.
  """
  every = config_evaluation.every_epochs
  return every * max(1, -(-config_evaluation.min_steps // (every * steps_per_epoch)))


def out_of_patience(config_evaluation: Any, steps_per_epoch: int, step: int, info: Mapping[str, Any]) -> bool:
  """Whether a run has ended because validation did not improve.

  It depends on the step and on the notes of its checkpoint, so a resumed run decides as an uninterrupted one.

  Args:
    config_evaluation: the section `config.evaluation`; a `patience` of 0 never ends.
    steps_per_epoch: of the run.
    step: steps done.
    info: of the checkpoint; see `with_score`.
  """
  if not config_evaluation.patience or 'best_step' not in info:
    return False
  interval = epochs_between_validations(config_evaluation, steps_per_epoch) * steps_per_epoch
  return step // interval - info['best_step'] // interval >= config_evaluation.patience


def restore_best(directory: str | os.PathLike, state: Any, info: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """Reads the checkpoint that is the best on validation; all processes must call it together.

  Args:
    directory: of the checkpoints.
    state: the last one, on devices.
    info: the notes of the last checkpoint.

  Returns:
    The best state, on devices, and the notes, with the validation of that state.
  """
  scores: dict[str, Any] = {}
  if distribute.is_primary():
    found = checkpoint.restore(directory, state, which='best')
    assert found is not None  # the last step is saved
    state, step, notes = found
    scores = {name: value for name, value in notes.items() if name.startswith('validation_')} | {'best_step': step}
  state = distribute.replicate(distribute.from_first(state))
  return state, without_score(info) | peers.first(lambda: scores)


def check_score(split: str, measured: Mapping[str, float], step: int) -> None:
  """Raises `Diverged` if the loss of a split is not finite: a finite state may still be useless.

  Args:
    split: the name of the split.
    measured: from `metrics.classification_metrics`.
    step: steps done.
  """
  if not math.isfinite(measured['loss']):
    raise diverged(f'the {split} loss after step {step:,} is {measured["loss"]}')


def sample(config: Any, dataset: Dataset) -> Split:
  """Training images that check a state which is not validated; as many as a batch of the test, which is compiled."""
  most = evaluate.most_at_a_time(dataset.test.images, config.evaluation.batch_size)
  count = min(most, len(dataset.test) or len(dataset.train))
  return Split(np.asarray(dataset.train.images[:count]), dataset.train.labels[:count])


class Saver:
  """Saves the state of a run from time to time; in process 0.

  Training waits for a copy of the state in the memory of the host. A thread writes it; one copy is kept at a time. If a
  write fails, the next call of a method raises its error, which ends the other processes as well.

  Args:
    directory: of the checkpoints.
    config_checkpoint: the section `config.checkpoint`.
    save_best: whether to save every state that is the best so far.
  """

  def __init__(self, directory: str | os.PathLike, config_checkpoint: Any, *, save_best: bool = False):
    self._directory, self._config, self._save_best = directory, config_checkpoint, save_best
    self._saved, self._seconds = time.perf_counter(), 0.0  # the time of the last save, and how long it took
    self._pool = concurrent.futures.ThreadPoolExecutor(1, 'saving')
    self._writing: concurrent.futures.Future[None] | None = None

  def wanted(self, step: int, epoch: int | None, info: Mapping[str, Any]) -> bool:
    """Whether to save now. Only the answer of process 0 counts, since it depends on the clock.

    Args:
      step: steps done.
      epoch: the number of epochs done, if one has just ended.
      info: of the checkpoint; see `with_score`.

    Raises:
      UsageError: the last save has failed.
    """
    writing = self._writing is not None and not self._writing.done()
    if not writing:
      self._finish()
    waited, best = time.perf_counter() - self._saved, info.get('best_step') == step
    if waited > 60 * self._config.every_minutes or (best and self._save_best):
      return True
    if epoch is None or epoch % self._config.every_epochs:
      return False
    # Of tiny epochs only some are saved, but always the best.
    return best or (not writing and waited * _SHARE >= self._seconds)

  def save(self, step: int, state: Any, info: Mapping[str, Any], *, wait: bool) -> None:
    """Saves; see `checkpoint.save`. All processes must call it together.

    Args:
      step, state, info: of the checkpoint. They may change when this returns.
      wait: whether to return, in all processes, only after the checkpoint is on the disk.

    Raises:
      UsageError: this save has failed, or the one before.
      Diverged: the state is not finite; it is not saved.
    """
    if distribute.is_primary():
      self._finish()
      self._saved = time.perf_counter()
      arrays = checkpoint.copy(step, state)
      self._writing = self._pool.submit(self._write, self._saved, step, arrays, copy.deepcopy(dict(info)))
      del arrays  # the memory of the copy is free as soon as it is written
    if wait:
      peers.first(self._finish)

  def close(self) -> None:
    """Waits until nothing is written any more; an error of the last write is not raised."""
    self._pool.shutdown(wait=True)

  def _write(self, started: float, step: int, arrays: Any, info: Mapping[str, Any]) -> None:
    try:
      checkpoint.save(self._directory, step, arrays, info=info, keep=self._config.keep)
    finally:
      self._saved = time.perf_counter()
      self._seconds = self._saved - started

  def _finish(self) -> None:
    """Waits for the write, and raises its error once."""
    writing, self._writing = self._writing, None
    if writing is not None:
      writing.result()


def first_notes(dataset: Dataset) -> dict[str, Any]:
  """The notes of a checkpoint before the first step: what is needed to read the run back, and what is counted.

  Args:
    dataset: of the run.
  """
  return {
    'dataset': dataset.name,
    'class_names': list(dataset.class_names),
    'image_shape': list(dataset.train.images.shape[1:]),
    'drawing': drawings.measure(dataset.train.images),
    'bit_depth': dataset.bit_depth,
    'train_seconds': 0.0,  # of the calls that trained, without compilation, validation and saving
    'trained_images': 0,
  }


def without_score(info: Mapping[str, Any]) -> dict[str, Any]:
  """The notes of a checkpoint for a later step, which has not been validated."""
  return {name: value for name, value in info.items() if not name.startswith('validation_')}


def with_score(info: Mapping[str, Any], validated: Mapping[str, float], step: int) -> dict[str, Any]:
  """The notes of a checkpoint with the validation of the same step, and the best so far; may raise `Diverged`."""
  check_score('validation', validated, step)
  made = without_score(info) | {f'validation_{name}': value for name, value in validated.items()}
  score = checkpoint.score(made)
  return made | ({'best_score': score, 'best_step': step} if score > info.get('best_score', -1.0) else {})


def result(
  config: Any,
  dataset: Dataset,
  made: Any,
  step: int,
  num_parameters: int,
  info: Mapping[str, Any],
  tested: Mapping[str, Any],
) -> dict[str, Any]:
  """The result of a run.

  Args:
    config, dataset: of the run.
    made: `plan.Plan`.
    step: steps done.
    num_parameters: of the network.
    info: the notes of the last checkpoint, or those that `restore_best` returned.
    tested: the measures of the test split; {} if it was not evaluated.

  Raises:
    Diverged: the test loss is not finite.
  """
  if tested:
    check_score('test', tested, step)
  early = (
    {'stopped_early': step < made.total_steps, 'best_step': info['best_step']} if config.evaluation.patience else {}
  )
  return {
    'dataset': dataset.name,
    'provenance': dataset.provenance,
    'data_sha256': info['data']['sha256'],
    **{f'num_{name}': len(getattr(dataset, name)) for name in ('train', 'validation', 'test')},
    'num_parameters': num_parameters,
    'epochs': step // made.steps_per_epoch,
    'steps': step,
    **early,
    'seed': config.seed,
    'train_seconds': info['train_seconds'],
    'images_per_second': info['trained_images'] / info['train_seconds'],
    **{name: value for name, value in info.items() if name.startswith('validation_')},
    **{f'test_{name}': value for name, value in tested.items()},
  }
