"""Temperature scaling and calibration error, by cases computed by hand."""

import math

import numpy as np
import pytest

from cnn_jax import calibration


def test_softmax_of_known_logits():
  logits = np.log(np.array([[1.0, 3.0], [4.0, 1.0]], np.float32))
  np.testing.assert_allclose(calibration.softmax(logits), [[0.25, 0.75], [0.8, 0.2]], rtol=1e-6)
  # Halving log 4 : log 1 gives log 2 : log 1.
  np.testing.assert_allclose(calibration.softmax(logits, 2.0)[1], [2 / 3, 1 / 3], rtol=1e-6)


def test_softmax_of_huge_logits_is_finite():
  np.testing.assert_array_equal(calibration.softmax(np.array([[5e4, -5e4]], np.float32), 0.01), [[1.0, 0.0]])


@pytest.mark.parametrize(('margin', 'right'), [(8.0, 3), (1.0, 3), (8.0, 2), (0.5, 9)])
def test_temperature_of_two_classes_with_one_margin(margin, right):
  # All logits are (margin, 0), so the most likely probability of the first class is its frequency:
  # sigmoid(margin / T) = right / (right + wrong), that is T = margin / log(right / wrong).
  wrong = 1
  logits = np.tile([margin, 0.0], (right + wrong, 1))
  labels = np.array([0] * right + [1] * wrong)
  assert calibration.fit_temperature(logits, labels) == pytest.approx(margin / math.log(right / wrong), rel=1e-9)


def test_temperature_minimises_the_loss():
  rng = np.random.default_rng(0)
  logits = 3 * rng.normal(size=(500, 7)).astype(np.float32)
  labels = np.array([rng.choice(7, p=p) for p in calibration.softmax(logits, 2.5)])

  def loss(temperature):
    return -np.mean(np.log(calibration.softmax(logits, temperature)[np.arange(500), labels]))

  best = calibration.fit_temperature(logits, labels)
  assert best == pytest.approx(2.5, rel=0.25)  # the temperature of the draws, to sampling error
  assert loss(best) < min(loss(best * 1.01), loss(best / 1.01), loss(1.0))


def test_temperature_is_scale_equivariant():
  rng = np.random.default_rng(1)
  logits, labels = rng.normal(size=(200, 4)), rng.integers(0, 4, 200)
  labels[:120] = np.argmax(logits[:120], axis=1)
  once = calibration.fit_temperature(logits, labels)
  assert calibration.fit_temperature(3 * logits, labels) == pytest.approx(3 * once, rel=1e-8)


def test_temperature_if_the_likelihood_has_no_maximum():
  logits = np.array([[2.0, 0.0], [0.0, 1.0]])
  assert calibration.fit_temperature(logits, np.array([0, 1])) == 1.0  # all correct: no evidence of errors
  assert calibration.fit_temperature(logits, np.array([1, 0])) == 100.0  # all wrong: as uncertain as possible


def test_no_examples_are_an_error():
  nothing, labels = np.zeros((0, 3)), np.zeros(0, np.int32)
  with pytest.raises(ValueError, match='no examples'):
    calibration.fit_temperature(nothing, labels)
  with pytest.raises(ValueError, match='no examples'):
    calibration.expected_calibration_error(nothing, labels)


def test_calibration_error_by_hand():
  # Two of four bins: (0.5, 0.75] holds 0.6 correct and 0.7 wrong; (0.75, 1] holds 0.9, 0.8 correct and 1.0 wrong.
  confidence = np.array([0.6, 0.7, 0.9, 0.8, 1.0])
  probabilities = np.stack([confidence, 1 - confidence], axis=1)
  labels = np.array([0, 1, 0, 0, 1])
  mean, accuracy, count = calibration.reliability(probabilities, labels, bins=4)
  np.testing.assert_array_equal(count, [0, 0, 2, 3])
  np.testing.assert_allclose(mean, [np.nan, np.nan, 0.65, 0.9])
  np.testing.assert_allclose(accuracy, [np.nan, np.nan, 1 / 2, 2 / 3])
  expected = (2 * abs(0.5 - 0.65) + 3 * abs(2 / 3 - 0.9)) / 5
  assert calibration.expected_calibration_error(probabilities, labels, bins=4) == pytest.approx(expected)


def test_a_confidence_on_an_edge_is_in_the_lower_bin():
  probabilities = np.array([[0.5, 0.5], [1.0, 0.0]])
  assert calibration.reliability(probabilities, np.array([0, 0]), bins=2)[2].tolist() == [1, 1]


def test_a_model_whose_accuracy_equals_its_confidence_has_no_error():
  probabilities = np.tile([0.75, 0.25], (8, 1))
  assert calibration.expected_calibration_error(probabilities, np.array([0] * 6 + [1] * 2)) == pytest.approx(0)
  assert calibration.expected_calibration_error(probabilities, np.array([0] * 8)) == pytest.approx(0.25)


def test_the_temperature_lowers_the_error_of_an_overconfident_model():
  rng = np.random.default_rng(2)
  true = rng.normal(size=(4000, 5)) * 1.5
  labels = np.array([rng.choice(5, p=p) for p in calibration.softmax(true)])
  overconfident = 4 * true
  temperature = calibration.fit_temperature(overconfident[:2000], labels[:2000])
  before = calibration.expected_calibration_error(calibration.softmax(overconfident[2000:]), labels[2000:])
  after = calibration.expected_calibration_error(calibration.softmax(overconfident[2000:], temperature), labels[2000:])
  assert after < before / 3
