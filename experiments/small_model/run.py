"""How accurate can a network of less than 8,000 parameters be on MNIST?

    TFDS_DATA_DIR=DIR python -m experiments.small_model.run [--seeds=5] [--json=FILE] [--plot=FILE.png]
    TFDS_DATA_DIR=DIR python -m experiments.small_model.run --select=10 --seeds=1

The first trains `configs/mnist_small.py` and takes the test once a seed, after the last epoch. The second is how that
config was chosen: it trains each candidate for 10 epochs and looks at validation alone.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax import record
from cnn_jax.data import load_dataset
from configs import mnist_small
from experiments import runs

LIMIT = 8_000  # parameters: kernels, biases, and the scales and biases of norms

CANDIDATES: dict[str, dict[str, Any]] = {
  'four blocks of one': {'model.features': (12, 16, 20, 16), 'model.convs_per_block': 1},
  'three blocks of two': {'model.features': (8, 12, 16), 'model.convs_per_block': 2},
  'four blocks of two': {'model.features': (6, 10, 12, 14), 'model.convs_per_block': 2},
}


def main(argv: Sequence[str]) -> None:
  """Trains the seeds, or the candidates, and prints the table."""
  parser = runs.parser(__doc__, 'small_model', seeds=5)
  parser.add_argument('--select', type=int, metavar='EPOCHS', help='compare candidates on validation instead')
  args, fields = parser.parse_known_args(argv)
  config = runs.override(mnist_small.get_config(), fields)
  dataset = load_dataset(config.data)
  if args.select:
    print('\n' + runs.select(config, CANDIDATES, args.select, args.workdir, args.seeds, dataset))
    return
  results = runs.train_seeds(config, args.workdir, args.seeds, dataset)
  accuracies = [result['test_accuracy'] for result in results]
  minutes = statistics.median(result['train_seconds'] for result in results) / 60
  header = ['parameters', 'epochs', 'minutes a seed', 'test accuracy', 'worst seed', 'best seed', 'n']
  row = [f'{results[0]["num_parameters"]:,}', str(results[0]['epochs']), f'{minutes:.1f}', runs.mean_std(accuracies)]
  row += [f'{100 * min(accuracies):.2f} %', f'{100 * max(accuracies):.2f} %', str(len(accuracies))]
  print(f'\n{dataset.name}\n\n{runs.table(header, [row])}')
  if args.json:
    record.write_json(args.json, {'results': results})
  if args.plot:
    _plot(args.workdir, accuracies, args.plot)


def _plot(workdir: Path, accuracies: list[float], path: Path) -> None:
  """The validation error of each seed, epoch by epoch, and beside its end the test error."""
  with runs.figure(path, size=(6.5, 3.8)) as (_, (axes,)):
    blue, red = runs.COLOURS[:2]
    end = 0
    for seed in range(len(accuracies)):
      lines = map(json.loads, (record.seed_workdir(workdir, seed) / 'metrics.jsonl').read_text().splitlines())
      points = [(line['epoch'], 100 * (1 - line['accuracy'])) for line in lines if line['split'] == 'validation']
      axes.plot(*zip(*points, strict=True), color=blue, alpha=0.5, linewidth=1)
      end, last = points[-1]
    tests = [100 * (1 - accuracy) for accuracy in accuracies]
    axes.plot([1.03 * end] * len(tests), tests, 'o', color=red, markersize=4, alpha=0.6, markeredgewidth=0)
    runs.error_axis(axes)
    runs.name_ends(axes, 1.03 * end, [(last, 'validation', blue), (statistics.mean(tests), 'test', red)])
    axes.set_xticks(range(0, int(end) + 1, max(1, round(end / 5))))
    axes.set(xlabel='epoch', ylabel='error, %', title=f'Less than {LIMIT:,} parameters, seed by seed')


if __name__ == '__main__':
  runs.run(main)
