"""The plots of a sweep: history, importances, parallel coordinates and slices.

Accuracy is drawn in percent. Pruned trials are crosses at their last accuracy.
"""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from cnn_jax.sweep.results import short
from cnn_jax.sweep.trials import Trials


def draw(workdir: str | os.PathLike, trials: Trials, distributions: Mapping[str, BaseDistribution]) -> None:
  """Draws history.png, importances.png, parallel_coordinates.png and slices.png.

  Args:
    workdir: where they are written.
    trials: the finished ones are drawn, at least one of which is complete.
    distributions: the distribution of each parameter, by name.
  """
  import matplotlib as mpl

  mpl.use('Agg')
  import matplotlib.pyplot as plt

  style = {'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.alpha': 0.25, 'font.size': 10}
  with plt.rc_context(style):
    for name, plot in (
      ('history', _history),
      ('importances', _importances),
      ('parallel_coordinates', _parallel_coordinates),
      ('slices', _slices),
    ):
      figure = plot(plt, trials, distributions)
      figure.savefig(Path(workdir) / f'{name}.png', dpi=120, bbox_inches='tight')
      plt.close(figure)


_BLUE, _ORANGE, _GREY = '#3366aa', '#dd7722', '#999999'


def _history(plt: Any, trials: Trials, distributions: Mapping[str, BaseDistribution]) -> Any:
  del distributions
  figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
  finished = trials.finished()
  complete: dict[int, float] = {}
  pruned: dict[int, float] = {}
  for i, trial in ((i, finished[run]) for i, run in enumerate(trials.runs) if run in finished):
    if trial.value is not None:
      (complete if trial.state == TrialState.COMPLETE else pruned)[i] = 100 * trial.value
  numbers, values = list(complete), list(complete.values())
  low, high = _limits(values)
  if pruned:
    _points(axes, list(pruned), list(pruned.values()), low, marker='x', color=_GREY, label='pruned, at the last epoch')
  _points(axes, numbers, values, low, color=_BLUE, label='complete', zorder=3)
  axes.step(numbers, list(itertools.accumulate(values, max)), where='post', color=_ORANGE, label='best so far')
  axes.set(xlabel='trial', ylabel='validation accuracy (%)', title='History', ylim=(low, high))
  axes.set_xlim(-0.5, len(trials.runs) - 0.5)
  axes.xaxis.get_major_locator().set_params(integer=True)
  figure.legend(loc='outside lower center', ncols=3, frameon=False)
  return figure


