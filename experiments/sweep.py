"""Searches hyperparameters: many ordinary runs of one config, compared on validation.

    python -m experiments.sweep --config=configs/digits.py --space=experiments/spaces/learning_rate.py --trials=30
      [--config.FIELD=VALUE] [--workers=N] [--sampler=tpe] [--pruner=median] [--seeds=3] [--study_seed=0]
      [--workdir=DIR] [--storage=URL] [--study=NAME] [--heartbeat=10]

Each trial is a run in WORKDIR/trial_00012/, which any command can read. None looks at the test split: that is
evaluated for the best one alone, which is trained again, as is the config as it was, from --seeds seeds that no
trial had. The same command goes on with a sweep that was stopped or killed, and with more --trials.

Sampler and seed: each trial has a sampler of its own, seeded from the study's seed and the trial's number.
`random`, `grid` and `qmc` depend on nothing else, so without a pruner the same --study_seed gives the same
table. `tpe` and `cmaes` suggest from the trials that are complete at that moment; with several workers
that depends on which ends first. So does what a pruner compares a trial with.

Several machines: the same command on each, with the same --storage (PostgreSQL) and --study.

Exit status: 0 done, 2 a usage, config, data or storage error, 3 no trial could be completed, 143 stopped after saving.
"""

import argparse
import contextlib
import importlib.util
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial

from cnn_jax import UsageError, command, main, record
from cnn_jax import config as config_lib
from experiments.sweeps import results
from experiments.sweeps.pool import Pool, StoppedError
from experiments.sweeps.progress import Progress
from experiments.sweeps.space import Space, make_pruner, make_sampler
from experiments.sweeps.trials import Trials, open_storage, open_study, storage_errors
from experiments.sweeps.worker import Task


def run(argv: Sequence[str]) -> int:
  """The command; see the module's docstring."""
  args, config = _parse(argv)
  warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  space = Space(args.space, _validating(config, args.pruner))
  plan = _plan(args, config, space)
  url = args.storage or f'sqlite:///{Path(args.workdir).resolve()}/study.db'
  with contextlib.ExitStack() as stack:
    if not args.storage:
      stack.enter_context(record.lock(args.workdir))
    stack.enter_context(storage_errors(url))
    storage = open_storage(url, args.heartbeat)
    study = open_study(storage, args.study, plan)
    runs = [f'trial_{i:05}' for i in range(args.trials)]
    trials = Trials(storage, study, runs, alone=not args.storage)
    workers = f'{args.workers} worker{"s" if args.workers > 1 else ""}'
    print(
      f'{args.trials} trials of {", ".join(space.distributions)}: sampler {args.sampler}, pruner {args.pruner}, {workers}.',
      flush=True,
    )
    stopping = stack.enter_context(_stop_signal())
    pool = stack.enter_context(Pool(args.workers, args.heartbeat, stopping))
    final = None
    try:
      _search(args, config, space, trials, pool)
      best = results.best(trials.finished())
      if best and args.seeds:
        seeds_study = open_study(storage, f'{args.study} (seeds)', plan)
        final = _train_again(args, config, space.config_of(FixedTrial(best.params)), best, storage, seeds_study, pool)
    except StoppedError:
      results.write(args.workdir, trials, None, args.command)
      print(
        f'Stopped after {len(trials.finished())} of {args.trials} trials; the same command goes on from there.',
        file=sys.stderr,
      )
      return command.STOPPED
    results.write(args.workdir, trials, final, args.command)
    if best is None:
      command.fail(f'none of the {args.trials} trials could be completed; see {args.workdir}/results.md.')
      return command.DIVERGED
    results.plot(args.workdir, trials, space.distributions)
    print(results.summary(trials, final))
    print(f'Tables and plots: {args.workdir}/results.md, results.csv and *.png.')
  return command.DONE


def _search(args: argparse.Namespace, config: Any, space: Space, trials: Trials, pool: Pool) -> None:
  pruner = make_pruner(args.pruner, config.epochs)

  def task_of(name: str, trial_id: int) -> tuple[optuna.Trial, Task]:
    sampler = make_sampler(args.sampler, space, args.study_seed, trials.runs.index(name))
    trial = trials.open(trial_id, sampler, pruner)
    made = space.config_of(trial)
    trials.suggested(trial)
    return trial, Task(made.to_dict(), str(Path(args.workdir) / name), evaluate_test=False)

  pool.finish(trials, task_of, Progress(trials))


