"""Every field of an experiment, and the checks that make a wrong one an error before anything slow starts."""

import difflib
import math
from typing import Any

from ml_collections import ConfigDict

from cnn_jax import UsageError


def default_config() -> ConfigDict:
  """The base that every file in `configs/` starts from: all fields, each read by something.

  Returns:
    A locked `ConfigDict`: setting a field that is not here is an error.
  """
  config = ConfigDict()
  config.seed = 0  # of initialisation, order, augmentation and dropout
  config.seeds = 1  # so many runs, one after another, from `seed`, `seed` + 1, ...
  config.batch_size = 128  # images per step over all devices of all processes
  config.epochs = 12  # passes over the training split
  config.init_from = ''  # workdir of a run whose weights to start from: fine-tuning
  config.min_steps = 0  # at least so many steps: a set too small for `epochs` gets more of them

  config.data = data = ConfigDict()
  data.source = 'auto'  # tfds | folder | bundled | auto (prepared TFDS set, else bundled)
  data.name = 'mnist'  # TFDS name, or the bundled set: mnist | digits
  data.dir = ''  # the image folder, or the TFDS data directory ('': $TFDS_DATA_DIR)
  data.image_size = 0  # pixels a side of the model's input (0: as the set has it)
  data.channels = 0  # 1 grey, 3 RGB (0: as the set has it)
  data.resize = 'crop'  # other sizes: crop (shorter side, centre) | pad (letterbox) | stretch
  data.validation = 0.1  # part of train held out for selection
  data.test = 0.1  # part held out for the test where the set has no test split of its own
  data.split_seed = 0  # of the rule that carves them out; not `seed`, so seeds share a split

  config.augment = augment = ConfigDict()
  augment.shift = 0  # random translation by up to so many pixels each way
  augment.padding = 'constant'  # what comes in from outside: constant (the corner's level) | reflect
  augment.flip = False  # mirror left-right with probability 1/2
  augment.rotate = 0.0  # random rotation by up to so many degrees each way
  augment.scale = 0.0  # random zoom by a factor in [1 - scale, 1 + scale]
  augment.erase = 0.0  # probability of erasing a random rectangle
  augment.brightness = 0.0  # add a uniform number in [-b, b], of the range [0, 1]
  augment.contrast = 0.0  # multiply the distance to the mean by a factor in [1 - c, 1 + c]
  augment.mixup = 0.0  # alpha of mixup's Beta(alpha, alpha); 0: off
  augment.cutmix = 0.0  # alpha of CutMix's Beta(alpha, alpha); 0: off

  config.model = model = ConfigDict()
  model.features = (32, 64, 128)  # channels of each block
  model.convs_per_block = 1
  model.kernel_size = 3
  model.stride = 1  # of the first convolution of every block after the first
  model.pool = 'max'  # 2x2 at the end of every block but the last: max | avg | none
  model.norm = 'batch'  # batch | group | none
  model.norm_momentum = 0.9  # of the running statistics of batch norm
  model.activation = 'relu'  # relu | gelu | silu
  model.dropout = 0.0  # probability, before the head
  model.residual = False  # add each block's input to its output
  model.aggregate = 'gap'  # gap (global average pooling) | flatten
  model.head = 'dense'  # dense | conv1x1
  model.frozen_blocks = 0  # so many first blocks stay as they are; for fine-tuning
  model.dtype = 'float32'  # of the arithmetic: float32 | bfloat16; parameters stay float32

  config.optimizer = optimizer = ConfigDict()
  optimizer.name = 'sgd'  # sgd | adamw | lion | muon
  optimizer.learning_rate = 0.1  # the schedule's peak
  optimizer.momentum = 0.9  # sgd's and muon's momentum; b1 of adamw and lion
  optimizer.nesterov = True  # sgd and muon
  optimizer.b2 = 0.999  # adamw and lion
  optimizer.weight_decay = 5e-3  # decoupled, times the learning rate; kernels only
  optimizer.clip_norm = 0.0  # largest global gradient norm; 0: off

  config.schedule = schedule = ConfigDict()
  schedule.name = 'one_cycle'  # constant | cosine | one_cycle | linear
  schedule.warmup_epochs = 2.0  # linear from zero (one_cycle: cosine from a 25th of the peak)
  schedule.end = 0.0  # the last learning rate, as a fraction of the peak

  config.loss = loss = ConfigDict()
  loss.label_smoothing = 0.0

  config.evaluation = evaluation = ConfigDict()
  evaluation.batch_size = 1000  # images per call over all devices
  evaluation.every_epochs = 1  # validate so often, and always after the last epoch
  evaluation.ema_decay = 0.0  # evaluate an exponential average of parameters and statistics; 0: off

  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every_epochs = 1
  checkpoint.every_minutes = 10.0  # and inside long epochs
  checkpoint.keep = 2  # newest ones kept, beside the best on validation

  config.log = log = ConfigDict()
  log.every_steps = 25  # steps per line of metrics.jsonl, and per compiled call on the CPU
  log.tensorboard = True
  log.report = True  # write report.html at the end, where one process trains alone
  return config.lock()


