"""Several seeds of one config: each an ordinary run, and the mean and standard deviation of all."""

import contextlib
import functools
import hashlib
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import cnn_jax
from cnn_jax import (
  Diverged,
  Stopped,
  UsageError,
  checkpoint,
  command,
  distribute,
  files,
  peers,
  record,
  train,
  workdirs,
)
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, identity
from cnn_jax.tables import format_mean_std


def train_one(config: Any, dataset: Dataset, workdir: str | os.PathLike, **options: Any) -> dict[str, Any]:
  """Trains one seed, and writes the result and the report.

  Args:
    config, dataset, workdir, options: see `train.train`.
  """
  tested: dict[str, np.ndarray] = {}
  options = {'on_start': functools.partial(write_start, config, workdir)} | options
  result = train.train(config, dataset, workdir, on_test=lambda logits: tested.update(test=logits), **options)
  if config.adapt_to_data:
    adapted, _ = config_lib.adapt(config, len(dataset.train))
    result |= {'batch_size': adapted.batch_size, 'learning_rate': adapted.optimizer.learning_rate}
  if distribute.is_primary():
    with peers.deadline('Writing the result'):
      record.write_result(workdir, result)
  finish(config, workdir, lambda: dataset, tested)
  return result


def finish(
  config: Any,
  workdir: str | os.PathLike,
  load: Callable[[], Dataset],
  logits: Mapping[str, np.ndarray] | None = None,
) -> None:
  """Does what is left to do for a run, or runs of several seeds, that have a result: also after an interruption.

  Writes the report of each that wants one and has none. If that fails, one line says so, and the result stays.

  Args:
    config: of the run.
    workdir: locked by this process.
    load: returns the data set.
    logits: see `report.write_report`.
  """
  if not distribute.is_primary():
    return
  if config.seeds > 1:
    for seed in range(config.seed, config.seed + config.seeds):
      finish(_one(config, seed), workdirs.seed_workdir(workdir, seed), load)
    return
  with contextlib.suppress(OSError):
    checkpoint.clean(Path(workdir) / 'checkpoints')
  result = record.read_result(workdir) or {}
  if isinstance(best := result.get('best_step'), int):  # the state that the result is about; see `saving.restore_best`
    checkpoint.remove_later(Path(workdir) / 'checkpoints', best)
  if 'test_accuracy' not in result or jax.process_count() > 1:
    return
  if config.log.report and not (Path(workdir) / 'report.html').exists():
    from cnn_jax.report import write_report  # matplotlib and jinja2, which training does not need

    try:
      write_report(workdir, load(), logits=logits)
    except Exception as error:
      reason = ' '.join(str(error).split()) or type(error).__name__
      print(f'warning: no report was written, the same command tries again: {reason}', file=sys.stderr)


def train_seeds(config: Any, dataset: Dataset, workdir: str | os.PathLike, **options: Any) -> dict[str, Any]:
  """Trains the seeds that have no result yet, one after another, and writes the result of all.

  In sequence, because that is faster on a CPU: see benchmarks/many_seeds. Each seed has a workdir of its own, which
  holds what a command with that seed alone would write.

  Args:
    config, dataset, workdir, options: see `train.train`.

  Returns:
    See `summarize`.
  """
  primary = distribute.is_primary()
  results = []
  write_all = functools.cache(lambda: write_start(config, workdir))
  # One handler for all: a signal between two seeds, or during the test of one, stops as well.
  with command.stop_signal() as stopping:
    for i, seed in enumerate(range(config.seed, config.seed + config.seeds)):
      stop = distribute.largest(np.array([float(stopping())]))
      if stop[0]:
        raise Stopped(f'Stopped after {i} of {config.seeds} seeds; the same command continues from there.')
      one = _one(config, seed)
      place = workdirs.seed_workdir(workdir, seed)
      with workdirs.lock(place) if primary else contextlib.nullcontext():
        result = peers.first(functools.partial(begin, one, place))
        if result is None:
          distribute.say(f'Seed {seed}, {i + 1} of {config.seeds}:')

          def on_start(one: Any = one, place: Path = place) -> None:
            write_all()
            write_start(one, place)

          try:
            result = train_one(one, dataset, place, stopping=stopping, on_start=on_start, **options)
          except Diverged as error:
            raise Diverged(f'with seed {seed} {error}') from error
        distribute.say(f'Seed {seed}: {describe(result)}.')
        results.append(result)
  result = summarize(results)
  if primary:
    write_all()
    record.write_result(workdir, result)
  return result


def begin(config: Any, workdir: str | os.PathLike) -> dict[str, Any] | None:
  """Checks that a run can begin or continue in a workdir; returns its result if it is complete.

  A run with a constant schedule that has a result for fewer epochs is not complete: it continues, unless it stopped
  early.

  Args:
    config: of the run.
    workdir: of the run; may not exist yet.

  Raises:
    UsageError: see `record.check_config`; or result.json is not a result.
  """
  record.check_config(workdir, config)
  result = record.read_result(workdir)
  if result is None:
    return None
  try:
    describe(result)
    epochs = config_lib.num_epochs(config, result['num_train'])
    lengths = zip(_each(result, 'epochs'), _each(result, 'stopped_early'), strict=True)
    return result if all(done >= epochs or early for done, early in lengths) else None
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # anybody may have written it
    raise UsageError(
      f'{Path(workdir) / "result.json"} is not the result of a run; remove it, and the same command writes it again.'
    ) from error


