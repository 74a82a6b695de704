"""Charts of the page: matplotlib figures as inline SVG in the colours and fonts of the page."""

import contextlib
import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cnn_jax.report import pictures, text

# The page has a light and a dark theme, and its colours are CSS variables. matplotlib accepts only fixed colours, so
# charts are drawn in these, which are used for nothing else, and `to_svg` replaces each by its variable.
_INK, _MUTED, _LINE, _BLUE, _ORANGE, _PAPER = (f'#01010{i}' for i in range(1, 7))
_VARIABLES = {
  _INK: 'var(--ink)',
  _MUTED: 'var(--muted)',
  _LINE: 'var(--line)',
  _BLUE: 'var(--blue)',
  _ORANGE: 'var(--orange)',
  _PAPER: 'var(--paper)',
}

_STYLE = {
  'svg.fonttype': 'none',  # text stays text, in the fonts of the page
  'svg.hashsalt': 'cnn_jax',
  'text.parse_math': False,  # a class may be called $x$
  'text.usetex': False,
  'axes.formatter.use_mathtext': False,
  'axes.unicode_minus': True,
  'font.size': 11,
  'text.color': _INK,
  'axes.labelcolor': _MUTED,
  'axes.edgecolor': _LINE,
  'axes.labelsize': 11,
  'axes.linewidth': 1,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': _LINE,
  'grid.linewidth': 0.7,
  'xtick.color': _LINE,
  'ytick.color': _LINE,
  'xtick.labelcolor': _MUTED,
  'ytick.labelcolor': _MUTED,
  'xtick.labelsize': 10.5,
  'ytick.labelsize': 10.5,
  'xtick.minor.visible': False,
  'ytick.minor.visible': False,
  'lines.linewidth': 1.8,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
  """Sets the style of the charts that are drawn inside."""
  import matplotlib

  with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
    # matplotlib uses its own font only to measure text, so a character that this font lacks does no harm.
    warnings.filterwarnings('ignore', message='Glyph')
    yield


def curves(name: str, title: str, splits: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Any:
  """Draws a metric against the training step.

  Args:
    name: loss | accuracy | learning_rate. Accuracies are drawn as errors on a logarithmic axis, because 99 and 99.5 %
      are far apart there. Losses are drawn on a logarithmic axis if all are positive.
    title: of the chart, for its description.
    splits: steps and values of the curves `train` and `validation`, at least one point each.

  Returns:
    The SVG.
  """
  figure, axes = _figure(380, 240)
  last = '; '.join(f'last {split} value {values[-1]:.4g}' for split, (_, values) in splits.items())
  if name == 'accuracy':
    errors = np.concatenate([1 - values for _, values in splits.values()])
    floor = np.min(errors[errors > 0], initial=1.0) / 2  # where an error of zero is drawn
    splits = {split: (steps, np.maximum(1 - values, floor)) for split, (steps, values) in splits.items()}
  for split, (steps, values) in splits.items():
    marker = 'o' if len(steps) == 1 or (split == 'validation' and len(steps) < 60) else ''
    colour = _BLUE if split == 'train' else _ORANGE
    axes.plot(steps, values, color=colour, marker=marker, markersize=3.5, label=split)
  if name == 'accuracy':
    _label_errors_as_accuracies(axes)
  elif name == 'loss' and all(np.min(values) > 0 for _, values in splits.values()):
    axes.set_yscale('log')
    _label_plainly(axes.yaxis)
  else:
    axes.set_ylim(bottom=0)
  axes.set_xlabel('step')
  axes.xaxis.set_major_locator(_ticker().MaxNLocator(5, integer=True, min_n_ticks=1))
  axes.xaxis.set_major_formatter(_ticker().FuncFormatter(lambda x, _: f'{x:,.0f}'))
  return to_svg(figure, f'{title} against the training step; {last}.')


def confusion_matrix(matrix: np.ndarray, classes: Sequence[str]) -> Any:
  """Draws a confusion matrix; with at most 20 classes, their names and the counts are written into it.

  Args:
    matrix: int (n, n), images of the class of the row that are predicted as the class of the column.
    classes: names of the classes.

  Returns:
    The SVG.
  """
  n = len(classes)
  right = np.eye(n, dtype=bool)
  share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  errors = np.where(right, 0, share)
  opacity = np.where(right, 0.55 * share, 0.85 * np.sqrt(errors / max(errors.max(), 1e-9)))
  colours = np.where(right[..., None], pictures.BLUE, pictures.ORANGE) / 255
  figure, axes = _figure(400, 400)
  axes.imshow(np.concatenate([colours, opacity[..., None]], axis=2), interpolation='none', aspect='auto')
  axes.grid(False)
  axes.set_xlabel('predicted')
  axes.set_ylabel('true')
  axes.tick_params(length=0)
  if n <= 20:
    names = [text.shorten(name, 12) for name in classes]
    wide = max(map(len, names)) > 3
    axes.set_xticks(np.arange(n), names, rotation=45 if wide else 0, ha='right' if wide else 'center')
    axes.set_yticks(np.arange(n), names)
    for i, j in np.argwhere(matrix):
      axes.text(j, i, f'{matrix[i, j]:,}', ha='center', va='center', fontsize=10.5 if n <= 10 else 8)
  description = f'Confusion matrix of {n} classes: {np.trace(matrix):,} of {matrix.sum():,} images are on the diagonal.'
  return to_svg(figure, description, grow=1.3)


def reliability(confidence: np.ndarray, accuracy: np.ndarray, count: np.ndarray, description: str) -> Any:
  """Draws a reliability diagram, and below it the number of images per bin.

  Args:
    confidence, accuracy, count: per bin, from `calibration.reliability`.
    description: of the chart, for those who cannot see it.

  Returns:
    The SVG.
  """
  edges = np.linspace(0, 1, len(count) + 1)
  full = count > 0
  figure, (axes, below) = _figure(380, 330, rows=(3, 1))
  axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
  axes.bar(edges[:-1][full], accuracy[full], 1 / len(count), align='edge', color=_BLUE, alpha=0.35, edgecolor=_PAPER)
  axes.plot(confidence[full], accuracy[full], 'o', color=_BLUE, markersize=4.5)
  axes.vlines(confidence[full], accuracy[full], confidence[full], color=_ORANGE, linewidth=2)
  axes.set_ylabel('accuracy')
  axes.set_xticklabels([])
  below.bar(edges[:-1], count, 1 / len(count), align='edge', color=_MUTED, alpha=0.55, edgecolor=_PAPER)
  below.set_yscale('log')
  below.set_ylim(0.5, 2 * max(count.max(), 1))
  _label_plainly(below.yaxis)
  below.set_xlabel('confidence: probability of the predicted class')
  below.set_ylabel('images')
  for ax in (axes, below):
    ax.set_xlim(0, 1)
  axes.set_ylim(0, 1.02)
  below.xaxis.set_major_formatter(_ticker().PercentFormatter(1, 0))
  axes.yaxis.set_major_formatter(_ticker().PercentFormatter(1, 0))
  return to_svg(figure, description)


def vector(values: np.ndarray) -> Any:
  """Draws the values (features,) as bars; of more than 512, the largest of each group of neighbours.

  Returns:
    The SVG.
  """
  width = -(-len(values) // 512)
  heights = np.array([values[i : i + width].max() for i in range(0, len(values), width)])
  figure, axes = _figure(380, 150)
  axes.bar(np.arange(len(heights)) * width, heights, 0.8 * width, align='edge', color=_BLUE, linewidth=0)
  axes.set_xlim(-0.5, len(values) + 0.5)
  axes.set_xlabel('channel' if width == 1 else f'channel; the largest of every {width}')
  return to_svg(figure, f'The {len(values)} inputs of the head; the largest is {values.max():.3f}.')


def to_svg(figure: Any, description: str, grow: float = 1.0) -> Any:
  """Writes a figure as inline SVG in the colours of the page, without scripts, addresses and ids that could clash.

  matplotlib's output is parsed and written anew, so that names in it stay text.

  Args:
    figure: a matplotlib figure, drawn inside `style`.
    description: for those who cannot see the chart; must differ between the charts of a page.
    grow: largest size on the page relative to the size of the figure; the chart shrinks with the page.

  Returns:
    Markup that the template inserts unchanged.
  """
  import markupsafe

  buffer = io.BytesIO()
  figure.savefig(
    buffer, format='svg', transparent=True, metadata={'Creator': None, 'Date': None, 'Format': None, 'Type': None}
  )
  root = ElementTree.fromstring(buffer.getvalue())
  prefix = f'c{zlib.crc32(description.encode()):08x}-'
  links = re.compile(r'url\(#([^)]+)\)')
  used = set()
  for element in root.iter():
    for name, value in element.attrib.items():
      used.update(links.findall(value))
      if name.endswith('href') and value.startswith('#'):
        used.add(value[1:])
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag.endswith('}style') or child.tag.endswith('}metadata'):
        parent.remove(child)
  for element in root.iter():
    element.tag = element.tag.rsplit('}', 1)[-1]
    attributes = {}
    for name, value in element.attrib.items():
      name = name.rsplit('}', 1)[-1]
      if name == 'id' and value not in used:
        continue
      if name == 'id':
        value = prefix + value
      elif name == 'href' and value.startswith('#'):
        value = '#' + prefix + value[1:]
      value = links.sub(lambda match: f'url(#{prefix}{match.group(1)})', value)
      for colour, variable in _VARIABLES.items():
        value = value.replace(colour, variable)
      attributes[name] = value
    element.attrib.clear()
    element.attrib.update(attributes)
  width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
  root.attrib.clear()
  root.attrib.update(
    {
      'viewBox': f'0 0 {width:g} {height:g}',
      'role': 'img',
      'aria-label': description,
      'style': f'max-width: {grow * width:g}px',
    }
  )
  return markupsafe.Markup(ElementTree.tostring(root, encoding='unicode'))


def _figure(width: int, height: int, rows: Sequence[int] = (1,)) -> tuple[Any, Any]:
  """A figure of a size in CSS pixels, 72 of which are one of matplotlib's inches, and its axes."""
  from matplotlib.figure import Figure

  figure = Figure((width / 72, height / 72), layout='constrained')
  figure.get_layout_engine().set(w_pad=2 / 72, h_pad=2 / 72)
  return figure, figure.subplots(len(rows), 1, height_ratios=rows)


def _label_errors_as_accuracies(axes: Any) -> None:
  """Turns an axis of error rates into a logarithmic one labelled with accuracies, the better ones above."""
  axes.set_yscale('log')
  low, high = sorted(axes.get_ylim())
  high = min(high, 1.0)
  ticks = [e * 10.0**p for p in range(0, -9, -1) for e in (1, 0.5, 0.2) if low <= e * 10.0**p <= high]
  if len(ticks) > 8:
    ticks = [tick for tick in ticks if math.log10(tick) == round(math.log10(tick))]
  elif len(ticks) < 3:
    plain = _ticker().MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)
    ticks = [float(tick) for tick in plain if low <= tick <= high]
  axes.set_ylim(high, low)
  axes.set_yticks(ticks, [f'{100 * (1 - tick):.6g}%' if tick < 1 else '0%' for tick in ticks])
  axes.yaxis.set_minor_locator(_ticker().NullLocator())


def _label_plainly(axis: Any) -> None:
  """Labels a logarithmic axis with plain numbers, about five of them."""
  low, high = axis.get_view_interval()
  digits: tuple[int, ...] = (1,)
  if high / low < 100:
    digits = (1, 2, 5) if high / low >= 10 else (1, 2, 3, 5, 7)
  axis.set_major_locator(_ticker().LogLocator(subs=digits, numticks=5))
  axis.set_major_formatter(_ticker().FuncFormatter(lambda x, _: f'{x:,.10g}'))
  axis.set_minor_locator(_ticker().NullLocator())


def _ticker() -> Any:
  import matplotlib.ticker

  return matplotlib.ticker
