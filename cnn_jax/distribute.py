"""Several processes and devices: joining, agreeing, placing arrays, and neighbours across devices."""

import contextlib
import dataclasses
import math
import os
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax import UsageError, peers

AXIS = 'batch'  # the name of the device axis in every collective and in batch norm
_DAY = 24 * 60 * 60


def join(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: float = peers.HEARTBEAT_SECONDS,
  join_seconds: float = peers.JOIN_SECONDS,
  stall_seconds: float = peers.STALL_SECONDS,
) -> None:
  """Joins the other processes of a run; does nothing if this process is the only one.

  Without the first three arguments, the process joins if JAX detects a cluster of several processes: those of Slurm's
  `srun`, of Open MPI's `mpirun`, of a TPU pod, or of an indexed Job of Kubernetes.

  Args:
    coordinator: host:port of process 0; the cluster's if None.
    num_processes: how many processes join; the cluster's number if None. 1: none, even in a cluster.
    process_id: of this process, from 0; the cluster's number if None.
    heartbeat_seconds: of silence after which another process counts as lost, and this one ends.
    join_seconds: after which this process ends if it does not find the others.
    stall_seconds: that reading images or writing the record may take, see `peers.deadline`.

  Raises:
    UsageError: the arguments are incomplete or contradict each other, the cluster does not tell what is needed, or the
      other processes did not come.
  """
  numbers = (num_processes, process_id)
  for name, seconds, least in (
    ('heartbeat', heartbeat_seconds, 2),
    ('join', join_seconds, 1),
    ('stall', stall_seconds, 2),
  ):
    if not least <= seconds <= _DAY:
      raise UsageError(f'--{name}_seconds is {seconds:g}; it must be from {least} to {_DAY}.')
  if num_processes is not None and num_processes < 1:
    raise UsageError(f'--num_processes is {num_processes}; it must be at least 1.')
  if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
    raise UsageError(f'--process_id is {process_id} of {num_processes} processes; it must be 0 to {num_processes - 1}.')
  if num_processes == 1:
    return
  if coordinator is None and numbers != (None, None):
    raise UsageError('--num_processes and --process_id need --coordinator=HOST:PORT, the address of process 0.')
  if coordinator is not None:
    match = re.fullmatch(r'(?:\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})', coordinator)
    if not match or not 1 <= int(match[1]) <= 65535:
      raise UsageError(f'--coordinator is {coordinator!r}; give it as HOST:PORT, such as node1:1234.')
  cluster = _detect() if numbers == (None, None) else None
  if coordinator is None and cluster is None:
    return
  if cluster is None and None in numbers:
    raise UsageError('--coordinator needs --num_processes and --process_id.')
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself
  options: dict[str, Any] = {
    # Later than our own deadlines, because JAX ends the process with a native stack.
    'initialization_timeout': round(join_seconds) + 60,
    'heartbeat_timeout_seconds': round(5 * heartbeat_seconds) + 60,
    'shutdown_timeout_seconds': round(heartbeat_seconds),
  }
  if cluster is None:
    options['cluster_detection_method'] = 'deactivate'
  elif cluster.alone and 'JAX_LOCAL_DEVICE_IDS' not in os.environ:
    options['local_device_ids'] = []  # all; JAX would take one per process
  where = coordinator or 'the address that the cluster gives'

  def initialize() -> None:
    try:
      jax.distributed.initialize(coordinator, num_processes, process_id, **options)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
      reason = ' '.join(str(error).split())[:300]
      raise UsageError(f'cannot join the other processes at {where}: {reason}') from error

  peers.connect(initialize, where, join_seconds, heartbeat_seconds, stall_seconds)


@dataclasses.dataclass(frozen=True)
class _Cluster:
  """A cluster of several processes; `alone` says whether each of them has a machine of its own."""

  alone: bool


def _detect() -> _Cluster | None:
  """The cluster that JAX detects, if it has several processes.

  Raises:
    UsageError: there is a cluster, but it does not tell how many processes there are.
  """
  from jax._src.clusters import ClusterEnv

  environment, name = os.environ, 'The cluster'
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # JAX advises to install a package in every pod of Kubernetes
    try:
      for kind in ClusterEnv._cluster_types:
        name = kind.__name__.removesuffix('Cluster')
        # Any pod would do for JAX, for example one that is a notebook.
        if kind.opt_in_only_method or (name == 'K8s' and 'JOB_COMPLETION_INDEX' not in environment):
          continue
        if name == 'Ompi' and environment.get('OMPI_COMM_WORLD_SIZE') == '1':
          continue
        if kind.is_env_present():
          # The number of the job is that of `sbatch`, of which only `srun` starts as many processes.
          step = int(environment.get('SLURM_STEP_NUM_TASKS', 2)) if name == 'Slurm' else 2
          if min(step, kind.get_process_count()) < 2:
            return None
          nodes = environment.get('SLURM_STEP_NUM_NODES') if name == 'Slurm' else None
          return _Cluster(nodes == str(step) or environment.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1')
      if int(environment.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
        raise RuntimeError('JAX does not know this version of Open MPI')
    except Exception as error:  # whatever JAX and the clients of the cluster raise
      if isinstance(error, OSError) and ',' not in environment.get('TPU_WORKER_HOSTNAMES', ''):
        return None  # a machine with TPUs, where no server tells of others
      reason = ' '.join(str(error).split())[:300] or type(error).__name__
      raise UsageError(
        f'{name} started this process, but the number of processes is not known ({reason}); give --coordinator, '
        '--num_processes and --process_id, or --num_processes=1 to train alone.'
      ) from error
  return None


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


def shard(tree: Any) -> Any:
  """Splits arrays along their first axes over the local devices, whose number must divide their lengths."""
  return jax.device_put(tree, NamedSharding(_local_mesh(), PartitionSpec(AXIS)))


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
