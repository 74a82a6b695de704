"""Dividing the cores and the GPUs of a machine among several processes."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from cnn_jax import UsageError

# More than this gain nothing, and hundreds of processes, of 0.2 GB and more, stop a machine before their first result. It is
# not 1, because a config moves between machines.
_MOST_PER_CORE = 8


@dataclasses.dataclass(frozen=True)
class Share:
  """The part of the machine that one of several processes uses; None: all of it."""

  cores: tuple[int, ...] | None
  gpus: tuple[str, ...] | None
  alone_on_gpu: bool


def divide(processes: int) -> list[Share]:
  """Divides the machine's cores and GPUs evenly; if there are fewer than processes, several processes share one."""
  if processes == 1:
    return [Share(None, None, True)]
  cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, 'sched_getaffinity') else ()
  gpus = find_gpus()
  return [
    Share(_part(cores, i, processes) or None, _part(gpus, i, processes) or None, len(gpus) >= processes)
    for i in range(processes)
  ]


def check_processes(name: str, processes: int) -> None:
  """Checks that a number of processes suits the machine.

  Args:
    name: of the field or argument.
    processes: how many it asks for.

  Raises:
    UsageError: there are far more than cores.
  """
  cores = os.cpu_count() or 1
  if processes > _MOST_PER_CORE * cores:
    raise UsageError(
      f'{name} is {processes}, but this machine has {cores} {"core" if cores == 1 else "cores"}; make it at most '
      f'{_MOST_PER_CORE * cores}.'
    )


def find_gpus() -> tuple[str, ...]:
  """The names of the machine's NVIDIA GPUs, as CUDA_VISIBLE_DEVICES lists them."""
  if 'CUDA_VISIBLE_DEVICES' in os.environ:
    return tuple(name.strip() for name in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if name.strip())
  if shutil.which('nvidia-smi') is None:
    return ()
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=20, check=True).stdout
    return tuple(str(i) for i, line in enumerate(line for line in listed.splitlines() if line.startswith('GPU ')))
  return ()


def variables(share: Share) -> dict[str, str]:
  """The variables of the environment that confine a process to the GPUs of its share; set them before JAX starts."""
  found = {'CUDA_VISIBLE_DEVICES': ','.join(share.gpus)} if share.gpus else {}
  if not share.alone_on_gpu and 'XLA_PYTHON_CLIENT_PREALLOCATE' not in os.environ:
    found['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  return found


def _part(items: Sequence[Any], i: int, n: int) -> tuple[Any, ...]:
  """Part i of n of the items; one of them if there are fewer than n."""
  if len(items) < n:
    return tuple(items[i % len(items) :][:1]) if items else ()
  return tuple(items[i * len(items) // n : (i + 1) * len(items) // n])
