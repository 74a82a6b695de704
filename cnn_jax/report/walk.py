"""One image on its way through the network: pixels, kernels, stages, pooled vector, logits, probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cnn_jax import inspect, models
from cnn_jax.data.augment import normalize
from cnn_jax.report import charts, pictures, text
from cnn_jax.report.subject import Subject

TILES, CHANNELS, PATCHES = 16, 6, 8  # per stage: maps, channels shown with patches, patches per channel
KERNELS = 64  # kernels of the first convolution shown
_TABLE = 10  # rows and columns of the table of pixel values
_SUBJECTS = ('edges', 'textures', 'parts', 'objects')  # what maps respond to, from the image on
_KINDS = {
  'Conv': 'convolution',
  'Dense': 'dense layer',
  'BatchNorm': 'batch norm',
  'GroupNorm': 'group norm',
  'LayerNorm': 'layer norm',
  'InstanceNorm': 'instance norm',
}


def follow_image(subject: Subject, layers: Sequence[inspect.Layer]) -> dict[str, Any]:
  """Follows the first image of the split that is classified correctly, or the first one, through the network.

  Args:
    subject: of the report.
    layers: of the network, from `inspect.layer_table`.
  """
  correct = np.flatnonzero(subject.predicted == subject.split.labels)
  index = int(correct[0]) if len(correct) else 0
  image = subject.pixels(index)
  ((batch, _),) = subject.maps(np.array([index]))
  maps = {name: values[0] for name, values in batch.items()}
  return {
    'name': subject.name(index),
    'true': subject.classes[subject.split.labels[index]],
    'predicted': subject.classes[subject.predicted[index]],
    'picture': subject.picture(index),
    'shape': image.shape,
    'pixels': pixel_table(image),
    'kernels': _kernels(subject, image),
    'stages': _stages(subject, maps, layers),
    'pooled': _pooled(subject, maps, index),
    'outputs': _outputs(subject, index),
  }


def pixel_table(image: np.ndarray) -> dict[str, Any]:
  """The values of the 10 by 10 pixels of an image, in its first channel, that vary most.

  Args:
    image: uint8 (height, width, channels).

  Returns:
    `rows` of values; `top`, `left`, `bottom`, `right`, inclusive; whether they are the `whole` image; their `frame`
    (top, left, height, width) in percent of the image; an `example` value, what it becomes when `normalised`, and the
    `range` of normalised values.
  """
  channel = image[:, :, 0].astype(np.int64)
  height, width = (min(_TABLE, side) for side in channel.shape)
  variance = height * width * _window_sums(channel**2, height, width) - _window_sums(channel, height, width) ** 2
  top, left = (int(i) for i in np.unravel_index(np.argmax(variance), variance.shape))
  part = channel[top : top + height, left : left + width]
  example = min(part.ravel().tolist(), key=lambda value: abs(value - 128))
  normalised, low, high = np.asarray(normalize(np.array([example, 0, 255], np.uint8))).tolist()
  sides = (channel.shape[0], channel.shape[1]) * 2
  return {
    'rows': part.tolist(),
    'top': top,
    'left': left,
    'bottom': top + height - 1,
    'right': left + width - 1,
    'whole': part.shape == channel.shape,
    'frame': [100 * x / side for x, side in zip((top, left, height, width), sides, strict=True)],
    'example': example,
    'normalised': text.minus(f'{normalised:.3f}'),
    'range': [text.minus(f'{end:.3g}') for end in (low, high)],
  }


def describe_layers(layers: Sequence[inspect.Layer]) -> str:
  """Counts layers by type and kernel size, for example `2 convolutions 3x3, 2 batch norms; 1,234 parameters`."""
  groups: dict[tuple[str, str], int] = {}
  for layer in layers:
    kernel = '' if layer.kernel is None or layer.kind == 'Dense' else text.TIMES.join(map(str, layer.kernel[:-2]))
    kind = (kind_name(layer.kind), kernel)
    groups[kind] = groups.get(kind, 0) + 1
  ordered = sorted(groups.items(), key=lambda group: not group[0][1])  # convolutions first
  counts = [f'{text.count(number, kind)} {kernel}'.rstrip() for (kind, kernel), number in ordered]
  parameters = sum(layer.parameters for layer in layers)
  return f'{", ".join(counts) or "No layers with parameters"}; {text.count(parameters, "parameter")}'


def kind_name(kind: str) -> str:
  """The name of a type of layer in words."""
  return _KINDS.get(kind, kind)


def _window_sums(values: np.ndarray, height: int, width: int) -> np.ndarray:
  """Sums over all windows of a size, by differences of cumulative sums."""
  sums = np.pad(values.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
  return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]


def _kernels(subject: Subject, image: np.ndarray) -> dict[str, Any]:
  """The kernels of the first convolution, and the weights of the one whose response varies most over the image."""
  kernel, response = inspect.first_convolution(subject.run.model, subject.run.variables, normalize(image[None]))
  channel = int(np.argmax(response[0].std(axis=(0, 1))))
  return {
    'sheet': pictures.data_uri(pictures.sheet(pictures.kernel_tiles(kernel)[:KERNELS], 8, 0.2)),
    'colour': kernel.shape[2] == 3,
    'shape': text.shape(kernel.shape[:-1]),
    'count': kernel.shape[-1],
    'shown': min(KERNELS, kernel.shape[-1]),
    'channel': channel,
    'numbers': [[text.minus(f'{x:+.2f}') for x in row] for row in kernel[:, :, 0, channel]],
  }


def _stages(subject: Subject, maps: Mapping[str, np.ndarray], layers: Sequence[inspect.Layer]) -> list[dict[str, Any]]:
  """The strongest maps of the image per stage, and the parts of other images to which their channels respond most."""
  run, count = subject.run, len(subject.split)
  height, width = run.image_shape[:2]
  # Evenly spread, because a folder's images are sorted by class.
  sample = np.unique(
    np.linspace(0, count - 1, min(count, max(100, min(2000, 1_600_000 // (height * width))))).round().astype(int)
  )
  strongest = jax.tree.map(lambda *batches: np.concatenate(batches), *[found for _, found in subject.maps(sample)])
  fields = inspect.receptive_fields(run.model, run.image_shape)
  names, stages = models.stage_names(maps), []
  for i, name in enumerate(names):
    values, (largest, where) = maps[name], strongest[name]
    order = np.argsort(-values.mean(axis=(0, 1)), kind='stable')
    channels = []
    for channel in map(int, order[:CHANNELS]):
      if largest[:, channel].max() <= 0:
        continue
      best = np.argsort(-largest[:, channel], kind='stable')[:PATCHES]
      places = [divmod(int(where[j, channel]), values.shape[1]) for j in best]
      patches = [_patch(subject, int(sample[j]), fields[name], place) for j, place in zip(best, places, strict=True)]
      channels.append(
        {
          'channel': channel,
          'map': pictures.data_uri(pictures.heat(values[:, :, channel])),
          'patches': pictures.data_uri(pictures.sheet(np.stack(patches), PATCHES)),
          'count': len(patches),
          'largest': float(largest[best[0], channel]),
          'here': float(values[:, :, channel].max()),
        }
      )
    field = fields[name]
    shown = order[:TILES]
    tiles = np.stack([pictures.heat(values[:, :, channel]) for channel in shown])
    stages.append(
      {
        'number': i + 1,
        'subject': _SUBJECTS[round(i * 3 / max(len(names) - 1, 1))],
        'layers': describe_layers([layer for layer in layers if layer.stage == i + 1]),
        'shape': text.shape(values.shape),
        'count': values.shape[2],
        'shown': len(shown),
        'sheet': pictures.data_uri(pictures.sheet(tiles, 4)),
        'field': text.shape([axis.size for axis in field]) if field else None,
        'channels': channels,
        'silent': int(np.sum(values.max(axis=(0, 1)) <= 0)),
        'sample': len(sample),
      }
    )
  return stages


def _patch(
  subject: Subject, index: int, field: tuple[inspect.Field, inspect.Field] | None, place: tuple[int, int]
) -> np.ndarray:
  """The pixels of an image that a position of a map depends on, clear outside the image: uint8 (h, w, 4)."""
  image = subject.pixels(index)
  if field is None:
    return pictures.fit(pictures.cut(image, 0, 0, *image.shape[:2]))
  top, left = (axis.first + at * axis.stride for axis, at in zip(field, place, strict=True))
  return pictures.fit(pictures.cut(image, top, left, field[0].size, field[1].size))


def _pooled(subject: Subject, maps: Mapping[str, np.ndarray], index: int) -> dict[str, Any]:
  """The input of the head, and the largest terms of the sum that is the logit of the predicted class."""
  vector = maps['pooled']
  predicted = int(subject.predicted[index])
  weights = inspect.head_kernel(subject.run.variables)[:, predicted]
  terms = vector * weights
  largest = np.argsort(-np.abs(terms), kind='stable')[:5]
  return {
    'is_average': subject.has_activation_maps,
    'size': len(vector),
    'svg': charts.vector(vector),
    'terms': [
      {'channel': int(i), 'value': float(vector[i]), 'weight': float(weights[i]), 'product': float(terms[i])}
      for i in largest
    ],
    'rest': float(terms.sum() - terms[largest].sum()),
    'bias': float(np.asarray(subject.run.variables['params']['head']['bias'], np.float32)[predicted]),
    'logit': float(subject.logits[index, predicted]),
    'class': subject.classes[predicted],
  }


def _outputs(subject: Subject, index: int) -> dict[str, Any]:
  """Logits, probabilities and one-hot vector of the ten most probable classes, in the order of the classes."""
  logits, probabilities = subject.logits[index], subject.probabilities[index]
  shown = np.sort(np.argsort(-logits, kind='stable')[:10])
  return {
    'rows': [
      {
        'class': subject.classes[i],
        'logit': float(logits[i]),
        'probability': float(probabilities[i]),
        'one_hot': int(i == subject.predicted[index]),
      }
      for i in map(int, shown)
    ],
    'others': len(logits) - len(shown),
    'others_probability': float(max(0.0, 1 - probabilities[shown].sum())),
  }
