"""Checkpoints: saved whole or not at all, verified when read, never silently skipped.

    checkpoints/<step>/state/...       the arrays, written by orbax
                       info.json       numbers about the run at that step
                       manifest.json   size and sha256 of every other file

One process writes (it holds the lock of the workdir); any number may read at the same time.
Everything is plain arrays and JSON: nothing is executed when a checkpoint is read.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from cnn_jax import UsageError

# What 'best' means: the highest of these in `info`. Selection never looks at the test split.
SCORE = 'validation_accuracy'


class CheckpointError(UsageError):
  """Checkpoints are there but none can be used; starting afresh over them is the user's decision."""


def save(directory: str | os.PathLike, step: int, state: Any, *, info: Mapping[str, Any], keep: int) -> None:
  """Saves a checkpoint, then removes those that are no longer wanted.

  A reader, or a process killed at any moment, finds the checkpoint complete or not at all. One of
  the same step is replaced. Later steps are removed: `restore` had passed them over as damaged.
  The newest `keep` stay, and the one with the highest `info['validation_accuracy']` (the earliest
  of equals).

  Args:
    directory: holds the checkpoints; made where it does not exist.
    step: steps done, >= 0.
    state: a pytree of arrays (any dtype, no empty ones), on devices or not; every array must be
      whole in this process.
    info: JSON values to read back beside the state.
    keep: at least 1.

  Raises:
    UsageError: the storage is full or cannot be written; what was there before stays.
  """
  directory = Path(directory).absolute()
  arrays = jax.tree.map(np.asarray, jax.device_get(serialization.to_state_dict(state)))
  temporary, target, replaced = directory / f'.tmp-{step}', directory / str(step), directory / f'.old-{step}'
  try:
    directory.mkdir(parents=True, exist_ok=True)
    _clean(directory)
    try:
      temporary.mkdir()
      _write_arrays(temporary / 'state', arrays)
      (temporary / 'info.json').write_text(json.dumps(dict(info), indent=2, sort_keys=True) + '\n')
      manifest = {'step': step, 'files': {name: _fingerprint(temporary / name) for name in _files(temporary)}}
      (temporary / 'manifest.json').write_text(json.dumps(manifest, indent=2, sort_keys=True) + '\n')
      _sync_tree(temporary)
    except OSError:
      shutil.rmtree(temporary, ignore_errors=True)  # gives the space back to the rest of the run
      raise
    if target.exists():  # a directory cannot be renamed over a full one; `.old-` counts until the next line is done
      target.rename(replaced)
    temporary.rename(target)
    _sync(directory)
    _prune(directory, step, keep)
  except OSError as error:
    reason = os.strerror(error.errno) if error.errno else str(error)
    raise UsageError(
      f'cannot save the checkpoint of step {step} in {directory}: {reason}; mend that or choose another --workdir.'
    ) from error


def restore(
  directory: str | os.PathLike,
  template: Any = None,
  *,
  which: str | int = 'last',
  warn: Callable[[str], None] = lambda message: print(f'warning: {message}', file=sys.stderr),
) -> tuple[Any, int, dict[str, Any]] | None:
  """Reads a checkpoint after comparing every file with its manifest.

  Args:
    directory: as given to `save`.
    template: a tree like the saved state, of arrays or `jax.ShapeDtypeStruct`s (`jax.eval_shape`
      makes one). Without it the state comes as nested dicts, tuples and the like as dicts too.
    which: 'last'; 'best' on validation; or a step. A damaged one is passed over with a warning for
      the next best or the one before; not so a step asked for by number.
    warn: called with one line for each checkpoint passed over.

  Returns:
    (state, step, info), the state's arrays bit for bit as saved, as NumPy arrays that the caller
    places on its devices; or None where there is no checkpoint at all.

  Raises:
    CheckpointError: all are damaged, the step asked for is missing or damaged, or the state is not
      like the template.
  """
  directory = Path(directory).absolute()
  found = _checkpoints(directory)
  if not found:
    return None
  damages = []
  for step in _candidates(found, which, directory, warn):
    try:
      _verify(found[step], step)
      arrays = _read_arrays(found[step] / 'state')
      info = json.loads((found[step] / 'info.json').read_text())
    except _DamagedError as damage:
      if not found[step].exists():  # a run that is training now has just removed it; look again
        return restore(directory, template, which=which, warn=warn)
      damages.append(f'{found[step]} is damaged ({damage})')
      if isinstance(which, str) and len(damages) < len(found):
        warn(f'checkpoint {damages[-1]}; trying the one before it.')
      continue
    return (arrays if template is None else _fill(template, arrays, found[step])), step, info
  if len(damages) < len(found):
    others = ', '.join(str(step) for step in found if step != which)
    raise CheckpointError(f'checkpoint {damages[0]}; ask for another step: {others}.')
  raise CheckpointError(
    f'all checkpoints are damaged, the last because {damages[0]}; put back a copy of {directory}, '
    'or remove it to start again from step 0.'
  )


def steps(directory: str | os.PathLike) -> list[int]:
  """The steps that have a checkpoint, damaged or not, in ascending order."""
  return list(_checkpoints(Path(directory).absolute()))


class _DamagedError(Exception):
  """Says which file of a checkpoint is not as it was written."""


