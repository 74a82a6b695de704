import numpy as np
import pytest

from cnn_jax.data.batches import epoch_indices


@pytest.mark.parametrize(('num_examples', 'batch_size'), [(10, 3), (12, 4), (1000, 128), (5, 5)])
def test_each_example_at_most_once_and_only_the_remainder_sits_out(num_examples, batch_size):
  indices = epoch_indices(num_examples, batch_size, seed=0, epoch=0)
  assert indices.shape == (num_examples // batch_size, batch_size)
  assert indices.dtype == np.int32
  assert len(np.unique(indices)) == indices.size
  assert indices.min() >= 0 and indices.max() < num_examples


def test_it_is_a_pure_function_of_its_arguments():
  np.testing.assert_array_equal(epoch_indices(100, 10, 3, 7), epoch_indices(100, 10, 3, 7))


def test_epochs_and_seeds_differ_even_where_their_sums_agree():
  orders = [epoch_indices(100, 10, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))]
  for i, one in enumerate(orders):
    for other in orders[:i]:
      assert (one != other).any()


def test_another_remainder_sits_out_each_epoch():
  left_out = [frozenset(range(10)) - set(epoch_indices(10, 8, 0, epoch).ravel()) for epoch in range(20)]
  assert all(len(some) == 2 for some in left_out)
  assert len(set(left_out)) > 5
  assert set().union(*left_out) == set(range(10))


def test_a_batch_larger_than_the_split_leaves_no_step():
  assert epoch_indices(3, 4, 0, 0).shape == (0, 4)
