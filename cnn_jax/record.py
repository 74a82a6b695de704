"""What a run writes down in its workdir: config, environment, metrics, TensorBoard events, result.

All of it is JSON (a number that is not finite becomes null, which JSON has in its place) and read
back without executing anything.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shlex
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from ml_collections import ConfigDict

import cnn_jax
from cnn_jax import UsageError
from cnn_jax import config as config_lib

# A resumed run may change these sections: they say what is written down, not what is computed.
_FREE_SECTIONS = ('log', 'checkpoint')

_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'pillow')


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
  """Makes a workdir and owns it while the context lasts; the kernel ends that with the process.

  Raises:
    UsageError: another process owns it, or it cannot be written.
  """
  path = Path(workdir)
  with contextlib.ExitStack() as stack:
    with _storage(path):
      path.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context((path / '.lock').open('a+'))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        raise UsageError(
          f'the workdir {path} is in use by {f"process {owner}" if owner else "another process"}; '
          'wait for it, stop it or choose another --workdir.'
        ) from None
      file.truncate(0)
      file.write(f'{os.getpid()}\n')
      file.flush()
    yield


def check_config(workdir: str | os.PathLike, config: ConfigDict) -> None:
  """Checks that a run which is resumed has the config it began with; a new run has nothing to check.

  A field newer than the run had its default.

  Raises:
    UsageError: another config is there that gives other results; names the first field.
  """
  path = Path(workdir) / 'config.json'
  new = _plain(config.to_dict())
  old = _read_json(path)
  if old is not None:
    old = _plain(_overlay(config_lib.default_config().to_dict(), old))
    old_fields, new_fields = dict(_fields(old)), dict(_fields(new))
    for field in sorted({*old_fields, *new_fields}):
      before, after = old_fields.get(field, 'missing'), new_fields.get(field, 'missing')
      if before != after and field.split('.')[0] not in _FREE_SECTIONS:
        raise UsageError(
          f'config.{field} is {after!r}, but the run in {path.parent} began with {before!r}; use another --workdir.'
        )


def write_config(workdir: str | os.PathLike, config: ConfigDict) -> None:
  """Writes config.json.

  Raises:
    UsageError: see `check_config`.
  """
  check_config(workdir, config)
  write_json(Path(workdir) / 'config.json', config.to_dict())


def load_config(workdir: str | os.PathLike) -> ConfigDict:
  """The config of a run, complete and checked; a field newer than the run has its default.

  Raises:
    UsageError: there is none, or a field is unknown or wrong, or it is of several runs with a seed each.
  """
  path = Path(workdir) / 'config.json'
  values = _read_json(path)
  if values is None:
    raise UsageError(f'{path} is missing; give the --workdir of a run.')
  config = ConfigDict(_overlay(config_lib.default_config().to_dict(), values))
  try:
    config_lib.check(config)
  except UsageError as error:
    raise UsageError(f'{path}: {error}') from error
  if config.seeds > 1:
    first, last = (seed_workdir(workdir, seed) for seed in (config.seed, config.seed + config.seeds - 1))
    raise UsageError(f'{workdir} holds the runs of {config.seeds} seeds; give one of {first} to {last.name} instead.')
  return config.lock()


def seed_workdir(workdir: str | os.PathLike, seed: int) -> Path:
  """Where, of several seeds, the run of one is recorded."""
  return Path(workdir) / f'seed_{seed:05}'


def write_environment(workdir: str | os.PathLike) -> None:
  """Writes environment.json: what this process runs on, now.

  Earlier starts of the same run are kept in its list `runs`, oldest first.
  """
  path = Path(workdir) / 'environment.json'
  earlier = _read_json(path)
  runs = [] if earlier is None else [*earlier.pop('runs', []), earlier]
  write_json(path, {**_environment(), 'runs': runs})


class Recorder:
  """Writes metrics.jsonl, timing.jsonl and TensorBoard events, one line for each (step, split).

  metrics.jsonl holds only what the config and the data decide, so a run that was interrupted
  leaves the same bytes as one that was not; timing.jsonl holds what the clock decides. A line that
  is there already is not written again: a resumed run may come by the same evaluation twice.

  Args:
    workdir: must be locked.
    step: of the restored checkpoint, or 0. Lines of later steps, and one that a killed process
      left half-written, are dropped.
    tensorboard: also write events.

  Raises (as do its methods):
    UsageError: the workdir cannot be written.
  """

  def __init__(self, workdir: str | os.PathLike, *, step: int = 0, tensorboard: bool = True):
    self._workdir = Path(workdir)
    with _storage(self._workdir):
      self._written = _truncate(self._workdir / 'metrics.jsonl', step)
      _truncate(self._workdir / 'timing.jsonl', step)
      self._metrics = (self._workdir / 'metrics.jsonl').open('a')
      self._timing = (self._workdir / 'timing.jsonl').open('a')
      self._events = _open_events(self._workdir, step) if tensorboard else None

  def append(
    self,
    step: int,
    epoch: int | float,
    split: str,
    values: Mapping[str, Any],
    timing: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes the metrics of a split after a step; they survive the process, not a power cut.

    Args:
      step: steps done.
      epoch: that the step belongs to.
      split: train | validation | test.
      values: numbers that do not depend on the clock.
      timing: numbers that do: images_per_second, data_wait_share, seconds.
    """
    if (step, split) in self._written:
      return
    self._written.add((step, split))
    timing = timing or {}
    with _storage(self._workdir):
      for file, numbers in ((self._metrics, values), (self._timing, timing)):
        if numbers:
          file.write(json.dumps(_plain({'step': step, 'epoch': epoch, 'split': split, **numbers})) + '\n')
          file.flush()
      if self._events is not None:
        scalars = [
          {'tag': f'{split}/{name}', 'simple_value': float(value)} for name, value in {**values, **timing}.items()
        ]
        self._events.write(_event(step=step, summary={'value': scalars}))
        self._events.flush()

  def sync(self) -> None:
    """Puts everything on disk; called before a checkpoint, so that no line it counts on is lost."""
    with _storage(self._workdir):
      for file in self._files():
        os.fsync(file.fileno())

  def close(self) -> None:
    """Closes the files."""
    with _storage(self._workdir), contextlib.ExitStack() as stack:  # closes all, even if one finds the disk full
      for file in self._files():
        stack.callback(file.close)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _files(self) -> list[IO[Any]]:
    return [self._metrics, self._timing] + ([self._events] if self._events is not None else [])


