"""How well the network performs, as the page shows it: learning curves, confusion, calibration."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import calibration, metrics, record
from cnn_jax.report import charts, text

_CURVE_POINTS = 400  # per curve; more are averaged
_MATRIX, _ROWS = 1000, 1000  # classes up to which the matrix is drawn; classes in the table


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

  With more than 1,000 classes there is no matrix, and the table has those with the lowest F1.

  Args:
    logits: float (n, num_classes).
    labels: int (n,).
    classes: names of the classes.
  """
  from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

  n = len(classes)
  predicted = np.argmax(logits, axis=1)
  svg = (
    charts.confusion_matrix(confusion_matrix(labels, predicted, labels=np.arange(n)), classes) if n <= _MATRIX else ''
  )
  per_class = precision_recall_fscore_support(labels, predicted, labels=np.arange(n), zero_division=np.nan)
  wrong = labels != predicted
  found, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
  pairs = sorted(zip(counts.tolist(), *found.tolist(), strict=True), key=lambda pair: (-pair[0], *pair[1:]))
  support = np.bincount(labels, minlength=n)
  order = np.arange(n) if n <= _ROWS else np.sort(np.argsort(per_class[2], kind='stable')[:_ROWS])
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
      for count, i, j in pairs[:10]
    ],
    'num_pairs': len(pairs),
    'classes': [
      {
        'name': classes[i],
        **{key: x[i] for key, x in zip(('precision', 'recall', 'f1', 'count'), per_class, strict=True)},
      }
      for i in order.tolist()
    ],
    'num_classes': n,
    'macro_f1': float(np.nanmean(per_class[2])),
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
