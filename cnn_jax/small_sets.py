"""A config that fits a small set: batch, learning rate and warm-up."""

import math
from typing import Any

# Steps per epoch that a set should have, and the images that a batch should hold at least.
MIN_STEPS, MIN_BATCH = 8, 4


def adapt(config: Any, num_train: int) -> tuple[Any, list[str]]:
  """Adapts a config to a small set, if `config.adapt_to_data` asks for that.

  If an epoch has fewer than `MIN_STEPS` steps, the batch becomes the largest power of two that gives that many, but not
  less than `MIN_BATCH` images if there are as many. The learning rate is multiplied by the ratio of the batches with SGD
  (Goyal et al. 2017), and by its root with an optimizer that scales updates itself (Malladi et al. 2022). The warm-up
  becomes a tenth of the run. The result depends on `config` and `num_train` alone, so all processes, seeds and starts of
  a run agree.

  Args:
    config: a checked config.
    num_train: training images.

  Returns:
    The config to train with, whose `adapt_to_data` is off, and lines about what was changed.
  """
  if not config.adapt_to_data:
    return config, []
  made = type(config)(config.to_dict() | {'adapt_to_data': False})
  size = min(max(num_train // MIN_STEPS, MIN_BATCH), num_train)
  if config.batch_size <= size or num_train < 1:
    return made.lock(), []
  made.batch_size = 1 << (size.bit_length() - 1)
  ratio = made.batch_size / config.batch_size
  made.optimizer.learning_rate = config.optimizer.learning_rate * (
    ratio if config.optimizer.name == 'sgd' else math.sqrt(ratio)
  )
  steps = num_train // made.batch_size
  epochs = max(config.epochs, -(-config.min_steps // steps))
  if config.schedule.warmup_epochs:
    made.schedule.warmup_epochs = epochs / 10
  line = (
    f'Adapted to {num_train:,} training images: batches of {made.batch_size} instead of {config.batch_size}, learning '
    f'rate {made.optimizer.learning_rate:.3g} instead of {config.optimizer.learning_rate:.3g}, warm-up of '
    f'{made.schedule.warmup_epochs:.3g} of {epochs:,} epochs; config.adapt_to_data=False turns this off.'
  )
  return made.lock(), [line]
