"""Figures of the experiments: their style, axes of errors, and lines through the means of several seeds."""

import contextlib
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import figures
from benchmarks.figures import COLOURS, INK

__all__ = ('COLOURS', 'INK', 'curves', 'error_axis', 'figure', 'name_ends')

_LINE_OF_TEXT = 13  # points


@contextlib.contextmanager
def figure(
  path: str | os.PathLike, *, widths: Sequence[float] = (1,), size: tuple[float, float] = (6.0, 4.0)
) -> Iterator[Any]:
  """Yields a figure and an array of axes side by side, and writes the PNG on leaving the context.

  Args:
    path: of the PNG.
    widths: of the axes, in proportion.
    size: of the figure, inches.
  """
  with figures.figure(path, widths=widths, size=size) as (made, axes):
    yield made, axes[0]


def error_axis(axes: Any) -> None:
  """Makes the vertical axis one of errors in percent, logarithmic, labelled with plain numbers."""
  from matplotlib import ticker

  axes.set_yscale('log')
  for setter in (axes.yaxis.set_major_locator, axes.yaxis.set_minor_locator):
    setter(ticker.NullLocator())
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f'{y:g}'))
  axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  axes.set_ylabel('test error, %')


def curves(axes: Any, x: Sequence[float], lines: Mapping[str, Sequence[Sequence[float]]]) -> None:
  """Draws a line through the means of each series, with bars of one standard deviation and a point per seed.

  Args:
    axes: with their scales set, because the names at the ends of the lines are placed in pixels.
    x: of the points.
    lines: name -> the values of all seeds at each x.
  """
  ends = []
  for (name, values), colour in zip(lines.items(), COLOURS, strict=False):
    means = [statistics.mean(of_x) for of_x in values]
    bars = [statistics.stdev(of_x) if len(of_x) > 1 else 0.0 for of_x in values]
    points = [(place, value) for place, of_x in zip(x, values, strict=True) for value in of_x]
    axes.plot(x, means, color=colour)
    axes.errorbar(x, means, bars, fmt='none', color=colour, alpha=0.5, capsize=2.5, elinewidth=1)
    axes.plot(*zip(*points, strict=True), 'o', color=colour, markersize=3.5, alpha=0.45, markeredgewidth=0)
    ends.append((means[-1], name, colour))
  axes.spines.bottom.set_bounds(x[0], x[-1])
  name_ends(axes, x[-1], ends)


def name_ends(axes: Any, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
  """Writes names to the right of the ends of lines, at least a line of text apart.

  Args:
    axes: with their scales set.
    x: of all ends.
    ends: (y, name, colour) of each.
  """
  axes.figure.canvas.draw()  # fixes the scales
  apart = _LINE_OF_TEXT * axes.figure.dpi / 72
  lowest = float('-inf')
  for y, name, colour in sorted(ends):
    height = axes.transData.transform((x, y))[1]
    placed = max(height, lowest + apart)
    lowest = placed
    offset = (8, (placed - height) * 72 / axes.figure.dpi)
    axes.annotate(name, (x, y), offset, textcoords='offset points', va='center', color=colour)
