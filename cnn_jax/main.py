"""Trains and evaluates what a config file describes.

    python -m cnn_jax.main --config=configs/mnist.py [--workdir=DIR] [--config.optimizer.learning_rate=0.1]
                           [--config.seeds=8]

Exit status: 0 done, 2 a usage, config or data error, 3 diverged, 143 stopped after saving, or because another process of
the run has ended. The same command continues a run that was stopped.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from cnn_jax import UsageError, command
from cnn_jax import config as config_lib


def train_and_evaluate(
  config: Any,
  workdir: str | os.PathLike,
  *,
  dataset: Any = None,
  evaluate_test: bool = True,
  on_validation: Callable[[int, dict[str, float]], None] | None = None,
  profile: bool = False,
) -> dict[str, Any]:
  """Trains a config, or continues the run in the workdir, and evaluates the result on the test split.

  With `config.seeds` > 1 the run of each seed is recorded in a workdir of its own, `workdir`/seed_00000 and so on, as
  a command with that seed alone would record it.

  Args:
    config: a `ConfigDict` with the fields of `cnn_jax.config`.
    workdir: made if it does not exist; belongs to one process at a time.
    dataset: from `load_dataset(config.data)`; None: loaded here.
    evaluate_test, on_validation, profile: see `train.train`; of several seeds, for each.

  Returns:
    The contents of `result.json`; of several seeds, see `seeds.summarize`.

  Raises:
    UsageError: config, data or workdir are not usable.
    Diverged, Stopped: see `train.train`.
  """
  config_lib.check(config)
  # These imports take a second; a mistyped config has been reported by now.
  import jax

  from cnn_jax import distribute, inspect, models, peers, seeds, weights, workdirs
  from cnn_jax.data import load_dataset, overview

  config_lib.check_devices(config, jax.device_count())
  with workdirs.lock(workdir) if distribute.is_primary() else contextlib.nullcontext():
    if missing := peers.first(lambda: weights.missing_statistics(config, workdir)):
      config = config_lib.vary(config, {field: tuple(levels) for field, levels in missing.items()})
    if (result := peers.first(lambda: seeds.begin(config, workdir))) is not None:
      load = functools.cache(lambda: dataset or load_dataset(config.data))
      peers.first(lambda: seeds.check_data(config, workdir, load))
      distribute.say(
        f'The run in {workdir} is complete: {seeds.describe(result)}. Use another --workdir for a new one.'
      )
      seeds.finish(config, workdir, load)
      return result
    dataset = dataset or load_dataset(config.data)
    num_classes, image_shape = len(dataset.class_names), tuple(dataset.train.images.shape[1:])
    config_lib.check_data(config, len(dataset.train), num_classes, image_shape, len(dataset.validation))
    adapted, lines = config_lib.adapt(config, len(dataset.train))
    config_lib.check_devices(adapted, jax.device_count())
    for line in lines:
      distribute.say(line)
    peers.compare(lambda: seeds.facts(config, dataset))
    for line in overview.lines(dataset):
      distribute.say(line)
    input_shape = config_lib.input_shape(config, image_shape)
    distribute.say(inspect.summary(models.create(config.model, num_classes), input_shape))
    train = seeds.train_seeds if config.seeds > 1 else seeds.train_one
    options = {'evaluate_test': evaluate_test, 'on_validation': on_validation, 'profile': profile}
    result = train(config, dataset, workdir, **options)
    distribute.say(f'Done: {seeds.describe(result)}. Recorded in {workdir}.')
    return result


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = command.Parser(__doc__)
  command.add_config(parser)
  parser.add_argument(
    '--workdir', type=command.local_path, help='where the run is recorded and resumed; default: runs/CONFIG-TIME'
  )
  parser.add_argument('--profile', action='store_true', help='write a trace of some steps for TensorBoard or Perfetto')
  parser.add_argument('--coordinator', help='host:port of process 0, if several processes train together')
  parser.add_argument('--num_processes', type=int, help='how many processes train together')
  parser.add_argument('--process_id', type=int, help='which of them this is, from 0')
  for name, seconds, what in (
    ('heartbeat', 20.0, 'of silence after which another process counts as lost'),
    ('join', 25.0, 'after which a process ends that does not find the others'),
    ('stall', 300.0, 'that reading or writing may take while the other processes wait'),
  ):
    parser.add_argument(f'--{name}_seconds', type=float, default=seconds, help=f'{what} (default: {seconds:g})')
  args, overrides = parser.parse_known_args(argv)
  if not args.config:
    raise UsageError('which experiment? give --config=configs/mnist.py or another file of configs/.')
  config = config_lib.load(args.config, overrides)
  stem = pathlib.Path(args.config.partition(':')[0]).stem
  command.prepare_backend()
  from cnn_jax import distribute, peers, workdirs

  limits = args.heartbeat_seconds, args.join_seconds, args.stall_seconds
  distribute.join(args.coordinator, args.num_processes, args.process_id, *limits)
  with peers.together(command.outcome):
    # Only the first process writes, so only it needs a new place.
    new = workdirs.new_workdir if distribute.is_primary() else str
    train_and_evaluate(config, args.workdir or new(f'runs/{stem}'), profile=args.profile)


if __name__ == '__main__':
  command.run(main)