def check_data(config: Any, workdir: str | os.PathLike, load: Callable[[], Dataset]) -> None:
  """Checks the data of a start that has nothing left to train, if they are at another place than those of the run.

  Args:
    config: of the start.
    workdir: of a complete run, or of the runs of several seeds.
    load: returns the data set.

  Raises:
    UsageError: the data are others; the first classes or files that differ are named.
  """
  if not record.moved_data(workdir, config):
    return
  one = workdirs.seed_workdir(workdir, config.seed) if config.seeds > 1 else Path(workdir)
  recorded = files.read_json(one / 'data.json') or {}
  if isinstance(identified := recorded.get('identity'), Mapping):
    identity.check({'data': identified}, load(), one)


def write_start(config: Any, workdir: str | os.PathLike) -> None:
  """Records the config and the machine of a start, and prints a line if the run was started on another machine."""
  earlier = files.read_json(Path(workdir) / 'environment.json')
  record.write_config(workdir, config)
  record.write_environment(workdir)
  now = files.read_json(Path(workdir) / 'environment.json')
  continued = any((Path(workdir) / 'checkpoints').glob('[0-9]*'))
  if continued and earlier and now and (changes := _changes(earlier, now)):
    distribute.say(f'This run was started with {changes}: its numbers will differ slightly from one without a pause.')


def facts(config: Any, dataset: Dataset) -> dict[str, Any]:
  """What all processes of a run must have in common: the config but for the record, and the data.

  Args:
    config: of the run.
    dataset: that this process has found.
  """
  found = {f'config.{name}': value for name, value in record.shared_fields(config).items()}
  found |= {'the version of cnn_jax': cnn_jax.__version__, 'the version of JAX': jax.__version__}
  identified = identity.identify(dataset)
  for name, classes in identified['splits'].items():
    digest = hashlib.sha256(repr(classes).encode()).hexdigest()[:12]
    found[f'the {name} split'] = f'{len(getattr(dataset, name))} images, identity {digest}'
  return found | {'the image shape': identified['image_shape'], 'the list of classes': identified['class_names']}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """The facts of environment.json that decide how sums are rounded, if they differ."""
  found = []
  for name in ('jax', 'jaxlib', 'backend', 'device_kind', 'cpu', 'cpu_cores', 'num_devices', 'num_processes'):
    old, new = (facts.get(name, (facts.get('versions') or {}).get(name)) for facts in (before, now))
    if None not in (old, new) and old != new:
      found.append(f'{name} {old} and continues with {new}')
  return ', '.join(found)


def _one(config: Any, seed: int) -> Any:
  return type(config)(config.to_dict() | {'seed': seed, 'seeds': 1}).lock()


def _each(result: Mapping[str, Any], name: str) -> list[Any]:
  """The value of each seed in a result of one or several; None if the result does not have it."""
  value = result.get(name)
  return value['values'] if isinstance(value, Mapping) else [value] * result.get('n', 1)


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The result of several runs that differ in nothing but the seed.

  Args:
    results: of each, as `train.train` returns them.

  Returns:
    `n`, `seeds`, what all have in common (the data set, numbers of images, parameters, epochs and steps), and for
    each measure, such as `test_accuracy`, an object of `mean`, `std` (of the sample: n - 1), `n` and `values`, in
    the order of `seeds`. Mean and std are None if a value is None or not finite. Epochs and steps are such measures
    if they differ. `test_per_class` has the mean and the standard deviation of each measure of a class.
  """
  shared = ['dataset', 'provenance', 'data_sha256', 'num_train', 'num_validation', 'num_test', 'num_parameters']
  shared += ['epochs', 'steps', *({'batch_size', 'learning_rate'} & results[0].keys())]  # the last of an adapted config
  summary: dict[str, Any] = {name: results[0].get(name) for name in shared}
  summary |= {'n': len(results), 'seeds': [result['seed'] for result in results]}
  differing = {name for name in ('epochs', 'steps') if len({result[name] for result in results}) > 1}
  measured = results[0].keys() - {*shared, 'seed', 'test_per_class'}
  for name in differing | measured.intersection(*results):  # a seed that an earlier version trained has fewer
    values = [result[name] for result in results]
    summary[name] = _spread(values) | {'n': len(values), 'values': values}
  if all('test_per_class' in result for result in results):
    summary['test_per_class'] = {
      label: {'n': measures['n']}
      | {name: _spread([r['test_per_class'][label][name] for r in results]) for name in measures.keys() - {'n'}}
      for label, measures in results[0]['test_per_class'].items()
    }
  return summary


def _spread(values: Sequence[Any]) -> dict[str, float | None]:
  """Mean and standard deviation of the sample; None if a value is None or not finite."""
  known = all(value is not None and math.isfinite(value) for value in values)
  numbers = [float(value) for value in values] if known else []
  return {'mean': statistics.mean(numbers) if known else None, 'std': statistics.stdev(numbers) if known else None}


def describe(result: Mapping[str, Any]) -> str:
  """One line about the result of a run, or of several seeds."""
  split = 'test' if 'test_accuracy' in result else 'validation'  # a trial of a sweep does not evaluate the test split
  accuracy, seconds = result[f'{split}_accuracy'], result['train_seconds']
  epochs = _each(result, 'epochs')
  span = f'{min(epochs)} to {max(epochs)}' if min(epochs) < max(epochs) else epochs[0]
  images = f'of {result[f"num_{split}"]:,} {split} images correct after {span} epochs'
  if 'seeds' in result:
    spread = format_mean_std(accuracy['mean'], accuracy['std'])
    return f'{spread} {images}, mean ± std of {result["n"]} seeds'
  early = ', stopped early' if result.get('stopped_early') else ''
  return f'{accuracy:.2%} {images}{early}, {seconds:.0f} s of training'
