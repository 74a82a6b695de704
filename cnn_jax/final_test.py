"""The test at the end of a run: the measures of the test split, and predictions.csv."""

import csv
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import distribute, files, metrics, workdirs
from cnn_jax.data import Dataset

FILE = 'predictions.csv'  # in the workdir

# predictions.csv has a column per class for at most so many classes, and otherwise the most probable classes.
_MAX_COLUMNS, _TOP = 100, 5
_MAX_CLASSES = 1000  # whose measures go into result.json


def measure(workdir: str | os.PathLike, dataset: Dataset, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
  """Computes the measures of the test split; process 0 also writes predictions.csv.

  Args:
    workdir: of the run.
    dataset: of the run.
    logits: float (n, num_classes), of `dataset.test`.
    labels: int (n,), of the same.

  Returns:
    Those of `metrics.classification_metrics`; `macro_precision` and `macro_f1`, means over the classes that occur, in
    which a class that was never predicted counts 0 (`balanced_accuracy` is the mean of the recalls); and, for at most
    1,000 classes, `per_class`: {class: {`precision`, `recall`, `n`}}, see `metrics.class_metrics`.

  Raises:
    UsageError: the file cannot be written.
  """
  found: dict[str, Any] = metrics.classification_metrics(logits, labels)
  by_class = metrics.class_metrics(logits, labels)
  rows = [dict(zip(by_class, values, strict=True)) for values in zip(*by_class.values(), strict=True)]
  occurring = [(row['precision'] or 0.0, row['recall'] or 0.0) for row in rows if row['n']]
  found['macro_precision'] = float(np.mean([precision for precision, _ in occurring]))
  found['macro_f1'] = float(np.mean([2 * p * r / (p + r) if p + r else 0.0 for p, r in occurring]))
  if len(rows) <= _MAX_CLASSES:
    found['per_class'] = dict(zip(dataset.class_names, rows, strict=True))
  if distribute.is_primary() and np.isfinite(found['loss']):
    _write(Path(workdir) / FILE, dataset, logits)
  return found


def _write(path: Path, dataset: Dataset, logits: np.ndarray) -> None:
  """Writes a row for each image: its path in the data folder or its index, its class, and the probabilities."""
  names, split = [_cell(name) for name in dataset.class_names], dataset.test
  wide = len(names) <= _MAX_COLUMNS
  more = [f'probability of {name}' for name in dataset.class_names]
  if not wide:
    more = [f'{what} {place}' for place in range(2, _TOP + 1) for what in ('prediction', 'probability')]
  with workdirs.writing(path), files.open_atomically(path) as stream:
    # Names of files need not be UTF-8.
    text = io.TextIOWrapper(stream, encoding='utf-8', errors='surrogateescape', newline='')
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['index' if split.names is None else 'path', 'label', 'prediction', 'probability', *more])
    for i, (label, row) in enumerate(zip(split.labels.tolist(), _probabilities(logits), strict=True)):
      best = np.argsort(-row, kind='stable')[: 1 if wide else _TOP].tolist()
      ranked = [cell for k in best for cell in (names[k], f'{row[k]:.6g}')]
      every = [f'{probability:.6g}' for probability in row.tolist()] if wide else []
      writer.writerow([i if split.names is None else _cell(split.names[i]), names[label], *ranked, *every])
    text.flush()
    text.detach()


def _probabilities(logits: np.ndarray) -> Iterator[np.ndarray]:
  """The probabilities of each image, float64 (num_classes,); some images at a time, to save memory."""
  for start in range(0, len(logits), 1024):
    yield from np.exp(metrics.log_softmax(logits[start : start + 1024]))


def _cell(text: str) -> str:
  """A name as a cell: a spreadsheet would run one such as `=cmd()` as a formula, so that it gets an apostrophe."""
  return f"'{text}" if re.match(r'[=+\-@\t\r\n]', text) and not re.fullmatch(r'[+-]?\d+(\.\d+)?', text) else text
