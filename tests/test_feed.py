"""The order of training: each example once per epoch, a pure function of (seed, epoch), on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.data import Split, feed
from cnn_jax.data.feed import epoch_indices

pytestmark = pytest.mark.usefixtures('strict')


@pytest.mark.parametrize(('num_examples', 'batch_size'), [(10, 3), (12, 4), (1000, 128), (5, 5)])
def test_each_example_occurs_once_except_the_remainder(num_examples, batch_size):
  indices = epoch_indices(num_examples, batch_size, seed=0, epoch=0)
  assert indices.shape == (num_examples // batch_size, batch_size)
  assert indices.dtype == np.int32
  assert len(np.unique(indices)) == indices.size
  assert indices.min() >= 0 and indices.max() < num_examples


def test_the_order_is_a_pure_function_of_its_arguments():
  np.testing.assert_array_equal(epoch_indices(100, 10, 3, 7), epoch_indices(100, 10, 3, 7))


def test_epochs_and_seeds_differ_even_if_their_sums_agree():
  orders = [epoch_indices(100, 10, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))]
  for i, one in enumerate(orders):
    for other in orders[:i]:
      assert (one != other).any()


def test_each_epoch_leaves_out_a_different_remainder():
  left_out = [frozenset(range(10)) - set(epoch_indices(10, 8, 0, epoch).ravel()) for epoch in range(20)]
  assert all(len(some) == 2 for some in left_out)
  assert len(set(left_out)) > 5
  assert set().union(*left_out) == set(range(10))


def test_a_batch_larger_than_the_split_leaves_no_step():
  assert epoch_indices(3, 4, 0, 0).shape == (0, 4)


@pytest.fixture(scope='module')
def resident():
  images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
  return feed.Resident(Split(images, np.arange(10, dtype=np.int32)), batch_size=3, seed=5, capacity=4)


def test_indices_are_the_order_of_the_epoch_padded_to_the_capacity(resident):
  order = epoch_indices(10, 3, seed=5, epoch=2)
  indices = resident.indices(epoch=2, offset=1, count=2)
  assert indices.shape == (4, 1, 3) and indices.dtype == np.int32
  np.testing.assert_array_equal(indices[:2, 0], order[1:3])
  assert resident.indices(epoch=2, offset=3, count=0).shape == (4, 1, 3)


@pytest.mark.parametrize('devices', [1, 2, 3])
def test_devices_take_their_parts_of_the_batch_in_order(resident, devices):
  indices = epoch_indices(10, 6, seed=0, epoch=0)[0]
  take = jax.vmap(lambda i: feed.take(resident.images, resident.labels, i), axis_name='batch')
  batch = take(jnp.asarray(indices.reshape(devices, -1)))
  assert batch['images'].dtype == jnp.uint8
  np.testing.assert_array_equal(batch['images'].ravel(), indices)
  np.testing.assert_array_equal(batch['labels'].ravel(), indices)
  np.testing.assert_array_equal(batch['positions'].ravel(), np.arange(6))
  assert batch['positions'].dtype == jnp.int32
