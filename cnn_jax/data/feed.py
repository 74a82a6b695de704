"""What `train` is fed with: arrays on the devices, and which examples each device takes at each step.

A split is resident, whole on every device, or streamed: read, decoded and placed on the devices in chunks, while they
compute. Either way the same examples come in the same order, which is a pure function of (seed, epoch), so resuming
needs the step alone.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cnn_jax import distribute
from cnn_jax.data import Split
from cnn_jax.data.lazy import LazyImages, fits

CHUNK_BYTES = 2**26  # of the images that are placed on the devices of this process at a time
_GROUP_BYTES = 2**20  # of the images that a thread reads at a time

Batches = tuple[Array, Array, np.ndarray]  # images, labels and indices, as `train.compile_steps` takes them


def choose(
  split: Split, config: Any, capacity: int, total_steps: int, maps: np.ndarray | None = None
) -> tuple['Resident | Streamed', str]:
  """Chooses how training gets a split, by its size in memory and `config.data.resident`.

  Args:
    split: to train on.
    config: of the run, adapted to the data.
    capacity: the most steps of one call.
    total_steps: of the run.
    maps: see `Resident`; they are resident in any case.

  Returns:
    The feed, and a sentence about the choice for the user, or ''.
  """
  options = config.batch_size, config.seed, capacity, config.data.sampling
  if maps is not None:
    return Resident(split, *options, maps), ''  # they have a sentence of their own
  megabytes = num_bytes(split) / 1e6
  what = f'The {len(split):,} training images take {megabytes:,.0f} MB decoded'
  if fits(num_bytes(split), config.data):
    return Resident(split, *options), f'{what} and are kept in memory.'
  streamed = Streamed(split, *options, total_steps, config.data.workers)
  why = f'config.data.megabytes is {config.data.megabytes:,}'
  if config.data.resident == 'never':
    why = "config.data.resident is 'never'"
  return streamed, f'{what}; {why}, so they are read during training, {streamed.megabytes:,.0f} MB ahead at most.'


def num_bytes(split: Split) -> int:
  """The bytes that the decoded images of a split take."""
  return len(split) * int(np.prod(split.images.shape[1:]))


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
    capacity: see above.
  """

  sharded = False

  def __init__(
    self,
    split: Split,
    batch_size: int,
    seed: int,
    capacity: int,
    sampling: str = 'uniform',
    maps: np.ndarray | None = None,
  ):
    self._views, self._size, self.capacity = 1 if maps is None else len(maps), len(split), capacity
    images = np.asarray(split.images) if maps is None else maps.reshape(-1, *maps.shape[2:])
    self.images, self.labels = distribute.replicate((images, np.tile(split.labels, self._views)))
    self._order = _order(split, batch_size, seed, sampling)

  def take(self, epoch: int, offset: int, count: int) -> tuple[Batches, int]:
    """The arguments of a call that takes some steps.

    Args:
      epoch, offset, count: see `indices`.

    Returns:
      Images, labels and indices; and how many steps they are for, which may be fewer than asked for, but not zero.
    """
    return (self.images, self.labels, self.indices(epoch, offset, count)), count

  def nothing(self) -> Batches:
    """The arguments of a call that takes no step, and so only compiles."""
    return self.take(0, 0, 0)[0]

  def close(self) -> None:
    """Does nothing; see `Streamed.close`."""

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
    padded = np.pad(order, ((0, self.capacity - len(order)), (0, 0)))
    by_device = padded.reshape(self.capacity, jax.device_count(), -1)
    first = jax.process_index() * jax.local_device_count()
    return by_device[:, first : first + jax.local_device_count()]


