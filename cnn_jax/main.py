"""Trains and evaluates what a config file describes.

    python -m cnn_jax.main --config=configs/mnist.py [--workdir=DIR] [--config.optimizer.learning_rate=0.1]
                           [--config.seeds=8]

Exit status: 0 done, 2 a usage, config or data error, 3 diverged, 143 stopped after saving.
"""

import contextlib
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from cnn_jax import UsageError, command
from cnn_jax import config as config_lib

_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment: a file of configs/, or one of yours.', flag_values=_FLAGS
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run is recorded, and resumed from. Default: runs/<config>-<time>.', flag_values=_FLAGS
)
_PROFILE = flags.DEFINE_boolean(
  'profile', False, 'Write a trace of some steps to the workdir, for TensorBoard or Perfetto.', flag_values=_FLAGS
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'host:port of process 0, where several processes train together.', flag_values=_FLAGS
)
_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes train together.', flag_values=_FLAGS)
_PROCESS = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.', flag_values=_FLAGS)


def train_and_evaluate(
  config: Any,
  workdir: str | os.PathLike,
  *,
  dataset: Any = None,
  evaluate_test: bool = True,
  on_validation: Callable[[int, dict[str, float]], None] | None = None,
  profile: bool = False,
) -> dict[str, Any]:
  """Trains a config, or goes on with what the workdir holds, and evaluates the result on the test split.

  With `config.seeds` > 1 the run of each seed is recorded in a workdir of its own, `workdir`/seed_00000 and so on,
  and is what a command with that seed alone would make.

  Args:
    config: a `ConfigDict` with the fields of `cnn_jax.config`.
    workdir: made where it does not exist; belongs to one process at a time.
    dataset: what `load_dataset(config.data)` gives, where it has been loaded already.
    evaluate_test, on_validation, profile: see `train.train`; of several seeds, for each.

  Returns:
    What `result.json` holds; of several seeds, see `summarize`.

  Raises:
    UsageError: config, data or workdir are not usable.
    train.Diverged, train.Stopped: see there.
  """
  config_lib.check(config)
  # These imports take seconds; a mistyped config has been reported by now.
  import jax

  from cnn_jax import record
  from cnn_jax.data import load_dataset
  from cnn_jax.model import create_model, summary

  config_lib.check_devices(config, jax.device_count())
  primary = jax.process_index() == 0
  with record.lock(workdir) if primary else contextlib.nullcontext():
    record.check_config(workdir, config)
    if (result := record.read_result(workdir)) is not None:
      if primary:
        print(f'The run in {workdir} is complete: {_describe(result)}. Take another --workdir for a new one.')
      return result
    dataset = dataset or load_dataset(config.data)
    height, width, channels = dataset.train.images.shape[1:]
    config_lib.check_data(config, len(dataset.train), height, width)
    if primary:
      record.write_config(workdir, config)
      record.write_environment(workdir)
      print(
        f'{dataset.name}: {len(dataset.train):,} training, {len(dataset.validation):,} validation and '
        f'{len(dataset.test):,} test images, {height}x{width}x{channels}, {len(dataset.class_names)} classes.'
      )
      print(summary(create_model(config.model, len(dataset.class_names)), (height, width, channels)), flush=True)
    options = {'evaluate_test': evaluate_test, 'on_validation': on_validation, 'profile': profile}
    train_all = _train_seeds if config.seeds > 1 else _train_one
    result = train_all(config, dataset, workdir, **options)
    if primary:
      print(f'Done: {_describe(result)}. Recorded in {workdir}.', flush=True)
    return result


def _train_one(config: Any, dataset: Any, workdir: str | os.PathLike, **options: Any) -> dict[str, Any]:
  """Trains one seed and writes down the result; `options` are those of `train.train`."""
  import jax

  from cnn_jax import record, train

  result = train.train(config, dataset, workdir, **options)
  if jax.process_index() == 0:
    record.write_result(workdir, result)
    if config.log.report and options['evaluate_test'] and jax.process_count() == 1:
      from cnn_jax.report import write_report

      write_report(workdir, dataset)
  return result


