"""Losses and metrics. A metric is a sum and a count, divided once at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from cnn_jax import Diverged


def smooth_labels(labels_one_hot: jax.Array, smoothing: float) -> jax.Array:
  """Spreads a share of the probability evenly over all classes (Szegedy et al. 2016, section 7).

  Args:
    labels_one_hot: float (batch, num_classes).
    smoothing: the share, in [0, 1).

  Returns:
    float (batch, num_classes); rows have the same sums as before.
  """
  return labels_one_hot * (1 - smoothing) + smoothing / labels_one_hot.shape[-1]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Computes the cross-entropy of each example in nats.

  Args:
    logits: float (batch, num_classes).
    labels: probabilities (batch, num_classes).

  Returns:
    float32 (batch,).
  """
  return optax.softmax_cross_entropy(logits, labels)


def relative_weights(labels: jax.Array, class_weights: Sequence[float], axis: str) -> jax.Array:
  """Computes the weights with which the mean loss becomes the weighted mean over the global batch.

  sum(w * loss) / sum(w) over all devices is the mean of loss * w / mean(w), so a device needs nothing of the others but
  the mean of the weights. The weight of a mixed example is that of its classes, in the proportions of its label.

  Args:
    labels: probabilities (batch, num_classes), before smoothing, which would mix the weights of all classes.
    class_weights: a positive number per class.
    axis: the name of the device axis.

  Returns:
    float32 (batch,), whose mean over all devices is 1.
  """
  weights = jnp.sum(labels * jnp.asarray(class_weights, labels.dtype)[None], axis=1)
  return weights / lax.pmean(jnp.mean(weights), axis)


def balanced_weights(labels: np.ndarray, num_classes: int) -> tuple[float, ...]:
  """Computes the weights with which each class has the same share in the loss, as scikit-learn's 'balanced'.

  Args:
    labels: int (n,), of the training split.
    num_classes: of the data.

  Returns:
    n / (classes * count) for each class; `classes` counts those that occur. The weight of one that does not is 1.
  """
  counts = np.bincount(labels, minlength=num_classes)
  weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
  return tuple(np.where(counts > 0, weights, 1.0).tolist())


def training_sums(losses: jax.Array, logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
  """Computes sums over a batch. Add them over devices and steps, then divide once by `count`.

  Args:
    losses: float (batch,).
    logits: float (batch, num_classes).
    labels: probabilities (batch, num_classes). A prediction is correct if it is the class with the largest label; with
      mixing that is the class of either example.

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
  """Divides sums by their `count`, in float64.

  Args:
    sums: arrays of one shape, including `count`; each is summed over all its elements first.

  Returns:
    The mean of each name but `count`.
  """
  totals = {name: float(np.sum(value, dtype=np.float64)) for name, value in sums.items()}
  count = totals.pop('count')
  return {name: total / count for name, total in totals.items()}


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Computes loss and accuracies over a split, in float64.

  Args:
    logits: float (n, num_classes), n >= 1. A prediction with a logit that is not a number is wrong.
    labels: int (n,).

  Returns:
    `loss` (mean cross-entropy in nats, without smoothing), `accuracy`, `balanced_accuracy` (the mean of the accuracies
    of the classes that occur), `top5_accuracy`.

  Raises:
    ValueError: there are no examples.
  """
  if len(logits) == 0:
    raise ValueError('metrics need at least one example, but there are no examples')
  log_probabilities = log_softmax(logits)
  correct = (np.argmax(logits, axis=1) == labels) & ~np.isnan(logits).any(axis=1)
  counts = np.bincount(labels)
  recalls = np.bincount(labels, correct)[counts > 0] / counts[counts > 0]
  return {
    'loss': float(-np.mean(np.take_along_axis(log_probabilities, labels[:, None], axis=1))),
    'accuracy': float(np.mean(correct)),
    'balanced_accuracy': float(np.mean(recalls)),
    'top5_accuracy': top_k_accuracy(logits, labels, 5),
  }


def class_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, list[Any]]:
  """Computes precision and recall of each class.

  Args:
    logits: float (n, num_classes). A prediction with a logit that is not a number counts for no class.
    labels: int (n,).

  Returns:
    Lists with a value per class: `precision`, None if the class was never predicted; `recall`, None if the class does
    not occur; and `n`, the examples of the class.
  """
  num_classes = logits.shape[1]
  known = ~np.isnan(logits).any(axis=1)
  predicted = np.argmax(logits[known], axis=1)
  hits = np.bincount(predicted[predicted == labels[known]], minlength=num_classes).tolist()
  claims = np.bincount(predicted, minlength=num_classes).tolist()
  counts = np.bincount(labels, minlength=num_classes).tolist()
  return {
    'precision': [hit / claim if claim else None for hit, claim in zip(hits, claims, strict=True)],
    'recall': [hit / count if count else None for hit, count in zip(hits, counts, strict=True)],
    'n': counts,
  }


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
  """Computes the share of examples for which fewer than k classes have a larger logit than the label.

  Args:
    logits: float (n, num_classes), n >= 1. A prediction with a logit that is not a number is wrong.
    labels: int (n,).
    k: at least 1.
  """
  label_logits = np.take_along_axis(logits, labels[:, None], axis=1)
  right = np.sum(logits > label_logits, axis=1) < k
  return float(np.mean(right & ~np.isnan(logits).any(axis=1)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """Computes the logarithm of the softmax of logits (n, num_classes), float64."""
  shifted = logits.astype(np.float64) - np.max(logits, axis=1, keepdims=True)
  return shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))


