"""One image on its way through the network: pixels, kernels, stages, pooled vector, logits, probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnn_jax import calibration, inspect
from cnn_jax import config as config_lib
from cnn_jax.data.augment import Statistics, normalize
from cnn_jax.report import charts, pictures, text
from cnn_jax.report.stages import show_stages
from cnn_jax.report.subject import Subject

KERNELS = 64  # kernels of the first convolution shown
_TABLE = 10  # rows and columns of the table of pixel values


def follow_image(subject: Subject, layers: Sequence[inspect.Layer]) -> dict[str, Any]:
  """Follows an image of the split through the network: of those that are classified correctly, the most confident one.

  Args:
    subject: of the report.
    layers: of the network, from `inspect.layer_table`.
  """
  correct = subject.predicted == subject.split.labels
  index = int(np.argmax(np.where(correct, subject.confidence, -1)))
  image = subject.pixels(index)
  (found,) = subject.inside(np.array([index]))
  maps = {name: values[0] for name, values in found.maps.items()}
  predicted = int(np.argmax(maps['logits']))  # the result may be that of several views of the image
  return {
    'name': subject.name(index),
    'true': subject.classes[subject.split.labels[index]],
    'predicted': subject.classes[predicted],
    'picture': subject.picture(index),
    'shape': image.shape,
    'pixels': pixel_table(image, config_lib.statistics(subject.run.config.data)),
    'kernels': _kernels(found.kernel, int(np.argmax(found.variation[0]))),
    'stages': show_stages(subject, maps, layers),
    'pooled': _pooled(subject, maps, predicted),
    'evidence': _evidence(subject, index, maps, predicted),
    'outputs': _outputs(subject, maps['logits']),
  }


def pixel_table(image: np.ndarray, statistics: Statistics) -> dict[str, Any]:
  """The values of the 10 by 10 pixels of an image, in its first channel, that vary most.

  Args:
    image: uint8 (height, width, channels).
    statistics: of the network's input.

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
  first = Statistics(statistics.mean[:1], statistics.std[:1])
  normalised, low, high = np.asarray(normalize(np.array([example, 0, 255], np.uint8), first)).tolist()
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


def _window_sums(values: np.ndarray, height: int, width: int) -> np.ndarray:
  """Sums over all windows of a size, by differences of cumulative sums."""
  sums = np.pad(values.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
  return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]


def _kernels(kernel: np.ndarray, channel: int) -> dict[str, Any]:
  """The kernels of the first convolution, and the weights of one of them."""
  return {
    'sheet': pictures.data_uri(pictures.sheet(pictures.kernel_tiles(kernel)[:KERNELS], 8, 0.2)),
    'colour': kernel.shape[2] == 3,
    'shape': text.shape(kernel.shape[:-1]),
    'count': kernel.shape[-1],
    'shown': min(KERNELS, kernel.shape[-1]),
    'channel': channel,
    'numbers': [[text.minus(f'{x:+.2f}') for x in row] for row in kernel[:, :, 0, channel]],
  }


def _pooled(subject: Subject, maps: Mapping[str, np.ndarray], predicted: int) -> dict[str, Any]:
  """The input of the head, and the largest terms of the sum that is the logit of the predicted class."""
  vector = maps['pooled']
  weights = inspect.head_kernel(subject.run.variables)[:, predicted]
  terms = vector * weights
  largest = np.argsort(-np.abs(terms), kind='stable')[:5]
  return {
    'stages': len(inspect.averaged_stages(maps)),
    'size': len(vector),
    'svg': charts.vector(vector),
    'terms': [
      {'channel': int(i), 'value': float(vector[i]), 'weight': float(weights[i]), 'product': float(terms[i])}
      for i in largest
    ],
    'rest': float(terms.sum() - terms[largest].sum()),
    'bias': float(np.asarray(subject.run.variables['params']['head']['bias'], np.float32)[predicted]),
    'logit': float(maps['logits'][predicted]),
    'class': subject.classes[predicted],
  }


def _evidence(subject: Subject, index: int, maps: Mapping[str, np.ndarray], predicted: int) -> str | None:
  """The class activation map of the predicted class; None if the network has none."""
  averaged = {name: maps[name][None] for name in inspect.averaged_stages(maps)}
  if not averaged:
    return None
  ((evidence,),) = inspect.class_activation_maps(subject.run.variables, averaged, np.array([[predicted]]))
  return subject.evidence(index, evidence / max(float(evidence.max()), 1e-9), pictures.ORANGE)


def _outputs(subject: Subject, logits: np.ndarray) -> dict[str, Any]:
  """Logits, probabilities and one-hot vector of the ten most probable classes, in the order of the classes."""
  probabilities = calibration.softmax(logits[None])[0]
  shown = np.sort(np.argsort(-logits, kind='stable')[:10])
  return {
    'rows': [
      {
        'class': subject.classes[i],
        'logit': float(logits[i]),
        'probability': float(probabilities[i]),
        'one_hot': int(i == np.argmax(logits)),
      }
      for i in map(int, shown)
    ],
    'others': len(logits) - len(shown),
    'others_probability': float(max(0.0, 1 - probabilities[shown].sum())),
  }
