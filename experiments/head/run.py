"""Global average pooling or flattening in front of the head: accuracy on the test split, on moved digits, on larger images.

    TFDS_DATA_DIR=DIR python -m experiments.head.run [--seeds=3] [--output=experiments/head]

Three networks that differ only in `model.aggregate` and `model.head` are trained without augmentation on digits that
are all centred. The test digits are then moved and placed on larger canvases.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cnn_jax import command, evaluate, workdirs
from cnn_jax import config as config_lib
from cnn_jax.config import default_config
from cnn_jax.data import Split, load_dataset
from cnn_jax.run import load_run
from cnn_jax.tables import markdown
from experiments import plots, results, study

HEADS = {
  'average + dense': {'model.aggregate': 'gap', 'model.head': 'dense'},
  'average + 1x1 convolution': {'model.aggregate': 'gap', 'model.head': 'conv1x1'},
  'flatten + dense': {'model.aggregate': 'flatten', 'model.head': 'dense'},
}
MOVES = {f'moved by {by}': by for by in (1, 2, 3, 4)}  # pixels


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  args, overrides = study.parse(study.parser(__doc__, 'head', seeds=3), argv)
  config = config_lib.override(recipe(), overrides)
  command.prepare_backend()
  dataset = load_dataset(config.data)
  measurements = []
  for name, fields in HEADS.items():
    workdir = args.workdir / name.replace(' + ', '_').replace(' ', '_')
    runs = study.train_seeds(config_lib.vary(config, fields), workdir, args.seeds, dataset)
    moved = [_accuracies(workdirs.seed_workdir(workdir, seed), dataset.test) for seed in range(args.seeds)]
    accuracies = {'test': [run['test_accuracy'] for run in runs]}
    accuracies |= {images: [of_seed[images] for of_seed in moved] for images in moved[0]}
    measurements += [
      {'head': name, 'parameters': runs[0]['num_parameters'], 'images': images, 'accuracy': results.summary(values)}
      for images, values in accuracies.items()
    ]
  found = study.found(args, dataset, measurements=measurements)
  results.publish(found, tables, args.output, lambda path: plot(found, path))


def recipe() -> ConfigDict:
  """The config of all runs."""
  return config_lib.vary(
    default_config(),
    {'data.source': 'tfds', 'epochs': 2, 'schedule.warmup_epochs': 0.5, 'model.features': (16, 32, 64)},
  )


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md: digits that are moved, and larger canvases."""
  accuracies = results.grid(found['measurements'], 'head', 'images', 'accuracy')
  parameters = {one['head']: f'{one["parameters"]:,}' for one in found['measurements']}

  def table(columns: Sequence[str]) -> str:
    rows = [
      [head, parameters[head], *(results.show(cells[images]) for images in columns)]
      for head, cells in accuracies.items()
      if set(columns) <= cells.keys()
    ]
    return markdown(['head', 'parameters', *columns], rows)

  return {
    'moved': f'{results.source(found)}\n\n{table(["test", *MOVES])}',
    'canvases': table(_canvas_names(accuracies)),
  }


def shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
  """Moves images by whole pixels and fills the border with zero, the background of MNIST.

  Args:
    images: uint8 (n, height, width, channels).
    down, right: pixels; negative values move up and left.
  """
  height, width = images.shape[1:3]
  framed = np.pad(images, ((0, 0), (abs(down),) * 2, (abs(right),) * 2, (0, 0)))
  top, left = abs(down) - down, abs(right) - right
  return framed[:, top : top + height, left : left + width]


def on_canvas(images: np.ndarray, side: int, seed: int | None = None) -> np.ndarray:
  """Places images on black canvases.

  Args:
    images: uint8 (n, height, width, channels).
    side: of the canvases, pixels.
    seed: of random places where the images lie inside; None: in the middle.

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
  """The canvases for images of a side, as name -> arguments of `on_canvas`: 40 and 56 pixels for 28."""
  return {
    f'{place} {size}x{size}': (size, seed)
    for size in (round(side * 10 / 7), 2 * side)
    for place, seed in (('middle of', None), ('anywhere on', 0))
  }


def _canvas_names(accuracies: Mapping[str, Mapping[str, Any]]) -> list[str]:
  return [images for images in next(iter(accuracies.values())) if images not in ('test', *MOVES)]


def _accuracies(workdir: Path, test: Split) -> dict[str, float]:
  """The accuracy of a run on moved digits (mean of eight directions), and on canvases unless its head is flattened."""

  def measure() -> dict[str, float]:
    run = load_run(workdir)

    def accuracy(images: np.ndarray) -> float:
      split = Split(images, test.labels)
      return evaluate.evaluate_split(run.model, run.variables, split, run.config)['accuracy']

    images = np.asarray(test.images)
    directions = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    accuracies = {
      name: statistics.mean(accuracy(shifted(images, by * y, by * x)) for y, x in directions)
      for name, by in MOVES.items()
    }
    if run.config.model.aggregate == 'gap':
      for name, (side, seed) in _canvases(images.shape[1]).items():
        accuracies[name] = accuracy(on_canvas(images, side, seed))
    return accuracies

  measured = study.cached(workdir / 'moved.json', measure)
  return {name: measured[name] for name in (*MOVES, *_canvases(test.images.shape[1])) if name in measured}


def plot(found: Mapping[str, Any], path: Path) -> None:
  """Draws accuracy against the distance, and the accuracies of the first head on canvases."""
  accuracies = results.grid(found['measurements'], 'head', 'images', 'accuracy')
  percent = {
    head: {images: [100 * value for value in cell['values']] for images, cell in cells.items()}
    for head, cells in accuracies.items()
  }
  with plots.figure(path, widths=(1, 1), size=(11, 4)) as (_, (left, right)):
    pixels = (0, *MOVES.values())
    left.set(xlim=(-0.1, 6.4), xticks=pixels, ylabel='test accuracy, %')
    left.set_xlabel('distance by which the test images are moved, pixels', loc='left')
    left.set_title('Moved digits')
    plots.curves(left, pixels, {head: [of[images] for images in ('test', *MOVES)] for head, of in percent.items()})
    head, values = next(iter(percent.items()))
    canvases = ['test', *_canvas_names(accuracies)]
    for i, name in enumerate(canvases):
      right.plot([statistics.mean(values[name])] * 2, [i - 0.2, i + 0.2], color=plots.COLOURS[0], linewidth=2)
      right.plot(values[name], [i] * len(values[name]), 'o', color=plots.COLOURS[0], alpha=0.5, markeredgewidth=0)
    right.set_yticks(range(len(canvases)), ['original image', *canvases[1:]])
    right.invert_yaxis()
    right.tick_params(axis='y', length=0)
    right.set_xlabel(f'test accuracy of {head}, %')
    right.set_title('Canvases larger than the training images')


if __name__ == '__main__':
  command.run(main)
