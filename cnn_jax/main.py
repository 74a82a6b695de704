"""Trains and evaluates what a config file describes.

    python -m cnn_jax.main --config=configs/mnist.py [--workdir=DIR] [--config.optimizer.learning_rate=0.1]
                           [--config.seeds=8]

Exit status: 0 done, 2 a usage, config or data error, 3 diverged, 143 stopped after saving.
"""

import contextlib
import os
import pathlib
import time
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

  from cnn_jax import distribute, inspect, models, record, seeds
  from cnn_jax.data import load_dataset

  config_lib.check_devices(config, jax.device_count())
  primary = distribute.is_primary()
  with record.lock(workdir) if primary else contextlib.nullcontext():
    record.check_config(workdir, config)
    if (result := record.read_result(workdir)) is not None:
      distribute.say(
        f'The run in {workdir} is complete: {seeds.describe(result)}. Use another --workdir for a new one.'
      )
      return result
    dataset = dataset or load_dataset(config.data)
    num_classes, image_shape = len(dataset.class_names), tuple(dataset.train.images.shape[1:])
    config_lib.check_data(config, len(dataset.train), num_classes, image_shape)
    if primary:
      record.write_config(workdir, config)
      record.write_environment(workdir)
    distribute.say(
      f'{dataset.name}: {len(dataset.train):,} training, {len(dataset.validation):,} validation and '
      f'{len(dataset.test):,} test images, {"x".join(map(str, image_shape))}, {num_classes} classes.'
    )
    distribute.say(inspect.summary(models.create(config.model, num_classes), image_shape))
    train = seeds.train_seeds if config.seeds > 1 else seeds.train_one
    options = {'evaluate_test': evaluate_test, 'on_validation': on_validation, 'profile': profile}
    result = train(config, dataset, workdir, **options)
    distribute.say(f'Done: {seeds.describe(result)}. Recorded in {workdir}.')
    return result


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = command.Parser(__doc__)
  command.add_config(parser)
  parser.add_argument('--workdir', help='where the run is recorded and resumed; default: runs/CONFIG-TIME')
  parser.add_argument('--profile', action='store_true', help='write a trace of some steps for TensorBoard or Perfetto')
  parser.add_argument('--coordinator', help='host:port of process 0, if several processes train together')
  parser.add_argument('--num_processes', type=int, help='how many processes train together')
  parser.add_argument('--process_id', type=int, help='which of them this is, from 0')
  args, overrides = parser.parse_known_args(argv)
  if not args.config:
    raise UsageError('which experiment? give --config=configs/mnist.py or another file of configs/.')
  config = config_lib.load(args.config, overrides)
  stem = pathlib.Path(args.config.partition(':')[0]).stem
  command.prepare_backend()
  from cnn_jax import distribute

  distribute.join(args.coordinator, args.num_processes, args.process_id)
  workdir = args.workdir or f'runs/{stem}-{time.strftime("%Y%m%d-%H%M%S")}'
  train_and_evaluate(config, workdir, profile=args.profile)


if __name__ == '__main__':
  command.run(main)
