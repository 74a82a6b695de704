"""The identity of a data set: what changes it, what does not, and what a message names."""

import dataclasses
import json

import numpy as np
import pytest

from cnn_jax import UsageError
from cnn_jax.data import Dataset, Split, identity


def _split(names, labels, sizes=None):
  images = np.zeros((len(labels), 4, 4, 1), np.uint8)
  sizes = np.full(len(labels), 10) if sizes is None else np.array(sizes)
  return Split(images, np.array(labels, np.int32), names, None if names is None else sizes)


def _dataset(**changes):
  parts = {
    'train': _split(['cat/1.png', 'cat/2.png', 'dog/1.png'], [0, 0, 1]),
    'validation': _split(['cat/3.png'], [0]),
    'test': _split(['dog/2.png'], [1]),
  }
  return Dataset(**({'name': 'folder pets', 'provenance': '', 'class_names': ('cat', 'dog')} | parts | changes))


def _differences(tmp_path, changed, before=None):
  before = before or _dataset()
  identity.write_record(tmp_path, before, identity.identify(before))
  return identity.find_differences(identity.identify(before), changed, tmp_path / 'data.csv')


def test_the_identity_depends_neither_on_the_name_nor_on_the_order_of_files(tmp_path):
  shuffled = _split(['dog/1.png', 'cat/2.png', 'cat/1.png'], [1, 0, 0])
  other = _dataset(name='folder elsewhere', provenance='moved', train=shuffled)
  assert _differences(tmp_path, other) == ''


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'class_names': ('dog', 'zebra')}, "class 'zebra' is new; class 'cat' is missing"),
    ({'class_names': ('dog', 'cat')}, 'the classes have another order'),
    (
      {'train': _split(['cat/1.png', 'cat/2.png', 'dog/1.png', 'dog/9.png'], [0, 0, 1, 1])},
      "train has 2 images of 'dog', then 1 (new: dog/9.png)",
    ),
    ({'train': _split(['cat/1.png', 'dog/1.png'], [0, 1])}, "train has 1 images of 'cat', then 2 (missing: cat/2.png)"),
    (
      {'test': _split(['dog/2.png'], [1], sizes=[11])},
      "test has 1 images of 'dog', then 1 (other size: dog/2.png)",
    ),
    (
      {'test': _split(['cat/3.png'], [0]), 'validation': _split(['dog/2.png'], [1])},
      "validation has 0 images of 'cat', then 1 (missing: cat/3.png)",
    ),
  ],
)
def test_a_message_names_the_classes_or_files_that_differ(tmp_path, changes, named):
  assert _differences(tmp_path, _dataset(**changes)).startswith(named)


def test_images_without_files_are_identified_by_their_labels(tmp_path):
  def numbered(labels):
    return _dataset(train=_split(None, labels), validation=_split(None, []), test=_split(None, [1]))

  assert _differences(tmp_path, numbered([0, 1, 1]), numbered([0, 1, 1])) == ''
  assert _differences(tmp_path, numbered([1, 0, 1]), numbered([0, 1, 1])).startswith(
    "train has 1 images of 'cat', then 1"
  )
  assert not (tmp_path / 'data.csv').exists()


def test_another_shape_is_another_set(tmp_path):
  larger = dataclasses.replace(_dataset().train, images=np.zeros((3, 8, 8, 1), np.uint8))
  assert 'the images have the shape [8, 8, 1], then [4, 4, 1]' in _differences(tmp_path, _dataset(train=larger))


def test_without_a_listing_a_message_names_the_class(tmp_path):
  fewer = _dataset(train=_split(['cat/1.png', 'dog/1.png'], [0, 1]))
  recorded = identity.identify(_dataset())
  assert identity.find_differences(recorded, fewer, tmp_path / 'none.csv') == "train has 1 images of 'cat', then 2"


@pytest.mark.parametrize('recorded', [{}, {'splits': 3}, {'class_names': 'cat'}, {'splits': {'train': [[[]], 'x']}}])
def test_a_damaged_identity_is_another_set_and_no_error(tmp_path, recorded):
  assert identity.find_differences(recorded, _dataset(), tmp_path / 'none.csv')


def test_names_that_are_not_utf8_are_recorded(tmp_path):
  name = b'cat/caf\xe9.png'.decode(errors='surrogateescape')
  odd = _dataset(train=_split([name, 'cat/2.png', 'dog/1.png'], [0, 0, 1]))
  assert _differences(tmp_path, odd, odd) == ''
  assert b'cat/caf\xe9.png,cat,train,10' in (tmp_path / 'data.csv').read_bytes()
  assert f'missing: {name}' in _differences(tmp_path, _dataset(), odd)


def test_the_record_of_a_set(tmp_path):
  noted = _dataset(notes=('a note',), skipped=(('cat/9.png', 'empty'),))
  identity.write_record(tmp_path, noted, identity.identify(noted))
  about = json.loads((tmp_path / 'data.json').read_text())
  assert about['notes'] == ['a note'] and about['skipped'] == [['cat/9.png', 'empty']]
  assert about['identity'] == identity.identify(_dataset())
  assert (tmp_path / 'data.csv').read_text().splitlines()[:2] == ['path,label,split,bytes', 'cat/1.png,cat,train,10']


def test_a_run_of_version_0_1_is_compared_by_name_and_classes(tmp_path):
  identity.check({'class_names': ['cat', 'dog'], 'dataset': 'folder pets'}, _dataset(), tmp_path)
  with pytest.raises(UsageError, match='"folder pets", then "folder plants"'):
    identity.check({'class_names': ['cat', 'dog'], 'dataset': 'folder plants'}, _dataset(), tmp_path)
  with pytest.raises(UsageError, match="class 'cat' is new"):
    identity.check({'class_names': ['ant', 'dog'], 'dataset': 'folder pets'}, _dataset(), tmp_path)


def test_files_that_version_0_1_split_by_another_rule_are_refused(tmp_path):
  recorded = {'class_names': ['cat', 'dog'], 'dataset': 'folder pets'}
  with pytest.raises(UsageError, match='carved other files'):
    identity.check(recorded, _dataset(provenance='5 images; test carved out of train by class.'), tmp_path)
