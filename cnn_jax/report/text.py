"""Text of the page: names made harmless, numbers made short."""

import math
from collections.abc import Sequence

from cnn_jax import command

TIMES = '\u00d7'  # the multiplication sign
_LONGEST = 200  # characters of a name; a longer one would fill the page


def clean(text: str, length: int = _LONGEST) -> str:
  """Prepares a name of a file, a class or a run for HTML and SVG: escapes control characters and cuts long text."""
  return shorten(command.printable(text[: length + 1]), length)


def shorten(text: str, length: int) -> str:
  """Cuts text to at most `length` characters, of which the last is then an ellipsis."""
  return text if len(text) <= length else text[: length - 1] + '…'


def percent(fraction: float) -> str:
  """Formats a fraction as a percentage with two decimals; NaN becomes a dash."""
  return '\u2013' if math.isnan(fraction) else f'{fraction:.2%}'


def signed(number: float) -> str:
  """Formats a number with its sign and three decimals."""
  return minus(f'{number:+.3f}')


def minus(number: str) -> str:
  """Replaces the hyphen of a negative number by a minus sign, which is as wide as a plus sign."""
  return number.replace('-', '\u2212')


def short_number(number: float) -> str:
  """Formats a number with three digits and the letter of its magnitude, for example `1.23 M`."""
  for size, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= size:
      return f'{number / size:.3g} {letter}'
  return f'{number:.0f}'


def duration(seconds: float) -> str:
  """Formats a duration in the largest unit of which it has at least two."""
  minutes, hours = seconds / 60, seconds / 3600
  if minutes < 2:
    return f'{seconds:.1f} s'
  return f'{minutes:.1f} min' if hours < 2 else f'{hours:.1f} h'


def shape(sizes: Sequence[int]) -> str:
  """Formats the shape of an array, for example `28 x 28 x 3`, with multiplication signs."""
  return f' {TIMES} '.join(map(str, sizes))


def count(number: int, noun: str) -> str:
  """Formats a number of things, for example `1 image` or `2 images`."""
  return f'{number:,} {noun}' + ('' if number == 1 else 's')
