"""Where the log points of a run go: JSON lines, TensorBoard events, and experiment trackers.

A sink has three methods. `append(step, epoch, split, values, timing)` adds the point of a split after a step, `sync()`
puts all points on the disk, and `close(complete)` ends; `complete` is False if the run failed or was stopped.
"""

import contextlib
import importlib.util
import json
import os
import platform
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax import UsageError, files, passwords

Numbers = Mapping[str, Any]


class JsonLines:
  """Appends to metrics.jsonl and timing.jsonl, one line per point.

  metrics.jsonl holds what config and data determine, so that an interrupted run writes the same bytes as an
  uninterrupted one. timing.jsonl holds what depends on the clock.

  Args:
    workdir: of the run.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._files = [(Path(workdir) / name).open('a') for name in ('metrics.jsonl', 'timing.jsonl')]

  def append(self, step: int, epoch: float, split: str, values: Numbers, timing: Numbers) -> None:
    """Writes the lines of a point; they survive the process, but not a power cut."""
    for file, numbers in zip(self._files, (values, timing), strict=True):
      if numbers:
        file.write(json.dumps(files.plain({'step': step, 'epoch': epoch, 'split': split, **numbers})) + '\n')
        file.flush()

  def sync(self) -> None:
    for file in self._files:
      os.fsync(file.fileno())

  def close(self, complete: bool) -> None:
    del complete
    with contextlib.ExitStack() as stack:  # closes both, even if the disk is full
      for file in self._files:
        stack.callback(file.close)


class TensorBoard:
  """Writes a new file of TensorBoard events.

  tensorboardX defines the format. Its `SummaryWriter` is not used because it writes from a thread, whose errors come
  too late to stop the run, and overwrites a file that was begun in the same second. Its `RecordWriter` is not used
  because it waits for the disk at every point.

  Args:
    workdir: of the run.
    step: of the restored checkpoint, or 0. TensorBoard hides the later points of earlier files.
  """

  def __init__(self, workdir: str | os.PathLike, step: int):
    now = time.time_ns()
    name = f'events.out.tfevents.{now // 10**9}.{platform.node()}.{now % 10**9:09}'
    self._file = (Path(workdir) / name).open('xb')
    self._write(file_version='brain.Event:2')
    self._write(step=step + 1, session_log={'status': 'START'})

  def append(self, step: int, epoch: float, split: str, values: Numbers, timing: Numbers) -> None:
    del epoch
    scalars = [{'tag': tag, 'simple_value': value} for tag, value in _tagged(split, values, timing).items()]
    self._write(step=step, summary={'value': scalars})

  def sync(self) -> None:
    os.fsync(self._file.fileno())

  def close(self, complete: bool) -> None:
    del complete
    self._file.close()

  def _write(self, **fields: Any) -> None:
    """Writes a record: length, its checksum, an `Event` message, its checksum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    message = Event(wall_time=time.time(), **fields).SerializeToString()
    for part in (struct.pack('<Q', len(message)), message):
      self._file.write(part + struct.pack('<I', masked_crc32c(part)))
    self._file.flush()


class Wandb:
  """Logs to Weights & Biases, whose own variables (WANDB_MODE, WANDB_PROJECT, WANDB_NAME, ...) apply.

  Args:
    workdir: of the run; wandb keeps its files there.
    fields: of the config, as {'optimizer.name': 'sgd'}; shown beside the curves.
    run_id: of an earlier run to continue; None for a new run.

  Attributes:
    run_id: of this run.
  """

  def __init__(self, workdir: str | os.PathLike, fields: Mapping[str, Any], run_id: str | None):
    import wandb

    self._run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', 'cnn_jax'),
      name=os.environ.get('WANDB_NAME', Path(workdir).resolve().name),
      dir=os.fspath(workdir),
      id=run_id,
      resume='allow',
      config=dict(fields),
      allow_val_change=True,  # a resumed run may change `config.log` and `config.checkpoint`
      settings=wandb.Settings(console='off', quiet=True),  # leaves stdout to the progress line
    )
    self.run_id = self._run.id

  def append(self, step: int, epoch: float, split: str, values: Numbers, timing: Numbers) -> None:
    del epoch
    self._run.log(_tagged(split, values, timing), step=step)

  def sync(self) -> None:
    """Does nothing: a process of wandb's own writes the points and survives this one."""

  def close(self, complete: bool) -> None:
    self._run.finish(exit_code=0 if complete else 1)