def _train_seeds(config: Any, dataset: Any, workdir: str | os.PathLike, **options: Any) -> dict[str, Any]:
  """Trains the seeds that have no result yet, one after another, and writes down the result of all.

  One after another because that is the faster way on a CPU: see experiments/many_seeds.
  """
  import jax

  from cnn_jax import record, train

  primary = jax.process_index() == 0
  results = []
  # One watch for all: a signal that comes between two seeds, or in the test of one, stops as well.
  with train.stop_signal() as stopping:
    for i, seed in enumerate(range(config.seed, config.seed + config.seeds)):
      if stopping():
        raise train.Stopped(f'Stopped after {i} of {config.seeds} seeds; the same command goes on from there.')
      one = type(config)(config.to_dict() | {'seed': seed, 'seeds': 1}).lock()
      place = record.seed_workdir(workdir, seed)
      with record.lock(place) if primary else contextlib.nullcontext():
        record.check_config(place, one)
        result = record.read_result(place)
        if result is None:
          if primary:
            record.write_config(place, one)
            record.write_environment(place)
            print(f'Seed {seed}, {i + 1} of {config.seeds}:', flush=True)
          try:
            result = _train_one(one, dataset, place, stopping=stopping, **options)
          except train.Diverged as error:
            raise train.Diverged(f'with seed {seed} {error}') from error
        if primary:
          print(f'Seed {seed}: {_describe(result)}.', flush=True)
        results.append(result)
  result = summarize(results)
  if primary:
    record.write_result(workdir, result)
  return result


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The result of several runs that differ in nothing but the seed.

  Args:
    results: of each, as `train.train` returns them.

  Returns:
    `n`, `seeds`, what all have in common (the data set, numbers of images, parameters, epochs and steps), and for
    each measure, such as `test_accuracy`, an object of `mean`, `std` (of the sample: n - 1), `n` and `values`, in
    the order of `seeds`. Mean and std are None where a value is, or is not finite.
  """
  shared = ('dataset', 'provenance', 'num_train', 'num_validation', 'num_test', 'num_parameters', 'epochs', 'steps')
  summary: dict[str, Any] = {name: results[0][name] for name in shared}
  summary |= {'n': len(results), 'seeds': [result['seed'] for result in results]}
  for name in results[0].keys() - {*shared, 'seed'}:
    values = [result[name] for result in results]
    known = all(value is not None and math.isfinite(value) for value in values)
    summary[name] = {
      'mean': statistics.mean(values) if known else None,
      'std': statistics.stdev(values) if known else None,
      'n': len(values),
      'values': values,
    }
  return summary


def _describe(result: Mapping[str, Any]) -> str:
  split = 'test' if 'test_accuracy' in result else 'validation'  # a trial of a sweep does not look at the test
  accuracy, seconds = result[f'{split}_accuracy'], result['train_seconds']
  images = f'of {result[f"num_{split}"]:,} {split} images right after {result["epochs"]} epochs'
  if 'seeds' in result:
    return f'{accuracy["mean"]:.2%} ± {accuracy["std"]:.2%} {images}, mean ± std of {result["n"]} seeds'
  return f'{accuracy:.2%} {images}, {seconds:.0f} s of training'


def main(argv: Sequence[str]) -> int:
  """The command; see the module's docstring."""
  config, workdir = parse(argv)
  config_lib.check(config)
  command.prepare_backend()
  _join_processes()
  from cnn_jax import train

  try:
    train_and_evaluate(config, workdir, profile=_PROFILE.value)
  except train.Diverged as error:
    command.fail(error)
    return command.DIVERGED
  except train.Stopped as stopped:
    print(stopped, file=sys.stderr)
    return command.STOPPED
  return command.DONE


def parse(argv: Sequence[str]) -> tuple[Any, str]:
  """Reads the flags of a config, with its overrides, and of a workdir.

  Returns:
    The config, whose values `config.check` has not seen yet, and the workdir.

  Raises:
    UsageError: something is wrong with them, or in the file they name.
  """
  if any(argument in ('--help', '-h', '--helpfull') for argument in argv):
    print(__doc__)
    print(_FLAGS.main_module_help() or _FLAGS.get_help())
    sys.exit(command.DONE)
  name = next((a.split('=', 1)[1] for a in argv if a.startswith('--config=')), None)
  if name is None:
    raise UsageError('which experiment? give --config=configs/mnist.py or another file of configs/.')
  if not pathlib.Path(name.split(':')[0]).is_file():
    raise UsageError(f'there is no config file {name}; those that come with the project are in configs/.')
  try:
    rest = _FLAGS(['cnn_jax.main', *argv])[1:]
    config = _CONFIG.value
    config.keys()  # a config that could not be loaded says so when it is touched
  except flags.Error as error:
    raise UsageError(f'{error}') from error
  except (AttributeError, KeyError, TypeError, ValueError, SyntaxError, ImportError, OSError) as error:
    # What a config file or an override raises; the message of ml_collections names the field
    # and its nearest neighbour.
    cause = error.__cause__ or error
    raise UsageError(f'{name}: {type(cause).__name__}: {cause}') from error
  if rest:
    raise UsageError(f'{rest[0]!r} is not a flag; a field is set by --config.NAME=VALUE.')
  stem = pathlib.Path(name.split(':')[0]).stem
  return config, _WORKDIR.value or f'runs/{stem}-{time.strftime("%Y%m%d-%H%M%S")}'


def _join_processes() -> None:
  """Joins the other processes of a run over several hosts; one process alone must not."""
  environment = os.environ
  several = (
    int(environment.get('SLURM_NTASKS', 1)) > 1
    or int(environment.get('OMPI_COMM_WORLD_SIZE', 1)) > 1
    or ',' in environment.get('TPU_WORKER_HOSTNAMES', '')
  )
  if _COORDINATOR.value is None and not several:
    return
  import jax

  jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)


if __name__ == '__main__':
  command.run(main)
