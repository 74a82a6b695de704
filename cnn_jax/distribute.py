"""Several processes and devices: joining, agreeing, placing arrays, and neighbours across devices."""

import contextlib
import functools
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax import UsageError, peers

AXIS = 'batch'  # the name of the device axis in every collective and in batch norm


def join(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: float = peers.HEARTBEAT_SECONDS,
  join_seconds: float = peers.JOIN_SECONDS,
) -> None:
  """Joins the other processes of a run; does nothing if this process is the only one.

  Without arguments, the process joins if Slurm's `srun`, Open MPI's `mpirun` or a TPU pod started several.

  Args:
    coordinator: host:port of process 0.
    num_processes: how many processes join; the cluster's number if None.
    process_id: of this process, from 0; the cluster's number if None.
    heartbeat_seconds: of silence after which another process counts as lost, and this one ends.
    join_seconds: after which this process ends if it does not find the others.

  Raises:
    UsageError: the arguments are incomplete or contradict each other, or the other processes did not come.
  """
  environment = os.environ
  several = (
    int(environment.get('SLURM_STEP_NUM_TASKS', 1)) > 1
    or int(environment.get('OMPI_COMM_WORLD_SIZE', 1)) > 1
    or ',' in environment.get('TPU_WORKER_HOSTNAMES', '')
  )
  numbers = (num_processes, process_id)
  if coordinator is None and numbers != (None, None):
    raise UsageError('--num_processes and --process_id need --coordinator=HOST:PORT, the address of process 0.')
  if coordinator is not None:
    if not re.fullmatch(r'.+:[0-9]{1,5}', coordinator):
      raise UsageError(f'--coordinator is {coordinator!r}; give it as HOST:PORT, such as node1:1234.')
    if None in numbers and (numbers != (None, None) or not several):
      raise UsageError('--coordinator needs --num_processes and --process_id.')
  if num_processes is not None and num_processes < 1:
    raise UsageError(f'--num_processes is {num_processes}; it must be at least 1.')
  if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
    raise UsageError(f'--process_id is {process_id} of {num_processes} processes; it must be 0 to {num_processes - 1}.')
  if not heartbeat_seconds >= 2:
    raise UsageError(f'--heartbeat_seconds is {heartbeat_seconds:g}; it must be at least 2.')
  if coordinator is None and not several:
    return
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself
  initialize = functools.partial(
    jax.distributed.initialize,
    coordinator,
    num_processes,
    process_id,
    # Later than our own deadlines, because JAX ends the process with a native stack.
    initialization_timeout=round(join_seconds) + 60,
    heartbeat_timeout_seconds=round(5 * heartbeat_seconds) + 60,
    shutdown_timeout_seconds=round(heartbeat_seconds),
  )
  peers.connect(initialize, coordinator or 'the address that the cluster gives', join_seconds, heartbeat_seconds)


def is_primary() -> bool:
  """Whether this process, the first of those that train together, writes the record."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line on standard output, from the first process alone; a run goes on if nobody can read it."""
  if is_primary():
    with contextlib.suppress(OSError):
      print(text, flush=True)


def largest(values: np.ndarray) -> np.ndarray:
  """The elementwise maximum over all processes, which must call this together."""
  if jax.process_count() == 1:
    return values
  from jax.experimental import multihost_utils

  return np.max(multihost_utils.process_allgather(values), axis=0)


def gather(array: np.ndarray) -> np.ndarray:
  """Concatenates the arrays of all processes along the first axis; every process gets the result."""
  if jax.process_count() == 1:
    return array
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(array, tiled=True)


def from_first(tree: Any) -> Any:
  """Gives all processes, which must call this together, the arrays of process 0, bit for bit.

  Args:
    tree: of arrays; of the same shapes and dtypes in all processes.
  """
  if jax.process_count() == 1:
    return tree
  from jax.experimental import multihost_utils

  leaves, structure = jax.tree.flatten(jax.device_get(tree))
  arrays = [np.asarray(leaf) for leaf in leaves]
  # As bytes, because the sum behind the broadcast turns -0.0 into 0.0.
  packed = np.frombuffer(b''.join(array.tobytes() for array in arrays), np.uint8)
  packed = np.asarray(multihost_utils.broadcast_one_to_all(packed))
  ends = np.cumsum([array.nbytes for array in arrays])
  parts = np.split(packed, ends[:-1])
  unpacked = [
    np.frombuffer(part.tobytes(), array.dtype).reshape(array.shape) for part, array in zip(parts, arrays, strict=True)
  ]
  return jax.tree.unflatten(structure, unpacked)


def replicate(tree: Any) -> Any:
  """Copies a tree of arrays to every local device."""
  return jax.device_put(tree, NamedSharding(_local_mesh(), PartitionSpec()))


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """An array with arbitrary contents that `replicate` does not copy to the first device of a CPU.

  JAX uses the memory of an array as it is if it starts at a multiple of 64 bytes. So the array must not change later.

  Args:
    shape: of the array.
    dtype: of the array.
  """
  dtype = np.dtype(dtype)
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def shard(array: np.ndarray) -> jax.Array:
  """Splits an array along its first axis over the local devices, whose number must divide its length."""
  return jax.device_put(array, NamedSharding(_local_mesh(), PartitionSpec(AXIS)))


def previous_example(x: jax.Array) -> jax.Array:
  """Moves every example of a global batch one position up; the last one comes first.

  Inside a function that is mapped over the axis `batch`, only the example at the boundary travels between devices.

  Args:
    x: (batch, ...), this device's part of the global batch.

  Returns:
    The same shape: at position p of the global batch, the example of position p - 1.
  """
  devices = lax.axis_size(AXIS)
  last = lax.ppermute(x[-1:], AXIS, [(i, (i + 1) % devices) for i in range(devices)])
  return jnp.concatenate([last, x[:-1]])


def _local_mesh() -> Mesh:
  return Mesh(np.array(jax.local_devices()), (AXIS,))
