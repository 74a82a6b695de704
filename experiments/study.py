"""The command line and the training runs of an experiment: several seeds, subsets, candidates compared on validation.

Every training run has a workdir of its own, and the same command continues an experiment that was interrupted: complete
runs return the result that they recorded.
"""

import argparse
import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import check_counts
from cnn_jax import UsageError, command, record, workdirs
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, Split
from cnn_jax.main import train_and_evaluate
from cnn_jax.tables import markdown
from experiments import results

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'


def parser(doc: str | None, name: str, seeds: int) -> command.Parser:
  """Makes a parser with the arguments of every experiment.

  Args:
    doc: the text of `--help`.
    name: of the experiment; its runs are recorded in runs/NAME.
    seeds: the default of `--seeds`.
  """
  made = command.Parser(doc or '')
  made.prog = f'python -m experiments.{name}.run'
  made.add_argument('--seeds', type=int, default=seeds, help='runs per variant, with seeds 0, 1, ... (%(default)s)')
  made.add_argument('--workdir', type=Path, default=Path('runs') / name, help='of all runs (%(default)s)')
  made.add_argument('--output', type=Path, help='write results.json, figure.png and the tables of README.md there')
  return made


def parse(made: command.Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Parses arguments.

  Args:
    made: from `parser`.
    argv: the arguments after the program's name.

  Returns:
    The arguments, with the whole `command` for the record, and those left over, which are overrides of the config.

  Raises:
    UsageError: an argument is wrong, or there are no seeds, or no epochs to select after.
  """
  args, overrides = made.parse_known_args(argv)
  check_counts(args, 'seeds', *(['select'] if hasattr(args, 'select') else []))
  args.command = f'{made.prog} {shlex.join(argv)}'
  return args, overrides


def found(args: argparse.Namespace, dataset: Dataset, **measured: Any) -> dict[str, Any]:
  """The contents of results.json: what was measured, and where, with which data, command, versions and commit.

  Args:
    args: from `parse`; all runs below `args.workdir` count.
    dataset: that the config loads.
    measured: fields of the experiment.
  """
  evidence = results.provenance(args.workdir)
  return {'command': args.command, 'dataset': dataset.name, 'seeds': list(range(args.seeds)), **evidence, **measured}


def train(
  config: Any, workdir: str | os.PathLike, seed: int, dataset: Dataset, *, evaluate_test: bool = True
) -> dict[str, Any]:
  """Trains one seed, without a report and TensorBoard events, and returns the contents of its result.json.

  Args:
    config: its `seed` is replaced.
    workdir: of all seeds; `workdirs.seed_workdir` gives the place of this one.
    seed: of the run.
    dataset: to train on.
    evaluate_test: whether to evaluate the test split. Pass False when comparing runs, so that selection never sees it.
  """
  config = config_lib.vary(config, {'seed': seed, 'log.report': False, 'log.tensorboard': False})
  return train_and_evaluate(config, workdirs.seed_workdir(workdir, seed), dataset=dataset, evaluate_test=evaluate_test)


def train_seeds(
  config: Any, workdir: str | os.PathLike, seeds: int, dataset: Dataset, *, evaluate_test: bool = True
) -> list[dict[str, Any]]:
  """Trains the seeds 0, 1, ... and returns the result of each; see `train`."""
  return [train(config, workdir, seed, dataset, evaluate_test=evaluate_test) for seed in range(seeds)]


def cached(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """Returns the contents of a JSON file; if it does not exist, calls `measure` and stores the result there first."""
  if not path.exists():
    record.write_json(path, measure())
  return json.loads(path.read_text())


def subset(dataset: Dataset, size: int, seed: int) -> Dataset:
  """Reduces the training split of a data set, with classes balanced as far as possible.

  Subsets of the same seed are nested: the first 100 images of a subset of 300 are the subset of 100.

  Args:
    dataset: its validation and test splits stay as they are.
    size: training images.
    seed: of the choice.

  Raises:
    UsageError: the training split is smaller than `size`.
  """
  labels = dataset.train.labels
  if size > len(labels):
    raise UsageError(f'{dataset.name} has {len(labels)} training images, fewer than {size}; choose a smaller subset.')
  order = np.random.default_rng(seed).permutation(len(labels))
  rank = np.empty(len(labels), np.int64)  # of each image among the images of its class, in that order
  for label in range(len(dataset.class_names)):
    members = order[labels[order] == label]
    rank[members] = np.arange(len(members))
  chosen = order[np.argsort(rank[order], kind='stable')][:size]
  images = np.asarray(dataset.train.images[chosen])
  # The name is recorded with the run, so that a run is never resumed with other images.
  return dataclasses.replace(
    dataset,
    name=f'{dataset.name}, {size:,} training images chosen with seed {seed}',
    train=Split(images, labels[chosen]),
  )


# Selection on validation ------------------------------------------------------------------------


def add_select(made: command.Parser) -> None:
  """Adds `--select=EPOCHS`, which compares the candidates of an experiment instead of training its config."""
  made.add_argument('--select', type=int, metavar='EPOCHS', help='compare the candidates on validation instead')


def select(
  config: Any, candidates: Mapping[str, Mapping[str, Any]], args: argparse.Namespace, dataset: Dataset
) -> dict[str, Any]:
  """Trains candidates for `args.select` epochs and compares them on validation; the test split is never evaluated.

  The warm-up of the config is shortened in proportion, unless a candidate has one of its own.

  Args:
    config: with a validation split.
    candidates: name -> the fields that differ from the config.
    args: from `parse`.
    dataset: see `train`.

  Returns:
    The field `selection` of results.json.

  Raises:
    UsageError: there is no validation split.
  """
  check_validation(dataset)
  warmup = config.schedule.warmup_epochs * args.select / config.epochs
  workdir = args.workdir / f'select_{args.select}_epochs'
  measured = []
  for name, fields in candidates.items():
    made = config_lib.vary(config, {'epochs': args.select, 'schedule.warmup_epochs': warmup, **fields})
    runs = train_seeds(made, workdir / name.replace(' ', '_'), args.seeds, dataset, evaluate_test=False)
    one = {'candidate': name, 'parameters': runs[0]['num_parameters']}
    for field in ('images_per_second', 'validation_accuracy', 'validation_loss'):
      one[field] = results.summary([run[field] for run in runs])
    measured.append(one)
  return {
    'command': args.command,
    'epochs': args.select,
    'seeds': list(range(args.seeds)),
    'num_validation': len(dataset.validation),
    'candidates': measured,
    **results.provenance(workdir),
  }


def check_validation(dataset: Dataset) -> None:
  """Checks that there are images to validate on, which some experiments need after the training.

  Raises:
    UsageError: there are none.
  """
  if not len(dataset.validation):
    raise UsageError(f'{dataset.name} has no validation images; set config.data.validation above 0.')


def selection_table(selection: Mapping[str, Any]) -> str:
  """The table of what `select` returns; the best candidate on validation is bold, of equals the one with less loss."""

  def quality(one: Mapping[str, Any]) -> tuple[float, float]:
    return one['validation_accuracy']['mean'], -one['validation_loss']['mean']

  best = max(selection['candidates'], key=quality)
  rows = [
    [
      f'**{one["candidate"]}**' if one is best else one['candidate'],
      f'{one["parameters"]:,}',
      '-' if one['images_per_second']['mean'] is None else f'{one["images_per_second"]["mean"]:,.0f}',
      results.show(one['validation_accuracy']),
      f'{one["validation_loss"]["mean"]:.4f}',
      str(one['validation_accuracy']['n']),
    ]
    for one in selection['candidates']
  ]
  header = ['candidate', 'parameters', 'images/s', 'validation accuracy', 'validation loss', 'n']
  what = f'{selection["num_validation"]:,} validation images, {selection["epochs"]} epochs'
  return f'{results.source(selection)} {what}:\n\n{markdown(header, rows)}'
