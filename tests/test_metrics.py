"""Losses and metrics, by cases computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight

from cnn_jax import Diverged, metrics

pytestmark = pytest.mark.usefixtures('strict')


def test_constant_logits_score_exactly_one_class():
  labels = np.arange(16, dtype=np.int32) % 8
  result = metrics.classification_metrics(np.zeros((16, 8), np.float32), labels)
  assert result['accuracy'] == 2 / 16  # argmax of equal logits is class 0, which has two examples
  assert result['loss'] == pytest.approx(np.log(8), rel=1e-12)


def test_top5_by_hand():
  logits = np.tile(np.arange(10.0), (3, 1))  # the top five are classes 5 to 9
  assert metrics.classification_metrics(logits, np.array([9, 5, 4]))['top5_accuracy'] == pytest.approx(2 / 3)
  assert metrics.classification_metrics(np.zeros((1, 3)), np.array([2]))['top5_accuracy'] == 1


def test_loss_of_huge_logits_is_finite_and_exact():
  result = metrics.classification_metrics(np.array([[1e4, 0.0]]), np.array([1]))
  assert result['loss'] == pytest.approx(1e4)


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


def test_weights_give_the_weighted_mean_of_the_global_batch():
  """Three devices of two examples each; the fourth label is mixed, and has the weight of its classes in proportion."""
  labels = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2, 0]]
  labels[3] = (0.25, 0, 0.75)
  losses = np.array([1, 2, 3, 4, 5, 6], np.float32)
  weights = np.array([1, 1, 4, 0.25 + 0.75 * 8, 8, 1])

  def mean_loss(labels, losses):
    weights = metrics.relative_weights(labels, (1.0, 4.0, 8.0), 'devices')
    return jax.lax.pmean(jnp.mean(losses * weights), 'devices')

  found = jax.vmap(mean_loss, axis_name='devices')(labels.reshape(3, 2, 3), losses.reshape(3, 2))
  np.testing.assert_allclose(found, np.sum(weights * losses) / np.sum(weights), rtol=1e-6)


def test_balanced_weights_are_those_of_scikit_learn():
  labels = np.array([0] * 6 + [1] * 3 + [3] * 1)
  expected = compute_class_weight('balanced', classes=np.array([0, 1, 3]), y=labels)
  assert metrics.balanced_weights(labels, 5) == pytest.approx((expected[0], expected[1], 1, expected[2], 1))


def test_precision_and_recall_of_each_class():
  logits = np.eye(4)[[0, 0, 0, 1, 1, 3]]
  labels = np.array([0, 0, 1, 1, 2, 2])
  found = metrics.class_metrics(logits, labels)
  assert found == {'precision': [2 / 3, 1 / 2, None, 0], 'recall': [1, 1 / 2, 0, None], 'n': [2, 2, 2, 0]}
  precision, recall, _, n = precision_recall_fscore_support(labels, [0, 0, 0, 1, 1, 3], zero_division=0)
  np.testing.assert_allclose(np.array([[x or 0 for x in found[name]] for name in found]), [precision, recall, n])
  logits[0, 3] = np.nan  # no prediction
  assert (
    metrics.class_metrics(logits, labels)['recall'][0] == metrics.class_metrics(logits, labels)['precision'][0] == 0.5
  )


def test_training_sums_compare_with_the_largest_label():
  sums = metrics.training_sums(
    jnp.array([1.0, 2.0]), jnp.array([[2.0, 1.0], [0.0, 1.0]]), jnp.array([[0.6, 0.4], [1, 0]])
  )
  assert {name: float(value) for name, value in sums.items()} == {'loss': 3.0, 'accuracy': 1.0, 'count': 2.0}


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('loss', np.nan, 'the loss of step 1,002 is nan; lower config.optimizer.learning_rate'),
    ('loss', np.inf, 'the loss of step 1,002 is inf'),
    ('update_norm', np.inf, 'the update norm of step 1,002 is inf'),
    ('parameter_norm', np.nan, 'the parameter norm of step 1,002 is nan'),
    ('update_norm', 2e7, 'the update norm of step 1,002 is 2e\\+07'),  # finite, but float32 cannot add one to it
  ],
)
def test_divergence_names_the_step_and_what_diverged(name, value, message):
  measured = {key: np.array([1.0, 2.0, 3.0], np.float32) for key in ('loss', 'update_norm', 'parameter_norm')}
  metrics.check_steps(measured, first_step=1000)
  measured[name][1:] = value
  with pytest.raises(Diverged, match=message):
    metrics.check_steps(measured, first_step=1000)


def test_what_is_not_a_number_is_wrong():
  logits = np.array([[np.nan] * 3, [0, np.nan, 1], [2, 1, 0]])
  found = metrics.classification_metrics(logits, np.array([0, 2, 0]))
  assert found['accuracy'] == found['top5_accuracy'] == pytest.approx(1 / 3)
  assert metrics.top_k_accuracy(logits, np.array([0, 2, 0]), 1) == pytest.approx(1 / 3)


def test_balanced_accuracy_is_the_mean_over_the_classes_that_occur():
  logits = np.eye(4)[[0] * 100]
  found = metrics.classification_metrics(logits, np.array([0] * 98 + [2, 2]))
  assert found['accuracy'] == 0.98
  assert found['balanced_accuracy'] == 0.5


def test_windows_make_a_log_point_every_few_steps_and_at_the_end_of_an_epoch():
  windows = metrics.Windows(size=2, steps_per_epoch=3)
  names = ('loss', 'accuracy', 'count', 'learning_rate', 'gradient_norm')

  def steps(*losses):
    return {name: np.array([{'loss': loss, 'count': 1}.get(name, 1) for loss in losses], np.float32) for name in names}

  assert [(step, point['loss']) for step, point in windows.add(0, steps(1, 3, 5))] == [(2, 2.0), (3, 5.0)]
  assert windows.add(3, steps(7)) == []
  resumed = metrics.Windows(size=2, steps_per_epoch=3, pending=windows.pending)
  assert [(step, point['loss']) for step, point in resumed.add(4, steps(9))] == [(5, 8.0)]
