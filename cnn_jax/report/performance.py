"""How well the network performs, as the page shows it: learning curves, confusion, calibration."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import calibration, metrics, record
from cnn_jax.report import charts, text

_CURVE_POINTS = 400  # per curve; more are averaged
_MATRIX, _ROWS = 60, 100  # classes up to which the matrix is drawn; classes in the table
_PAIRS = 10  # in the table of confusions; twice as many without a matrix


def wilson_interval(share: float, n: int) -> tuple[float, float]:
  """The 95 % confidence interval of a proportion that was measured on n examples (Wilson 1927).

  Args:
    share: the proportion, in [0, 1].
    n: at least 1.
  """
  z = 1.96
  centre = (share + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  return centre - half, centre + half


def learning_curves(workdir: Path) -> list[dict[str, Any]]:
  """Draws metrics.jsonl: a chart each of loss, accuracy and learning rate, as far as they were recorded."""
  points = record.read_points(workdir)

  def curve(split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [
      (point['step'], point[name]) for point in points if point['split'] == split and point.get(name) is not None
    ]
    line = np.array(found, np.float64).reshape(-1, 2)
    size = -(-len(line) // _CURVE_POINTS) or 1
    means = [np.mean(line[i : i + size], axis=0) for i in range(0, len(line), size)]
    steps, values = np.array(means).reshape(-1, 2).T
    return steps, values

  drawn = []
  for name, title, splits in (
    ('loss', 'Loss, nats', ('train', 'validation')),
    ('accuracy', 'Accuracy', ('train', 'validation')),
    ('learning_rate', 'Learning rate', ('train',)),
  ):
    found = {split: curve(split, name) for split in splits}
    found = {split: (steps, values) for split, (steps, values) in found.items() if len(steps)}
    if found:
      drawn.append({'title': title, 'svg': charts.curves(name, title, found)})
  return drawn


def confusion(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
  """The confusion matrix, the most frequent confusions, and precision, recall and F1 per class.

  With more than 60 classes there is no matrix; with more than 100, the table has those with the lowest F1.

  Args:
    logits: float (n, num_classes).
    labels: int (n,).
    classes: names of the classes.
  """
  n = len(classes)
  predicted = np.argmax(logits, axis=1)
  wrong = labels != predicted
  found, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
  pairs = sorted(zip(counts.tolist(), *found.tolist(), strict=True), key=lambda pair: (-pair[0], *pair[1:]))
  support, guesses, hits = (np.bincount(x, minlength=n) for x in (labels, predicted, labels[~wrong]))
  with np.errstate(invalid='ignore'):  # 0 / 0 is NaN
    precision, recall, f1 = hits / guesses, hits / support, 2 * hits / (support + guesses)
  svg = ''
  if n <= _MATRIX:
    matrix = np.diag(hits)
    matrix[tuple(found)] = counts
    svg = charts.confusion_matrix(matrix, classes)
  order = np.arange(n)
  if n > _ROWS:
    order = np.argsort(f1, kind='stable')[: min(_ROWS, np.sum(~np.isnan(f1)))]  # NaN comes last
  return {
    'svg': svg,
    'numbers': n <= 20,
    'pairs': [
      {
        'true': classes[i],
        'predicted': classes[j],
        'count': count,
        'share': count / int(support[i]),
      }
      for count, i, j in pairs[: _PAIRS if svg else 2 * _PAIRS]
    ],
    'num_pairs': len(pairs),
    'classes': [
      {'name': classes[i], 'count': support[i], 'precision': precision[i], 'recall': recall[i], 'f1': f1[i]}
      for i in order.tolist()
    ],
    'num_classes': n,
    'macro_f1': float(np.nanmean(f1)),
  }


def calibrate(
  logits: np.ndarray, labels: np.ndarray, validation_logits: np.ndarray, validation_labels: np.ndarray
) -> dict[str, Any]:
  """Calibration on a split before and after temperature scaling, which is fitted on the validation split.

  Args:
    logits: float (n, num_classes), of the split.
    labels: int (n,), of the split.
    validation_logits, validation_labels: the same of the validation split, which may be empty.
  """

  def measure(temperature: float, title: str) -> dict[str, Any]:
    probabilities = calibration.softmax(logits, temperature)
    error = calibration.expected_calibration_error(probabilities, labels)
    description = f'Reliability diagram {title}: accuracy against confidence; calibration error {text.percent(error)}.'
    return {
      'error': error,
      'loss': metrics.classification_metrics(logits / temperature, labels)['loss'],
      'svg': charts.reliability(*calibration.reliability(probabilities, labels), description),
    }

  before = measure(1.0, 'as trained')
  if not len(validation_labels):
    return {'before': before, 'after': None}
  temperature = calibration.fit_temperature(validation_logits, validation_labels)
  return {
    'before': before,
    'after': measure(temperature, 'after temperature scaling'),
    'temperature': temperature,
    'fitted_on': len(validation_labels),
    'no_mistakes': bool(np.all(np.argmax(validation_logits, axis=1) == validation_labels)),
  }
