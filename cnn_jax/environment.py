"""What a process runs on: its command, versions, processor, devices, and the commit of the code."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cnn_jax
from cnn_jax import passwords

_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'pillow')


def describe() -> dict[str, Any]:
  """The software, the hardware and the command of this process, as JSON values."""
  import jax

  devices = jax.devices()
  return {
    'start_time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'command': shlex.join(passwords.mask_arguments(sys.orig_argv)),
    'versions': {
      'python': platform.python_version(),
      'cnn_jax': cnn_jax.__version__,
      **{name: importlib.metadata.version(name) for name in _LIBRARIES},
    },
    'platform': platform.platform(),
    'cpu': _cpu_model(),
    'cpu_cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
    'backend': devices[0].platform,
    'device_kind': devices[0].device_kind,
    'num_devices': len(devices),
    'num_processes': jax.process_count(),
    'git': _git(),
  }


def _cpu_model() -> str:
  with contextlib.suppress(OSError):
    for line in Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.split(':', 1)[1].strip()
  return platform.processor()


def _git() -> dict[str, Any] | None:
  """The commit of this package, and whether its files differ from it; None outside a checkout."""
  package = Path(cnn_jax.__file__).resolve().parent
  try:
    top, commit = _run_git(package, 'rev-parse', '--show-toplevel', 'HEAD').splitlines()
    if Path(top).resolve() != package.parent:  # installed somewhere inside another project's checkout
      return None
    return {'commit': commit, 'dirty': bool(_run_git(package, 'status', '--porcelain', '--', '.'))}
  except (OSError, ValueError, subprocess.SubprocessError):
    return None


def _run_git(directory: Path, *arguments: str) -> str:
  return subprocess.run(
    ['git', '-C', str(directory), *arguments], capture_output=True, text=True, timeout=5, check=True
  ).stdout
