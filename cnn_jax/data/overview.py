"""What a set holds, for people: a table of classes and splits, and what they should know about it."""

import numpy as np

from cnn_jax.command import printable
from cnn_jax.data import Dataset
from cnn_jax.data.layout import SPLITS
from cnn_jax.data.listing import shorten

_MAX_ROWS = 20
_MAX_WIDTH = 40
_IMBALANCE = 10  # the ratio from which accuracy hides the small classes


def lines(dataset: Dataset) -> list[str]:
  """What every start prints about a set: its size, the table of a set of files, which come and go, and its notes."""
  shape = 'x'.join(map(str, dataset.train.images.shape[1:]))
  size = (
    f'{printable(dataset.name)}: {len(dataset.train):,} training, {len(dataset.validation):,} validation and '
    f'{len(dataset.test):,} test images, {shape}, {len(dataset.class_names)} classes.'
  )
  rows = table(dataset) if dataset.train.sizes is not None else []
  return [size, *rows, *(f'Note: {note}' for note in dataset.notes)]


def table(dataset: Dataset) -> list[str]:
  """The numbers of images by class and split, as lines of text.

  Args:
    dataset: its labels are counted. Of many classes, the first are shown, and the range of the others.
  """
  counts = _counts(dataset)
  shown = len(dataset.class_names) if len(dataset.class_names) <= _MAX_ROWS + 1 else _MAX_ROWS
  rows = [
    (_clip(name), *(f'{count:,}' for count in row))
    for name, row in zip(dataset.class_names[:shown], counts[:shown], strict=True)
  ]
  if shown < len(counts):
    rest = counts[shown:]
    ranges = [f'{low:,}-{high:,}' for low, high in zip(rest.min(axis=0), rest.max(axis=0), strict=True)]
    rows.append((f'{len(rest):,} more, each', *ranges))
  rows = [('class', *SPLITS), *rows, ('all', *(f'{count:,}' for count in counts.sum(axis=0)))]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
    for row in rows
  ]


def notes(dataset: Dataset) -> list[str]:
  """A line about unequal classes, and one for each split that lacks classes.

  Args:
    dataset: its labels are counted.
  """
  counts, names = _counts(dataset), dataset.class_names
  found = []
  small, large = int(counts[:, 0].argmin()), int(counts[:, 0].argmax())
  if counts[large, 0] >= _IMBALANCE * counts[small, 0]:
    found.append(
      f'The classes are unequal: {counts[large, 0]:,} training images of {_clip(names[large])}, '
      f'{counts[small, 0]:,} of {_clip(names[small])}. Accuracy may hide the small classes; balanced accuracy, the mean '
      'over the classes, is reported too.'
    )
  for column, split in enumerate(SPLITS):
    absent = [_clip(names[label]) for label in np.flatnonzero(counts[:, column] == 0)]
    if absent and counts[:, column].any():
      found.append(f'Classes without a {split} image: {shorten(absent)}.')
  return found


def _counts(dataset: Dataset) -> np.ndarray:
  """int64 (classes, splits)."""
  return np.stack(
    [np.bincount(getattr(dataset, split).labels, minlength=len(dataset.class_names)) for split in SPLITS], axis=1
  )


def _clip(name: str) -> str:
  name = printable(name)
  return name if len(name) <= _MAX_WIDTH else name[: _MAX_WIDTH - 3] + '...'