class Streamed:
  """Feeds training from a split that is read while the devices compute; see `Resident`.

  Each process reads only the images of its own devices. Grain reads and decodes ahead of the steps, in threads or
  processes; a thread collects the images of the next steps in one chunk and places it on the devices.

  Args:
    split: to train on.
    batch_size, seed, sampling: see `Resident`.
    capacity: the most steps of one call; fewer are taken if their images are larger than `CHUNK_BYTES`.
    total_steps: of the run.
    workers: processes that read; 0: threads of this process do.

  Attributes:
    capacity: the most steps of one call.
    megabytes: of decoded images that are in memory at a time, at most.
  """

  sharded = True

  def __init__(
    self,
    split: Split,
    batch_size: int,
    seed: int,
    capacity: int,
    sampling: str,
    total_steps: int,
    workers: int = 0,
  ):
    devices = jax.local_device_count()
    self._steps_per_epoch, self._total_steps, self._workers = len(split) // batch_size, total_steps, workers
    self._batch = (devices, batch_size // jax.device_count())  # of this process
    step_bytes = num_bytes(split) // len(split) * devices * self._batch[1]
    self.capacity = max(1, min(capacity, CHUNK_BYTES // step_bytes))
    self.megabytes = 3 * self.capacity * step_bytes / 1e6  # in use, collected, and read by Grain
    first = jax.process_index() * devices * self._batch[1]
    mine = slice(first, first + devices * self._batch[1])
    self._split, self._plan = split, _Plan(split, _order(split, batch_size, seed, sampling), mine)
    self._pool = concurrent.futures.ThreadPoolExecutor(1, 'feed')
    self._iterator: Generator[np.ndarray, None, None] | None = None
    self._chunk: _Chunk | None = None
    self._next: concurrent.futures.Future[_Chunk] | None = None
    self._next_step, self._length = -1, 1

  def take(self, epoch: int, offset: int, count: int) -> tuple[Batches, int]:
    """See `Resident.take`; waits until the images are there, and raises what reading them raises."""
    step = epoch * self._steps_per_epoch + offset
    if self._chunk is None or not self._chunk.first <= step < self._chunk.end:
      self._chunk = None  # frees its memory
      if self._next is None or self._next_step != step:
        self._restart(step)
      assert self._next is not None
      self._chunk = self._next.result()
      self._submit(self._chunk.end)
    count = min(count, self._chunk.end - step)
    return (self._chunk.images, self._chunk.labels, self._indices(step - self._chunk.first, count)), count

  def nothing(self) -> Batches:
    """See `Resident.nothing`; reads nothing."""
    images, labels = self._buffers()
    labels.fill(0)
    return (*distribute.shard((images, labels)), self._indices(0, 0))

  def close(self) -> None:
    """Stops reading ahead."""
    self._pool.shutdown(wait=True, cancel_futures=True)
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = self._next = self._chunk = None

  def _indices(self, first: int, count: int) -> np.ndarray:
    """int32 (capacity, local devices, batch / devices): steps lie one after another in a chunk."""
    devices, size = self._batch
    rows = (first + np.arange(self.capacity, dtype=np.int32))[:, None] * size + np.arange(size, dtype=np.int32)
    rows[count:] = 0
    return np.broadcast_to(rows[:, None], (self.capacity, devices, size))

  def _restart(self, step: int) -> None:
    if self._next is not None:
      self._next.cancel()
      concurrent.futures.wait([self._next])
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = _read_groups(self._plan, step, self._total_steps, self.capacity, self._workers)
    self._length = 1  # the first step does not wait for many images, and the next chunks grow
    self._submit(step)

  def _submit(self, step: int) -> None:
    """Starts to collect the chunk that begins at a step."""
    self._next, self._next_step = None, step
    if step < self._total_steps:
      self._next = self._pool.submit(self._collect, step)

  def _collect(self, step: int) -> '_Chunk':
    """Collects the images of some steps, which end with the epoch at the latest, and places them on the devices."""
    assert self._iterator is not None
    images, labels = self._buffers()
    devices, size = self._batch
    by_step = images.reshape(devices, self.capacity, size, *images.shape[2:])
    end = min(step + self._length, self._total_steps, (step // self._steps_per_epoch + 1) * self._steps_per_epoch)
    self._length = min(2 * self._length, self.capacity)
    for number in range(end - step):
      ids = self._plan.ids(step + number)
      labels.reshape(devices, self.capacity, size)[:, number] = self._split.labels[ids].reshape(devices, size)
      for start in range(0, len(ids), self._plan.group):
        group = next(self._iterator)
        for row, image in enumerate(group, start):
          by_step[row // size, number, row % size] = image
    return _Chunk(step, end, *distribute.shard((images, labels)))

  def _buffers(self) -> tuple[np.ndarray, np.ndarray]:
    shape = (self._batch[0], self.capacity * self._batch[1])
    # Memory of their own, because the devices of a CPU use it as it is.
    return distribute.empty((*shape, *self._split.images.shape[1:]), np.uint8), distribute.empty(shape, np.int32)


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """The images and labels of the steps from `first` to before `end`: (local devices, capacity * batch / devices, ...)."""

  first: int
  end: int
  images: Array
  labels: Array


class _Plan:
  """Which examples a process reads, in the order of the steps; it travels to other processes.

  Args:
    split: to train on.
    order: maps an epoch to indices (steps, batch).
    mine: the positions in the batch of this process.
  """

  def __init__(self, split: Split, order: Callable[[int], np.ndarray], mine: slice):
    self.images, self._order, self._mine = split.images, order, mine
    self._steps_per_epoch = len(order(0))
    self.rows = mine.stop - mine.start  # of a step
    wanted = max(1, _GROUP_BYTES * len(split) // num_bytes(split))
    self.group = next(size for size in range(min(wanted, self.rows), 0, -1) if self.rows % size == 0)

  def ids(self, step: int) -> np.ndarray:
    """The examples of a step of the run, int32 (rows,)."""
    epoch, offset = divmod(step, self._steps_per_epoch)
    return self._order(epoch)[offset, self._mine]

  def read(self, number: int) -> np.ndarray:
    """The images of a group, uint8 (group, height, width, channels); groups are numbered through the run."""
    step, part = divmod(number, self.rows // self.group)
    ids = self.ids(step)[part * self.group : (part + 1) * self.group]
    return self.images.read(ids) if isinstance(self.images, LazyImages) else self.images[ids]


def _read_groups(plan: _Plan, first: int, end: int, capacity: int, workers: int) -> Generator:
  """Yields the groups of the steps from `first` to before `end`, while the next `capacity` steps are read."""
  from cnn_jax.data.workers import read  # Grain takes half a second

  groups = plan.rows // plan.group
  threads = max(1, min(os.cpu_count() or 1, 16))
  return read(plan.read, range(first * groups, end * groups), threads, max(threads, capacity * groups), workers)


class _Order:
  """Maps an epoch to the order of its examples; keeps those of two epochs, but not on the way to another process."""

  def __init__(self, compute: Callable[[int], np.ndarray]):
    self._compute, self._kept = compute, functools.lru_cache(2)(compute)

  def __call__(self, epoch: int) -> np.ndarray:
    return self._kept(epoch)

  def __reduce__(self) -> tuple[Any, ...]:
    return _Order, (self._compute,)


def _order(split: Split, batch_size: int, seed: int, sampling: str) -> _Order:
  """Maps an epoch to the order of its examples, int32 (steps, batch_size)."""
  if sampling == 'balanced':
    return _Order(functools.partial(balanced_indices, split.labels, batch_size, seed))
  return _Order(functools.partial(epoch_indices, len(split), batch_size, seed))


def take(images: Array, labels: Array, indices: Array) -> dict[str, Array]:
  """One device's part of a batch; call it inside a function that is mapped over the axis `batch`.

  Args:
    images, labels: of a feed.
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
