"""Splits of files: the share of each class, and which files move if others come and go."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.config import default_config
from cnn_jax.data import splits

SHARES = {'test': 0.1, 'validation': 0.1}


def _assign(counts, shares=SHARES, seed=0, names='{}/{}.png'):
  """The split of each path of classes with some numbers of files."""
  pairs = [(names.format(label, i), label) for label, count in enumerate(counts) for i in range(count)]
  paths, labels = [path for path, _ in pairs], np.array([label for _, label in pairs], np.int32)
  parts = splits.by_path(paths, labels, shares, seed)
  assert sorted(np.concatenate(list(parts.values()))) == list(range(len(paths)))
  return {paths[i]: split for split, indices in parts.items() for i in indices}


def _counts(assigned, label):
  of_class = [split for path, split in assigned.items() if path.startswith(f'{label}/')]
  return tuple(of_class.count(split) for split in ('train', 'validation', 'test'))


def test_each_class_has_its_share_and_keeps_some_for_training():
  counts = [1, 2, 3, 5, 10, 20, 100, 490]
  expected = [(1, 0, 0), (1, 0, 1), (1, 1, 1), (3, 1, 1), (8, 1, 1), (16, 2, 2), (81, 9, 10), (397, 44, 49)]
  assigned = _assign(counts)
  assert [_counts(assigned, label) for label in range(len(counts))] == expected
  assert {_counts(_assign([10] * 100), label) for label in range(100)} == {(8, 1, 1)}
  assert _counts(_assign([10], {'test': 0.99, 'validation': 0.99}), 0) == (1, 0, 9)
  assert _counts(_assign([10], {'test': 0.1, 'validation': 0.0}), 0) == (9, 0, 1)
  assert _counts(_assign([10], {}), 0) == (10, 0, 0)


@settings(max_examples=40, deadline=None)
@given(
  st.lists(st.integers(1, 40), min_size=1, max_size=4),
  st.integers(0, 2**64),
  st.floats(0, 0.9),
  st.floats(0.01, 0.9),
  st.integers(0, 39),
)
def test_one_file_more_moves_each_border_by_at_most_one_file(counts, seed, validation, test, place):
  shares = {'test': test, 'validation': validation}
  more = _assign(counts, shares, seed)
  gone = f'0/{place % counts[0]}.png'
  labels = np.array([int(path.split('/')[0]) for path in more if path != gone], np.int32)
  paths = [path for path in more if path != gone]
  parts = splits.by_path(paths, labels, shares, seed)
  fewer = {paths[i]: split for split, indices in parts.items() for i in indices}
  moved = {path for path in fewer if fewer[path] != more[path]}
  assert len(moved) <= 2
  assert all(path.startswith('0/') for path in moved)
  for inner in ({'test'}, {'test', 'validation'}):
    assert sum((fewer[path] in inner) != (more[path] in inner) for path in fewer) <= 1


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 0.99), st.floats(0, 0.99))
def test_the_share_of_validation_never_moves_a_file_into_or_out_of_the_test_split(one, other):
  first, second = (_assign([7, 30], {'test': 0.2, 'validation': share}) for share in (one, other))
  assert {path for path in first if first[path] == 'test'} == {path for path in second if second[path] == 'test'}


def test_the_seed_and_the_path_decide_whatever_the_order():
  assert _assign([50], seed=1) == _assign([50], seed=1) != _assign([50], seed=2)
  paths = [f'{i}.png' for i in range(50)]
  parts = splits.by_path(paths, np.zeros(50, np.int32), SHARES, 0)
  turned = splits.by_path(paths[::-1], np.zeros(50, np.int32), SHARES, 0)
  for split in parts:
    assert {paths[i] for i in parts[split]} == {paths[::-1][i] for i in turned[split]}


def test_names_that_are_not_utf8_have_hashes():
  assert _counts(_assign([10], names='{}/caf\udce9{}.png'), 0) == (8, 1, 1)


def test_no_files_leave_all_splits_empty():
  parts = splits.by_path([], np.zeros(0, np.int32), SHARES, 0)
  assert {split: len(indices) for split, indices in parts.items()} == {'train': 0, 'test': 0, 'validation': 0}


@pytest.mark.parametrize('share', [0.1, 0.25, 0.5])
def test_the_whole_share_is_that_of_each_class(share):
  assigned = _assign([200] * 3, {'test': share})
  assert _counts(assigned, 1) == (200 - round(200 * share), 0, round(200 * share))


def _official(unlabelled=(), splits_there=('train', 'validation', 'test')):
  """The indices of official splits of 40, 20 and 20 examples of two classes, and their labels."""
  official, labels = {}, np.tile(np.array([0, 1], np.int32), 40)
  for split, (first, end) in {'train': (0, 40), 'validation': (40, 60), 'test': (60, 80)}.items():
    if split in unlabelled:
      labels[first:end] = -1
    if split in splits_there:
      official[split] = np.arange(first, end)
  return official, labels


@pytest.mark.parametrize(
  ('splits_there', 'unlabelled', 'test', 'validation', 'rules'),
  [
    ('train validation test', '', range(60, 80), range(40, 60), 0),
    ('train validation test', 'test', range(40, 60), 4, 2),
    ('train validation test', 'validation', range(60, 80), 4, 1),
    ('train validation test', 'validation test', 4, 4, 1),
    ('train validation', '', 4, range(40, 60), 1),
    ('train test', 'test', 4, 4, 1),
    ('train test', '', range(60, 80), 4, 1),
    ('train', '', 4, 4, 1),
  ],
)
def test_official_splits_with_labels_are_kept_and_validation_replaces_a_test_without(
  splits_there, unlabelled, test, validation, rules
):
  official, labels = _official(unlabelled.split(), splits_there.split())
  parts, said = splits.by_class(official, labels, default_config().data)
  for split, expected in (('test', test), ('validation', validation)):
    if isinstance(expected, range):
      assert parts[split].tolist() == list(expected)
    else:
      assert len(parts[split]) == expected and set(parts[split]) < set(range(40))
  assert (labels[np.concatenate(list(parts.values()))] >= 0).all()
  assert sum(map(len, parts.values())) == len(np.unique(np.concatenate(list(parts.values()))))
  assert len(said) == rules and (splits.PROMOTED in said) == (rules == 2)
