"""The test accuracy on MNIST of one network with fewer than a million parameters after a fixed number of epochs.

    TFDS_DATA_DIR=DIR python -m experiments.mnist_accuracy.run [--seeds=5] [--output=experiments/mnist_accuracy]
    TFDS_DATA_DIR=DIR python -m experiments.mnist_accuracy.run --select=3 --seeds=1 [--output=experiments/mnist_accuracy]
    TFDS_DATA_DIR=DIR python -m experiments.mnist_accuracy.run --longer [--select=20 --seeds=1] [--output=...]

The first command trains `configs/mnist.py:best` on all training images and evaluates the test split once per seed,
after the last epoch, without and with test-time augmentation. The second one selected that config: it holds out 10,000
training images, trains each candidate for 3 epochs and evaluates the held-out images only. `--longer` trains or selects
a wider network, for a GPU.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax import command, evaluate, metrics, workdirs
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, load_dataset
from cnn_jax.run import load_run
from cnn_jax.tables import markdown
from experiments import plots, results, study

CONFIG = f'{study.CONFIGS}/mnist.py:best'
LIMIT = 1_000_000  # parameters

# Stronger augmentation and averaged weights pay off only after more epochs than candidates are trained for, so they are
# not among the candidates. The table has speeds too: a network that is half as fast must beat twice the epochs.
CANDIDATES: dict[str, dict[str, Any]] = {
  'four blocks of one': {'model.features': (32, 64, 128, 128), 'model.convs_per_block': 1},
  'four blocks of two': {'model.features': (16, 32, 64, 128), 'model.convs_per_block': 2},
  'four blocks of two, residual': {
    'model.features': (16, 32, 64, 128),
    'model.convs_per_block': 2,
    'model.residual': True,
  },
  'three blocks of two': {'model.features': (16, 32, 64), 'model.convs_per_block': 2},
  'three blocks of one, 5x5': {'model.features': (20, 40, 80), 'model.convs_per_block': 1, 'model.kernel_size': 5},
}

# Does a wider network that is trained for five times as long do better? Of the candidates, each of the two changes of
# the network, and no distortion, did better than the first.
LONGER: dict[str, Any] = {
  'batch_size': 256,
  'epochs': 60,
  'model.features': (32, 64, 128, 128),
  'model.residual': True,
  'augment.elastic': 0.3,
  'optimizer.learning_rate': 0.2,
  'schedule.warmup_epochs': 4.0,
}
_FIRST: dict[str, Any] = {'model.features': (16, 32, 64, 128), 'model.residual': False, 'augment.elastic': 0.5}
_AIRBENCH: dict[str, Any] = {
  'model.name': 'airbench',
  'model.features': (32, 64, 128),
  'batch_size': 500,
  'optimizer.name': 'muon_sgd',
  'optimizer.learning_rate': 0.12,
  'optimizer.momentum': 0.6,
  'optimizer.head_rate': 0.67,
  'optimizer.bias_rate': 0.053,
  'optimizer.weight_decay': 4e-3,
  'optimizer.first_stage_epochs': 3.0,
  'schedule.name': 'linear',
  'schedule.warmup_epochs': 0.0,
  'loss.reduction': 'sum',
  'evaluation.ema_decay': 0.0,
  'augment.elastic': 0.5,
}
# The fields of each that differ from the longer training.
LONGER_CANDIDATES: dict[str, dict[str, Any]] = {
  'four blocks of two': _FIRST,
  'no distortion': _FIRST | {'augment.elastic': 0.0},
  'distortion of 1 pixel': _FIRST | {'augment.elastic': 1.0},
  'wider': _FIRST | {'model.features': (24, 48, 96, 160)},
  'wider first blocks': _FIRST | {'model.features': (32, 64, 128, 128)},
  'three blocks of three': _FIRST | {'model.features': (32, 64, 96), 'model.convs_per_block': 3},
  'flattened maps': _FIRST | {'model.aggregate': 'flatten'},
  'GELU': _FIRST | {'model.activation': 'gelu'},
  'no label smoothing': _FIRST | {'loss.label_smoothing': 0.0},
  'residual': _FIRST | {'model.residual': True},
  'airbench, Muon': _AIRBENCH,
}


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = study.parser(__doc__, 'mnist_accuracy', seeds=5)
  study.add_select(parser)
  parser.add_argument('--longer', action='store_true', help='a wider network, trained for longer')
  args, overrides = study.parse(parser, argv)
  fields = (LONGER if args.longer else {}) | ({'data.validation': 1 / 6} if args.select else {})
  config = config_lib.override(config_lib.vary(config_lib.load(CONFIG), fields), overrides)
  command.prepare_backend()
  dataset = load_dataset(config.data)
  if args.select:
    candidates = LONGER_CANDIDATES if args.longer else CANDIDATES
    name = 'longer_selection' if args.longer else 'selection'
    results.publish({name: study.select(config, candidates, args, dataset)}, tables, args.output)
    return
  args.workdir /= 'longer' if args.longer else 'chosen'
  found = measure(config, args, dataset)
  if args.longer:
    results.publish({'longer': found}, tables, args.output)
  else:
    results.publish(found, tables, args.output, lambda path: plot(found, path))


def measure(config: Any, args: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
  """Trains all seeds, and evaluates the test split of each without and with test-time augmentation.

  Args:
    config: of the runs.
    args: from `study.parse`.
    dataset: that the config loads.

  Returns:
    The fields of results.json.
  """
  runs = study.train_seeds(config, args.workdir, args.seeds, dataset)
  averaged = [_averaged(workdirs.seed_workdir(args.workdir, seed), dataset) for seed in range(args.seeds)]
  accuracies = {'original image': [run['test_accuracy'] for run in runs], 'mean of five shifts': averaged}
  return study.found(
    args,
    dataset,
    parameters=runs[0]['num_parameters'],
    epochs=runs[0]['epochs'],
    train_seconds=results.summary([run['train_seconds'] for run in runs]),
    measurements=[
      {'prediction': name, 'test_accuracy': results.summary(values)} for name, values in accuracies.items()
    ],
  )


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md: the selections, and the results."""
  made = {name: study.selection_table(found[name]) for name in ('selection', 'longer_selection') if name in found}
  for name, of in (('results', found), ('longer', found.get('longer', {}))):
    if 'measurements' in of:
      made[name] = table(of)
  return made


