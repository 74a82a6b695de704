"""Exact evaluation: every example of a split counts once, on any number of devices. Also a command.

python -m cnn_jax.evaluate --workdir=DIR [--split=test] [--checkpoint=last]
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax import UsageError, checkpoint, command, metrics, record
from cnn_jax.data import Dataset, Split, load_dataset
from cnn_jax.data.augment import normalize
from cnn_jax.model import CNN, create_model


@functools.partial(jax.jit, static_argnames='model')
def eval_step(model: CNN, variables: Any, images: jax.Array) -> jax.Array:
  """Logits of one batch.

  Args:
    model: the network.
    variables: `{'params', 'batch_stats'}`.
    images: uint8 (batch, height, width, channels).

  Returns:
    float32 (batch, num_classes).
  """
  return model.apply(variables, normalize(images), train=False)


def compute_logits(model: CNN, variables: Any, images: Any, batch_size: int) -> np.ndarray:
  """Logits of many images, over all devices of all processes.

  Args:
    model: the network.
    variables: `{'params', 'batch_stats'}`.
    images: uint8 (n, height, width, channels), n >= 0; an array or whatever gives one for a slice.
    batch_size: images per call over all devices; rounded up to a multiple of them. The last
      batch is padded and the padding's logits dropped.

  Returns:
    float32 (n, num_classes), on every process.
  """
  processes, devices = jax.process_count(), jax.local_devices()
  sharding = NamedSharding(Mesh(np.array(devices), ('batch',)), PartitionSpec('batch'))
  # A batch larger than the split would compute padding only.
  size = min(-(-batch_size // processes), max(1, -(-len(images) // processes)))
  size = -(-size // len(devices)) * len(devices)
  share = -(-len(images) // processes)
  first, end = jax.process_index() * share, min((jax.process_index() + 1) * share, len(images))
  logits = np.zeros((share, model.num_classes), np.float32)
  for start in range(first, end, size):
    batch = np.asarray(images[start : min(start + size, end)])
    padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])
    found = eval_step(model, variables, jax.device_put(padded, sharding))
    logits[start - first : start - first + len(batch)] = np.asarray(found)[: len(batch)]
  if processes == 1:
    return logits
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(logits, tiled=True)[: len(images)]


def evaluate_split(model: CNN, variables: Any, split: Split, batch_size: int) -> dict[str, float]:
  """Loss, accuracy and top-5 accuracy over a split; see `metrics.classification_metrics`."""
  return metrics.classification_metrics(compute_logits(model, variables, split.images, batch_size), split.labels)


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, read back from its workdir."""

  config: Any
  model: CNN
  variables: Any  # {'params', 'batch_stats'}, numpy arrays
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # height, width, channels of the model's input
  dataset: str  # the name of what it was trained on
  step: int  # updates behind `variables`


def load_run(workdir: str | os.PathLike, which: str = 'last') -> Run:
  """Reads a run's config and one of its checkpoints; nothing in the workdir is executed.

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
    model=create_model(config.model, len(info['class_names'])),
    variables=jax.tree.map(jnp.asarray, variables),
    class_names=tuple(info['class_names']),
    image_shape=tuple(info['image_shape']),
    dataset=info['dataset'],
    step=step,
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


def main(argv: Sequence[str]) -> None:
  """The command: prints one JSON object with the metrics of a split."""
  parser = command.Parser('Evaluates a run on a split of its data set.')
  parser.add_argument('--workdir', required=True, help='the run')
  parser.add_argument('--split', default='test', choices=['train', 'validation', 'test'])
  parser.add_argument('--checkpoint', default='last', choices=['last', 'best'], help='newest, or best on validation')
  args = parser.parse_args(argv)
  command.use_compile_cache()
  run = load_run(args.workdir, args.checkpoint)
  split = getattr(load_run_dataset(run), args.split)
  if not len(split.labels):
    raise UsageError(f'the {args.split} split of "{run.dataset}" is empty; choose another --split.')
  measured = evaluate_split(run.model, run.variables, split, run.config.evaluation.batch_size)
  print(json.dumps({'dataset': run.dataset, 'split': args.split, 'step': run.step, 'n': len(split.labels)} | measured))


if __name__ == '__main__':
  command.run(main)
