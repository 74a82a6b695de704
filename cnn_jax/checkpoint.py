"""Checkpoints: saved whole or not at all, verified when they are read, never skipped silently.

    checkpoints/<step>/state/...       the arrays, written by orbax
                       info.json       what is needed to read the run back, and numbers about it at that step
                       manifest.json   size and sha256 of every other file

One process writes: the one that holds the lock of the workdir. Any number of processes may read at the same time.
Everything is plain arrays and JSON: nothing is executed when a checkpoint is read.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from cnn_jax import Diverged, UsageError, arrays, command, files

# 'best' is the checkpoint with the highest of the first of these that is in its `info`; the second is that of older
# versions. The test split plays no part in the selection.
_SCORES = ('validation_balanced_accuracy', 'validation_accuracy')
_MAX_REASON = 500  # characters; names in a manifest may have any length


class CheckpointError(UsageError):
  """Checkpoints exist but none can be used; only the user can decide to start again over them."""


def save(directory: str | os.PathLike, step: int, state: Any, *, info: Mapping[str, Any], keep: int) -> None:
  """Saves a checkpoint, then removes those that are no longer needed.

  A reader, or a process killed at any moment, finds the checkpoint complete or not at all. A checkpoint of the same
  step is replaced. Later ones are removed, since `restore` passed them over as damaged. The newest `keep` stay, and
  the one with the highest `score` (of equals, the earliest).

  Args:
    directory: holds the checkpoints; made if it does not exist, in a directory that does.
    step: steps done, >= 0.
    state: a pytree of arrays (any dtype, not empty), on devices or not; every array must be whole in this process.
      Its fields `step`, `params`, `batch_stats` and `ema` are checked if it has them.
    info: JSON values that `restore` returns beside the state.
    keep: how many of the newest to keep, at least 1.

  Raises:
    UsageError: the disk is full or cannot be written; earlier checkpoints stay.
    Diverged: a parameter, a running statistic or an average is not finite; nothing is saved.
  """
  directory = Path(directory).absolute()
  host = _to_host(state)
  _check_state(host, step)
  temporary, target, replaced = directory / f'.tmp-{step}', directory / str(step), directory / f'.old-{step}'
  try:
    directory.mkdir(exist_ok=True)  # not its parents: the disk of the workdir may have been removed
    place = os.stat(directory)
    clean(directory)
    try:
      temporary.mkdir()
      arrays.write(temporary / 'state', host)
      (temporary / 'info.json').write_text(json.dumps(dict(info), indent=2, sort_keys=True) + '\n')
      manifest = {'step': step, 'files': {name: _fingerprint(temporary / name) for name in _files(temporary)}}
      (temporary / 'manifest.json').write_text(json.dumps(manifest, indent=2, sort_keys=True) + '\n')
      _sync_tree(temporary)
      if not os.path.samestat(place, os.stat(directory)):  # orbax has made the directory again, elsewhere
        raise FileNotFoundError(errno.ENOENT, 'the workdir was moved or its disk was removed')
    except OSError:
      shutil.rmtree(temporary, ignore_errors=True)  # frees the space for the rest of the run
      raise
    if target.exists():  # a directory cannot replace a full one in one step; until the next line, `.old-` counts
      target.rename(replaced)
    temporary.rename(target)
    files.sync(directory)
    _prune(directory, step, keep)
  except OSError as error:
    reason = os.strerror(error.errno) if error.errno else str(error)
    raise UsageError(
      f'cannot save the checkpoint of step {step} in {directory}: {reason}; correct that or use another --workdir.'
    ) from error


def copy(step: int, state: Any) -> Any:
  """Copies a state to the host, for a `save` that goes on while the state changes.

  Args:
    step, state: see `save`.

  Returns:
    Nested dicts of NumPy arrays, which `save` takes in place of the state.

  Raises:
    Diverged: see `save`.
  """
  host = _to_host(state)
  _check_state(host, step)
  # On a CPU they are the buffers of the state, which the next step takes for its result.
  return jax.tree.map(np.array, host) if jax.default_backend() == 'cpu' else host


def restore(
  directory: str | os.PathLike,
  template: Any = None,
  *,
  which: str = 'last',
  check: Callable[[Mapping[str, Any], Any], None] = lambda info, shapes: None,
  warn: Callable[[str], None] = lambda message: print(f'warning: {command.printable(message)}', file=sys.stderr),
) -> tuple[Any, int, dict[str, Any]] | None:
  """Reads a checkpoint after comparing every file with the manifest.

  Args:
    directory: the one given to `save`.
    template: a tree like the saved state, of arrays or `jax.ShapeDtypeStruct`s (`jax.eval_shape` makes one). Without
      it the state is returned as nested dicts; tuples and dataclasses become dicts as well.
    which: last, or best on validation. A damaged checkpoint is passed over with a warning, and the one before, or the
      next best, is used.
    check: called with `info` and the state as `jax.ShapeDtypeStruct`s, before the state is compared with the template
      and before memory is taken for it; may raise.
    warn: called with one line for each checkpoint that is passed over.

  Returns:
    (state, step, info), the arrays of the state as NumPy arrays, bit for bit as saved; None if there is no checkpoint.

  Raises:
    CheckpointError: all checkpoints are damaged, or the state does not match the template.
    UsageError: `which` is something else.
  """
  directory = Path(directory).absolute()
  found = _checkpoints(directory)
  if not found:
    return None
  damages = []
  for step in _candidates(found, which, directory, warn):
    try:
      _verify(found[step], step)
      info = _read_json(found[step] / 'info.json')
      shapes = arrays.read_shapes(found[step] / 'state')
      check(info, shapes)
      if template is not None:
        _fill(template, shapes, found[step])
      read = arrays.read(found[step] / 'state')
    except (_DamagedError, arrays.UnreadableError) as damage:
      if not found[step].exists():  # a training run has just removed it; look again
        return restore(directory, template, which=which, check=check, warn=warn)
      damages.append(f'{found[step]} is damaged ({str(damage)[:_MAX_REASON]})')
      if len(damages) < len(found):
        warn(f'checkpoint {damages[-1]}; trying the one before it.')
      continue
    return (read if template is None else _fill(template, read, found[step])), step, info
  raise CheckpointError(
    f'all checkpoints are damaged, the last because {damages[0]}; restore a copy of {directory}, '
    'or remove it to start again from step 0.'
  )


def remove_later(directory: str | os.PathLike, step: int) -> None:
  """Removes the checkpoints after a step, the newest first; does nothing if there is no checkpoint of that step.

  Args:
    directory: of the checkpoints; belongs to this process.
    step: of the one that is then the last.

  Raises:
    UsageError: one cannot be removed.
  """
  directory = Path(directory).absolute()
  try:
    found = _checkpoints(directory)
    for later in [other for other in reversed(found) if other > step and step in found]:
      found[later].rename(directory / f'.tmp-{later}')  # see `_prune`
    clean(directory)
  except OSError as error:
    raise UsageError(f'cannot remove checkpoints in {directory}: {error.strerror}; correct that.') from error


def score(info: Mapping[str, Any]) -> float | None:
  """By how much a checkpoint counts as the best, in [0, 1]; None if its state was not validated."""
  value = next((info[name] for name in _SCORES if name in info), None)
  return value if isinstance(value, int | float) and 0 <= value <= 1 else None


class _DamagedError(Exception):
  """Names the file of a checkpoint that is not as it was written."""


def _to_host(state: Any) -> Any:
  return jax.tree.map(np.asarray, jax.device_get(serialization.to_state_dict(state)))


def _check_state(state: Any, step: int) -> None:
  """Checks the number of the step, and that what is used for prediction is finite."""
  fields = state if isinstance(state, dict) else {}
  if 'step' in fields and int(fields['step']) != step:
    raise AssertionError(f'the checkpoint is saved as step {step}, but the state has made {fields["step"]} steps')
  checked = {name: fields.get(name) for name in ('params', 'batch_stats', 'ema')}
  for path, leaf in jax.tree_util.tree_leaves_with_path(checked):
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.all(np.isfinite(leaf)):
      raise Diverged(
        f'{"/".join(str(key.key) for key in path)} is not finite after step {step:,}, so that nothing was saved; '
        'lower config.optimizer.learning_rate, lengthen config.schedule.warmup_epochs or set '
        'config.optimizer.clip_norm, and use another --workdir.'
      )


def _checkpoints(directory: Path) -> dict[int, Path]:
  try:
    names = {entry.name for entry in directory.iterdir()}
  except FileNotFoundError:
    return {}
  except OSError as error:
    raise CheckpointError(f'cannot read the checkpoints in {directory}: {error.strerror}; make it readable.') from error
  found = {int(name[5:]): directory / name for name in names if re.fullmatch(r'\.old-[0-9]+', name)}
  found |= {int(name): directory / name for name in names if re.fullmatch(r'[0-9]+', name)}
  return dict(sorted(found.items()))


def _candidates(found: dict[int, Path], which: str, directory: Path, warn: Callable[[str], None]) -> list[int]:
  if which not in ('last', 'best'):
    raise UsageError(f'the checkpoint to read is {which!r}; it must be last or best.')
  newest_first = sorted(found, reverse=True)
  if which == 'last':
    return newest_first
  scores = {step: value for step, path in found.items() if (value := _score(path)) is not None}
  scored = sorted(scores, key=lambda step: (-scores[step], step))
  if not scored:
    warn(f'no checkpoint in {directory} was validated; using the last as the best.')
  return scored + [step for step in newest_first if step not in scored]


def _score(path: Path) -> float | None:
  try:
    return score(_read_json(path / 'info.json'))
  except _DamagedError:
    return None


def _read_json(path: Path) -> dict[str, Any]:
  try:
    value = files.read_json(path)
  except UsageError as error:
    raise _DamagedError(str(error).partition(';')[0]) from error  # without the advice
  if value is None:
    raise _DamagedError(f'{path.name} is missing')
  return value


def _verify(path: Path, step: int) -> None:
  manifest = _read_json(path / 'manifest.json')
  listed = manifest.get('files')
  if not isinstance(listed, dict):
    raise _DamagedError('manifest.json lists no files')
  if manifest.get('step') != step:
    raise _DamagedError(f'manifest.json is of step {manifest.get("step")}')
  present = _files(path)
  for name in sorted({*listed, *present} - {'manifest.json'}):
    if name not in present:
      raise _DamagedError(f'{name} is missing')
    if name not in listed:
      raise _DamagedError(f'{name} is not in the manifest')
    try:
      fingerprint = _fingerprint(path / name)
    except OSError as error:
      raise _DamagedError(f'{name}: {error.strerror}') from error
    if fingerprint != listed[name]:
      raise _DamagedError(f'{name} is not as it was written')


def _files(path: Path) -> list[str]:
  # A link to a directory counts as a file, which cannot be read: what lies behind it is not in the manifest.
  found = (file for file in path.rglob('*') if file.is_symlink() or not file.is_dir())
  return sorted(file.relative_to(path).as_posix() for file in found)


def _fingerprint(path: Path) -> dict[str, Any]:
  with files.open_regular(path) as file:
    return {'sha256': hashlib.file_digest(file, 'sha256').hexdigest(), 'bytes': file.tell()}


def _fill(template: Any, read: Any, path: Path) -> Any:
  expected, saved = _describe(serialization.to_state_dict(template)), _describe(read)
  for name in sorted({*expected, *saved}):
    if expected.get(name) != saved.get(name):
      raise CheckpointError(
        f'checkpoint {path} does not match this model and optimizer: {name or "the state"} is '
        f'{saved.get(name, "missing")} there and {expected.get(name, "missing")} here; use another --workdir.'
      )
  return serialization.from_state_dict(template, read)


def _describe(tree: Any) -> dict[str, str]:
  described = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    leaf = leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
    described['/'.join(str(key.key) for key in path)] = f'{leaf.dtype}{list(leaf.shape)}'
  return described


def clean(directory: str | os.PathLike) -> None:
  """Removes what a killed process has left; call it in the process that owns the workdir.

  Args:
    directory: of the checkpoints.

  Raises:
    OSError: a file cannot be removed.
  """
  directory = Path(directory)
  for path in directory.glob('.tmp-*'):
    shutil.rmtree(path)
  for path in directory.glob('.old-*'):
    target = directory / path.name.removeprefix('.old-')
    if target.exists():
      shutil.rmtree(path)
    else:
      path.rename(target)


def _prune(directory: Path, step: int, keep: int) -> None:
  found = _checkpoints(directory)
  kept = [other for other in found if other <= step]
  scores = {other: value for other in kept if (value := _score(found[other])) is not None}
  best = max(scores, key=lambda other: (scores[other], -other), default=step)
  for other, path in found.items():
    if path.name.startswith('.') or other not in {*kept[-keep:], best}:
      path.rename(directory / f'.tmp-{other}')  # hidden first, because a half-removed one would count as damaged
  for path in [*directory.glob('.old-*'), *directory.glob('.tmp-*')]:
    shutil.rmtree(path)


def _sync_tree(path: Path) -> None:
  for file in path.rglob('*'):
    files.sync(file)
  files.sync(path)
