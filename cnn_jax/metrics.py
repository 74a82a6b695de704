"""Losses, and metrics that are sums and counts until they are divided once."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax


def smooth_labels(labels_one_hot: jax.Array, smoothing: float) -> jax.Array:
  """Moves a share of the probability to all classes alike (Szegedy et al. 2016, section 7).

  Args:
    labels_one_hot: float (batch, num_classes).
    smoothing: the share, in [0, 1).
  """
  return labels_one_hot * (1 - smoothing) + smoothing / labels_one_hot.shape[-1]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross-entropy of each example in nats.

  Args:
    logits: float (batch, num_classes).
    labels: probabilities (batch, num_classes).

  Returns:
    float32 (batch,).
  """
  return optax.softmax_cross_entropy(logits, labels)


def training_sums(losses: jax.Array, logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
  """Sums over a batch, to be added over devices and steps and divided once by `count`.

  Args:
    losses: float (batch,).
    logits: float (batch, num_classes).
    labels: probabilities (batch, num_classes); an example counts as right where the most
      probable class is that of its largest label, which mixing may make either of two.

  Returns:
    Scalars `loss`, `accuracy` (sums) and `count`.
  """
  correct = jnp.argmax(logits, axis=-1) == jnp.argmax(labels, axis=-1)
  return {
    'loss': jnp.sum(losses),
    'accuracy': jnp.sum(correct, dtype=jnp.float32),
    'count': jnp.float32(losses.shape[0]),
  }


def divide(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Means from sums and their `count`, in float64.

  Args:
    sums: arrays of any one shape, `count` among them; all are summed first.
  """
  totals = {name: float(np.sum(value, dtype=np.float64)) for name, value in sums.items()}
  count = totals.pop('count')
  return {name: total / count for name, total in totals.items()}


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Loss, accuracy and top-5 accuracy over a split, in float64.

  Args:
    logits: float (n, num_classes), n >= 1.
    labels: int (n,).

  Returns:
    `loss` (mean cross-entropy in nats, without smoothing), `accuracy`, `top5_accuracy`: a label
    is among the top five where fewer than five classes have a larger logit.
  """
  if len(logits) == 0:
    raise ValueError('metrics of no examples')
  log_probabilities = log_softmax(logits)
  of_label = np.take_along_axis(logits, labels[:, None], axis=1)
  return {
    'loss': float(-np.mean(np.take_along_axis(log_probabilities, labels[:, None], axis=1))),
    'accuracy': float(np.mean(np.argmax(logits, axis=1) == labels)),
    'top5_accuracy': float(np.mean(np.sum(logits > of_label, axis=1) < 5)),
  }


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """Logarithms of the probabilities of logits (n, num_classes), float64."""
  shifted = logits.astype(np.float64) - np.max(logits, axis=1, keepdims=True)
  return shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))
