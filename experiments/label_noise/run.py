"""What do wrong labels in training cost, and does label smoothing help against them?

    TFDS_DATA_DIR=DIR python -m experiments.label_noise.run [--seeds=3] [--json=FILE] [--plot=FILE.png]

10,000 training images, of which an exact share has a wrong label, any other class with the same probability. Validation
and test labels stay right. The seed of a run also chooses the images and their wrong labels.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import record
from cnn_jax.config import default_config
from cnn_jax.data import Dataset, Split, load_dataset
from experiments import runs

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
SMOOTHINGS = {'no label smoothing': 0.0, 'label smoothing 0.1': 0.1}


def main(argv: Sequence[str]) -> None:
  """Trains with all shares, with and without smoothing, and prints the table."""
  parser = runs.parser(__doc__, 'label_noise', seeds=3)
  parser.add_argument('--size', type=int, default=10_000, help='training images (%(default)s)')
  args, fields = parser.parse_known_args(argv)
  config = runs.override(_recipe(), fields)
  dataset = load_dataset(config.data)
  found: dict[str, dict[str, list[float]]] = {name: {} for name in SMOOTHINGS}
  for share in SHARES:
    for name, smoothing in SMOOTHINGS.items():
      made = runs.vary(config, {'loss.label_smoothing': smoothing})
      place = args.workdir / f'{args.size}_images' / f'{share:.0%}_wrong_smoothing_{smoothing}'
      found[name][f'{share:.0%}'] = [
        runs.train(made, place, seed, _spoiled(dataset, args.size, share, seed))['test_accuracy']
        for seed in range(args.seeds)
      ]
  shares = [f'{share:.0%}' for share in SHARES]
  rows = [[share, *(runs.mean_std(found[name][share]) for name in SMOOTHINGS), str(args.seeds)] for share in shares]
  print(f'\n{dataset.name}, {args.size:,} training images\n\n{runs.table(["wrong labels", *SMOOTHINGS, "n"], rows)}')
  if args.json:
    record.write_json(args.json, found)
  if args.plot:
    _plot(found, args.plot)


def _recipe() -> Any:
  return runs.vary(
    default_config(),
    {
      'data.source': 'tfds', 'epochs': 6, 'schedule.warmup_epochs': 1.2, 'batch_size': 100,
      'model.features': (16, 32, 64), 'checkpoint.every_epochs': 10_000,
    },
  )  # fmt: skip


def wrong_labels(labels: np.ndarray, share: float, num_classes: int, seed: int) -> np.ndarray:
  """Labels of which an exact share is wrong.

  Those of a larger share of the same seed are those of a smaller one and more.

  Args:
    labels: int32 (n,).
    share: in [0, 1]; of n, rounded to a whole number of labels.
    num_classes: a wrong label is any of the others with the same probability.
    seed: of which labels, and of what they become.
  """
  random = np.random.default_rng(seed)
  chosen = random.permutation(len(labels))[: round(share * len(labels))]
  offsets = random.integers(1, num_classes, len(labels), dtype=labels.dtype)
  spoiled = labels.copy()
  spoiled[chosen] = (labels[chosen] + offsets[chosen]) % num_classes
  return spoiled


def _spoiled(dataset: Dataset, size: int, share: float, seed: int) -> Dataset:
  part = runs.subset(dataset, size, seed)
  labels = wrong_labels(part.train.labels, share, len(part.class_names), seed)
  return dataclasses.replace(
    part, name=f'{part.name}, {share:.0%} of their labels wrong', train=Split(part.train.images, labels)
  )


def _plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
  errors = {name: [[100 * (1 - v) for v in values] for values in of.values()] for name, of in found.items()}
  with runs.figure(path, size=(7, 4)) as (_, (axes,)):
    runs.error_axis(axes)
    percent = [100 * share for share in SHARES]
    axes.set_xticks(percent)
    axes.set(xlabel='wrong labels in training, %', title='Right labels in the test, wrong ones in training')
    runs.curves(axes, percent, errors)


if __name__ == '__main__':
  runs.run(main)
