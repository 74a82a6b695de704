"""The stages of the network: the strongest maps of an image, and the parts of other images that excite their channels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnn_jax import inspect, models
from cnn_jax.report import layers as layers_lib
from cnn_jax.report import pictures, text
from cnn_jax.report.subject import Subject

TILES, CHANNELS = 16, 6  # per step: maps, channels shown with patches
_PATCHES = {True: (8, 64), False: (6, 80)}  # of small images and of others: patches per channel, pixels of a side
_STEPS = 5  # of a deep network, neighbouring stages share a step
_SUBJECTS = ('edges', 'textures', 'parts', 'objects')  # what maps respond to, from the image on
_INSPECTED = 100, 2000, 1_600_000  # images: at least, at most, and pixels of those between


def show_stages(
  subject: Subject, maps: Mapping[str, np.ndarray], layers: Sequence[inspect.Layer]
) -> list[dict[str, Any]]:
  """Draws, step by step, the maps of an image and what their channels respond to most.

  Args:
    subject: of the report.
    maps: of the image: stage1, ..., each (height, width, channels).
    layers: of the network, from `inspect.layer_table`.
  """
  names = models.stage_names(maps)
  steps = group_stages([maps[name].shape[:2] for name in names])
  ends = [names[step[-1]] for step in steps]
  # The channels that respond most to the image, the first ones of which are shown with parts of other images.
  orders = {name: np.argsort(-maps[name].mean(axis=(0, 1)), kind='stable')[:TILES] for name in ends}
  excited = {name: [int(c) for c in order[:CHANNELS] if maps[name][..., c].max() > 0] for name, order in orders.items()}
  fields = inspect.receptive_fields(subject.run.model, subject.run.input_shape)
  whole = {name for name in ends if _is_large(fields[name], subject)}
  sample, strongest, kept = _inspect(subject, {name: excited[name] if name in whole else [] for name in ends})
  count, side = _PATCHES[subject.small]
  shown = []
  for step, name in zip(steps, ends, strict=True):
    values, field = maps[name], fields[name]
    channels = []
    for i, channel in enumerate(excited[name]):
      largest, where = (x[:, channel] for x in strongest[name])
      best = np.argsort(-largest, kind='stable')[:count]
      patches = []
      for j in best:
        image = subject.pixels(int(sample[j]))
        if field and name not in whole:
          patches.append(pictures.fit(_patch(image, field, divmod(int(where[j]), values.shape[1])), side))
        elif subject.small:
          patches.append(pictures.cut(image, 0, 0, *image.shape[:2]))
        else:
          patches.append(pictures.spotlight(pictures.fit(image, side), kept[name][j, :, :, i]))
      channels.append(
        {
          'channel': channel,
          'map': pictures.data_uri(pictures.heat(values[:, :, channel])),
          'patches': pictures.data_uri(pictures.sheet(np.stack(patches), count)),
          'count': len(patches),
          'largest': float(largest[best[0]]),
          'here': float(values[:, :, channel].max()),
        }
      )
    tiles = np.stack([pictures.heat(values[:, :, channel]) for channel in orders[name]])
    shown.append(
      {
        'title': _title(step),
        'subject': _SUBJECTS[round(step[-1] * 3 / max(len(names) - 1, 1))],
        'layers': layers_lib.describe_layers([layer for layer in layers if layer.stage - 1 in step]),
        'shape': text.shape(values.shape),
        'last': step[-1] + 1 if len(step) > 1 else None,
        'count': values.shape[2],
        'shown': len(tiles),
        'sheet': pictures.data_uri(pictures.sheet(tiles, 4)),
        'field': text.shape([axis.size for axis in field]) if field else None,
        'lit': name in whole and not subject.small,
        'channels': channels,
        'silent': int(np.sum(values.max(axis=(0, 1)) <= 0)),
        'sample': len(sample),
      }
    )
  return shown


def group_stages(sizes: Sequence[tuple[int, ...]], limit: int = _STEPS) -> list[list[int]]:
  """Groups the stages of a network into at most `limit` steps: neighbours, at first those with maps of equal size.

  Args:
    sizes: height and width of each stage's maps.
    limit: of the number of steps, at least 1.

  Returns:
    The stages of each step, from 0 on.
  """
  steps = [[i] for i in range(len(sizes))]
  while len(steps) > limit:
    pairs = range(len(steps) - 1)
    first = min(pairs, key=lambda i: (sizes[steps[i][-1]] != sizes[steps[i + 1][-1]], len(steps[i] + steps[i + 1]), i))
    steps[first : first + 2] = [steps[first] + steps[first + 1]]
  return steps


def _inspect(
  subject: Subject, channels: Mapping[str, Sequence[int]]
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
  """Computes maps of some images of the split.

  Args:
    subject: of the report.
    channels: whose maps to keep, of each stage.

  Returns:
    The images; per stage the largest value of each channel and its place in the flattened map, both (images, features);
    and the maps to keep, float32 (images, height, width, channels).
  """
  count, (height, width) = len(subject.split), subject.run.input_shape[:2]
  least, most, num_pixels = _INSPECTED
  # Evenly spread, because a folder's images are sorted by class.
  size = min(count, max(least, min(most, num_pixels // (height * width))))
  sample = np.unique(np.linspace(0, count - 1, size).round().astype(int))
  strongest: dict[str, list] = {name: [] for name in channels}
  kept: dict[str, list] = {name: [] for name in channels}
  for found in subject.inside(sample):
    for name, wanted in channels.items():
      strongest[name].append(found.strongest[name])
      kept[name].append(found.maps[name][..., list(wanted)])
  return (
    sample,
    {
      name: (np.concatenate([x for x, _ in parts]), np.concatenate([at for _, at in parts]))
      for name, parts in strongest.items()
    },
    {name: np.concatenate(parts) for name, parts in kept.items()},
  )


def _is_large(field: tuple[inspect.Field, inspect.Field] | None, subject: Subject) -> bool:
  """Whether a place of a map depends on so much of an image that all of the image is shown."""
  if field is None or subject.small:
    return field is None
  return any(2 * axis.size > side for axis, side in zip(field, subject.run.input_shape, strict=False))


def _patch(image: np.ndarray, field: tuple[inspect.Field, inspect.Field], place: tuple[int, int]) -> np.ndarray:
  """The pixels of an image that a position of a map depends on, clear outside the image: uint8 (height, width, 4)."""
  top, left = (axis.first + at * axis.stride for axis, at in zip(field, place, strict=True))
  return pictures.cut(image, top, left, field[0].size, field[1].size)


def _title(step: Sequence[int]) -> str:
  """The name of a step: `Stage 1`, `Stages 4 and 5` or `Stages 6 to 8`."""
  if len(step) == 1:
    return f'Stage {step[0] + 1}'
  return f'Stages {step[0] + 1} {"and" if len(step) == 2 else "to"} {step[-1] + 1}'
