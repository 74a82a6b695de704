"""A sweep from its first trial to its tables: the search, the comparison from fresh seeds, and the results."""

import argparse
import contextlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from ml_collections import ConfigDict
from optuna.storages import RDBStorage
from optuna.trial import FixedTrial, FrozenTrial

from cnn_jax import Diverged, Stopped, UsageError, command, passwords, workdirs
from cnn_jax import config as config_lib
from cnn_jax.sweep import plots, results
from cnn_jax.sweep.pool import Pool
from cnn_jax.sweep.progress import Progress
from cnn_jax.sweep.space import Space, make_pruner, make_sampler
from cnn_jax.sweep.storage import file_url, open_storage, open_study, storage_errors
from cnn_jax.sweep.trials import Exhausted, Trials
from cnn_jax.sweep.worker import Task

_PROPOSALS = 5  # of a sampler for one trial that repeat an earlier one, before a new configuration is searched for


def sweep(args: argparse.Namespace, config: ConfigDict) -> None:
  """Runs a sweep, or continues one, and writes its tables and plots to the workdir.

  Args:
    args: the options of the command; `args.command` is quoted in results.md.
    config: the config that the trials vary.

  Raises:
    UsageError: the space, the storage or the data are not usable, or every trial is infeasible.
    Diverged: no trial completed.
    Stopped: SIGTERM or Ctrl-C, after all runs were saved.
  """
  warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  for handler in logging.getLogger('optuna').handlers:
    handler.addFilter(_mask)
  space = Space(args.space, _with_validation(config, args.pruner))
  plan = _plan(args, config, space)
  url = args.storage or file_url(Path(args.workdir) / 'study.db')
  with contextlib.ExitStack() as stack:
    if not args.storage:
      stack.enter_context(workdirs.lock(args.workdir))
    stack.enter_context(storage_errors(url))
    storage = open_storage(url, args.heartbeat)
    study = open_study(storage, args.study, plan)
    runs = [f'trial_{i:05}' for i in range(args.trials)]
    trials = Trials(storage, study, runs, alone=not args.storage)
    workers = f'{args.workers} worker{"s" if args.workers > 1 else ""}'
    names = ', '.join(space.distributions)
    print(f'{args.trials} trials of {names}: sampler {args.sampler}, pruner {args.pruner}, {workers}.', flush=True)
    stopping = stack.enter_context(command.stop_signal())
    pool = stack.enter_context(Pool(args.workers, args.heartbeat, args.deadline, stopping))
    final = None
    try:
      _search(args, config, space, trials, pool)
      best = results.best(trials.finished())
      if best and args.seeds:
        seeds_study = open_study(storage, f'{args.study} (seeds)', plan)
        final = _train_again(args, config, space.config_of(FixedTrial(best.params)), best, storage, seeds_study, pool)
    except Stopped:
      results.write(args.workdir, trials, None, args.command)
      raise Stopped(
        f'Stopped after {len(trials.finished())} of {len(trials.runs)} trials; the same command continues from there.'
      ) from None
    results.write(args.workdir, trials, final, args.command)
    if best is None:
      raise _nothing_completed(trials.finished(), args.workdir)
    plots.draw(args.workdir, trials, space.distributions)
    print(results.summary(trials, final))
    print(f'Tables and plots: {args.workdir}/results.md, results.csv and *.png.')


def _mask(line: logging.LogRecord) -> bool:
  line.msg, line.args = passwords.mask(line.getMessage()), ()
  return True


