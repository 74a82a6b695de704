"""Several seeds of one config: each an ordinary run, and the mean and standard deviation of all."""

import contextlib
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from cnn_jax import Diverged, Stopped, command, distribute, record, train
from cnn_jax.data import Dataset
from cnn_jax.tables import format_mean_std


def train_one(config: Any, dataset: Dataset, workdir: str | os.PathLike, **options: Any) -> dict[str, Any]:
  """Trains one seed, and writes the result and the report.

  Args:
    config, dataset, workdir, options: see `train.train`.
  """
  result = train.train(config, dataset, workdir, **options)
  if distribute.is_primary():
    record.write_result(workdir, result)
    if config.log.report and options['evaluate_test'] and jax.process_count() == 1:
      from cnn_jax.report import write_report  # matplotlib and jinja2, which training does not need

      write_report(workdir, dataset)
  return result


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
  # One handler for all: a signal between two seeds, or during the test of one, stops as well.
  with command.stop_signal() as stopping:
    for i, seed in enumerate(range(config.seed, config.seed + config.seeds)):
      if stopping():
        raise Stopped(f'Stopped after {i} of {config.seeds} seeds; the same command continues from there.')
      one = type(config)(config.to_dict() | {'seed': seed, 'seeds': 1}).lock()
      place = record.seed_workdir(workdir, seed)
      with record.lock(place) if primary else contextlib.nullcontext():
        record.check_config(place, one)
        result = record.read_result(place)
        if result is None:
          if primary:
            record.write_config(place, one)
            record.write_environment(place)
          distribute.say(f'Seed {seed}, {i + 1} of {config.seeds}:')
          try:
            result = train_one(one, dataset, place, stopping=stopping, **options)
          except Diverged as error:
            raise Diverged(f'with seed {seed} {error}') from error
        distribute.say(f'Seed {seed}: {describe(result)}.')
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
    the order of `seeds`. Mean and std are None if a value is None or not finite.
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


def describe(result: Mapping[str, Any]) -> str:
  """One line about the result of a run, or of several seeds."""
  split = 'test' if 'test_accuracy' in result else 'validation'  # a trial of a sweep does not evaluate the test split
  accuracy, seconds = result[f'{split}_accuracy'], result['train_seconds']
  images = f'of {result[f"num_{split}"]:,} {split} images correct after {result["epochs"]} epochs'
  if 'seeds' in result:
    spread = format_mean_std(accuracy['mean'], accuracy['std'])
    return f'{spread} {images}, mean ± std of {result["n"]} seeds'
  return f'{accuracy:.2%} {images}, {seconds:.0f} s of training'