def _checkpoints(directory: Path) -> dict[int, Path]:
  try:
    names = {entry.name for entry in directory.iterdir()}
  except FileNotFoundError:
    return {}
  except OSError as error:
    raise CheckpointError(f'cannot read the checkpoints in {directory}: {error.strerror}; make it readable.') from error
  found = {int(name[5:]): directory / name for name in names if re.fullmatch(r'\.old-\d+', name)}
  found |= {int(name): directory / name for name in names if re.fullmatch(r'\d+', name)}
  return dict(sorted(found.items()))


def _candidates(found: dict[int, Path], which: str | int, directory: Path, warn: Callable[[str], None]) -> list[int]:
  newest_first = sorted(found, reverse=True)
  if which == 'last':
    return newest_first
  if which == 'best':
    scores = {step: score for step, path in found.items() if (score := _score(path)) is not None}
    scored = sorted(scores, key=lambda step: (-scores[step], step))
    if not scored:
      warn(f'no checkpoint in {directory} has a {SCORE}; taking the last as the best.')
    return scored + [step for step in newest_first if step not in scored]
  if which not in found:
    raise CheckpointError(f'{directory} has no checkpoint of step {which}; it has: {", ".join(map(str, found))}.')
  return [which]


def _score(path: Path) -> float | None:
  try:
    score = json.loads((path / 'info.json').read_text()).get(SCORE)
  except (OSError, ValueError, AttributeError):
    return None
  return score if isinstance(score, int | float) and math.isfinite(score) else None


def _verify(path: Path, step: int) -> None:
  try:
    manifest = json.loads((path / 'manifest.json').read_text())
    saved_step, listed = manifest['step'], dict(manifest['files'])
  except OSError as error:
    raise _DamagedError(f'manifest.json: {error.strerror}') from error
  except (ValueError, KeyError, TypeError) as error:
    raise _DamagedError('manifest.json is not readable') from error
  if saved_step != step:
    raise _DamagedError(f'manifest.json is of step {saved_step}')
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
  return sorted(file.relative_to(path).as_posix() for file in path.rglob('*') if not file.is_dir())


def _fingerprint(path: Path) -> dict[str, Any]:
  with path.open('rb') as file:
    return {'sha256': hashlib.file_digest(file, 'sha256').hexdigest(), 'bytes': file.tell()}


def _write_arrays(path: Path, arrays: Any) -> None:
  import orbax.checkpoint as ocp  # 0.6 s, so only where it is needed
  from etils import epath

  # The handler alone: orbax's Checkpointer adds a rename and a metadata file of its own (and 50 ms).
  handler = ocp.PyTreeCheckpointHandler()
  path.mkdir()
  with _quiet():
    try:
      # Wrapped, because orbax refuses a tree that is empty at the top.
      handler.save(epath.Path(path), args=ocp.args.PyTreeSave({'state': arrays}))
      handler.finalize(epath.Path(path))
    except ValueError as error:  # TensorStore's form of a failed write
      code = re.search(r"os_error_code='(\d+)'", str(error))
      if code is None:
        raise
      raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    finally:
      handler.close()


def _read_arrays(path: Path) -> Any:
  import orbax.checkpoint as ocp
  from etils import epath

  handler = ocp.PyTreeCheckpointHandler()
  with _quiet():
    try:
      return handler.restore(epath.Path(path), args=ocp.args.PyTreeRestore())['state']
    except Exception as error:  # the files are as written, so this orbax cannot read what another one wrote
      raise _DamagedError(f'orbax {ocp.__version__} cannot read it: {str(error).splitlines()[0]}') from error
    finally:
      handler.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  # Orbax logs the traceback of every thread that a full disk stops; the exception says it once.
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)


def _fill(template: Any, arrays: Any, path: Path) -> Any:
  expected, saved = _describe(serialization.to_state_dict(template)), _describe(arrays)
  for name in sorted({*expected, *saved}):
    if expected.get(name) != saved.get(name):
      raise CheckpointError(
        f'checkpoint {path} does not fit this model and optimizer: {name or "the state"} is '
        f'{saved.get(name, "missing")} there and {expected.get(name, "missing")} here; use another --workdir.'
      )
  return serialization.from_state_dict(template, arrays)


def _describe(tree: Any) -> dict[str, str]:
  described = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    leaf = leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
    described['/'.join(str(key.key) for key in path)] = f'{leaf.dtype}{list(leaf.shape)}'
  return described


def _clean(directory: Path) -> None:
  # What a killed process left. The writer is alone, so nobody is using these.
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
  scores = {other: score for other in kept if (score := _score(found[other])) is not None}
  best = max(scores, key=lambda other: (scores[other], -other), default=step)
  for other, path in found.items():
    if path.name.startswith('.') or other not in {*kept[-keep:], best}:
      path.rename(directory / f'.tmp-{other}')  # first out of sight: a half-removed one would look damaged
  for path in [*directory.glob('.old-*'), *directory.glob('.tmp-*')]:
    shutil.rmtree(path)


def _sync_tree(path: Path) -> None:
  for file in path.rglob('*'):
    _sync(file)
  _sync(path)


def _sync(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno != errno.EINVAL:  # a file system that cannot sync directories
      raise
  finally:
    os.close(descriptor)
