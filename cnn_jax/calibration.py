"""How far probabilities can be trusted: temperature scaling and expected calibration error.

Both as in Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv 1706.04599).
"""

import numpy as np

_TEMPERATURES = (0.01, 100.0)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
  """Probabilities of logits divided by a temperature.

  Args:
    logits: float (n, num_classes).
    temperature: > 0; above 1 the probabilities become less sure. The order of classes stays.

  Returns:
    float64 (n, num_classes); rows sum to 1.
  """
  scaled = logits.astype(np.float64) / temperature
  exponentials = np.exp(scaled - np.max(scaled, axis=1, keepdims=True))
  return exponentials / np.sum(exponentials, axis=1, keepdims=True)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
  """The temperature T that makes softmax(logits / T) likeliest to have drawn the labels.

  The mean negative log-likelihood is convex in b = 1 / T, so its one minimum is where its
  derivative, the mean of (expected logit under softmax(b logits)) - (logit of the label), is zero.

  Args:
    logits: float (n, num_classes) of examples that were not trained on, n >= 1: the validation
      split, never the one that is reported.
    labels: int (n,).

  Returns:
    T in [0.01, 100]. Where every label has the largest logit the likelihood grows without end as
    T falls: such examples say nothing about how often the model errs, and T is 1.

  Raises:
    ValueError: there are no examples.
  """
  from scipy.optimize import brentq

  if len(labels) == 0:
    raise ValueError('the temperature of no examples')
  logits = logits.astype(np.float64)
  of_label = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
  if np.all(np.sum(logits >= of_label[:, None], axis=1) == 1):
    return 1.0

  def slope(inverse: float) -> float:
    expected = np.sum(softmax(logits, 1 / inverse) * logits, axis=1)
    return float(np.mean(expected - of_label))

  coldest, hottest = _TEMPERATURES
  if slope(1 / hottest) >= 0:
    return hottest
  if slope(1 / coldest) <= 0:
    return coldest
  return float(1 / brentq(slope, 1 / hottest, 1 / coldest, xtol=1e-12, rtol=1e-12))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
  """The mean distance between confidence and accuracy over the bins of `reliability`, weighted by their counts.

  Args:
    probabilities: float (n, num_classes), n >= 1.
    labels: int (n,).
    bins: how many.

  Returns:
    In [0, 1]; 0 where, in every bin, the model is right as often as it says.

  Raises:
    ValueError: there are no examples.
  """
  if len(labels) == 0:
    raise ValueError('the calibration error of no examples')
  confidence, accuracy, count = reliability(probabilities, labels, bins)
  full = count > 0
  return float(np.sum(count[full] * np.abs(accuracy[full] - confidence[full])) / np.sum(count))


def reliability(
  probabilities: np.ndarray, labels: np.ndarray, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Sorts examples by confidence, the probability of the class predicted, into bins of equal width.

  Args:
    probabilities: float (n, num_classes).
    labels: int (n,).
    bins: how many. Bin i, from 0, holds the confidences in (i / bins, (i + 1) / bins].

  Returns:
    Of each bin: mean confidence and accuracy, float64, NaN where it is empty; count, int64.
  """
  predicted = np.argmax(probabilities, axis=1)
  confidence = np.max(probabilities, axis=1).astype(np.float64)
  bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
  count = np.bincount(bin_of, minlength=bins)
  with np.errstate(invalid='ignore'):
    mean_confidence = np.bincount(bin_of, confidence, bins) / count
    accuracy = np.bincount(bin_of, predicted == labels, bins) / count
  return mean_confidence, accuracy, count
