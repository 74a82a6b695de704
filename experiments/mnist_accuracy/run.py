"""How accurate can one network of less than a million parameters be on MNIST after a fixed number of epochs?

    TFDS_DATA_DIR=DIR python -m experiments.mnist_accuracy.run [--seeds=5] [--json=FILE] [--plot=FILE.png]
    TFDS_DATA_DIR=DIR python -m experiments.mnist_accuracy.run --select=3 --seeds=1

The first trains `configs/mnist_best.py` on all training images and takes the test once a seed, after the last epoch,
without and with test-time augmentation. The second is how that config was chosen: it trains each candidate for 3
epochs, with 10,000 training images held out, and looks at those alone.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax import evaluate, metrics, record
from cnn_jax.data import Dataset, load_dataset
from configs import mnist_best
from experiments import runs

# What stronger augmentation and averaged weights bring shows only after more epochs than these get, so they are no
# candidates. The table has the speeds beside the accuracies: a network twice as slow must be worth twice the epochs.
CANDIDATES: dict[str, dict[str, Any]] = {
  'four blocks of one': {'model.features': (32, 64, 128, 128), 'model.convs_per_block': 1},
  'four blocks of two': {'model.features': (16, 32, 64, 128), 'model.convs_per_block': 2},
  'four blocks of two, residual': {
    'model.features': (16, 32, 64, 128), 'model.convs_per_block': 2, 'model.residual': True,
  },
  'three blocks of two': {'model.features': (16, 32, 64), 'model.convs_per_block': 2},
  'three blocks of one, 5x5': {
    'model.features': (20, 40, 80), 'model.convs_per_block': 1, 'model.kernel_size': 5,
  },
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
  """Trains the seeds, or the candidates, and prints the table."""
  parser = runs.parser(__doc__, 'mnist_accuracy', seeds=5)
  parser.add_argument('--select', type=int, metavar='EPOCHS', help='compare candidates on validation instead')
  args, fields = parser.parse_known_args(argv)
  config = runs.override(mnist_best.get_config(), fields)
  if args.select:
    config = runs.vary(config, {'data.validation': 1 / 6})
    dataset = load_dataset(config.data)
    print('\n' + runs.select(config, CANDIDATES, args.select, args.workdir, args.seeds, dataset))
    return
  dataset = load_dataset(config.data)
  results = runs.train_seeds(config, args.workdir, args.seeds, dataset)
  accuracies = {
    'as it is': [result['test_accuracy'] for result in results],
    'averaged over five shifts': [
      _averaged(record.seed_workdir(args.workdir, seed), dataset) for seed in range(args.seeds)
    ],
  }
  minutes = statistics.median(result['train_seconds'] for result in results) / 60
  print(f'\n{dataset.name}: {results[0]["num_parameters"]:,} parameters, {results[0]["epochs"]} epochs, ', end='')
  print(f'{minutes:.1f} minutes a seed (median).\n')
  header = ['the test image', 'test accuracy', 'worst seed', 'best seed', 'n']
  rows = [
    [name, runs.mean_std(values), f'{100 * min(values):.2f} %', f'{100 * max(values):.2f} %', str(len(values))]
    for name, values in accuracies.items()
  ]
  print(runs.table(header, rows))
  if args.json:
    record.write_json(args.json, {'results': results, 'averaged_over_shifts': accuracies['averaged over five shifts']})
  if args.plot:
    _plot(accuracies, args.plot)


def _averaged(workdir: Path, dataset: Dataset) -> float:
  """The test accuracy of a run with test-time augmentation."""

  def measure() -> dict[str, float]:
    run = evaluate.load_run(workdir)
    views = evaluate.tta_views(run.config.augment)
    images, size = dataset.test.images, run.config.evaluation.batch_size
    logits = evaluate.compute_logits(run.model, run.variables, images, size, views)
    return metrics.classification_metrics(logits, dataset.test.labels)

  return runs.kept(workdir / 'averaged_over_shifts.json', measure)['accuracy']


def _plot(accuracies: dict[str, list[float]], path: Path) -> None:
  with runs.figure(path, size=(6, 3.4)) as (_, (axes,)):
    names = list(accuracies)
    pairs = [[100 * value for value in pair] for pair in zip(*accuracies.values(), strict=True)]
    axes.plot([0, 1], list(zip(*pairs, strict=True)), color='#dddddd', linewidth=0.8, zorder=1)  # seed by seed
    for i, (name, colour) in enumerate(zip(names, runs.COLOURS, strict=False)):
      values = [pair[i] for pair in pairs]
      axes.plot([i] * len(values), values, 'o', color=colour, alpha=0.6, markeredgewidth=0)
      mean = statistics.mean(values)
      axes.plot([i - 0.12, i + 0.12], [mean, mean], color=colour, linewidth=2)
      axes.annotate(runs.mean_std(accuracies[name]), (i + 0.12, mean), (6, 0), textcoords='offset points', va='center')
    axes.set_xticks(range(len(names)), names)
    axes.set(xlim=(-0.5, len(names)), ylabel='test accuracy, %', title='MNIST at the last epoch, seed by seed')
    axes.tick_params(axis='x', length=0)


if __name__ == '__main__':
  runs.run(main)
