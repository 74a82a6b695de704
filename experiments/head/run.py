"""Global average pooling or flattening before the head: what does it cost, and what does it buy beyond the test split?

    TFDS_DATA_DIR=DIR python -m experiments.head.run [--seeds=3] [--json=FILE] [--plot=FILE.png]

Three networks that differ in nothing but `model.aggregate` and `model.head`, trained without augmentation, on digits
that all lie in the middle of their frame. Then the test digits are moved, and put on larger canvases.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import evaluate, record
from cnn_jax.config import default_config
from cnn_jax.data import Split, load_dataset
from experiments import runs

HEADS = {
  'average + dense': {'model.aggregate': 'gap', 'model.head': 'dense'},
  'average + 1x1 convolution': {'model.aggregate': 'gap', 'model.head': 'conv1x1'},
  'flatten + dense': {'model.aggregate': 'flatten', 'model.head': 'dense'},
}
MOVES = {f'moved by {by}': by for by in (1, 2, 3, 4)}  # pixels


def main(argv: Sequence[str]) -> None:
  """Trains all heads from all seeds, and prints the tables."""
  parser = runs.parser(__doc__, 'head', seeds=3)
  args, fields = parser.parse_known_args(argv)
  config = runs.override(_recipe(), fields)
  dataset = load_dataset(config.data)
  found: dict[str, list[dict[str, Any]]] = {}
  for name, of_head in HEADS.items():
    workdir = args.workdir / name.replace(' + ', '_').replace(' ', '_')
    results = runs.train_seeds(runs.vary(config, of_head), workdir, args.seeds, dataset)
    found[name] = [
      {'parameters': result['num_parameters'], 'test': result['test_accuracy']}
      | _moved(record.seed_workdir(workdir, seed), dataset.test)
      for seed, result in enumerate(results)
    ]
  print(f'\n{dataset.name}')
  pooled = {name: results for name, results in found.items() if 'average' in name}
  for part, columns in ((found, ['test', *MOVES]), (pooled, _canvases(dataset.test.images.shape[1]))):
    rows = [
      [name, f'{results[0]["parameters"]:,}', *(runs.mean_std([r[c] for r in results]) for c in columns)]
      for name, results in part.items()
    ]
    print(f'\n{runs.table(["", "parameters", *columns], rows)}')
  print(f'\nTest accuracy, mean ± standard deviation of {args.seeds} seeds.')
  if args.json:
    record.write_json(args.json, found)
  if args.plot:
    _plot(found, dataset.test.images.shape[1], args.plot)


def _recipe() -> Any:
  return runs.vary(
    default_config(),
    {'data.source': 'tfds', 'epochs': 2, 'schedule.warmup_epochs': 0.5, 'model.features': (16, 32, 64)},
  )


def shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
  """Moves images by whole pixels; what comes in is zero, the black that MNIST has around its digits.

  Args:
    images: uint8 (n, height, width, channels).
    down, right: pixels; negative ones are up and left.
  """
  height, width = images.shape[1:3]
  framed = np.pad(images, ((0, 0), (abs(down),) * 2, (abs(right),) * 2, (0, 0)))
  top, left = abs(down) - down, abs(right) - right
  return framed[:, top : top + height, left : left + width]


def on_canvas(images: np.ndarray, side: int, seed: int | None = None) -> np.ndarray:
  """Puts images on black canvases, in the middle, or with a seed anywhere where they are whole.

  Args:
    images: uint8 (n, height, width, channels).
    side: of the canvases, pixels.
    seed: of the places.

  Returns:
    uint8 (n, side, side, channels).
  """
  n, height, width, channels = images.shape
  free = np.array([side - height, side - width])
  places = np.broadcast_to(free // 2, (n, 2))
  if seed is not None:
    places = np.random.default_rng(seed).integers(0, free, (n, 2), endpoint=True)
  canvases = np.zeros((n, side, side, channels), np.uint8)
  for canvas, image, (top, left) in zip(canvases, images, places, strict=True):
    canvas[top : top + height, left : left + width] = image
  return canvases


def _canvases(side: int) -> dict[str, tuple[int, int | None]]:
  """Name -> side and seed of `on_canvas`, for images of this side: 40 and 56 pixels for 28."""
  return {
    f'{place} {size}x{size}': (size, seed)
    for size in (round(side * 10 / 7), 2 * side)
    for place, seed in (('middle of', None), ('anywhere on', 0))
  }


def _moved(workdir: Path, test: Split) -> dict[str, float]:
  """The accuracy of a run on the test images moved in eight directions, and on larger canvases if it takes them."""

  def measure() -> dict[str, float]:
    run = evaluate.load_run(workdir)

    def accuracy(images: np.ndarray) -> float:
      moved = Split(images, test.labels)
      return evaluate.evaluate_split(run.model, run.variables, moved, run.config.evaluation.batch_size)['accuracy']

    images = np.asarray(test.images)
    directions = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    accuracies = {
      name: statistics.mean(accuracy(shifted(images, by * y, by * x)) for y, x in directions)
      for name, by in MOVES.items()
    }
    if run.model.aggregate == 'gap':
      for name, (side, seed) in _canvases(images.shape[1]).items():
        accuracies[name] = accuracy(on_canvas(images, side, seed))
    return accuracies

  return runs.kept(workdir / 'moved.json', measure)


def _plot(found: dict[str, list[dict[str, Any]]], side: int, path: Path) -> None:
  with runs.figure(path, widths=(1, 1), size=(11, 4)) as (_, (left, right)):
    lines = {name: [[100 * r[move] for r in results] for move in ('test', *MOVES)] for name, results in found.items()}
    pixels = (0, *MOVES.values())
    left.set(xlim=(-0.1, 6.4), xticks=pixels, ylabel='test accuracy, %')
    left.set_xlabel('test images moved by, pixels', loc='left')
    left.set_title('Digits out of their place')
    runs.curves(left, pixels, lines)
    canvases = ['test', *_canvases(side)]
    for i, name in enumerate(canvases):
      values = [100 * r[name] for r in found['average + dense']]
      right.plot([statistics.mean(values)] * 2, [i - 0.2, i + 0.2], color=runs.COLOURS[0], linewidth=2)
      right.plot(values, [i] * len(values), 'o', color=runs.COLOURS[0], alpha=0.5, markeredgewidth=0)
    right.set_yticks(range(len(canvases)), ['the image as it is', *canvases[1:]])
    right.invert_yaxis()
    right.tick_params(axis='y', length=0)
    right.set_xlabel('test accuracy of average + dense, %')
    right.set_title('Canvases larger than any image in training')


if __name__ == '__main__':
  runs.run(main)
