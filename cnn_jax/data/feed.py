"""What `train` is fed with: arrays on the devices, and which examples each device takes at each step.

The order is a pure function of (seed, epoch), so resuming needs the step alone.
"""

import functools

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
    sampling: of an epoch: uniform, see `epoch_indices`, or balanced, see `balanced_indices`.
    maps: (views, n, ...), of several views of each image, from `frozen.compute_maps`; they take the place of the images,
      and the epochs take turns with the views. None: the images are used.

  Attributes:
    images: uint8 (n, height, width, channels), or maps (views * n, ...), and
    labels: int32, as many, both on all local devices.
  """

  def __init__(
    self,
    split: Split,
    batch_size: int,
    seed: int,
    capacity: int,
    sampling: str = 'uniform',
    maps: np.ndarray | None = None,
  ):
    self._views, self._size, self._capacity = 1 if maps is None else len(maps), len(split), capacity
    images = np.asarray(split.images) if maps is None else maps.reshape(-1, *maps.shape[2:])
    self.images, self.labels = distribute.replicate((images, np.tile(split.labels, self._views)))
    order = functools.partial(epoch_indices, len(split), batch_size, seed)
    if sampling == 'balanced':
      order = functools.partial(balanced_indices, split.labels, batch_size, seed)
    self._order = functools.lru_cache(1)(order)

  def indices(self, epoch: int, offset: int, count: int) -> np.ndarray:
    """Which examples each local device takes at some steps.

    Args:
      epoch: from 0.
      offset: the first step, counted in the epoch.
      count: of steps, at most the capacity; 0 is allowed.

    Returns:
      int32 (capacity, local devices, batch / devices) of `images`; rows from `count` on are padding.
    """
    order = self._order(epoch)[offset : offset + count] + np.int32(epoch % self._views * self._size)
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
  order = _generator(seed, epoch).permutation(num_examples).astype(np.int32)
  return order[: steps * batch_size].reshape(steps, batch_size)


def balanced_indices(labels: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
  """The order of one epoch in which every class occurs equally often; it has as many steps as `epoch_indices`.

  The draws of all epochs are dealt out to the classes in turn, so that their numbers differ by at most one, within an
  epoch and in total. Each class passes through fresh permutations of its examples, one after another and across epochs,
  so that its examples are drawn equally often too: after each epoch, their numbers differ by at most one. The draws of an
  epoch are shuffled.

  Args:
    labels: int (num_examples,). A class without examples takes no turns.
    batch_size: examples per step, over all devices.
    seed: non-negative.
    epoch: counted from 0.

  Returns:
    int32 (num_examples // batch_size, batch_size).
  """
  steps = len(labels) // batch_size
  classes, counts = np.unique(labels, return_counts=True)
  members = np.split(np.argsort(labels, kind='stable').astype(np.int32), np.cumsum(counts)[:-1])
  drawn = []
  for turn, (label, examples) in enumerate(zip(classes.tolist(), members, strict=True)):
    # Draw i of all epochs belongs to the class whose turn is i modulo the number of classes.
    first, end = (-((turn - passed * steps * batch_size) // len(classes)) for passed in (epoch, epoch + 1))
    begun, ended = first // len(examples), -(-end // len(examples))
    passes = [_generator(seed, cycle, label).permutation(examples) for cycle in range(begun, ended)]
    start = begun * len(examples)
    drawn.append(np.concatenate([examples[:0], *passes])[first - start : end - start])
  return _generator(seed, epoch).permutation(np.concatenate(drawn)).reshape(steps, batch_size)


def _generator(seed: int, number: int, *stream: int) -> np.random.Generator:
  # PCG64 by name: `default_rng` may choose another generator in a later NumPy.
  return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, number), spawn_key=stream)))
