"""Several processes and devices: joining, agreeing, placing arrays, and neighbours across devices."""

import contextlib
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax import UsageError

AXIS = 'batch'  # the name of the device axis in every collective and in batch norm


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Joins the other processes of a run; does nothing if this process is the only one.

  Without arguments, the process joins if Slurm's `srun`, Open MPI's `mpirun` or a TPU pod started several.

  Args:
    coordinator: host:port of process 0.
    num_processes: how many processes join; the cluster's number if None.
    process_id: of this process, from 0; the cluster's number if None.

  Raises:
    UsageError: the arguments are incomplete or contradict each other.
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
  if coordinator is not None or several:
    jax.distributed.initialize(coordinator, num_processes, process_id)


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


def replicate(tree: Any) -> Any:
  """Copies a tree of arrays to every local device."""
  return jax.device_put(tree, NamedSharding(_local_mesh(), PartitionSpec()))


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
