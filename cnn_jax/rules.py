"""The rules that fields of a config keep: names, types and values."""

import difflib
from typing import Any

from ml_collections import ConfigDict

from cnn_jax import UsageError

_LARGEST = 3.4e38  # of float32


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
        else "the fields are in cnn_jax/config.py and in the network's file."
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
    rule: one of several values; a range; or for each number: `positive`, `below one`, `at most one`, `seed`. All numbers
      are finite in float32 and not negative, and all integers but seeds fit into int32.

  Raises:
    UsageError: says what is allowed.
  """
  several, numbers = isinstance(value, tuple | list), _numbers(value)
  if any(isinstance(number, float) and not abs(number) <= _LARGEST for number in numbers):
    raise UsageError(f'{field} is {value}; it must be a finite number.')
  if any(number < 0 for number in numbers):
    raise UsageError(f'{field} is {value}; it must not be negative.')
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
  if rule == 'at most one' and any(number > 1 for number in numbers):
    raise UsageError(f'{field} is {value}; a probability is at most 1.')


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
