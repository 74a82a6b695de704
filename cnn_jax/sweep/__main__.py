"""Searches hyperparameters: many ordinary runs of one config, compared on validation.

    python -m cnn_jax.sweep --config=configs/digits.py --space=experiments/spaces/learning_rate.py --trials=30
      [--config.FIELD=VALUE] [--workers=N] [--sampler=tpe] [--pruner=median] [--seeds=3] [--study_seed=0]
      [--workdir=DIR] [--storage=URL] [--study=NAME] [--heartbeat=10] [--deadline=300]

Each trial is a run in WORKDIR/trial_00012, which every command can read. No trial evaluates the test split. At the end
the best trial and the unchanged config are trained again from --seeds seeds that no trial used, and these runs are
evaluated on the test split. The same command continues a sweep that was stopped or killed, and extends it if --trials
is larger. To search with several machines, start the command on each with the same --storage and --study.
docs/sweeps.md describes space files, samplers, pruners and storages.

Exit status: 0 done, 2 a usage, config, data or storage error, 3 no trial completed, 143 stopped after saving.
"""

import argparse
import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax import UsageError, command, passwords, shares
from cnn_jax import config as config_lib


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  try:
    args, config = _parse(argv)
    if importlib.util.find_spec('optuna') is None:
      raise UsageError("python -m cnn_jax.sweep needs the package optuna; pip install '.[sweep]'.")
    if args.sampler == 'cmaes' and importlib.util.find_spec('cmaes') is None:
      raise UsageError("--sampler=cmaes needs the package cmaes; pip install '.[sweep]', or choose another sampler.")
    from cnn_jax.sweep import search

    search.sweep(args, config)
  except UsageError as error:  # an error may quote an argument
    raise UsageError(passwords.mask(str(error), passwords.find(argv))) from error


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Any]:
  parser = command.Parser(__doc__)
  command.add_config(parser)
  parser.add_argument(
    '--space', type=command.local_path, required=True, help='a space file: one of experiments/spaces/, or your own'
  )
  parser.add_argument('--trials', type=int, required=True, help='how many trials in total, earlier ones included')
  parser.add_argument('--workers', type=int, default=1, help='processes, each with its share of cores or GPUs (1)')
  parser.add_argument(
    '--sampler', default='tpe', choices=['tpe', 'random', 'grid', 'qmc', 'cmaes'], help='default: tpe'
  )
  parser.add_argument('--pruner', default='median', choices=['median', 'hyperband', 'none'], help='default: median')
  parser.add_argument(
    '--seeds', type=int, default=3, help='of the comparison at the end; 0: no comparison, no test (3)'
  )
  parser.add_argument('--study_seed', type=int, default=0, help='of the samplers (0)')
  parser.add_argument('--workdir', type=command.local_path, help='default: runs/sweep-CONFIG-SPACE')
  parser.add_argument('--storage', help='URL of a database for several machines; default: a file in the workdir')
  parser.add_argument('--study', help='name of the study in the storage; default: CONFIG-SPACE')
  parser.add_argument(
    '--heartbeat', type=int, default=10, help='seconds between heartbeats; a trial that misses three is reassigned (10)'
  )
  parser.add_argument(
    '--deadline', type=int, default=300, help='seconds after which a worker that does nothing is replaced (300)'
  )
  args, overrides = parser.parse_known_args(argv)
  if not args.config:
    raise UsageError('which experiment? give --config=configs/digits.py or another file of configs/.')
  for name, least in (
    ('trials', 1),
    ('workers', 1),
    ('seeds', 0),
    ('study_seed', 0),
    ('heartbeat', 1),
    ('deadline', 1),
  ):
    if getattr(args, name) < least:
      raise UsageError(f'--{name} is {getattr(args, name)}; it must be at least {least}.')
  shares.check_processes('--workers', args.workers)
  config = config_lib.load(args.config, overrides)
  if config.seeds > 1:
    raise UsageError(f'config.seeds is {config.seeds}, but a trial has one seed; remove it and use --seeds.')
  stem = f'{Path(args.config.partition(":")[0]).stem}-{Path(args.space).stem}'
  args.workdir = args.workdir or f'runs/sweep-{stem}'
  args.study = args.study or stem
  args.command = shlex.join(['python', '-m', 'cnn_jax.sweep', *passwords.mask_arguments(argv)])
  return args, config


if __name__ == '__main__':
  command.run(main)
