import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import metrics


def test_constant_logits_score_exactly_one_class():
  labels = np.arange(16, dtype=np.int32) % 8
  found = metrics.classification_metrics(np.zeros((16, 8), np.float32), labels)
  assert found['accuracy'] == 2 / 16  # argmax of equals is class 0, which has two examples
  assert found['loss'] == pytest.approx(np.log(8), rel=1e-12)


def test_top5_by_hand():
  logits = np.tile(np.arange(10.0), (3, 1))  # classes 5...9 are the top five
  assert metrics.classification_metrics(logits, np.array([9, 5, 4]))['top5_accuracy'] == pytest.approx(2 / 3)
  assert metrics.classification_metrics(np.zeros((1, 3)), np.array([2]))['top5_accuracy'] == 1


def test_loss_of_huge_logits_is_finite_and_exact():
  found = metrics.classification_metrics(np.array([[1e4, 0.0]]), np.array([1]))
  assert found['loss'] == pytest.approx(1e4)


def test_no_examples_is_an_error():
  with pytest.raises(ValueError, match='no examples'):
    metrics.classification_metrics(np.zeros((0, 2)), np.zeros(0, np.int32))


def test_sums_are_divided_once():
  # Batches of 3 and 1: the mean over examples is not the mean of the means.
  sums = {'loss': np.array([3.0, 5.0]), 'count': np.array([3.0, 1.0])}
  assert metrics.divide(sums) == {'loss': 2.0}


def test_smoothing_and_cross_entropy_by_hand():
  labels = metrics.smooth_labels(jnp.array([[1.0, 0.0]]), 0.2)
  np.testing.assert_allclose(labels, [[0.9, 0.1]], rtol=1e-6)
  logits = jnp.log(jnp.array([[0.75, 0.25]]))
  expected = -(0.9 * np.log(0.75) + 0.1 * np.log(0.25))
  np.testing.assert_allclose(metrics.cross_entropy(logits, labels), [expected], rtol=1e-5)


def test_training_sums_count_the_largest_label():
  sums = metrics.training_sums(
    jnp.array([1.0, 2.0]), jnp.array([[2.0, 1.0], [0.0, 1.0]]), jnp.array([[0.6, 0.4], [1, 0]])
  )
  assert {name: float(value) for name, value in sums.items()} == {'loss': 3.0, 'accuracy': 1.0, 'count': 2.0}