def _train_again(
  args: argparse.Namespace, config: Any, chosen: Any, best: FrozenTrial, storage: Any, study: optuna.Study, pool: Pool
) -> Trials:
  """Trains the chosen configuration and the config as it was from fresh seeds, and looks at the test split.

  The seed of the trials would flatter the chosen one, which was chosen for its luck too. The config as it was is
  trained from that seed as well, to stand beside the trials; like them it does not look at the test split.
  """
  name = best.user_attrs['run']
  configs = {
    f'{label}_seed_{seed}': made.to_dict() | {'seed': seed}
    for label, made in ((name, chosen), ('default', config))
    for seed in range(config.seed + 1, config.seed + 1 + args.seeds)
  }
  beside = results.BASELINE.format(seed=config.seed)
  configs[beside] = config.to_dict()
  final = Trials(storage, study, list(configs), alone=not args.storage)
  if len(final.finished()) < len(configs):
    print(
      f'{name} is the best on validation; now it and the config as it was from seeds that no trial had.', flush=True
    )

  def task_of(run: str, trial_id: int) -> tuple[optuna.Trial, Task]:
    trial = final.open(trial_id, optuna.samplers.RandomSampler(), optuna.pruners.NopPruner())
    return trial, Task(configs[run], str(Path(args.workdir) / run), evaluate_test=run != beside)

  pool.finish(final, task_of, Progress(final))
  return final


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Any]:
  parser = command.Parser('Searches hyperparameters of a config; see the top of experiments/sweep.py.')
  parser.add_argument('--space', required=True, help='a file of experiments/spaces/, or one of yours')
  parser.add_argument('--trials', type=int, required=True, help='how many there are to be, earlier ones included')
  parser.add_argument('--workers', type=int, default=1, help='processes here, each with its share of cores or GPUs')
  parser.add_argument('--sampler', default='tpe', choices=['tpe', 'random', 'grid', 'qmc', 'cmaes'])
  parser.add_argument('--pruner', default='median', choices=['median', 'hyperband', 'none'])
  parser.add_argument('--seeds', type=int, default=3, help='of the comparison at the end; 0: none, and no test')
  parser.add_argument('--study_seed', type=int, default=0, help='of the samplers')
  parser.add_argument('--workdir', help='default: runs/sweep-CONFIG-SPACE')
  parser.add_argument('--storage', help='URL of a database for several machines; default: a file in the workdir')
  parser.add_argument('--study', help='its name in the storage; default: CONFIG-SPACE')
  parser.add_argument(
    '--heartbeat', type=int, default=10, help='seconds between signs of life; after three without, others take over'
  )
  args, rest = parser.parse_known_args(argv)
  for name, least in (('trials', 1), ('workers', 1), ('seeds', 0), ('study_seed', 0), ('heartbeat', 1)):
    if getattr(args, name) < least:
      raise UsageError(f'--{name} is {getattr(args, name)}; it must be at least {least}.')
  if args.sampler == 'cmaes' and importlib.util.find_spec('cmaes') is None:
    raise UsageError("--sampler=cmaes needs the package cmaes; pip install '.[sweep]', or take another sampler.")
  config, _ = main.parse(rest)
  config_lib.check(config)
  if config.seeds > 1:
    raise UsageError(f'config.seeds is {config.seeds}, but a trial has one seed; leave it out and see --seeds.')
  file = next(a.split('=', 1)[1] for a in rest if a.startswith('--config='))
  stem = f'{Path(file.split(":")[0]).stem}-{Path(args.space).stem}'
  args.workdir = args.workdir or f'runs/sweep-{stem}'
  args.study = args.study or stem
  args.command = shlex.join(['python', '-m', 'experiments.sweep', *argv])
  return args, config


def _validating(config: Any, pruner: str) -> Any:
  """The config with a validation after each epoch where a pruner looks at them."""
  config = type(config)(config.to_dict()).lock()
  if pruner != 'none':
    config.evaluation.every_epochs = 1
  return config


def _plan(args: argparse.Namespace, config: Any, space: Space) -> dict[str, Any]:
  """What must not change while a study lasts."""
  plan = {
    f'config.{field}': value
    for field, value in _leaves(config.to_dict())
    if not field.startswith(('log.', 'checkpoint.'))
  }
  plan |= {f'--{name}': getattr(args, name) for name in ('sampler', 'pruner', 'study_seed')}
  if args.sampler == 'grid':
    points = space.grid(args.study_seed)
    if args.trials > len(points):
      print(f'The grid has {len(points)} points, which are all the trials there will be.')
      args.trials = len(points)
    plan['the grid'] = points
  return plan | space.plan()


def _leaves(values: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _leaves(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
  """Turns the first SIGTERM or Ctrl-C into a flag; a second one acts as it always did."""
  received: list[int] = []
  before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

  def handler(number, frame):
    del frame
    received.append(number)
    for s, earlier in before.items():
      signal.signal(s, earlier)

  for s in before:
    signal.signal(s, handler)
  try:
    yield lambda: bool(received)
  finally:
    for s, earlier in before.items():
      signal.signal(s, earlier)


if __name__ == '__main__':
  command.run(run)
