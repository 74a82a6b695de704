"""predictions.csv, and the measures of the test split."""

import csv
import dataclasses
import os

import numpy as np
import pytest

from cnn_jax import final_test, record
from cnn_jax.data import Dataset, Split


def _dataset(labels, class_names, names=None):
  empty = Split(np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int32))
  test = Split(np.zeros((len(labels), 2, 2, 1), np.uint8), np.array(labels, np.int32), names)
  return Dataset('made up', 'for a test', tuple(class_names), empty, empty, test)


def _rows(workdir):
  with (workdir / 'predictions.csv').open(encoding='utf-8', errors='surrogateescape', newline='') as file:
    return list(csv.DictReader(file))


def test_each_image_has_a_row_and_each_class_its_measures(tmp_path):
  names = ('=cmd()/a.png', 'b, "c"\n.png', os.fsdecode(b'\xff.png'))
  dataset = _dataset([0, 1, 1], ('-1', '=SUM(A1)', 'dog'), names)
  logits = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
  found = final_test.measure(tmp_path, dataset, logits, dataset.test.labels)
  rows = _rows(tmp_path)
  assert [row['path'] for row in rows] == ["'=cmd()/a.png", *names[1:]]
  assert [row['label'] for row in rows] == ['-1', "'=SUM(A1)", "'=SUM(A1)"]  # a number is no formula
  assert [row['prediction'] for row in rows] == ['-1', '-1', "'=SUM(A1)"]
  assert [float(row['probability']) for row in rows] == pytest.approx([0.7, 0.5, 0.8], rel=1e-5)
  columns = [f'probability of {name}' for name in dataset.class_names]
  np.testing.assert_allclose([[float(row[column]) for column in columns] for row in rows], np.exp(logits), rtol=1e-5)
  assert found['accuracy'] == pytest.approx(2 / 3)
  assert found['balanced_accuracy'] == 0.75
  assert found['macro_precision'] == 0.75
  assert found['macro_f1'] == pytest.approx(2 / 3)
  assert found['per_class'] == {
    '-1': {'precision': 0.5, 'recall': 1.0, 'n': 1},
    '=SUM(A1)': {'precision': 1.0, 'recall': 0.5, 'n': 2},
    'dog': {'precision': None, 'recall': None, 'n': 0},
  }
  record.write_result(tmp_path, found)
  assert record.read_result(tmp_path) == found


def test_many_classes_have_five_predictions_and_very_many_no_measures_each(tmp_path):
  dataset = _dataset([3, 1000], [f'c{i}' for i in range(1001)])
  logits = -np.abs(np.arange(1001) - np.array([[3.0], [7.0]]))
  found = final_test.measure(tmp_path, dataset, logits, dataset.test.labels)
  assert 'per_class' not in found
  rows = _rows(tmp_path)
  assert [row['index'] for row in rows] == ['0', '1']
  assert len(rows[0]) == 12
  places = ('prediction', *(f'prediction {place}' for place in range(2, 6)))
  assert [rows[1][place] for place in places] == ['c7', 'c6', 'c8', 'c5', 'c9']
  assert float(rows[0]['probability 2']) == pytest.approx(float(rows[0]['probability']) / np.e, rel=1e-4)


def test_logits_that_are_not_finite_are_not_written(tmp_path):
  dataset = _dataset([0, 1], ('a', 'b'))
  found = final_test.measure(tmp_path, dataset, np.full((2, 2), np.nan), dataset.test.labels)
  assert not np.isfinite(found['loss'])
  assert not (tmp_path / 'predictions.csv').exists()


def test_the_file_is_replaced_as_a_whole(tmp_path):
  labels = np.arange(100) % 10
  dataset = _dataset(labels, 'abcdefghij')
  final_test.measure(tmp_path, dataset, np.eye(10)[labels], labels)
  before = (tmp_path / 'predictions.csv').stat().st_ino
  smaller = dataclasses.replace(dataset, test=Split(dataset.test.images[:1], dataset.test.labels[:1]))
  final_test.measure(tmp_path, smaller, np.eye(10)[:1], labels[:1])
  assert len(_rows(tmp_path)) == 1
  assert (tmp_path / 'predictions.csv').stat().st_ino != before  # another file took its place
  assert [path.name for path in tmp_path.iterdir()] == ['predictions.csv']
