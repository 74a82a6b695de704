"""What a run records in its workdir: config, environment, log points and result.

All of it is JSON; non-finite numbers are written as null. Nothing is executed when it is read.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from ml_collections import ConfigDict

import cnn_jax
from cnn_jax import UsageError, environment, files, sinks, workdirs
from cnn_jax import config as config_lib

# Sections and fields that a resumed run may change: they determine what is recorded, where the data are and how they are
# kept, and what is computed twice, not what is computed. The identity of the data is checked by itself.
_FREE = (
  'log', 'checkpoint', 'model.rematerialize',
  'data.dir', 'data.table', 'data.resident', 'data.megabytes', 'data.workers',
)  # fmt: skip
# Of these, the fields in which the processes of a run may differ. Resident and streamed sets take their steps in other calls.
_OWN = ('log.', 'checkpoint.', 'data.dir', 'data.table', 'data.workers')
_LENGTH = ('epochs', 'min_steps')  # a run with a constant schedule may be continued

_MAX_LOG_BYTES = 2**30  # of metrics.jsonl, about 5 million points
_MAX_REASON = 500  # characters of what is wrong in a config that somebody else may have written


def check_config(workdir: str | os.PathLike, config: ConfigDict) -> None:
  """Checks that a run can be started in a workdir, or continued there, with a config.

  A continued run must have the config that it was started with, except for the sections `log` and `checkpoint`, the place
  of the data and how they are read, and, if the schedule is constant, more epochs. A field that is newer than the run
  counts as its default.

  Args:
    workdir: of the run; may not exist yet.
    config: a checked config.

  Raises:
    UsageError: a tracker is not installed, the recorded config is not usable, or a field differs, which is named.
  """
  sinks.check_trackers(config.log.trackers)
  recorded = _read_config(workdir)
  if recorded is None:
    return
  for field, old, new in _differences(recorded, config):
    if field in _LENGTH and new > old:
      if config.schedule.name == recorded.schedule.name == 'constant':
        continue
      raise UsageError(
        f'config.{field} is {new!r}, but the run in {workdir} was started with {old!r}, and its schedule '
        f'{recorded.schedule.name!r} ends there; train longer from its weights, with a schedule of their own, by '
        f'--config.init_from={workdir} and another --workdir.'
      )
    raise UsageError(
      f'config.{field} is {new!r}, but the run in {workdir} was started with {old!r}; use another --workdir.'
    )


def moved_data(workdir: str | os.PathLike, config: ConfigDict) -> bool:
  """Whether the recorded config says that the data are at another place; if so, they may be others."""
  recorded = _read_config(workdir)
  return recorded is not None and any(recorded.data[name] != config.data[name] for name in ('dir', 'table'))


def shared_fields(config: ConfigDict) -> dict[str, Any]:
  """The fields that all processes of a run must have in common, as JSON values by name, such as {'seed': 0}."""
  fields = dict(config_lib.leaves(files.plain(config.to_dict())))
  return {name: value for name, value in fields.items() if not name.startswith(_OWN)}


def check_saved_config(workdir: str | os.PathLike, saved: Any, config: ConfigDict) -> None:
  """Checks that config.json still describes the network and the training of a checkpoint.

  Args:
    workdir: of the run.
    saved: the config in the checkpoint's notes; None in a run of version 0.1.
    config: of `load_config`, or checked by `check_config`.

  Raises:
    UsageError: names the field that differs.
  """
  if saved is None:
    return
  path = Path(workdir) / 'config.json'
  if not isinstance(saved, Mapping):
    raise UsageError(f'a checkpoint in {workdir} holds no config but a {type(saved).__name__}; use another workdir.')
  for field, old, new in _differences(_make_config(saved, path), config):
    if field not in _LENGTH or config.schedule.name != 'constant':
      where = f'{path} has {new!r} as {field}' if path.exists() else f'config.{field} is {new!r}'
      raise UsageError(f'{where}, but the checkpoint in {workdir} was trained with {old!r}; restore that value.')


def write_config(workdir: str | os.PathLike, config: ConfigDict) -> None:
  """Writes config.json, after `check_config`."""
  write_json(Path(workdir) / 'config.json', config.to_dict())


def load_config(workdir: str | os.PathLike) -> ConfigDict:
  """The config of a run, checked and locked; a field that is newer than the run has its default.

  Args:
    workdir: of the run.

  Raises:
    UsageError: there is no config, a field is unknown or wrong, or the workdir holds the runs of several seeds.
  """
  config = _read_config(workdir)
  if config is None:
    raise UsageError(f'{Path(workdir) / "config.json"} is missing; give the --workdir of a run.')
  if config.seeds > 1:
    first, last = (workdirs.seed_workdir(workdir, seed) for seed in (config.seed, config.seed + config.seeds - 1))
    raise UsageError(f'{workdir} holds the runs of {config.seeds} seeds; give one of {first} to {last.name} instead.')
  return config.lock()


def write_environment(workdir: str | os.PathLike) -> None:
  """Writes environment.json: the software, the hardware and the command of this process.

  Earlier starts of the same run are kept in its list `runs`, oldest first.
  """
  path = Path(workdir) / 'environment.json'
  earlier = files.read_json(path)
  runs = earlier.pop('runs', None) if earlier else None
  runs = [*(runs if isinstance(runs, list) else []), *([earlier] if earlier else [])]
  write_json(path, {**environment.describe(), 'runs': runs})


class Recorder:
  """Records the log points of a run: metrics.jsonl, timing.jsonl, TensorBoard events, experiment trackers.

  It is a context manager. Entering it removes what an earlier process logged after the restored step, and opens the
  sinks that the config selects. A point that is there already is not written again: a resumed run may repeat the
  evaluation of the restored step.

  Args:
    workdir: locked by this process.
    step: of the restored checkpoint, or 0.
    config: of the run; `log.tensorboard` and `log.trackers` select sinks.
    primary: whether this process writes the record. Pass False in the other processes of a run; nothing is written.

  Raises (as its methods do):
    UsageError: the workdir cannot be written, or a tracker cannot be started.
  """

  def __init__(self, workdir: str | os.PathLike, *, step: int, config: ConfigDict, primary: bool = True):
    self._workdir, self._step, self._config, self._primary = Path(workdir), step, config, primary
    self._sinks: list[Any] = []
    self._place: tuple[int, int] | None = None
    self._written: set[tuple[int, str]] = set()

  def __enter__(self) -> Self:
    if self._primary:
      self._written = remove_later_points(self._workdir, self._step)
      try:
        with workdirs.writing(self._workdir):
          self._place = workdirs.place(self._workdir)
          self._sinks.append(sinks.JsonLines(self._workdir))
          if self._config.log.tensorboard:
            self._sinks.append(sinks.TensorBoard(self._workdir, self._step))
          for name in self._config.log.trackers:
            fields = dict(config_lib.leaves(files.plain(self._config.to_dict())))
            self._sinks.append(sinks.Tracker(self._workdir, fields, name))
      except BaseException:
        self.close(complete=False)
        raise
    return self

  def append(
    self,
    step: int,
    epoch: int | float,
    split: str,
    values: Mapping[str, Any],
    timing: Mapping[str, Any] | None = None,
  ) -> None:
    """Adds the point of a split after a step; it survives the process, but not a power cut.

    Args:
      step: steps done.
      epoch: that the step belongs to, from 1.
      split: train | validation | test.
      values: numbers that do not depend on the clock.
      timing: numbers that do: images_per_second, data_wait_share, seconds.
    """
    if (step, split) in self._written:
      return
    self._written.add((step, split))
    with workdirs.writing(self._workdir):
      for sink in self._sinks:
        sink.append(step, epoch, split, values, timing or {})

  def sync(self) -> None:
    """Puts all points on the disk. Call it before saving a checkpoint, whose record must not lose points.

    Raises:
      UsageError: the workdir is no longer where it was, so that a checkpoint would be saved without the others.
    """
    with workdirs.writing(self._workdir):
      if self._primary and workdirs.place(self._workdir) != self._place:
        raise UsageError(
          f'the workdir {self._workdir} was moved or its disk was removed; bring it back, and the same command continues '
          'from what was saved last.'
        )
      for sink in self._sinks:
        sink.sync()

  def close(self, complete: bool = True) -> None:
    """Closes all sinks, even if one of them fails.

    Args:
      complete: whether the run ended as planned; trackers show it.
    """
    with workdirs.writing(self._workdir), contextlib.ExitStack() as stack:
      while self._sinks:
        stack.callback(self._sinks.pop().close, complete)

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self.close(complete=kind is None)


def remove_later_points(workdir: str | os.PathLike, step: int) -> set[tuple[int, str]]:
  """Removes the points after a step, and damaged lines, from metrics.jsonl and timing.jsonl.

  Args:
    workdir: locked by this process.
    step: steps done at the checkpoint to continue from.

  Returns:
    (step, split) of each point that metrics.jsonl still holds.

  Raises:
    UsageError: a file cannot be read or written.
  """
  with workdirs.writing(Path(workdir)):
    _remove_later_lines(Path(workdir) / 'timing.jsonl', step)
    return _remove_later_lines(Path(workdir) / 'metrics.jsonl', step)


def read_points(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The log points of a run, in the order of metrics.jsonl; damaged lines are left out.

  Args:
    workdir: of the run.

  Returns:
    An object per point: `step` and `epoch`, `split`, and the measured numbers, None in place of non-finite ones.

  Raises:
    UsageError: metrics.jsonl cannot be read.
  """
  path = Path(workdir) / 'metrics.jsonl'
  try:
    return [point for line in _read_lines(path) if (point := _parse_point(line)) is not None]
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}; give the workdir of a run.') from error