# Beyond it float32 cannot represent a change by one, so that no update of usual size has an effect.
_LARGEST_NORM = 2.0**24


def diverged(what: str) -> Diverged:
  """The exception that says what is not finite, and what to change."""
  return Diverged(
    f'{what}; lower config.optimizer.learning_rate, lengthen config.schedule.warmup_epochs or set '
    'config.optimizer.clip_norm, and use another --workdir.'
  )


def check_steps(measured: Mapping[str, np.ndarray], first_step: int) -> None:
  """Raises `Diverged` if a loss is not finite, or a norm is not finite or far beyond any use.

  Args:
    measured: float32 (steps,) for each metric of `train_step`.
    first_step: the number of steps before the first of them.
  """
  norms = [name for name in measured if name.endswith('_norm')]
  bad = ~np.isfinite(measured['loss'])
  for name in norms:
    bad |= ~(measured[name] <= _LARGEST_NORM)
  if not np.any(bad):
    return
  i = int(np.argmax(bad))
  name = (
    'loss' if not np.isfinite(measured['loss'][i]) else next(n for n in norms if not measured[n][i] <= _LARGEST_NORM)
  )
  raise diverged(f'the {name.replace("_", " ")} of step {first_step + i + 1:,} is {measured[name][i]:g}')


class Windows:
  """Collects the values of single steps into log points, one per `size` steps of an epoch.

  Args:
    size: steps per log point; the last point of an epoch may have fewer.
    steps_per_epoch: the number of steps after which an epoch, and its last log point, ends.
    pending: the attribute `pending` at the time of a checkpoint, to continue an incomplete log point.

  Attributes:
    pending: {name: values of each step} since the last log point, as Python numbers.
  """

  def __init__(self, size: int, steps_per_epoch: int, pending: Mapping[str, Sequence[float]] | None = None):
    self._size, self._steps_per_epoch = size, steps_per_epoch
    self.pending = {name: list(values) for name, values in (pending or {}).items()}

  def add(self, step: int, measured: Mapping[str, np.ndarray]) -> list[tuple[int, dict[str, float]]]:
    """Adds steps of one epoch.

    Args:
      step: the number of steps before them.
      measured: float32 (steps,) for each metric of `train_step`.

    Returns:
      (steps done, log point) for each point that is now complete; see `summarize`.
    """
    points = []
    count = len(measured['loss'])
    for i in range(count):
      for name, values in measured.items():
        self.pending.setdefault(name, []).append(float(values[i]))
      done = (step + i) % self._steps_per_epoch + 1
      if done % self._size == 0 or done == self._steps_per_epoch:
        points.append((step + i + 1, summarize(self.pending)))
        self.pending = {}
    return points


def summarize(steps: Mapping[str, Sequence[float]]) -> dict[str, float]:
  """Makes one log point from several steps: means over examples, means of the norms, and the last learning rate."""
  arrays = {name: np.asarray(values, np.float32) for name, values in steps.items()}
  norms = {name: float(np.mean(values)) for name, values in arrays.items() if name.endswith('_norm')}
  sums = {name: arrays[name] for name in ('loss', 'accuracy', 'count')}
  return divide(sums) | {'learning_rate': float(arrays['learning_rate'][-1])} | norms