def write_result(workdir: str | os.PathLike, result: Mapping[str, Any]) -> None:
  """Writes result.json, which says that a run is complete; the last thing a run does."""
  write_json(Path(workdir) / 'result.json', result)


def read_result(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """The result of a run, or None while it is not complete."""
  return _read_json(Path(workdir) / 'result.json')


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file whole or not at all: sorted, indented, NumPy numbers and arrays as plain ones.

  Raises:
    UsageError: it cannot be written.
  """
  _write(Path(path), json.dumps(_plain(value), indent=2, sort_keys=True) + '\n')


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UsageError(f'cannot write to {path}: {error.strerror}; mend that or choose another --workdir.') from error


def _write(path: Path, text: str) -> None:
  temporary = path.with_name(f'.{path.name}.tmp')
  with _storage(path):
    with temporary.open('w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    temporary.rename(path)


def _read_json(path: Path) -> dict[str, Any] | None:
  try:
    value = json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}; give the --workdir of a run.') from error
  except ValueError as error:
    raise UsageError(f'{path} is not JSON ({error}); put back a copy or use another --workdir.') from error
  if not isinstance(value, dict):
    raise UsageError(f'{path} does not hold a JSON object; put back a copy or use another --workdir.')
  return value


def _truncate(path: Path, step: int) -> set[tuple[int, str]]:
  """Drops the lines after a step and those that are not whole; returns the (step, split) of the rest."""
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  kept, written = [], set()
  for line in lines:
    try:
      entry = json.loads(line)
      key = (entry['step'], entry['split'])
    except (ValueError, TypeError, KeyError):
      continue
    if key[0] <= step and line.endswith(b'\n'):
      kept.append(line)
      written.add(key)
  if kept != lines:
    _write(path, b''.join(kept).decode())
  return written


def _open_events(workdir: Path, step: int) -> IO[bytes]:
  """Opens a new TensorBoard file; it hides what earlier ones have of the steps after `step`.

  tensorboardX gives the format. Its `SummaryWriter` is not used because it writes from a thread, whose
  errors come too late for one line, and would overwrite a file begun in the same second.
  """
  now = time.time_ns()
  file = (workdir / f'events.out.tfevents.{now // 10**9}.{platform.node()}.{now % 10**9:09}').open('xb')
  file.write(_event(file_version='brain.Event:2'))
  if step:
    file.write(_event(step=step + 1, session_log={'status': 'START'}))
  file.flush()
  return file


def _event(**fields: Any) -> bytes:
  """One record of a TensorBoard file: length, its checksum, `Event` message, its checksum."""
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.record_writer import masked_crc32c

  message = Event(wall_time=time.time(), **fields).SerializeToString()
  length = struct.pack('<Q', len(message))
  return b''.join(
    (length, struct.pack('<I', masked_crc32c(length)), message, struct.pack('<I', masked_crc32c(message)))
  )


def _plain(value: Any) -> Any:
  """As JSON has it: tuples as lists, array and NumPy numbers as Python's, NaN and infinities as None."""
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, Mapping):
    return {str(name): _plain(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _fields(values: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _fields(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value


def _overlay(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  merged = dict(base)
  for name, value in values.items():
    if isinstance(value, dict) and isinstance(base.get(name, {}), Mapping):
      merged[name] = _overlay(base.get(name, {}), value)
    else:
      merged[name] = tuple(value) if isinstance(value, list) else value
  return merged


def _environment() -> dict[str, Any]:
  import jax

  devices = jax.devices()
  return {
    'start_time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'command': shlex.join(sys.orig_argv),
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
  """The commit of this code and whether it has changed since; None where it is not a checkout."""
  root = Path(cnn_jax.__file__).resolve().parent.parent
  try:
    top, commit = _run_git(root, 'rev-parse', '--show-toplevel', 'HEAD').splitlines()
    if Path(top).resolve() != root:  # installed somewhere inside another project's checkout
      return None
    return {'commit': commit, 'dirty': bool(_run_git(root, 'status', '--porcelain'))}
  except (OSError, ValueError, subprocess.SubprocessError):
    return None


def _run_git(root: Path, *arguments: str) -> str:
  return subprocess.run(
    ['git', '-C', str(root), *arguments], capture_output=True, text=True, timeout=5, check=True
  ).stdout
