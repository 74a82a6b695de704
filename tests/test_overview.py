"""The table of classes and splits, and the notes about a set."""

import numpy as np

from cnn_jax.data import Dataset, Split, overview


def _dataset(names, *counts):
  """A set with some numbers of images per class in train, validation and test."""
  splits = [np.repeat(np.arange(len(names)), count).astype(np.int32) for count in counts]
  parts = [Split(np.zeros((len(labels), 2, 2, 1), np.uint8), labels) for labels in splits]
  return Dataset('toy', 'made here', tuple(names), *parts)


def test_the_table_has_a_row_per_class():
  assert overview.table(_dataset(['cat', 'elephant'], [1200, 80], [9, 0], [10, 1])) == [
    'class     train  validation  test',
    'cat       1,200           9    10',
    'elephant     80           0     1',
    'all       1,280           9    11',
  ]


def test_of_many_classes_the_first_are_shown_and_the_range_of_the_others():
  counts = list(range(100, 200))
  lines = overview.table(_dataset([f'{i:03}' for i in range(100)], counts, [1] * 100, [0] * 100))
  assert len(lines) == 23
  assert lines[20].split() == ['019', '119', '1', '0']
  assert lines[21].split() == ['80', 'more,', 'each', '120-199', '1-1', '0-0']
  assert lines[22].split() == ['all', '14,950', '100', '0']
  assert len(overview.table(_dataset([f'{i}' for i in range(21)], [1] * 21, [1] * 21, [1] * 21))) == 23


def test_long_names_and_control_characters_do_not_break_the_table():
  lines = overview.table(_dataset(['x' * 10_000, 'a\x1b[2J\nb'], [1, 1], [1, 1], [1, 1]))
  assert max(map(len, lines)) < 80
  assert 'a\\x1b[2J\\nb' in lines[2]


def test_unequal_and_absent_classes_are_noted():
  assert overview.notes(_dataset(['a', 'b'], [90, 10], [9, 1], [9, 1])) == []
  (note,) = overview.notes(_dataset(['a', 'b'], [100, 10], [9, 1], [9, 1]))
  assert '100 training images of a, 10 of b' in note
  assert 'balanced accuracy' in note
  assert overview.notes(_dataset(['a', 'b', 'c'], [9, 9, 9], [1, 0, 0], [0, 0, 0])) == [
    'Classes without a validation image: b, c.'
  ]
