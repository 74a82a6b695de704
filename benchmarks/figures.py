"""The style of all figures of benchmarks and experiments."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

COLOURS = ('#1f6f8b', '#d1603d', '#6b8f3c', '#7d5a9b', '#8a8a8a')
INK, LINE = '#333333', '#bbbbbb'
_STYLE = {
  'font.size': 10,
  'text.color': INK,
  'axes.labelcolor': INK,
  'axes.edgecolor': LINE,
  'axes.linewidth': 0.8,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.titlesize': 11,
  'axes.titlelocation': 'left',
  'xtick.color': LINE,
  'ytick.color': LINE,
  'xtick.labelcolor': INK,
  'ytick.labelcolor': INK,
  'lines.linewidth': 1.6,
}


@contextlib.contextmanager
def figure(
  path: str | os.PathLike, *, rows: int = 1, widths: Sequence[float] = (1,), size: tuple[float, float] = (6.0, 4.0)
) -> Iterator[tuple[Any, Any]]:
  """Yields a figure and its axes, an array (rows, columns), and writes the PNG on leaving the context.

  Args:
    path: of the PNG.
    rows: of axes.
    widths: of the columns, in proportion.
    size: of the figure, inches.
  """
  import matplotlib as mpl

  mpl.use('Agg')
  import matplotlib.pyplot as plt

  with plt.rc_context(_STYLE):
    ratios = {'width_ratios': widths}
    made, axes = plt.subplots(rows, len(widths), figsize=size, layout='constrained', squeeze=False, gridspec_kw=ratios)
    try:
      yield made, axes
      made.savefig(path, dpi=150)
    finally:
      plt.close(made)