_CHOICES = {
  'data.source': ('auto', 'tfds', 'folder', 'bundled'),
  'data.resize': ('crop', 'pad', 'stretch'),
  'data.channels': (0, 1, 3),
  'augment.padding': ('constant', 'reflect'),
  'model.pool': ('max', 'avg', 'none'),
  'model.norm': ('batch', 'group', 'none'),
  'model.activation': ('relu', 'gelu', 'silu'),
  'model.aggregate': ('gap', 'flatten'),
  'model.head': ('dense', 'conv1x1'),
  'model.dtype': ('float32', 'bfloat16'),
  'optimizer.name': ('sgd', 'adamw', 'lion', 'muon'),
  'schedule.name': ('constant', 'cosine', 'one_cycle', 'linear'),
}

_POSITIVE = (
  'seeds', 'batch_size', 'epochs', 'model.convs_per_block', 'model.kernel_size', 'model.stride',
  'optimizer.learning_rate', 'evaluation.batch_size', 'evaluation.every_epochs',
  'checkpoint.every_epochs', 'checkpoint.every_minutes', 'checkpoint.keep', 'log.every_steps',
)  # fmt: skip

_BELOW_ONE = (
  'data.validation', 'data.test', 'augment.scale', 'augment.contrast', 'augment.brightness', 'model.dropout',
  'model.norm_momentum', 'optimizer.momentum', 'optimizer.b2', 'loss.label_smoothing', 'evaluation.ema_decay',
)  # fmt: skip


def check(config: ConfigDict) -> None:
  """Checks names, types and values of a config against the base.

  Args:
    config: what a config file and the command line made.

  Raises:
    UsageError: names the first field that is unknown (and its nearest neighbour), missing, of
      another type than the base's, or impossible.
  """
  base = default_config()
  _check_fields(config, base, '')
  for field, choices in _CHOICES.items():
    if _get(config, field) not in choices:
      names = ', '.join(str(choice) for choice in choices)
      raise UsageError(f'config.{field} is {_get(config, field)!r}; it must be one of: {names}.')
  for field, value in _leaves(config):
    if isinstance(value, float) and not math.isfinite(value):
      raise UsageError(f'config.{field} is {value}; it must be a finite number.')
    if field in _POSITIVE and value <= 0:
      raise UsageError(f'config.{field} is {value}; it must be greater than zero.')
    if isinstance(value, int | float) and value < 0:
      raise UsageError(f'config.{field} is {value}; it must not be negative.')
    if field in _BELOW_ONE and value >= 1:
      raise UsageError(f'config.{field} is {value}; it must be less than 1.')
  if config.augment.erase > 1:
    raise UsageError(f'config.augment.erase is {config.augment.erase}; a probability is at most 1.')
  if not config.model.features or any(not isinstance(f, int) or f <= 0 for f in config.model.features):
    raise UsageError(
      f'config.model.features is {tuple(config.model.features)}; give the channels of each block, such as (32, 64).'
    )
  if config.model.frozen_blocks > len(config.model.features):
    raise UsageError(
      f'config.model.frozen_blocks is {config.model.frozen_blocks} but there are {len(config.model.features)} blocks.'
    )
  if config.schedule.warmup_epochs >= config.epochs and config.schedule.name != 'constant':
    raise UsageError(
      f'config.schedule.warmup_epochs is {config.schedule.warmup_epochs} of {config.epochs} epochs; '
      'the warm-up must end before the training does.'
    )


