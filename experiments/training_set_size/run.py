"""How does the test error fall with the number of training images, and how many of them is augmentation worth?

    TFDS_DATA_DIR=DIR python -m experiments.training_set_size.run [--seeds=3] [--json=FILE] [--plot=FILE.png]

The same network takes the same number of steps with batches of the same size, whatever the number of images: only how
often it sees each of them differs. The seed of a run also chooses the images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax import UsageError, record
from cnn_jax import config as config_lib
from cnn_jax.config import default_config
from cnn_jax.data import load_dataset
from experiments import runs

SIZES = '100,300,1000,3000,10000,30000,60000'
WAYS: dict[str, dict[str, Any]] = {
  'the images as they are': {},
  'shifted, turned, scaled': {'augment.shift': 2, 'augment.rotate': 10.0, 'augment.scale': 0.1},
}


def main(argv: Sequence[str]) -> None:
  """Trains on all sizes, both ways, and prints the table."""
  parser = runs.parser(__doc__, 'training_set_size', seeds=3)
  parser.add_argument('--sizes', default=SIZES, help='training images (%(default)s)')
  parser.add_argument('--steps', type=int, default=600, help='of every run (%(default)s)')
  args, fields = parser.parse_known_args(argv)
  config = runs.override(_recipe(), fields)
  sizes = [int(size) for size in args.sizes.split(',')]
  dataset = load_dataset(config.data)
  found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
  for size in sizes:
    made = take_steps(config, size, args.steps)
    for way, of_way in WAYS.items():
      place = args.workdir / f'{args.steps}_steps' / f'{size}_images' / way.replace(',', '').replace(' ', '_')
      found[way][str(size)] = [
        runs.train(runs.vary(made, of_way), place, seed, runs.subset(dataset, size, seed))['test_accuracy']
        for seed in range(args.seeds)
      ]
  rows = [[f'{size:,}', *(runs.mean_std(found[way][str(size)]) for way in WAYS), str(args.seeds)] for size in sizes]
  print(f'\n{dataset.name}, {args.steps} steps\n\n{runs.table(["training images", *WAYS, "n"], rows)}')
  if args.json:
    record.write_json(args.json, found)
  if args.plot:
    _plot(found, sizes, args.plot)


def _recipe() -> Any:
  # Nothing is chosen here, so no image is held out to choose on.
  return runs.vary(
    default_config(),
    {
      'data.source': 'tfds', 'data.validation': 0.0, 'batch_size': 100, 'model.features': (16, 32, 64),
      'checkpoint.every_epochs': 10_000,
    },
  )  # fmt: skip


def take_steps(config: Any, size: int, steps: int) -> Any:
  """A config whose epochs are a number of steps on a set of a size, the first fifth of them warm-up.

  Raises:
    UsageError: they are not a whole number of epochs.
  """
  per_epoch = config_lib.steps_per_epoch(config, size)
  if not per_epoch or steps % per_epoch:
    raise UsageError(
      f'{steps} steps with batches of {config.batch_size} are not a whole number of epochs of {size} images.'
    )
  epochs = steps // per_epoch
  return runs.vary(config, {'epochs': epochs, 'schedule.warmup_epochs': epochs / 5})


def _plot(found: dict[str, dict[str, list[float]]], sizes: list[int], path: Path) -> None:
  errors = {
    way: [[100 * (1 - value) for value in values[str(size)]] for size in sizes] for way, values in found.items()
  }
  with runs.figure(path, size=(7.5, 4.2)) as (_, (axes,)):
    axes.set_xscale('log')
    runs.error_axis(axes)
    axes.set_xticks(sizes, [f'{size:,}' for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel='training images', title='The same number of steps on more and more images')
    runs.curves(axes, sizes, errors)


if __name__ == '__main__':
  runs.run(main)
