"""What does each block buy, and what do the blocks answer to?

    TFDS_DATA_DIR=DIR python -m experiments.depth_and_receptive_field.run [--seeds=3] [--json=FILE] [--plot=FILE.png]

Networks of the first one, two, three and four of the same blocks. The figure has their errors, and, for the deepest
one, the parts of test images that excite some channels of each block most, each as large as what the block sees.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import evaluate, record
from cnn_jax.config import default_config
from cnn_jax.data import load_dataset
from cnn_jax.data.augment import normalize
from cnn_jax.evaluate import Run
from cnn_jax.model import feature_maps
from cnn_jax.report import receptive_field
from experiments import runs

CHANNELS, PATCHES = 6, 9  # shown of each block; of each channel, in a square
OUTSIDE = -1.0  # in place of a pixel, which is 0 to 1


def main(argv: Sequence[str]) -> None:
  """Trains all depths from all seeds, and prints the table."""
  parser = runs.parser(__doc__, 'depth_and_receptive_field', seeds=3)
  parser.add_argument('--images', type=int, default=5_000, help='of the test, to find patches in (%(default)s)')
  args, fields = parser.parse_known_args(argv)
  config = runs.override(_recipe(), fields)
  dataset = load_dataset(config.data)
  features = tuple(config.model.features)
  found = []
  for depth in range(1, len(features) + 1):
    made = runs.vary(config, {'model.features': features[:depth]})
    results = runs.train_seeds(made, args.workdir / f'{depth}_blocks', args.seeds, dataset)
    found.append(
      {
        'blocks': depth,
        'features': features[:depth],
        'field': field_side(made.model, dataset.test.images.shape[1], depth),
        'parameters': results[0]['num_parameters'],
        'test_accuracy': [result['test_accuracy'] for result in results],
      }
    )
  rows = [
    [
      f'{one["blocks"]} ({"-".join(map(str, one["features"]))})', f'{one["field"]}x{one["field"]}',
      f'{one["parameters"]:,}', runs.mean_std(one['test_accuracy']), str(args.seeds),
    ]
    for one in found
  ]  # fmt: skip
  header = ['blocks (channels)', 'receptive field, pixels', 'parameters', 'test accuracy', 'n']
  print(f'\n{dataset.name}\n\n{runs.table(header, rows)}')
  if args.json:
    record.write_json(args.json, {'depths': found})
  if args.plot:
    run = evaluate.load_run(record.seed_workdir(args.workdir / f'{len(features)}_blocks', 0))
    sheets = {b + 1: strongest_patches(run, dataset.test.images[: args.images], b + 1) for b in range(len(features))}
    _plot(found, sheets, args.plot)


def _recipe() -> Any:
  return runs.vary(
    default_config(),
    {'data.source': 'tfds', 'epochs': 2, 'schedule.warmup_epochs': 0.5, 'model.features': (16, 32, 64, 128)},
  )


def field_side(config_model: Any, size: int, block: int) -> int:
  """Pixels a side of what one place of a block's maps depends on, the frame of zeros around the image included.

  Args:
    config_model: the section `config.model`.
    size: pixels a side of the image.
    block: from 1.
  """
  first, last = receptive_field(config_model, size, block, 0)
  return last - first + 1


def strongest_patches(run: Run, images: np.ndarray, block: int) -> np.ndarray:
  """The parts of some images that excite channels of a block most, at most one of each image.

  The channels are those that differ most from image to image, by the standard deviation of their largest value.

  Args:
    run: whose network looks.
    images: uint8 (n, height, width, 1), of equal sides.
    block: from 1.

  Returns:
    float32 (CHANNELS, PATCHES, side, side) in [0, 1], side that of the receptive field, at most the image's; OUTSIDE
    of the image.
  """

  @jax.jit
  def look(batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    maps = feature_maps(run.model, run.variables, normalize(batch))[f'block{block}']
    flat = maps.reshape(maps.shape[0], -1, maps.shape[-1])
    return jnp.max(flat, axis=1), jnp.argmax(flat, axis=1)

  parts = [look(images[i : i + 500]) for i in range(0, len(images), 500)]
  largest, where = (np.concatenate(part) for part in zip(*parts, strict=True))
  size = images.shape[1]
  side = _map_side(run, size, block)
  channels = np.argsort(-largest.std(axis=0), kind='stable')[:CHANNELS]
  best = np.argsort(-largest[:, channels], axis=0, kind='stable')[:PATCHES]
  return np.stack(
    [
      np.stack([_patch(run, images[i, :, :, 0], block, divmod(int(where[i, channel]), side)) for i in of_channel])
      for channel, of_channel in zip(channels, best.T, strict=True)
    ]
  )


def _map_side(run: Run, size: int, block: int) -> int:
  images = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
  return jax.eval_shape(lambda x: feature_maps(run.model, run.variables, x), images)[f'block{block}'].shape[1]


def _patch(run: Run, image: np.ndarray, block: int, place: tuple[int, int]) -> np.ndarray:
  """What one place of a block's maps sees of an image (size, size); the whole image where it sees more than that."""
  size = len(image)
  ends = [receptive_field(run.config.model, size, block, position) for position in place]
  if ends[0][1] - ends[0][0] >= size:
    return image.astype(np.float32) / 255
  framed = np.pad(image.astype(np.float32) / 255, size, constant_values=OUTSIDE)
  (top, bottom), (left, right) = ends
  return framed[top + size : bottom + size + 1, left + size : right + size + 1]


def _plot(found: list[dict[str, Any]], sheets: dict[int, np.ndarray], path: Path) -> None:
  from matplotlib import colormaps

  depths = [one['blocks'] for one in found]
  errors = [[100 * (1 - value) for value in one['test_accuracy']] for one in found]
  with runs.figure(path, widths=(1, 1.9), size=(12, 5.2)) as (_, (left, right)):
    runs.error_axis(left)
    left.set_xticks(depths, [f'{one["blocks"]}\n{one["field"]}x{one["field"]}\n{one["parameters"]:,}' for one in found])
    left.set_xlabel('blocks\nreceptive field, pixels\nparameters')
    left.set_title('Deeper sees more')
    runs.curves(left, depths, {'': errors})
    place = right.get_subplotspec()
    right.remove()
    square = round(PATCHES**0.5)
    gray = colormaps['gray'].with_extremes(under='#bcd3dc')  # what is outside of the image
    grid = place.subgridspec(len(sheets), CHANNELS).subplots(squeeze=False)
    for row, (block, channels) in zip(grid, sheets.items(), strict=True):
      for axes, patches in zip(row, channels, strict=False):
        side = patches.shape[-1]
        sheet = np.full((square * (side + 1) - 1,) * 2, np.nan)
        for i, patch in enumerate(patches):
          top, start = (side + 1) * (i // square), (side + 1) * (i % square)
          sheet[top : top + side, start : start + side] = patch
        axes.imshow(sheet, cmap=gray, vmin=0, vmax=1, interpolation='none')
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
      for axes in row[len(channels) :]:
        axes.remove()
      side = channels.shape[-1]
      row[0].set_ylabel(f'block {block}\n{side}x{side}', rotation=0, ha='right', va='center')
    # A title as wide as this would push the columns apart; an empty one makes room for it.
    grid[0, 0].set_title(' ')
    text = 'What excites some channels of each block most'
    grid[0, 0].text(0, 1.06, text, transform=grid[0, 0].transAxes, fontsize=11, in_layout=False)


if __name__ == '__main__':
  runs.run(main)
