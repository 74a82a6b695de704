"""The rules that fields of a config keep: names, types and values."""

import difflib
from typing import Any

from ml_collections import ConfigDict

from cnn_jax import UsageError

_LARGEST, _SMALLEST = 3.4e38, 1.2e-38  # of float32
_LEAST_STD = 1e-3  # levels; the network's input stays below 255,000


def check_fields(config: ConfigDict, base: ConfigDict, prefix: str = '') -> None:
  """Checks that a config has the fields of another one, with values of the same types.

  Raises:
    UsageError: names the first field that is unknown (and the field whose name is most similar), missing, or of another
      type.
  """
  for name in config:
    if name not in base:
      near = difflib.get_close_matches(name, base.keys(), 1, 0.5)
      hint = (
        f'did you mean config.{prefix}{near[0]}?'
        if near
        else "the fields are in cnn_jax/fields.py and in the network's file."
      )
      raise UsageError(f'config.{prefix}{name} is not a field; {hint}')
  for name, default in base.items():
    if name not in config:
      raise UsageError(f'config.{prefix}{name} is missing; start the config from cnn_jax.config.default_config().')
    value = config[name]
    if isinstance(default, ConfigDict) and isinstance(value, ConfigDict):
      check_fields(value, default, f'{prefix}{name}.')
    elif not _same_type(value, default):
      raise UsageError(
        f'config.{prefix}{name} is {" ".join(repr(value).split())[:80]}, a {type(value).__name__}; it must be a {type(default).__name__}.'
      )


def check_value(field: str, value: Any, rule: tuple | range | str | None) -> None:
  """Checks the value of a field.

  Args:
    field: its name.
    value: of the right type.
    rule: one of several values; a range; or for each number: `positive`, `below one`, `at most one`, `at most half`,
      `seed`. All numbers
      are finite in float32 and not negative, and all integers but seeds fit into int32.

  Raises:
    UsageError: says what is allowed.
  """
  several, numbers = isinstance(value, tuple | list), _numbers(value)
  if any(isinstance(number, float) and not abs(number) <= _LARGEST for number in numbers):
    raise UsageError(f'{field} is {value}; it must be a finite number.')
  if any(number < 0 for number in numbers):
    raise UsageError(f'{field} is {value}; it must not be negative.')
  if any(0 < number < _SMALLEST for number in numbers):
    raise UsageError(f'{field} is {value}, which is zero in float32; the smallest number is {_SMALLEST:.2g}.')
  if rule != 'seed' and any(isinstance(number, int) and number >= 2**31 for number in numbers):
    raise UsageError(f'{field} is {value}; it must be less than {2**31}.')
  if isinstance(rule, range) and value not in rule:
    raise UsageError(f'{field} is {value}; it must be from {rule.start} to {rule.stop - 1}.')
  if isinstance(rule, tuple) and value not in rule:
    raise UsageError(f'{field} is {value!r}; it must be one of: {", ".join(map(str, rule))}.')
  if rule == 'positive' and several and (not value or any(type(x) is not int or x <= 0 for x in value)):
    raise UsageError(f'{field} is {tuple(value)}; give one or more whole numbers greater than zero, such as (32, 64).')
  if rule == 'positive' and any(number <= 0 for number in numbers):
    raise UsageError(f'{field} is {value}; it must be greater than zero.')
  if rule == 'below one' and any(number >= 1 for number in numbers):
    raise UsageError(f'{field} is {value}; it must be less than 1.')
  for name, most in (('at most one', 1), ('at most half', 0.5)):
    if rule == name and any(number > most for number in numbers):
      raise UsageError(f'{field} is {value}; it must be at most {most}.')


def check_class_weights(config: ConfigDict, num_classes: int = 0) -> None:
  """Checks the weights of the classes in the loss.

  Args:
    config: complete.
    num_classes: of the data; 0 if unknown.

  Raises:
    UsageError: they are neither `balanced` nor a positive number per class, or sampling balances the classes as well.
  """
  weights, name = tuple(config.loss.class_weights), 'config.loss.class_weights'
  if weights == ('balanced',):
    if config.data.sampling == 'balanced':
      raise UsageError(
        f"{name} and config.data.sampling are both 'balanced', which would correct the same imbalance twice; set one of them."
      )
  elif any(isinstance(x, bool) or not isinstance(x, int | float) or x <= 0 for x in weights):
    raise UsageError(
      f'{name} is {" ".join(repr(weights).split())[:80]}; give balanced, or a number greater than zero per class, such '
      'as (1, 2.5).'
    )
  elif weights and num_classes and len(weights) != num_classes:
    raise UsageError(
      f'{name} holds {len(weights)} {"number" if len(weights) == 1 else "numbers"}, but the data have {num_classes} '
      'classes; give one per class, in the order of their names.'
    )