def check_devices(config: ConfigDict, num_devices: int) -> None:
  """Checks that the batches divide evenly over all devices.

  Raises:
    UsageError: names the nearest batch sizes that do.
  """
  size = config.batch_size
  if size % num_devices:
    below, above = size // num_devices * num_devices, -(-size // num_devices) * num_devices
    nearest = f'{below} or {above}' if below else f'{above}'
    raise UsageError(
      f'config.batch_size is {size}, which does not divide over {num_devices} devices; the nearest that do: {nearest}.'
    )


def check_data(config: ConfigDict, num_train: int, height: int, width: int) -> None:
  """Checks a config against the shape of the data it is to train on.

  Args:
    num_train: training images.
    height, width: of an image, in pixels.

  Raises:
    UsageError: a batch larger than the split, a shift larger than the image, or more 2x2
      poolings and strides than the image has pixels for.
  """
  if config.batch_size > num_train:
    raise UsageError(
      f'config.batch_size is {config.batch_size} but there are {num_train} training images; make it at most {num_train}.'
    )
  side = min(height, width)
  if config.augment.shift >= side:
    raise UsageError(
      f'config.augment.shift is {config.augment.shift} but images are {height}x{width} pixels; make it less than {side}.'
    )
  reduction = (2 if config.model.pool != 'none' else 1) * config.model.stride
  blocks = len(config.model.features)
  if side < reduction ** (blocks - 1):
    raise UsageError(
      f'config.model.features has {blocks} blocks, which need images of at least {reduction ** (blocks - 1)} pixels '
      f'a side, but these have {height}x{width}; use fewer blocks or a larger config.data.image_size.'
    )


def steps_per_epoch(config: ConfigDict, num_train: int) -> int:
  """Steps of one epoch: floor(num_train / batch_size); the remainder sits out, another one each epoch."""
  return num_train // config.batch_size


def num_epochs(config: ConfigDict, num_train: int) -> int:
  """Epochs of a run: `config.epochs`, or as many more as `config.min_steps` asks for."""
  return max(config.epochs, -(-config.min_steps // steps_per_epoch(config, num_train)))


def _leaves(config: ConfigDict, prefix: str = '') -> list[tuple[str, Any]]:
  leaves = []
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      leaves += _leaves(value, f'{prefix}{name}.')
    else:
      leaves.append((prefix + name, value))
  return leaves


def _get(config: ConfigDict, field: str) -> Any:
  for name in field.split('.'):
    config = config[name]
  return config


def _check_fields(config: ConfigDict, base: ConfigDict, prefix: str) -> None:
  for name in config:
    if name not in base:
      near = difflib.get_close_matches(name, base.keys(), 1, 0.5)
      hint = f'did you mean config.{prefix}{near[0]}?' if near else 'the fields are in cnn_jax/config.py.'
      raise UsageError(f'config.{prefix}{name} is not a field; {hint}')
  for name, default in base.items():
    if name not in config:
      raise UsageError(f'config.{prefix}{name} is missing; start the config from cnn_jax.config.default_config().')
    value = config[name]
    if isinstance(default, ConfigDict) and isinstance(value, ConfigDict):
      _check_fields(value, default, f'{prefix}{name}.')
    elif not _same_type(value, default):
      raise UsageError(
        f'config.{prefix}{name} is {value!r}, a {type(value).__name__}; it must be a {type(default).__name__}.'
      )


def _same_type(value: Any, default: Any) -> bool:
  if isinstance(default, bool) or isinstance(value, bool):
    return isinstance(default, bool) and isinstance(value, bool)
  if isinstance(default, float):
    return isinstance(value, int | float)
  if isinstance(default, tuple):
    return isinstance(value, tuple | list)
  return isinstance(value, type(default))
