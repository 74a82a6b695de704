"""The test error as a function of the number of training images, with and without augmentation.

    TFDS_DATA_DIR=DIR python -m experiments.training_set_size.run [--seeds=3] [--output=experiments/training_set_size]

The same network takes the same number of steps with batches of the same size on every number of images; only the
number of times that each image is used differs. The seed of a run also chooses the images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cnn_jax import UsageError, command
from cnn_jax import config as config_lib
from cnn_jax.config import default_config
from cnn_jax.data import load_dataset
from cnn_jax.tables import markdown
from experiments import plots, results, study

SIZES = '100,300,1000,3000,10000,30000,60000'
AUGMENTATIONS: dict[str, dict[str, Any]] = {
  'no augmentation': {},
  'shift, rotation, zoom': {'augment.shift': 2, 'augment.rotate': 10.0, 'augment.scale': 0.1},
}


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = study.parser(__doc__, 'training_set_size', seeds=3)
  parser.add_argument('--sizes', default=SIZES, help='numbers of training images (%(default)s)')
  parser.add_argument('--steps', type=int, default=600, help='per run (%(default)s)')
  args, overrides = study.parse(parser, argv)
  config = config_lib.override(recipe(), overrides)
  try:
    sizes = [int(size) for size in args.sizes.split(',')]
  except ValueError as error:
    raise UsageError(f'--sizes is {args.sizes!r}; give numbers of images such as 100,300.') from error
  command.prepare_backend()
  dataset = load_dataset(config.data)
  args.workdir /= f'{args.steps}_steps'
  measurements = []
  for size in sizes:
    made = with_steps(config, size, args.steps)
    for name, fields in AUGMENTATIONS.items():
      place = args.workdir / f'{size}_images' / name.replace(',', '').replace(' ', '_')
      values = [
        study.train(config_lib.vary(made, fields), place, seed, study.subset(dataset, size, seed))['test_accuracy']
        for seed in range(args.seeds)
      ]
      measurements.append({'training_images': size, 'augmentation': name, 'test_accuracy': results.summary(values)})
  found = study.found(args, dataset, steps=args.steps, measurements=measurements)
  results.publish(found, tables, args.output, lambda path: plot(found, path))


def recipe() -> ConfigDict:
  """The config of all runs. Nothing is selected, so no images are held out for validation."""
  return config_lib.vary(
    default_config(),
    {
      'data.source': 'tfds',
      'data.validation': 0.0,
      'batch_size': 100,
      'model.features': (16, 32, 64),
      'checkpoint.every_epochs': 10_000,
    },
  )


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The table of README.md."""
  grid = results.grid(found['measurements'], 'training_images', 'augmentation', 'test_accuracy')
  columns = list(next(iter(grid.values())))
  rows = [
    [f'{size:,}', *(results.show(cells[column]) for column in columns), str(cells[columns[0]]['n'])]
    for size, cells in grid.items()
  ]
  table = markdown(['training images', *columns, 'n'], rows)
  return {'results': f'{results.source(found)} {found["steps"]:,} steps, test accuracy:\n\n{table}'}


def with_steps(config: ConfigDict, size: int, steps: int) -> ConfigDict:
  """A config whose epochs amount to a number of steps, the first fifth of them warm-up.

  Args:
    config: its `epochs` and `schedule.warmup_epochs` are replaced.
    size: training images.
    steps: in total.

  Raises:
    UsageError: the steps are not a whole number of epochs.
  """
  per_epoch = config_lib.steps_per_epoch(config, size)
  if not per_epoch or steps % per_epoch:
    raise UsageError(
      f'{steps} steps with batches of {config.batch_size} are not a whole number of epochs of {size} images; '
      'change --steps or --sizes.'
    )
  epochs = steps // per_epoch
  return config_lib.vary(config, {'epochs': epochs, 'schedule.warmup_epochs': epochs / 5})


def plot(found: Mapping[str, Any], path: Path) -> None:
  """Draws the test error against the number of training images."""
  grid = results.grid(found['measurements'], 'augmentation', 'training_images', 'test_accuracy')
  errors = {
    name: [[100 * (1 - value) for value in cell['values']] for cell in cells.values()] for name, cells in grid.items()
  }
  sizes = list(next(iter(grid.values())))
  with plots.figure(path, size=(7.5, 4.2)) as (_, (axes,)):
    axes.set_xscale('log')
    plots.error_axis(axes)
    axes.set_xticks(sizes, [f'{size:,}' for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel='training images', title=f'Test error after {found["steps"]:,} steps')
    plots.curves(axes, sizes, errors)


if __name__ == '__main__':
  command.run(main)
