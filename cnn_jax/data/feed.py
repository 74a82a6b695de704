"""What `train` is fed with: arrays on the devices, and which examples each device takes at each step.

The order is a pure function of (seed, epoch), so resuming needs the step alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cnn_jax import distribute
from cnn_jax.data import Split


class Resident:
  """Feeds training from a split that every device holds whole.

  Args:
    split: to train on.
    batch_size: examples per step, over all devices of all processes; they must divide it.
    seed: of the order.
    capacity: the most steps that are asked for at a time.

  Attributes:
    images: uint8 (n, height, width, channels) and
    labels: int32 (n,), both on all local devices.
  """

  def __init__(self, split: Split, batch_size: int, seed: int, capacity: int):
    self.images, self.labels = distribute.replicate((np.asarray(split.images), split.labels))
    self._capacity = capacity
    self._order = functools.lru_cache(1)(functools.partial(epoch_indices, len(split), batch_size, seed))

  def indices(self, epoch: int, offset: int, count: int) -> np.ndarray:
    """Which examples each local device takes at some steps.

    Args:
      epoch: from 0.
      offset: the first step, counted in the epoch.
      count: of steps, at most the capacity; 0 is allowed.

    Returns:
      int32 (capacity, local devices, batch / devices) of `images`; rows from `count` on are padding.
    """
    order = self._order(epoch)[offset : offset + count]
    padded = np.pad(order, ((0, self._capacity - len(order)), (0, 0)))
    by_device = padded.reshape(self._capacity, jax.device_count(), -1)
    first = jax.process_index() * jax.local_device_count()
    return by_device[:, first : first + jax.local_device_count()]


def take(images: Array, labels: Array, indices: Array) -> dict[str, Array]:
  """One device's part of a batch; call it inside a function that is mapped over the axis `batch`.

  Args:
    images, labels: of `Resident`.
    indices: int32 (batch / devices,), of this device and step.

  Returns:
    `images` uint8 (batch / devices, height, width, channels), `labels` int32 (batch / devices,), and `positions` int32
    (batch / devices,), where in the global batch they are.
  """
  first = lax.axis_index(distribute.AXIS) * indices.shape[0]
  positions = first + jnp.arange(indices.shape[0], dtype=jnp.int32)
  return {'images': images[indices], 'labels': labels[indices], 'positions': positions}


def epoch_indices(num_examples: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
  """The order of one epoch: a fresh permutation. The remainder, a different one in each epoch, is left out.

  Args:
    num_examples: size of the split.
    batch_size: examples per step, over all devices.
    seed: non-negative.
    epoch: counted from 0.

  Returns:
    int32 (num_examples // batch_size, batch_size): row s holds the examples of step s of the
    epoch; no example appears twice.
  """
  steps = num_examples // batch_size
  # PCG64 by name: `default_rng` may choose another generator in a later NumPy.
  rng: Any = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
  order = rng.permutation(num_examples).astype(np.int32)
  return order[: steps * batch_size].reshape(steps, batch_size)
