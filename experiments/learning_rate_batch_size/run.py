"""Does the best learning rate grow with the batch?

    python -m experiments.learning_rate_batch_size.run [--seeds=3] [--json=FILE] [--plot=FILE.png]

A sweep over the whole grid of `experiments/spaces/learning_rate_batch_size.py` for each of the seeds, by
`experiments.sweep`. The cell with the best validation accuracy, averaged over the seeds, is trained again from as many
seeds that no sweep had, and the test split is looked at, once for each.
"""

import csv
import math
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax import UsageError, record
from cnn_jax.data import load_dataset
from configs import digits
from experiments import runs
from experiments.sweeps.space import Space

CONFIG, SPACE = 'configs/digits.py', 'experiments/spaces/learning_rate_batch_size.py'
Cell = tuple[int, float]  # batch size, learning rate


def main(argv: Sequence[str]) -> None:
  """Sweeps with every seed, tests the chosen cell, and prints the table."""
  parser = runs.parser(__doc__, 'learning_rate_batch_size', seeds=3)
  parser.add_argument('--trials', type=int, help='of each sweep (default: all of the grid)')
  parser.add_argument('--workers', type=int, default=1, help='processes that train at the same time (%(default)s)')
  args, fields = parser.parse_known_args(argv)
  config = runs.override(digits.get_config(), fields)
  trials = args.trials or len(Space(SPACE, config).grid(0))
  found: dict[Cell, list[dict[str, float]]] = {}
  for seed in range(args.seeds):
    workdir = args.workdir / f'sweep_seed_{seed}'
    _sweep(fields, seed, trials, args.workers, workdir)
    for cell, measured in _read(workdir).items():
      found.setdefault(cell, []).append(measured)
  chosen = best(found)
  made = runs.vary(config, {'batch_size': chosen[0], 'optimizer.learning_rate': chosen[1]})
  dataset = load_dataset(config.data)
  tests = [
    runs.train(made, args.workdir / f'chosen_{chosen[0]}_{chosen[1]}', seed, dataset)['test_accuracy']
    for seed in range(args.seeds, 2 * args.seeds)
  ]
  rates = sorted({rate for _, rate in found})
  rows = [
    [str(size), *(_told(found.get((size, rate))) for rate in rates)] for size in sorted({size for size, _ in found})
  ]
  print(f'\n{dataset.name}: validation accuracy, n = {args.seeds}\n')
  print(runs.table(['batch size', *(f'learning rate {rate:g}' for rate in rates)], rows))
  print(f'\nChosen: batch size {chosen[0]}, learning rate {chosen[1]:g}; ', end='')
  print(f'on test, from seeds that no sweep had: {runs.mean_std(tests)} (n = {len(tests)}).')
  if args.json:
    cells = [{'batch_size': size, 'learning_rate': rate, 'runs': of} for (size, rate), of in sorted(found.items())]
    record.write_json(args.json, {'cells': cells, 'chosen': chosen, 'test_accuracy': tests})
  if args.plot:
    _plot(found, chosen, args.plot)


def best(found: dict[Cell, list[dict[str, float]]]) -> Cell:
  """The cell with the highest mean accuracy on validation, of equals that with the lowest mean loss.

  A run that diverged has an accuracy of 0 and an infinite loss.
  """
  return max(
    found,
    key=lambda cell: (
      statistics.mean(run['accuracy'] for run in found[cell]),
      -statistics.mean(run['loss'] for run in found[cell]),
    ),
  )


def _sweep(fields: Sequence[str], seed: int, trials: int, workers: int, workdir: Path) -> None:
  # Without seeds of its own it stops after the search, and never looks at the test split.
  arguments = [
    f'--config={CONFIG}', *fields, f'--config.seed={seed}', f'--space={SPACE}', '--sampler=grid', '--pruner=none',
    f'--trials={trials}', f'--workers={workers}', '--seeds=0', f'--workdir={workdir}',
  ]  # fmt: skip
  sweep = subprocess.Popen([sys.executable, '-m', 'experiments.sweep', *arguments])
  before = signal.signal(signal.SIGTERM, lambda *_: sweep.terminate())  # it saves first
  try:
    status = sweep.wait()
  finally:
    signal.signal(signal.SIGTERM, before)
  if status:
    sys.exit(status)


def _read(workdir: Path) -> dict[Cell, dict[str, float]]:
  """The trials of a sweep, from its results.csv."""
  found = {}
  with (workdir / 'results.csv').open() as file:
    for row in csv.DictReader(file):
      finite = row['state'] == 'complete'
      found[int(row['batch_size']), float(row['learning_rate'])] = {
        'accuracy': float(row['validation_accuracy']) if finite else 0.0,
        'loss': float(row['validation_loss']) if finite else math.inf,
      }
  if not found:
    raise UsageError(f'{workdir}/results.csv has no trial; remove {workdir} and try again.')
  return found


def _told(measured: Sequence[dict[str, float]] | None) -> str:
  if not measured:
    return '-'
  return runs.mean_std([run['accuracy'] for run in measured])


def _plot(found: dict[Cell, list[dict[str, float]]], chosen: Cell, path: Path) -> None:
  sizes, rates = (sorted(set(values)) for values in zip(*found, strict=True))
  means = {cell: 100 * statistics.mean(run['accuracy'] for run in of) for cell, of in found.items()}
  grid = [[means.get((size, rate), math.nan) for rate in rates] for size in sizes]
  # The colours tell the better cells apart; one that learnt nothing is as light as a poor one.
  ordered = sorted(means.values())
  low, high = ordered[len(ordered) // 4], max(ordered[-1], ordered[len(ordered) // 4] + 1)
  with runs.figure(path, size=(7.5, 3.8)) as (_, (axes,)):
    axes.imshow(grid, cmap='Blues', vmin=low - 0.3 * (high - low), vmax=high + 0.2 * (high - low), aspect='auto')
    for i, row in enumerate(grid):
      for j, value in enumerate(row):
        ink = 'white' if value > low + 0.6 * (high - low) else '#333333'
        axes.text(j, i, '' if math.isnan(value) else f'{value:.1f}', ha='center', va='center', color=ink)
    place = (rates.index(chosen[1]) - 0.5, sizes.index(chosen[0]) - 0.5)
    axes.add_patch(_frame(place))
    axes.set_xticks(range(len(rates)), [f'{rate:g}' for rate in rates])
    axes.set_yticks(range(len(sizes)), [str(size) for size in sizes])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel='learning rate', ylabel='batch size')
    axes.set_title('Validation accuracy, %, mean over the seeds; framed: chosen')


def _frame(corner: tuple[float, float]) -> Any:
  from matplotlib.patches import Rectangle

  return Rectangle(corner, 1, 1, fill=False, edgecolor=runs.COLOURS[1], linewidth=2.5, clip_on=False)


if __name__ == '__main__':
  runs.run(main)
