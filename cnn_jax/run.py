"""A run read back from its workdir: the network, its variables, and what they were trained on."""

import dataclasses
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax import UsageError, checkpoint, models, record
from cnn_jax.data import Dataset, load_dataset


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, read back from its workdir."""

  config: Any
  model: nn.Module
  variables: Any  # {'params', 'batch_stats'}, numpy arrays
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # height, width, channels of the model's input
  dataset: str  # the name of what it was trained on
  step: int  # updates behind `variables`
  drawing: dict[str, Any] | None  # how the training images lie in their frame; see `drawings.measure`


def load_run(workdir: str | os.PathLike, which: str = 'last') -> Run:
  """Reads a run's config and one of its checkpoints. Nothing in the workdir is executed.

  Args:
    workdir: of a run that has saved at least once.
    which: `last`, or `best` on validation.

  Raises:
    UsageError: there is no run, or no checkpoint that is whole.
  """
  config = record.load_config(workdir)
  restored = checkpoint.restore(os.path.join(workdir, 'checkpoints'), None, which=which)
  if restored is None:
    raise UsageError(f'{workdir} has no checkpoint yet; train it with python -m cnn_jax.main --workdir={workdir}.')
  state, step, info = restored
  variables = state.get('ema') or {'params': state['params'], 'batch_stats': state.get('batch_stats') or {}}
  variables.setdefault('batch_stats', {})
  return Run(
    config=config,
    model=models.create(config.model, len(info['class_names'])),
    variables=jax.tree.map(jnp.asarray, variables),
    class_names=tuple(info['class_names']),
    image_shape=tuple(info['image_shape']),
    dataset=info['dataset'],
    step=step,
    drawing=info.get('drawing'),
  )


def load_run_dataset(run: Run) -> Dataset:
  """Loads the data set of a run.

  Raises:
    UsageError: what the config finds here and now is not what the run was trained on.
  """
  dataset = load_dataset(run.config.data)
  if dataset.name != run.dataset:
    raise UsageError(
      f'the run was trained on "{run.dataset}", but its config finds "{dataset.name}" here; '
      'set TFDS_DATA_DIR as it was then.'
    )
  return dataset