def check_stage_rates(rates: Any, num_stages: int = 0) -> None:
  """Checks the factors of the learning rate of the last stages.

  Args:
    rates: `config.optimizer.stage_rates`.
    num_stages: of the network; 0 if unknown.

  Raises:
    UsageError: one of them is not a number, or there are more than one per stage and one of the head.
  """
  name = f'config.optimizer.stage_rates is {" ".join(repr(tuple(rates)).split())[:80]}'
  if any(isinstance(x, bool) or not isinstance(x, int | float) for x in rates):
    raise UsageError(f'{name}; give numbers, such as (0.1, 0.3, 1), the last of them for the head.')
  if num_stages and len(rates) > num_stages + 1:
    raise UsageError(
      f'{name}, {len(rates)} numbers, but the network has {num_stages} stages and a head; give at most {num_stages + 1}.'
    )


def check_statistics(config_data: Any, channels: int) -> None:
  """Checks the statistics of the network's input.

  Args:
    config_data: the section `config.data`, whose `mean` and `std` are tuples.
    channels: of the images; 0 if unknown.

  Raises:
    UsageError: one of them is not numbers of levels, the std is not positive, there are not as many of one as of the
      other, or neither one number nor one per channel.
  """
  mean, std = tuple(config_data.mean), tuple(config_data.std)
  for name, values in (('mean', mean), ('std', std)):
    if len(values) not in (0, 1, 3) or any(isinstance(x, bool) or not isinstance(x, int | float) for x in values):
      raise UsageError(
        f'config.data.{name} is {" ".join(repr(values).split())[:80]}; give one number of levels, such as (127.5,), or '
        'three, of red, green and blue.'
      )
  if any(x < _LEAST_STD for x in std):
    raise UsageError(f'config.data.std is {std}; it is in levels from 0 to 255, and must be at least {_LEAST_STD}.')
  if len(mean) != len(std):
    raise UsageError(
      f'config.data.mean is {mean} but config.data.std is {std}; give as many numbers of both, or none of either.'
    )
  if channels and len(mean) > 1 and len(mean) != channels:
    raise UsageError(
      f'config.data.mean is {mean}, one number per colour, but the images are grey; give one number of both mean and std.'
    )


def check_sizes(config: ConfigDict) -> None:
  """Checks the sizes of the decoded images and of the network's input.

  Args:
    config: complete.

  Raises:
    UsageError: the input, in evaluation or in training, is larger than the decoded images or has a size while they have
      none, or frozen stages are to keep maps of two sizes.
  """
  size, canvas, training = config.data.image_size, config.data.canvas_size, config.augment.image_size
  for name, value in (('data.canvas_size', canvas), ('augment.image_size', training)):
    if value and not size:
      raise UsageError(
        f"config.{name} is {value} but config.data.image_size is 0; set it to the pixels a side of the network's input."
      )
  if 0 < canvas < size:
    raise UsageError(
      f"config.data.canvas_size is {canvas} and config.data.image_size {size}, but the network's input is cut out of the "
      f'canvas; make the canvas at least {size}, or 0.'
    )
  if training > (canvas or size):
    raise UsageError(
      f'config.augment.image_size is {training} but images are decoded to {canvas or size} pixels a side; make '
      f'config.data.canvas_size at least {training}.'
    )
  if training not in (0, size) and config.model.frozen_stages and config.fine_tuning.views:
    raise UsageError(
      f'config.augment.image_size is {training} and config.data.image_size {size}, but the maps that '
      'config.fine_tuning.views keeps have one size; set config.augment.image_size or config.fine_tuning.views to 0.'
    )


def _numbers(value: Any) -> list[int | float]:
  values = value if isinstance(value, tuple | list) else [value]
  return [x for x in values if isinstance(x, int | float) and not isinstance(x, bool)]


def _same_type(value: Any, default: Any) -> bool:
  if isinstance(default, bool) or isinstance(value, bool):
    return isinstance(default, bool) and isinstance(value, bool)
  if isinstance(default, float):
    return isinstance(value, int | float)
  if isinstance(default, tuple):
    return isinstance(value, tuple | list)
  return isinstance(value, type(default))