def write_result(workdir: str | os.PathLike, result: Mapping[str, Any]) -> None:
  """Writes result.json, which marks a run as complete; a run writes it last."""
  write_json(Path(workdir) / 'result.json', result)


def read_result(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """The result of a run; None if it is not complete."""
  return files.read_json(Path(workdir) / 'result.json')


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file, sorted and indented, whole or not at all.

  Args:
    path: where to write; what is there is replaced.
    value: see `files.plain`.

  Raises:
    UsageError: the file cannot be written.
  """
  with workdirs.writing(Path(path)):
    files.write_atomically(path, json.dumps(files.plain(value), indent=2, sort_keys=True) + '\n')


def _read_config(workdir: str | os.PathLike) -> ConfigDict | None:
  """The recorded config, complete and checked; None if there is none."""
  path = Path(workdir) / 'config.json'
  values = files.read_json(path)
  return None if values is None else _make_config(values, path)


def _make_config(values: Mapping[str, Any], path: Path) -> ConfigDict:
  """A checked config from recorded values; the path is for messages."""
  try:
    config = config_lib.from_record(values)
    config_lib.check(config)
  except (UsageError, AttributeError, TypeError, ValueError) as error:  # ml_collections raises those for hostile names
    raise UsageError(f'{path}: {" ".join(str(error).split())[:_MAX_REASON]}{_writer(path.parent)}') from error
  return config


def _differences(recorded: ConfigDict, config: ConfigDict) -> Iterator[tuple[str, Any, Any]]:
  """The fields that differ and are not free, with the recorded value and the value now."""
  before, now = (dict(config_lib.leaves(files.plain(made.to_dict()))) for made in (recorded, config))
  for field in sorted({*before, *now}):
    old, new = before.get(field, 'missing'), now.get(field, 'missing')
    if old != new and field not in _FREE and field.split('.')[0] not in _FREE:
      yield field, old, new


def _writer(workdir: str | os.PathLike) -> str:
  """A sentence about the version that wrote a workdir, after a space; empty if it is unknown."""
  with contextlib.suppress(UsageError, AttributeError, KeyError, TypeError):
    versions = (files.read_json(Path(workdir) / 'environment.json') or {})['versions']
    return f' Version {versions["cnn_jax"][:20]} of cnn_jax wrote this workdir; this is version {cnn_jax.__version__}.'
  return ''


def _remove_later_lines(path: Path, step: int) -> set[tuple[int, str]]:
  lines = _read_lines(path)
  points = {line: point for line in lines if (point := _parse_point(line)) is not None and point['step'] <= step}
  kept = [line for line in lines if line in points]
  if kept != lines:
    files.write_atomically(path, b''.join(kept))
  return {(point['step'], point['split']) for point in points.values()}


def _read_lines(path: Path) -> list[bytes]:
  try:
    return io.BytesIO(files.read_limited(path, _MAX_LOG_BYTES)).readlines()
  except FileNotFoundError:
    return []


def _parse_point(line: bytes) -> dict[str, Any] | None:
  """The point of a line; None if the line is damaged or cut off."""
  try:
    point = json.loads(line)
  except (RecursionError, ValueError):
    return None
  if not line.endswith(b'\n') or not isinstance(point, dict) or not isinstance(point.get('split'), str):
    return None
  numbers = [value for name, value in point.items() if name != 'split' and value is not None]
  if not all(isinstance(value, int | float) and abs(value) < 1e300 for value in numbers):
    return None
  return point if isinstance(point.get('step'), int) else None
