"""The best learning rate for each batch size, on the digits with the same number of epochs.

    python -m experiments.learning_rate_batch_size.run [--seeds=3] [--output=experiments/learning_rate_batch_size]

`python -m cnn_jax.sweep` trains the whole grid of `experiments/spaces/learning_rate_batch_size.py` once per seed. The
cell with the best mean validation accuracy is trained again from as many seeds that no sweep used, and only these runs
are evaluated on the test split.
"""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax import UsageError, command
from cnn_jax import config as config_lib
from cnn_jax.data import load_dataset
from cnn_jax.tables import markdown
from experiments import plots, results, study

CONFIG = f'{study.CONFIGS}/digits.py'
SPACE = f'{results.FOLDER}/spaces/learning_rate_batch_size.py'
Cell = tuple[int, float]  # batch size, learning rate


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = study.parser(__doc__, 'learning_rate_batch_size', seeds=3)
  parser.add_argument('--trials', type=int, default=1000, help='of each sweep (default: the whole grid)')
  parser.add_argument('--workers', type=int, default=1, help='processes that train at the same time (%(default)s)')
  args, overrides = study.parse(parser, argv)
  config = config_lib.load(CONFIG, overrides)
  command.prepare_backend()
  cells: dict[Cell, list[dict[str, float]]] = {}
  for seed in range(args.seeds):
    workdir = args.workdir / f'sweep_seed_{seed}'
    sweep(overrides, seed, args.trials, args.workers, workdir)
    for cell, measured in _read(workdir).items():
      cells.setdefault(cell, []).append(measured)
  chosen = best(cells)
  made = config_lib.vary(config, {'batch_size': chosen[0], 'optimizer.learning_rate': chosen[1]})
  dataset = load_dataset(config.data)
  test_seeds = list(range(args.seeds, 2 * args.seeds))
  place = args.workdir / f'chosen_{chosen[0]}_{chosen[1]}'
  tests = [study.train(made, place, seed, dataset)['test_accuracy'] for seed in test_seeds]
  found = study.found(
    args,
    dataset,
    measurements=[
      {
        'batch_size': size,
        'learning_rate': rate,
        'validation_accuracy': results.summary([run['accuracy'] for run in measured]),
        'validation_loss': results.summary([run['loss'] for run in measured]),
      }
      for (size, rate), measured in sorted(cells.items())
    ],
    chosen={
      'batch_size': chosen[0],
      'learning_rate': chosen[1],
      'seeds': test_seeds,
      'test_accuracy': results.summary(tests),
    },
  )
  results.publish(found, tables, args.output, lambda path: plot(found, path))


def best(cells: Mapping[Cell, Sequence[Mapping[str, float]]]) -> Cell:
  """The cell with the highest mean validation accuracy, of equals the one with the lowest mean loss.

  Args:
    cells: `accuracy` and `loss` of each seed; a run that diverged has an accuracy of 0 and an infinite loss.
  """
  return max(
    cells,
    key=lambda cell: (
      statistics.mean(run['accuracy'] for run in cells[cell]),
      -statistics.mean(run['loss'] for run in cells[cell]),
    ),
  )


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The table of README.md."""
  grid = results.grid(found['measurements'], 'batch_size', 'learning_rate', 'validation_accuracy')
  rates = sorted({rate for cells in grid.values() for rate in cells})
  rows = [
    [str(size), *(results.show(cells[rate]) if rate in cells else '-' for rate in rates)]
    for size, cells in grid.items()
  ]
  table = markdown(['batch size', *(f'learning rate {rate:g}' for rate in rates)], rows)
  chosen = found['chosen']
  tested = f'{results.show(chosen["test_accuracy"])} of the test images, seeds {", ".join(map(str, chosen["seeds"]))}'
  cell = f'Selected: batch size {chosen["batch_size"]}, learning rate {chosen["learning_rate"]:g}; {tested}.'
  return {'results': f'{results.source(found)} Validation accuracy:\n\n{table}\n\n{cell}'}


def sweep(overrides: Sequence[str], seed: int, trials: int, workers: int, workdir: Path) -> None:
  """Runs a sweep over the grid, or continues it, without an evaluation of the test split.

  Args:
    overrides: of the config.
    seed: of all trials.
    trials: at most this many points of the grid.
    workers: processes.
    workdir: of the sweep.
  """
  from cnn_jax.sweep.__main__ import main as run_sweep  # needs Optuna, an extra

  run_sweep(
    [
      f'--config={CONFIG}',
      *overrides,
      f'--config.seed={seed}',
      f'--space={SPACE}',
      '--sampler=grid',
      '--pruner=none',
      f'--trials={trials}',
      f'--workers={workers}',
      '--seeds=0',
      f'--workdir={workdir}',
    ]
  )


def plot(found: Mapping[str, Any], path: Path) -> None:
  """Draws the mean validation accuracies as a grid of colours, with a frame around the selected cell."""
  grid = results.grid(found['measurements'], 'batch_size', 'learning_rate', 'validation_accuracy')
  sizes = list(grid)
  rates = sorted({rate for cells in grid.values() for rate in cells})
  values = [[100 * cells[rate]['mean'] if rate in cells else math.nan for rate in rates] for cells in grid.values()]
  # The scale separates the better cells; a cell that learnt nothing is as pale as any poor one.
  ordered = sorted(value for row in values for value in row if not math.isnan(value))
  low, high = ordered[len(ordered) // 4], max(ordered[-1], ordered[len(ordered) // 4] + 1)
  with plots.figure(path, size=(7.5, 3.8)) as (_, (axes,)):
    from matplotlib.patches import Rectangle

    axes.imshow(values, cmap='Blues', vmin=low - 0.3 * (high - low), vmax=high + 0.2 * (high - low), aspect='auto')
    for i, row in enumerate(values):
      for j, value in enumerate(row):
        ink = 'white' if value > low + 0.6 * (high - low) else plots.INK
        axes.text(j, i, '' if math.isnan(value) else f'{value:.1f}', ha='center', va='center', color=ink)
    chosen = found['chosen']
    corner = (rates.index(chosen['learning_rate']) - 0.5, sizes.index(chosen['batch_size']) - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=plots.COLOURS[1], linewidth=2.5, clip_on=False))
    axes.set_xticks(range(len(rates)), [f'{rate:g}' for rate in rates])
    axes.set_yticks(range(len(sizes)), [str(size) for size in sizes])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel='learning rate', ylabel='batch size')
    axes.set_title('Validation accuracy, %, mean over seeds; the frame marks the selected cell')


def _read(workdir: Path) -> dict[Cell, dict[str, float]]:
  """The trials of a sweep, from its results.csv."""
  cells = {}
  with (workdir / 'results.csv').open() as file:
    for row in csv.DictReader(file):
      complete = row['state'] == 'complete'
      cells[int(row['batch_size']), float(row['learning_rate'])] = {
        'accuracy': float(row['validation_accuracy']) if complete else 0.0,
        'loss': float(row['validation_loss']) if complete else math.inf,
      }
  if not cells:
    raise UsageError(f'{workdir}/results.csv has no trial; remove {workdir} and try again.')
  return cells


if __name__ == '__main__':
  command.run(main)