class MLflow:
  """Logs to MLflow, whose own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...) apply.

  Args:
    workdir: its last part names the run.
    fields: of the config, as {'optimizer.name': 'sgd'}; the parameters of the run.
    run_id: of an earlier run to continue; None for a new run.

  Attributes:
    run_id: of this run.
  """

  def __init__(self, workdir: str | os.PathLike, fields: Mapping[str, Any], run_id: str | None):
    from mlflow import MlflowClient
    from mlflow.entities import Param

    self._client = MlflowClient()
    if run_id is None:
      experiment = self._experiment(os.environ.get('MLFLOW_EXPERIMENT_NAME', 'cnn_jax'))
      run_id = self._client.create_run(experiment, run_name=Path(workdir).resolve().name).info.run_id
      params = [Param(field, str(value)) for field, value in fields.items()]
      for first in range(0, len(params), 100):  # MLflow's limit per call
        self._client.log_batch(run_id, params=params[first : first + 100])
    else:
      self._client.update_run(run_id, status='RUNNING')
    self.run_id = run_id

  def append(self, step: int, epoch: float, split: str, values: Numbers, timing: Numbers) -> None:
    from mlflow.entities import Metric

    del epoch
    now = time.time_ns() // 10**6
    points = [Metric(tag, value, now, step) for tag, value in _tagged(split, values, timing).items()]
    self._client.log_batch(self.run_id, metrics=points)

  def sync(self) -> None:
    """Does nothing: MLflow has stored a point when `append` returns."""

  def close(self, complete: bool) -> None:
    self._client.set_terminated(self.run_id, 'FINISHED' if complete else 'FAILED')

  def _experiment(self, name: str) -> str:
    """The id of an experiment, which is made if it does not exist."""
    try:
      found = self._client.get_experiment_by_name(name)
      return found.experiment_id if found else self._client.create_experiment(name)
    except Exception:  # another process has just made it
      found = self._client.get_experiment_by_name(name)
      if found is None:
        raise
      return found.experiment_id


_TRACKERS = {'wandb': Wandb, 'mlflow': MLflow}


class Tracker:
  """Passes points on to an experiment tracker, each point once however often the run is resumed.

  trackers.json in the workdir holds, for each tracker, the id of the run there and the last step sent of each split.
  A tracker that fails later than at the start is given up with a warning: the run matters more, and all points are
  in metrics.jsonl.

  Args:
    workdir: of the run.
    fields: of the config, as {'optimizer.name': 'sgd'}.
    name: wandb | mlflow.

  Raises:
    UsageError: the tracker cannot be started, or trackers.json is damaged.
  """

  def __init__(self, workdir: str | os.PathLike, fields: Mapping[str, Any], name: str):
    self._path, self._name = Path(workdir) / 'trackers.json', name
    notes = (files.read_json(self._path) or {}).get(name, {'run_id': None, 'sent': {}})
    try:
      run_id, self._sent = notes['run_id'], {str(split): int(step) for split, step in notes['sent'].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise UsageError(f'{self._path} is damaged; remove it, and {name} starts a new curve.') from error
    try:
      self._client: Any = _TRACKERS[name](workdir, fields, run_id)
    except Exception as error:  # whatever the library raises
      again = f', or remove {self._path} to start a new curve' if run_id else ''
      raise UsageError(
        f'{name} could not start ({_first_line(error)}); correct its settings, take it out of config.log.trackers{again}.'
      ) from error
    self._save()

  def append(self, step: int, epoch: float, split: str, values: Numbers, timing: Numbers) -> None:
    if step > self._sent.get(split, 0) and self._client is not None:
      with self._guarded():
        self._client.append(step, epoch, split, values, timing)
        self._sent[split] = step
        self._save()

  def sync(self) -> None:
    if self._client is not None:
      with self._guarded():
        self._client.sync()

  def close(self, complete: bool) -> None:
    if self._client is not None:
      with self._guarded():
        self._client.close(complete)

  def _save(self) -> None:
    others = files.read_json(self._path) or {}
    notes = others | {self._name: {'run_id': self._client.run_id, 'sent': self._sent}}
    files.write_atomically(self._path, json.dumps(notes, indent=2, sort_keys=True) + '\n')

  @contextlib.contextmanager
  def _guarded(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # whatever the library raises
      self._client = None
      print(
        f'warning: {self._name} failed ({_first_line(error)}); the run continues without it. '
        'All points are in metrics.jsonl.',
        file=sys.stderr,
      )


def check_trackers(names: Sequence[str]) -> None:
  """Checks that experiment trackers are installed.

  Raises:
    UsageError: names the first one that is missing, and how to install it.
  """
  for name in names:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # without an origin: a folder of that name, such as the one wandb makes
      raise UsageError(
        f"config.log.trackers has {name!r}, which is not installed; install it with pip install 'cnn_jax[{name}]'."
      )


def _tagged(split: str, values: Numbers, timing: Numbers) -> dict[str, float]:
  return {f'{split}/{name}': float(value) for name, value in {**values, **timing}.items()}


def _first_line(error: Exception) -> str:
  return passwords.mask(next(iter(str(error).splitlines()), type(error).__name__))
