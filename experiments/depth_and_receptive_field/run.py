"""What each further stage of a network adds: receptive field, parameters, accuracy, and the patches that excite it.

    TFDS_DATA_DIR=DIR python -m experiments.depth_and_receptive_field.run [--seeds=3] [--output=experiments/depth_and_receptive_field]

Networks with the first one, two, three and four of the same stages are trained. The figure shows their errors and, for
the deepest network, the patches of test images that excite some channels of each stage most, each as large as the
receptive field of that stage.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from cnn_jax import command, inspect, models, workdirs
from cnn_jax import config as config_lib
from cnn_jax.config import default_config
from cnn_jax.data import load_dataset
from cnn_jax.data.augment import normalize
from cnn_jax.run import Run, load_run
from cnn_jax.tables import markdown
from experiments import plots, results, study

CHANNELS, PATCHES = 6, 9  # shown per stage; per channel, in a square
OUTSIDE = -1.0  # of the image; pixels are 0 to 1
Fields = dict[str, tuple[inspect.Field, inspect.Field] | None]


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = study.parser(__doc__, 'depth_and_receptive_field', seeds=3)
  parser.add_argument('--images', type=int, default=5_000, help='test images to search for patches (%(default)s)')
  args, overrides = study.parse(parser, argv)
  config = config_lib.override(recipe(), overrides)
  command.prepare_backend()
  dataset = load_dataset(config.data)
  side, num_classes = dataset.test.images.shape[1], len(dataset.class_names)
  features = tuple(config.model.features)
  measurements = []
  for depth in range(1, len(features) + 1):
    made = config_lib.vary(config, {'model.features': features[:depth]})
    runs = study.train_seeds(made, args.workdir / f'{depth}_stages', args.seeds, dataset)
    measurements.append(
      {
        'stages': depth,
        'features': features[:depth],
        'receptive_field': field_side(models.create(made.model, num_classes), side),
        'parameters': runs[0]['num_parameters'],
        'test_accuracy': results.summary([run['test_accuracy'] for run in runs]),
      }
    )
  found = study.found(args, dataset, measurements=measurements)

  def draw(path: Path) -> None:
    run = load_run(workdirs.seed_workdir(args.workdir / f'{len(features)}_stages', 0))
    plot(found, strongest_patches(run, dataset.test.images[: args.images]), path)

  results.publish(found, tables, args.output, draw)


def recipe() -> ConfigDict:
  """The config of all runs; each network has the first of its stages."""
  return config_lib.vary(
    default_config(),
    {'data.source': 'tfds', 'epochs': 2, 'schedule.warmup_epochs': 0.5, 'model.features': (16, 32, 64, 128)},
  )


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The table of README.md."""
  rows = [
    [
      f'{one["stages"]} ({"-".join(map(str, one["features"]))})',
      _square(one['receptive_field']),
      f'{one["parameters"]:,}',
      results.show(one['test_accuracy']),
      str(one['test_accuracy']['n']),
    ]
    for one in found['measurements']
  ]
  header = ['stages (channels)', 'receptive field, pixels', 'parameters', 'test accuracy', 'n']
  return {'results': f'{results.source(found)}\n\n{markdown(header, rows)}'}


def field_side(model: nn.Module, side: int) -> int | None:
  """The receptive field of the last stage, pixels per side, including padding; None if it covers a large canvas too.

  Args:
    model: from `models.create`.
    side: of the square grey images, pixels.
  """
  field = list(_fields(model, (side, side, 1)).values())[-1]
  return None if field is None else field[0].size


