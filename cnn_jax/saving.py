"""When the state of a run is validated and saved, and what must hold before it is kept."""

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import jax

from cnn_jax import checkpoint, peers
from cnn_jax.data import Dataset, Split
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
  count = min(config.evaluation.batch_size, len(dataset.test) or len(dataset.train))
  return Split(dataset.train.images[:count], dataset.train.labels[:count])


class Saver:
  """Saves the state of a run from time to time; in process 0, whose success all processes wait for.

  Args:
    directory: of the checkpoints.
    config_checkpoint: the section `config.checkpoint`.
  """

  def __init__(self, directory: str | os.PathLike, config_checkpoint: Any):
    self._directory, self._config = directory, config_checkpoint
    self._saved, self._seconds = time.perf_counter(), 0.0  # the end and the duration of the last save

  def wanted(self, step: int, epoch: int | None, info: Mapping[str, Any]) -> bool:
    """Whether to save now. Only the answer of process 0 counts, since it depends on the clock.

    Args:
      step: steps done.
      epoch: the number of epochs done, if one has just ended.
      info: of the checkpoint; see `with_score`.
    """
    waited = time.perf_counter() - self._saved
    if waited > 60 * self._config.every_minutes:
      return True
    if epoch is None or epoch % self._config.every_epochs:
      return False
    # Of tiny epochs only some are saved, but always the best.
    return waited * _SHARE >= self._seconds or info.get('best_step') == step

  def save(self, step: int, state: Any, info: Mapping[str, Any]) -> None:
    """Saves; see `checkpoint.save`. All processes must call it together."""
    started = time.perf_counter()
    keep = self._config.keep
    peers.first(lambda: checkpoint.save(self._directory, step, jax.device_get(state), info=info, keep=keep))
    self._saved = time.perf_counter()
    self._seconds = self._saved - started


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
  config: Any, dataset: Dataset, made: Any, num_parameters: int, info: Mapping[str, Any], tested: Mapping[str, float]
) -> dict[str, Any]:
  """The result of a run.

  Args:
    config, dataset: of the run.
    made: `train.Setup`.
    num_parameters: of the network.
    info: the notes of the last checkpoint.
    tested: the measures of the test split; {} if it was not evaluated.

  Raises:
    Diverged: the test loss is not finite.
  """
  if tested:
    check_score('test', tested, made.total_steps)
  return {
    'dataset': dataset.name,
    'provenance': dataset.provenance,
    'data_sha256': info['data']['sha256'],
    **{f'num_{name}': len(getattr(dataset, name)) for name in ('train', 'validation', 'test')},
    'num_parameters': num_parameters,
    'epochs': made.epochs,
    'steps': made.total_steps,
    'seed': config.seed,
    'train_seconds': info['train_seconds'],
    'images_per_second': info['trained_images'] / info['train_seconds'],
    **{name: value for name, value in info.items() if name.startswith('validation_')},
    **{f'test_{name}': value for name, value in tested.items()},
  }