def table(found: Mapping[str, Any]) -> str:
  """The results of `measure`, with where they come from."""
  rows = [[one['prediction'], *results.show_range(one['test_accuracy'])] for one in found['measurements']]
  made = markdown(['prediction from', 'test accuracy', 'worst seed', 'best seed', 'n'], rows)
  return f'{results.source(found)} {found["parameters"]:,} parameters, {found["epochs"]} epochs:\n\n{made}'


def plot(found: Mapping[str, Any], path: Path) -> None:
  """Draws the test accuracy of every seed, without and with test-time augmentation."""
  accuracies = [one['test_accuracy'] for one in found['measurements']]
  with plots.figure(path, size=(6, 3.4)) as (_, (axes,)):
    percent = [[100 * value for value in of['values']] for of in accuracies]
    axes.plot([0, 1], percent, color='#dddddd', linewidth=0.8, zorder=1)  # a line per seed
    for i, (values, measured, colour) in enumerate(zip(percent, accuracies, plots.COLOURS, strict=False)):
      axes.plot([i] * len(values), values, 'o', color=colour, alpha=0.6, markeredgewidth=0)
      mean = statistics.mean(values)
      axes.plot([i - 0.12, i + 0.12], [mean, mean], color=colour, linewidth=2)
      axes.annotate(results.show(measured), (i + 0.12, mean), (6, 0), textcoords='offset points', va='center')
    names = [one['prediction'] for one in found['measurements']]
    axes.set_xticks(range(len(names)), names)
    axes.set(xlim=(-0.5, len(names)), ylabel='test accuracy, %', title='MNIST after the last epoch: every seed')
    axes.tick_params(axis='x', length=0)


def _averaged(workdir: Path, dataset: Dataset) -> float:
  """The test accuracy of a run with test-time augmentation."""

  def measure() -> dict[str, float]:
    run = load_run(workdir)
    views = evaluate.tta_views(run.config.augment)
    images, size = dataset.test.images, run.config.evaluation.batch_size
    logits = evaluate.compute_logits(
      run.model, run.variables, images, config_lib.statistics(run.config.data), size, views
    )
    return metrics.classification_metrics(logits, dataset.test.labels)

  return study.cached(workdir / 'averaged_over_shifts.json', measure)['accuracy']


if __name__ == '__main__':
  command.run(main)
