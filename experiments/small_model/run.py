"""The test accuracy on MNIST of a network with fewer than 8,000 parameters.

    TFDS_DATA_DIR=DIR python -m experiments.small_model.run [--seeds=5] [--output=experiments/small_model]
    TFDS_DATA_DIR=DIR python -m experiments.small_model.run --select=10 --seeds=1 [--output=experiments/small_model]
    TFDS_DATA_DIR=DIR python -m experiments.small_model.run --longer [--select=20 --seeds=1] [--output=...]

The first command trains `configs/mnist.py:small` and evaluates the test split once per seed, after the last epoch. The
second one selected that config: it trains each candidate for 10 epochs and evaluates validation only. `--longer` trains
another network for three times as many epochs on all training images, or selects it with a sixth of them held out.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax import command, workdirs
from cnn_jax import config as config_lib
from cnn_jax.data import load_dataset
from cnn_jax.tables import markdown
from experiments import plots, results, study
from experiments.mnist_accuracy import run as mnist_accuracy

CONFIG = f'{study.CONFIGS}/mnist.py:small'
LIMIT = 8_000  # parameters: kernels, biases, and the scales and biases of norms

CANDIDATES: dict[str, dict[str, Any]] = {
  'four blocks of one': {'model.features': (12, 16, 20, 16), 'model.convs_per_block': 1},
  'three blocks of two': {'model.features': (8, 12, 16), 'model.convs_per_block': 2},
  'four blocks of two': {'model.features': (6, 10, 12, 14), 'model.convs_per_block': 2},
}

# Do another network and three times as many epochs do better? It combines three of the changes that do in the selection.
LONGER: dict[str, Any] = {
  'data.validation': 0.0,
  'epochs': 60,
  'model.features': (6, 9, 12, 12),
  'model.aggregate': 'flatten',
  'model.residual': True,
  'augment.elastic': 0.5,
}
_FIRST: dict[str, Any] = {
  'model.features': (6, 10, 12, 14),
  'model.aggregate': 'gap',
  'model.residual': False,
  'augment.elastic': 0.0,
  'schedule.warmup_epochs': 0.5,
}
# The fields of each that differ from the longer training.
LONGER_CANDIDATES: dict[str, dict[str, Any]] = {
  'four blocks of two': _FIRST,
  'distortion of half a pixel': _FIRST | {'augment.elastic': 0.5},
  'GELU': _FIRST | {'model.activation': 'gelu'},
  'SiLU': _FIRST | {'model.activation': 'silu'},
  'flattened maps': _FIRST | {'model.features': (6, 9, 12, 12), 'model.aggregate': 'flatten'},
  'residual': _FIRST | {'model.features': (6, 10, 12, 12), 'model.residual': True},
  'stronger augmentation': _FIRST | {'augment.shift': 2, 'augment.rotate': 10.0, 'augment.scale': 0.1},
  'weight decay 5e-4': _FIRST | {'optimizer.weight_decay': 5e-4},
  'learning rate 0.6': _FIRST | {'optimizer.learning_rate': 0.6},
}


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = study.parser(__doc__, 'small_model', seeds=5)
  study.add_select(parser)
  parser.add_argument('--longer', action='store_true', help='another network, trained for longer')
  args, overrides = study.parse(parser, argv)
  config = config_lib.load(CONFIG)
  if args.longer:
    config = config_lib.vary(config, LONGER | ({'data.validation': 1 / 6} if args.select else {}))
  config = config_lib.override(config, overrides)
  command.prepare_backend()
  dataset = load_dataset(config.data)
  if args.select:
    name, candidates = ('longer_selection', LONGER_CANDIDATES) if args.longer else ('selection', CANDIDATES)
    results.publish({name: study.select(config, candidates, args, dataset)}, tables, args.output)
    return
  if args.longer:
    args.workdir /= 'longer'
    results.publish({'longer': mnist_accuracy.measure(config, args, dataset)}, tables, args.output)
    return
  study.check_validation(dataset)  # the figure shows it
  args.workdir /= 'chosen'
  runs = study.train_seeds(config, args.workdir, args.seeds, dataset)
  found = study.found(
    args,
    dataset,
    parameters=runs[0]['num_parameters'],
    epochs=runs[0]['epochs'],
    train_seconds=results.summary([run['train_seconds'] for run in runs]),
    test_accuracy=results.summary([run['test_accuracy'] for run in runs]),
    validation=_validation(args.workdir, args.seeds),
  )
  results.publish(found, tables, args.output, lambda path: plot(found, path))


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md: the selections, and the results."""
  made = {name: study.selection_table(found[name]) for name in ('selection', 'longer_selection') if name in found}
  if 'longer' in found:
    made['longer'] = mnist_accuracy.table(found['longer'])
  if 'test_accuracy' in found:
    accuracy = found['test_accuracy']
    row = [f'{found["parameters"]:,}', str(found['epochs']), *results.show_range(accuracy)]
    header = ['parameters', 'epochs', 'test accuracy', 'worst seed', 'best seed', 'n']
    made['results'] = f'{results.source(found)}\n\n{markdown(header, [row])}'
  return made


def plot(found: Mapping[str, Any], path: Path) -> None:
  """Draws the validation error of each seed per epoch, and the test errors after the last one."""
  with plots.figure(path, size=(6.5, 3.8)) as (_, (axes,)):
    blue, red = plots.COLOURS[:2]
    epochs = [one['epoch'] for one in found['validation']]
    by_seed = zip(*(one['accuracy']['values'] for one in found['validation']), strict=True)
    for accuracies in by_seed:
      errors = [100 * (1 - accuracy) for accuracy in accuracies]
      axes.plot(epochs, errors, color=blue, alpha=0.5, linewidth=1)
    tests = [100 * (1 - accuracy) for accuracy in found['test_accuracy']['values']]
    end = 1.03 * epochs[-1]
    axes.plot([end] * len(tests), tests, 'o', color=red, markersize=4, alpha=0.6, markeredgewidth=0)
    plots.error_axis(axes)
    plots.name_ends(axes, end, [(errors[-1], 'validation', blue), (statistics.mean(tests), 'test', red)])
    axes.set_xticks(range(0, int(epochs[-1]) + 1, max(1, round(epochs[-1] / 5))))
    axes.set(xlabel='epoch', ylabel='error, %', title=f'Fewer than {LIMIT:,} parameters: every seed')


def _validation(workdir: Path, seeds: int) -> list[dict[str, Any]]:
  """The validation accuracy of all seeds per epoch."""
  by_epoch: dict[int, list[float]] = {}
  for seed in range(seeds):
    for line in map(json.loads, (workdirs.seed_workdir(workdir, seed) / 'metrics.jsonl').read_text().splitlines()):
      if line['split'] == 'validation':
        by_epoch.setdefault(line['epoch'], []).append(line['accuracy'])
  return [{'epoch': epoch, 'accuracy': results.summary(values)} for epoch, values in sorted(by_epoch.items())]


if __name__ == '__main__':
  command.run(main)
