"""Calibration of probabilities: temperature scaling and expected calibration error.

Both follow Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv 1706.04599).
"""

import numpy as np

from cnn_jax import metrics

_TEMPERATURES = (0.01, 100.0)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
  """Computes the probabilities of logits divided by a temperature.

  Args:
    logits: float (n, num_classes).
    temperature: > 0; above 1 it makes the probabilities less confident. It does not change the order of the classes.

  Returns:
    float64 (n, num_classes); rows sum to 1.
  """
  return np.exp(metrics.log_softmax(logits.astype(np.float64) / temperature))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
  """Finds the temperature T that maximises the likelihood of the labels under softmax(logits / T).

  The mean negative log-likelihood is convex in b = 1 / T. Its minimum is where its derivative is zero: the mean of
  (expected logit under softmax(b logits)) - (logit of the label).

  Args:
    logits: float (n, num_classes), n >= 1, of examples that were not trained on: the validation split, never the
      split that is reported.
    labels: int (n,).

  Returns:
    T in [0.01, 100]. If every label has the largest logit, the likelihood grows without bound as T falls. Such examples
    contain no information about the rate of errors, and T is 1.

  Raises:
    ValueError: there are no examples.
  """
  from scipy.optimize import brentq

  if len(labels) == 0:
    raise ValueError('the temperature needs at least one example, but there are no examples')
  logits = logits.astype(np.float64)
  label_logits = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
  if np.all(np.sum(logits >= label_logits[:, None], axis=1) == 1):
    return 1.0

  def slope(inverse: float) -> float:
    expected = np.sum(softmax(logits, 1 / inverse) * logits, axis=1)
    return float(np.mean(expected - label_logits))

  coldest, hottest = _TEMPERATURES
  if slope(1 / hottest) >= 0:
    return hottest
  if slope(1 / coldest) <= 0:
    return coldest
  return float(1 / brentq(slope, 1 / hottest, 1 / coldest, xtol=1e-12, rtol=1e-12))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
  """Computes the mean distance between confidence and accuracy over the bins of `reliability`, weighted by count.

  Args:
    probabilities: float (n, num_classes), n >= 1.
    labels: int (n,).
    bins: the number of bins.

  Returns:
    A number in [0, 1]; 0 if the accuracy equals the mean confidence in every bin.

  Raises:
    ValueError: there are no examples.
  """
  if len(labels) == 0:
    raise ValueError('the calibration error needs at least one example, but there are no examples')
  confidence, accuracy, count = reliability(probabilities, labels, bins)
  full = count > 0
  return float(np.sum(count[full] * np.abs(accuracy[full] - confidence[full])) / np.sum(count))


def reliability(
  probabilities: np.ndarray, labels: np.ndarray, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Groups examples by confidence, the probability of the predicted class, into bins of equal width.

  Args:
    probabilities: float (n, num_classes).
    labels: int (n,).
    bins: the number of bins. Bin i, counted from 0, holds the confidences in (i / bins, (i + 1) / bins].

  Returns:
    For each bin: mean confidence and accuracy, float64, NaN for an empty bin; count, int64.
  """
  predicted = np.argmax(probabilities, axis=1)
  confidence = np.max(probabilities, axis=1).astype(np.float64)
  bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
  count = np.bincount(bin_of, minlength=bins)
  with np.errstate(invalid='ignore'):
    mean_confidence = np.bincount(bin_of, confidence, bins) / count
    accuracy = np.bincount(bin_of, predicted == labels, bins) / count
  return mean_confidence, accuracy, count
