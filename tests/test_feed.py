"""The order of training: each example once per epoch, a pure function of (seed, epoch), on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.data import Split, feed
from cnn_jax.data.feed import balanced_indices, epoch_indices

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


@pytest.mark.parametrize(('counts', 'batch_size'), [((90, 9, 1), 8), ((1, 1), 1), ((7, 0, 5), 4), ((3, 3, 3, 3), 5)])
def test_every_class_and_every_image_of_a_class_is_drawn_equally_often(counts, batch_size):
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
  drawn = np.zeros(len(labels), int)
  for epoch in range(7):
    indices = balanced_indices(labels, batch_size, 3, epoch)
    assert indices.shape == epoch_indices(len(labels), batch_size, 3, epoch).shape and indices.dtype == np.int32
    np.testing.assert_array_equal(indices, balanced_indices(labels, batch_size, 3, epoch))
    drawn += np.bincount(indices.ravel(), minlength=len(labels))
    of_epoch = np.bincount(labels[indices.ravel()], minlength=len(counts))[np.array(counts) > 0]
    in_total = np.bincount(labels, drawn, minlength=len(counts))[np.array(counts) > 0]
    assert np.ptp(of_epoch) <= 1 and np.ptp(in_total) <= 1
    assert all(np.ptp(drawn[labels == label]) <= 1 for label in np.unique(labels))


def test_balanced_orders_are_shuffled_and_differ():
  labels = np.repeat(np.arange(2, dtype=np.int32), (40, 8))
  orders = [balanced_indices(labels, 8, seed, epoch).ravel() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
  assert all((labels[order[:8]] == 0).any() and (labels[order[:8]] == 1).any() for order in orders)
  assert len({tuple(order) for order in orders}) == 3
  frequent = [set(order[labels[order] == 0]) for order in orders[:2]]
  assert len(frequent[0] | frequent[1]) == 40  # the second epoch goes on where the first one ended
  examples = feed.Resident(Split(np.zeros((48, 1, 1, 1), np.uint8), labels), 8, 1, 6, 'balanced')
  np.testing.assert_array_equal(examples.indices(0, 0, 6)[:, 0].ravel(), orders[2])


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