def strongest_patches(run: Run, images: np.ndarray) -> dict[str, np.ndarray]:
  """The patches that excite channels of each stage most, at most one per image.

  The channels are those whose largest value differs most between images, by its standard deviation.

  Args:
    run: its network is examined.
    images: uint8 (n, height, width, 1), square.

  Returns:
    {'stage1': float32 (CHANNELS, PATCHES, side, side), ...}: pixels in [0, 1], or OUTSIDE of the image. `side` is the
    receptive field, or the image's side if the field is as large as the image.
  """

  @jax.jit
  def strongest(batch: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    _, maps = run.model.apply(run.variables, normalize(batch, config_lib.statistics(run.config.data)), train=False)
    found = {}
    for stage in models.stage_names(maps):
      flat = maps[stage].reshape(len(batch), -1, maps[stage].shape[-1])
      found[stage] = jnp.max(flat, axis=1), jnp.argmax(flat, axis=1)
    return found

  parts = [strongest(images[i : i + 500]) for i in range(0, len(images), 500)]
  shapes = models.map_shapes(run.model, images.shape[1:])
  patches = {}
  for stage, fields in _fields(run.model, images.shape[1:]).items():
    largest, where = (np.concatenate([part[stage][i] for part in parts]) for i in (0, 1))
    channels = np.argsort(-largest.std(axis=0), kind='stable')[:CHANNELS]
    best = np.argsort(-largest[:, channels], axis=0, kind='stable')[:PATCHES]
    width = shapes[stage].shape[2]
    patches[stage] = np.stack(
      [
        np.stack([_patch(images[i, :, :, 0], fields, divmod(int(where[i, channel]), width)) for i in of_channel])
        for channel, of_channel in zip(channels, best.T, strict=True)
      ]
    )
  return patches


def plot(found: Mapping[str, Any], patches: Mapping[str, np.ndarray], path: Path) -> None:
  """Draws the test errors, and the patches of each stage."""
  from matplotlib import colormaps

  rows = found['measurements']
  depths = [one['stages'] for one in rows]
  errors = [[100 * (1 - value) for value in one['test_accuracy']['values']] for one in rows]
  with plots.figure(path, widths=(1, 1.9), size=(12, 5.2)) as (_, (left, right)):
    plots.error_axis(left)
    left.set_xticks(
      depths, [f'{one["stages"]}\n{_square(one["receptive_field"])}\n{one["parameters"]:,}' for one in rows]
    )
    left.set_xlabel('stages\nreceptive field, pixels\nparameters')
    left.set_title('Test error')
    plots.curves(left, depths, {'': errors})
    place = right.get_subplotspec()
    right.remove()
    gray = colormaps['gray'].with_extremes(under='#bcd3dc')  # outside of the image
    grid = place.subgridspec(len(patches), CHANNELS).subplots(squeeze=False)
    for row, (stage, channels) in zip(grid, patches.items(), strict=True):
      for axes, of_channel in zip(row, channels, strict=False):
        axes.imshow(_sheet(of_channel), cmap=gray, vmin=0, vmax=1, interpolation='none')
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
      for axes in row[len(channels) :]:
        axes.remove()
      row[0].set_ylabel(f'{stage}\n{_square(channels.shape[-1])}', rotation=0, ha='right', va='center')
    # The text is wider than a column and would push the columns apart; the empty title reserves its height.
    grid[0, 0].set_title(' ')
    text = 'The patches that excite some channels of each stage most'
    grid[0, 0].text(0, 1.06, text, transform=grid[0, 0].transAxes, fontsize=11, in_layout=False)


def _fields(model: nn.Module, image_shape: Sequence[int]) -> Fields:
  """The receptive fields of all stages, measured on a canvas that is several times as large as the image."""
  height, width, channels = image_shape
  times = max(4, -(-128 // min(height, width)))
  return inspect.receptive_fields(model, (times * height, times * width, channels))


def _patch(image: np.ndarray, fields: tuple[inspect.Field, inspect.Field] | None, place: tuple[int, int]) -> np.ndarray:
  """The pixels of a square image that a place of a map depends on; the whole image if they are at least as many."""
  side = len(image)
  pixels = image.astype(np.float32) / 255
  if fields is None or max(field.size for field in fields) >= side:
    return pixels
  framed = np.pad(pixels, side, constant_values=OUTSIDE)
  top, left = (side + field.first + at * field.stride for field, at in zip(fields, place, strict=True))
  return framed[top : top + fields[0].size, left : left + fields[1].size]


def _sheet(patches: np.ndarray) -> np.ndarray:
  """Patches in a square, a pixel apart."""
  square, side = round(PATCHES**0.5), patches.shape[-1]
  sheet = np.full((square * (side + 1) - 1,) * 2, np.nan)
  for i, patch in enumerate(patches):
    top, left = (side + 1) * (i // square), (side + 1) * (i % square)
    sheet[top : top + side, left : left + side] = patch
  return sheet


def _square(side: int | None) -> str:
  return 'everything' if side is None else f'{side}x{side}'


if __name__ == '__main__':
  command.run(main)
