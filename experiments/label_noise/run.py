"""The test accuracy after training with wrong labels, with and without label smoothing.

    TFDS_DATA_DIR=DIR python -m experiments.label_noise.run [--seeds=3] [--output=experiments/label_noise]

An exact share of 10,000 training labels is wrong: any other class with equal probability. Validation and test labels
stay correct. The seed of a run also chooses the images and their wrong labels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cnn_jax import command
from cnn_jax import config as config_lib
from cnn_jax.config import default_config
from cnn_jax.data import Dataset, Split, load_dataset
from cnn_jax.tables import markdown
from experiments import plots, results, study

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
SMOOTHINGS = (0.0, 0.1)


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = study.parser(__doc__, 'label_noise', seeds=3)
  parser.add_argument('--size', type=int, default=10_000, help='training images (%(default)s)')
  args, overrides = study.parse(parser, argv)
  config = config_lib.override(recipe(), overrides)
  command.prepare_backend()
  dataset = load_dataset(config.data)
  args.workdir /= f'{args.size}_images'
  measurements = []
  for share in SHARES:
    for smoothing in SMOOTHINGS:
      made = config_lib.vary(config, {'loss.label_smoothing': smoothing})
      place = args.workdir / f'{share:.0%}_wrong_smoothing_{smoothing}'
      values = [
        study.train(made, place, seed, with_wrong_labels(dataset, args.size, share, seed))['test_accuracy']
        for seed in range(args.seeds)
      ]
      measurements.append({'wrong': share, 'label_smoothing': smoothing, 'test_accuracy': results.summary(values)})
  found = study.found(args, dataset, training_images=args.size, measurements=measurements)
  results.publish(found, tables, args.output, lambda path: plot(found, path))


def recipe() -> ConfigDict:
  """The config of all runs."""
  return config_lib.vary(
    default_config(),
    {
      'data.source': 'tfds',
      'epochs': 6,
      'schedule.warmup_epochs': 1.2,
      'batch_size': 100,
      'model.features': (16, 32, 64),
      'checkpoint.every_epochs': 10_000,
    },
  )


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The table of README.md."""
  grid = results.grid(found['measurements'], 'wrong', 'label_smoothing', 'test_accuracy')
  columns = list(next(iter(grid.values())))
  rows = [
    [f'{share:.0%}', *(results.show(cells[column]) for column in columns), str(cells[columns[0]]['n'])]
    for share, cells in grid.items()
  ]
  table = markdown(['wrong labels', *map(_name, columns), 'n'], rows)
  return {'results': f'{results.source(found)} {found["training_images"]:,} training images:\n\n{table}'}


def wrong_labels(labels: np.ndarray, share: float, num_classes: int, seed: int) -> np.ndarray:
  """Replaces an exact share of labels by wrong ones.

  With the same seed, the wrong labels of a smaller share are also wrong, and equal, in a larger one.

  Args:
    labels: int32 (n,).
    share: in [0, 1]; `share * n` is rounded to a whole number of labels.
    num_classes: a wrong label is one of the `num_classes - 1` other classes, with equal probability.
    seed: of the choice of labels and of their new values.
  """
  random = np.random.default_rng(seed)
  chosen = random.permutation(len(labels))[: round(share * len(labels))]
  offsets = random.integers(1, num_classes, len(labels), dtype=labels.dtype)
  wrong = labels.copy()
  wrong[chosen] = (labels[chosen] + offsets[chosen]) % num_classes
  return wrong


def with_wrong_labels(dataset: Dataset, size: int, share: float, seed: int) -> Dataset:
  """A subset of the training split with wrong labels; see `study.subset` and `wrong_labels`."""
  part = study.subset(dataset, size, seed)
  labels = wrong_labels(part.train.labels, share, len(part.class_names), seed)
  return dataclasses.replace(
    part, name=f'{part.name}, {share:.0%} of their labels wrong', train=Split(part.train.images, labels)
  )


def plot(found: Mapping[str, Any], path: Path) -> None:
  """Draws the test error against the share of wrong labels."""
  grid = results.grid(found['measurements'], 'label_smoothing', 'wrong', 'test_accuracy')
  errors = {
    _name(smoothing): [[100 * (1 - value) for value in cell['values']] for cell in cells.values()]
    for smoothing, cells in grid.items()
  }
  percent = [100 * share for share in next(iter(grid.values()))]
  with plots.figure(path, size=(7, 4)) as (_, (axes,)):
    plots.error_axis(axes)
    axes.set_xticks(percent)
    axes.set(xlabel='wrong training labels, %', title='Test error after training with wrong labels')
    plots.curves(axes, percent, errors)


def _name(smoothing: float) -> str:
  return f'label smoothing {smoothing}' if smoothing else 'no label smoothing'


if __name__ == '__main__':
  command.run(main)