def _importances(plt: Any, trials: Trials, distributions: Mapping[str, BaseDistribution]) -> Any:
  figure, axes = plt.subplots(figsize=(7, 0.45 * len(distributions) + 1.3), layout='constrained')
  found: dict[str, float] = {}
  if len({t.value for t in _complete(trials)}) > 1:
    study = optuna.create_study(direction='maximize')
    study.add_trials(_complete(trials))  # without the interrupted ones
    found = optuna.importance.get_param_importances(
      study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
  if found:
    names = list(reversed(found))
    bars = axes.barh([n.replace('_', ' ') for n in names], [found[n] for n in names], color=_BLUE)
    axes.bar_label(bars, fmt='%.2f', padding=4)
    axes.set_xlim(0, 1.12 * max(found.values()))
  else:
    axes.text(0.5, 0.5, 'too few different results', ha='center', transform=axes.transAxes)
  axes.grid(axis='y', visible=False)
  axes.set(xlabel='share of the variance of validation accuracy (fANOVA)', title='Importance of the parameters')
  return figure


def _parallel_coordinates(plt: Any, trials: Trials, distributions: Mapping[str, BaseDistribution]) -> Any:
  import numpy as np

  figure, axes = plt.subplots(figsize=(1.9 * (len(distributions) + 1) + 1.5, 4.6))
  complete = sorted(_complete(trials), key=lambda t: t.value or 0.0)
  low, high = _limits([100 * (t.value or 0.0) for t in complete])
  colours = plt.get_cmap('viridis_r')
  for trial in complete:
    share = (100 * (trial.value or 0.0) - low) / (high - low)
    heights = [_position(d, trial.params[n]) if n in trial.params else np.nan for n, d in distributions.items()]
    clipped = min(max(share, 0.0), 1.0)
    axes.plot([*heights, clipped], color=colours(clipped), alpha=0.35 + 0.6 * clipped, linewidth=1.0 + 1.2 * clipped)
  ticks: dict[int, list[tuple[float, str]]] = {
    i: [(_position(d, v), short(v)) for v in _ticks(d)] for i, d in enumerate(distributions.values())
  }
  ticks[len(distributions)] = [(f, f'{low + f * (high - low):.1f}') for f in (0.0, 0.25, 0.5, 0.75, 1.0)]
  for i, marks in ticks.items():
    axes.axvline(i, color='black', linewidth=0.8)
    for height, text in marks:
      axes.annotate(
        text, (i, height), (-5, 0), textcoords='offset points', ha='right', va='center', fontsize=8,
        bbox={'boxstyle': 'round,pad=0.1', 'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.85}, zorder=5,
      )  # fmt: skip
  axes.set_xticks(range(len(ticks)), [*(n.replace('_', ' ') for n in distributions), 'validation\naccuracy (%)'])
  axes.set(yticks=[], xlim=(-0.45, len(distributions) + 0.1), title='Complete trials: the darker, the better')
  axes.spines[['left', 'bottom']].set_visible(False)
  axes.tick_params(axis='x', length=0, pad=8)
  axes.grid(visible=False)
  return figure


def _slices(plt: Any, trials: Trials, distributions: Mapping[str, BaseDistribution]) -> Any:
  columns = min(3, len(distributions))
  rows = -(-len(distributions) // columns)
  figure, grid = plt.subplots(
    rows, columns, figsize=(3.2 * columns + 1, 3 * rows + 0.4), sharey=True, squeeze=False, layout='constrained'
  )
  limits = _limits([100 * (t.value or 0.0) for t in _complete(trials)])
  number = {run: i for i, run in enumerate(trials.runs)}
  points = None
  for axes, (name, distribution) in zip(grid.flat, distributions.items(), strict=False):
    complete = [t for t in _complete(trials) if name in t.params]
    values = [t.params[name] for t in complete]
    if isinstance(distribution, CategoricalDistribution):
      axes.set_xticks(range(len(distribution.choices)), [str(choice) for choice in distribution.choices])
      values = [distribution.choices.index(value) for value in values]
    elif _is_log(distribution):
      axes.set_xscale('log')
    elif isinstance(distribution, IntDistribution):
      axes.xaxis.get_major_locator().set_params(integer=True)
    points = _points(
      axes, values, [100 * (t.value or 0.0) for t in complete], limits[0],
      c=[number[t.user_attrs['run']] for t in complete], cmap='Blues', vmin=-0.4 * len(number), vmax=len(number),
      edgecolors='#333333', linewidths=0.5, zorder=3,
    )  # fmt: skip
    axes.set(xlabel=name.replace('_', ' '), ylim=limits)
  for axes in grid.flat[len(distributions) :]:
    axes.set_visible(False)
  for row in grid:
    row[0].set_ylabel('validation accuracy (%)')
  bar = figure.colorbar(points, ax=grid, pad=0.02, boundaries=range(len(number) + 1), aspect=30)
  bar.set_label('trial')
  figure.suptitle('Accuracy against each parameter')
  return figure


def _points(axes: Any, x: Sequence[Any], y: Sequence[float], low: float, **style: Any) -> Any:
  """Draws points; a point below the limit of the axis is a triangle on it."""
  low_style = {name: value for name, value in style.items() if name not in ('c', 'label')} | {
    'marker': 'v',
    'clip_on': False,
  }
  below = [i for i, value in enumerate(y) if value < low]
  if below:
    if 'c' in style:
      low_style['c'] = [style['c'][i] for i in below]
    axes.scatter([x[i] for i in below], [low] * len(below), **low_style)
  above = [i for i in range(len(y)) if i not in set(below)]
  if 'c' in style:
    style['c'] = [style['c'][i] for i in above]
  return axes.scatter([x[i] for i in above], [y[i] for i in above], **style)


def _complete(trials: Trials) -> list[FrozenTrial]:
  return [t for t in trials.finished().values() if t.state == TrialState.COMPLETE and t.value is not None]


def _limits(values: Sequence[float]) -> tuple[float, float]:
  """The limits of an axis that separates the better trials: the worst tenth may lie below it."""
  ordered = sorted(values)
  low, high = ordered[len(ordered) // 10], ordered[-1]
  margin = max(0.08 * (high - low), 0.25)
  return low - margin, min(high + margin, 100 + margin)


def _is_log(distribution: BaseDistribution) -> bool:
  return isinstance(distribution, IntDistribution | FloatDistribution) and distribution.log


def _position(distribution: BaseDistribution, value: Any) -> float:
  """The height between 0 and 1 at which a value is drawn."""
  if isinstance(distribution, CategoricalDistribution):
    return distribution.choices.index(value) / max(len(distribution.choices) - 1, 1)
  assert isinstance(distribution, IntDistribution | FloatDistribution)
  scale = math.log if distribution.log else float
  low, high = scale(distribution.low), scale(distribution.high)
  return (scale(value) - low) / (high - low) if high > low else 0.5


def _ticks(distribution: BaseDistribution) -> list[Any]:
  if isinstance(distribution, CategoricalDistribution):
    return list(distribution.choices)
  assert isinstance(distribution, IntDistribution | FloatDistribution)
  low, high = distribution.low, distribution.high
  if distribution.step and (high - low) / distribution.step < 7 and not distribution.log:
    return [low + i * distribution.step for i in range(round((high - low) / distribution.step) + 1)]
  if distribution.log:
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [low, *(10.0**p for p in powers if low * 1.3 < 10.0**p < high / 1.3), high]
  if isinstance(distribution, IntDistribution):
    return sorted({low + round(f * (high - low)) for f in (0, 0.25, 0.5, 0.75, 1)})
  return [low + f * (high - low) for f in (0, 0.25, 0.5, 0.75, 1)]