def _search(args: argparse.Namespace, config: ConfigDict, space: Space, trials: Trials, pool: Pool) -> None:
  pruner, show = make_pruner(args.pruner, config.epochs), Progress(trials)
  identities: dict[int, str] = {}  # the configuration of each trial, by its number

  def task_of(name: str, trial_id: int) -> tuple[optuna.Trial, Task]:
    seen: dict[str, str] = {}  # the run of each configuration
    for run, earlier in trials.has_parameters().items():
      if earlier.number not in identities:
        identities[earlier.number] = space.identity(earlier.params)
      if run != name:
        seen.setdefault(identities[earlier.number], run)
    index, repeats = trials.runs.index(name), trials.num_repeats(name)
    sampler = make_sampler(args.sampler, space, args.study_seed, index, repeats)
    if repeats >= _PROPOSALS:
      if (unseen := space.unseen(seen, args.study_seed + index)) is None:
        show.say(f'The space has no further configuration: {len(seen)} trials instead of {args.trials}.')
        raise Exhausted
      sampler = optuna.samplers.PartialFixedSampler(unseen, sampler)
    trial = trials.open(trial_id, sampler, pruner)
    interrupted = bool(trial.params)
    made = space.config_of(trial)
    if not interrupted and (earlier_run := seen.get(space.identity(trial.params))):
      trials.repeat(trial, earlier_run)
    trials.suggested(trial)
    return trial, Task(made.to_dict(), str(Path(args.workdir) / name), False, config.data.to_dict())

  pool.finish(trials, task_of, show)


def _train_again(
  args: argparse.Namespace,
  config: ConfigDict,
  chosen: ConfigDict,
  best: FrozenTrial,
  storage: RDBStorage,
  study: optuna.Study,
  pool: Pool,
) -> Trials:
  """Trains the chosen configuration and the unchanged config from fresh seeds, and evaluates both on the test split.

  The seed of the trials would favour the chosen configuration, which was selected with that seed. The unchanged
  config is trained with that seed as well, for comparison with the trials, and like them without the test split.
  """
  name = best.user_attrs['run']
  configs = {
    f'{label}_seed_{seed}': made.to_dict() | {'seed': seed}
    for label, made in ((name, chosen), ('default', config))
    for seed in range(config.seed + 1, config.seed + 1 + args.seeds)
  }
  baseline = results.BASELINE.format(seed=config.seed)
  configs[baseline] = config.to_dict()
  final = Trials(storage, study, list(configs), alone=not args.storage)
  if len(final.finished()) < len(configs):
    print(
      f'{name} is the best on validation. It and the unchanged config are trained from fresh seeds now.', flush=True
    )

  def task_of(run: str, trial_id: int) -> tuple[optuna.Trial, Task]:
    trial = final.open(trial_id, optuna.samplers.RandomSampler(), optuna.pruners.NopPruner())
    return trial, Task(configs[run], str(Path(args.workdir) / run), evaluate_test=run != baseline)

  pool.finish(final, task_of, Progress(final))
  return final


def _with_validation(config: ConfigDict, pruner: str) -> ConfigDict:
  """The config, with a validation after each epoch if a pruner needs it."""
  return config if pruner == 'none' else config_lib.vary(config, {'evaluation.every_epochs': 1})


def _plan(args: argparse.Namespace, config: ConfigDict, space: Space) -> dict[str, Any]:
  """Everything that must stay the same during a study."""
  plan = {
    f'config.{field}': value
    for field, value in config_lib.leaves(config)
    if not field.startswith(('log.', 'checkpoint.'))
  }
  plan |= {f'--{name}': getattr(args, name) for name in ('sampler', 'pruner', 'study_seed')}
  if args.sampler == 'grid':
    points = space.grid(args.study_seed)
    if args.trials > len(points):
      print(f'The grid has {len(points)} different points, so there are {len(points)} trials.')
      args.trials = len(points)
    plan['the grid'] = points
  return plan | space.plan()


def _nothing_completed(finished: Mapping[str, FrozenTrial], workdir: str) -> Exception:
  states = {results.state(trial) for trial in finished.values()}
  if states <= {'infeasible', 'failed'}:
    first = next(iter(finished.values()))
    what = {'infeasible': 'are infeasible', 'failed': 'have failed'}
    return UsageError(
      f'all {len(finished)} trials {" or ".join(what[state] for state in sorted(states))}; the first one: '
      f'{first.user_attrs[results.state(first)]}'
    )
  return Diverged(f'none of the {len(finished)} trials completed; see {workdir}/results.md.')
