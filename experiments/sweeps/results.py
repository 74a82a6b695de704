"""What a sweep writes down when it ends: results.csv, results.md and plots."""

import csv
import io
import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from experiments.sweeps.trials import Trials

BASELINE = 'default_seed_{seed}'  # the run of the config as it was

# What is said of a configuration over several seeds.
_COMPARED = (('validation_accuracy', '%'), ('validation_loss', ''), ('test_accuracy', '%'))


def best(finished: Mapping[str, FrozenTrial]) -> FrozenTrial | None:
  """The trial with the highest accuracy on validation, of equals that with the lowest loss; None if none is complete.

  A small validation split has few accuracies: the 143 images of the digits, 144.
  """
  ranked = _ranked(finished)
  return ranked[0] if ranked and ranked[0].state == TrialState.COMPLETE else None


def write(workdir: str | os.PathLike, trials: Trials, final: Trials | None, command: str) -> None:
  """Writes results.csv and results.md.

  Args:
    workdir: of the sweep.
    trials: the finished ones are listed, the best first, and nothing that the clock decides, so
      that the same trials give the same table.
    final: the runs from several seeds, where they are finished.
    command: to be quoted.
  """
  ranked = _ranked(trials.finished())
  header, rows = _table(ranked)
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  writer.writerow(header)
  writer.writerows([['' if cell is None else cell for cell in row] for row in rows])
  _write(Path(workdir) / 'results.csv', file.getvalue())

  parts = [f'# {trials.study.study_name}', f'```sh\n{command}\n```', _provenance(Path(workdir), trials)]
  chosen = best(trials.finished())
  if final is not None and chosen is not None:
    parts += ['## The chosen configuration', _comparison(chosen, final)]
  shown = [[_cell(name, value) for name, value in zip(header, row, strict=True)] for row in rows]
  parts += [
    f'## {len(rows)} trials, the best on validation first',
    _markdown([h.replace('_', ' ') for h in header], shown),
  ]
  if chosen is not None and final is not None:
    parts += [f'![{name}]({name}.png)' for name in ('history', 'importances', 'parallel_coordinates', 'slices')]
  _write(Path(workdir) / 'results.md', '\n\n'.join(parts) + '\n')


def summary(trials: Trials, final: Trials | None) -> str:
  """The result of a sweep in a few lines."""
  chosen = best(trials.finished())
  assert chosen is not None
  parameters = ', '.join(f'{name}={_short(value)}' for name, value in chosen.params.items())
  lines = [f'Best on validation: {chosen.user_attrs["run"]}, {chosen.value:.2%}: {parameters}.']
  if final is not None:
    lines += [
      f'{label}: {spread[0]} on validation, {spread[2]} on test (n = {n}).' for label, spread, n in _spreads(final)
    ]
  return '\n'.join(lines)


def _ranked(finished: Mapping[str, FrozenTrial]) -> list[FrozenTrial]:
  """Complete ones before pruned ones, higher accuracies first, lower losses first."""

  def key(trial: FrozenTrial) -> tuple[Any, ...]:
    value = -math.inf if trial.value is None else trial.value
    loss = trial.user_attrs.get('validation_loss')
    return (
      trial.state != TrialState.COMPLETE,
      'diverged' in trial.user_attrs,
      -value,
      math.inf if loss is None else loss,
      trial.user_attrs['run'],
    )

  return sorted(finished.values(), key=key)


def _table(ranked: Sequence[FrozenTrial]) -> tuple[list[str], list[list[Any]]]:
  names = sorted({name for trial in ranked for name in trial.params})
  header = ['trial', 'state', 'validation_accuracy', 'validation_loss', 'epochs', 'parameters', *names]
  rows = [
    [
      trial.user_attrs['run'],
      'diverged' if 'diverged' in trial.user_attrs else trial.state.name.lower(),
      trial.value,
      None if (loss := trial.user_attrs.get('validation_loss')) is None else round(loss, 6),
      trial.last_step,
      trial.user_attrs.get('num_parameters'),
      *(trial.params.get(name) for name in names),
    ]
    for trial in ranked
  ]
  return header, rows


def _comparison(chosen: FrozenTrial, final: Trials) -> str:
  parameters = ', '.join(f'`{name}` {_short(value)}' for name, value in chosen.params.items())
  rows = [[label, *spread, str(n)] for label, spread, n in _spreads(final)]
  beside = [
    f'{_mean_std([trial.user_attrs["validation_accuracy"]], "%")} (loss {_short(trial.user_attrs["validation_loss"])})'
    for trial in (chosen, *(t for t in final.finished().values() if 'test_accuracy' not in t.user_attrs))
  ]
  return (
    f'{chosen.user_attrs["run"]}: {parameters}. With the seed of the trials it has {beside[0]} on validation'
    + (f', the config as it was {beside[1]}.' if len(beside) > 1 else '.')
    + '\n\nTrained again from n seeds that no trial had; mean ± standard deviation at the last epoch. The test split was '
    'looked at here for the first time.\n\n'
    + _markdown(['configuration', 'validation', 'validation loss', 'test', 'n'], rows)
  )


def _spreads(final: Trials) -> list[tuple[str, list[str], int]]:
  """Of the chosen configuration and of the config as it was: accuracy, loss and test accuracy over n seeds."""
  tested = [(run, trial) for run, trial in final.finished().items() if 'test_accuracy' in trial.user_attrs]
  spreads = []
  for label, group in itertools.groupby(tested, key=lambda item: item[0].split('_seed_')[0]):
    runs = [trial.user_attrs for _, trial in group]
    spread = [_mean_std([run[key] for run in runs], unit) for key, unit in _COMPARED]
    spreads.append((label, spread, len(runs)))
  return spreads


def _mean_std(values: Sequence[float], unit: str) -> str:
  scale, digits, unit = (100, 2, ' %') if unit == '%' else (1, 4, '')
  spread = f' ± {scale * statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
  return f'{scale * statistics.mean(values):.{digits}f}{spread}{unit}'


def _provenance(workdir: Path, trials: Trials) -> str:
  parts = [f'Data: {trials.study.user_attrs.get("dataset", "not loaded yet")}.']
  # Trials may have been trained elsewhere; then their workdirs say on what.
  for file in sorted(workdir.glob('trial_*/environment.json'))[:1]:
    found = json.loads(file.read_text())
    versions = ', '.join(f'{name} {found["versions"][name]}' for name in ('python', 'jax', 'flax', 'optax'))
    commit = (
      f', commit {found["git"]["commit"][:12]}{" with changes" if found["git"]["dirty"] else ""}'
      if found['git']
      else ''
    )
    parts.append(
      f'Hardware of {file.parent.name}: {found["num_devices"]} x {found["device_kind"]}, {found["cpu"]}, '
      f'{found["cpu_cores"]} {"core" if found["cpu_cores"] == 1 else "cores"}; {versions}, optuna {optuna.__version__}{commit}.'
    )
  return ' '.join(parts)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _cell(name: str, value: Any) -> str:
  if value is None:
    return ''
  if name == 'validation_accuracy':
    return f'{100 * value:.2f} %'
  return f'{value:,}' if name == 'parameters' else _short(value)


def _short(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')  # other sweeps may share the folder
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary.write_text(text)
  temporary.rename(path)


# Plots. Accuracy is drawn in percent; pruned trials are crosses at their last accuracy.


def plot(workdir: str | os.PathLike, trials: Trials, distributions: Mapping[str, BaseDistribution]) -> None:
  """Draws history.png, importances.png, parallel_coordinates.png and slices.png.

  Args:
    workdir: takes them.
    trials: finished.
    distributions: of the space, by name of the parameter.
  """
  import matplotlib as mpl

  mpl.use('Agg')
  import matplotlib.pyplot as plt

  style = {'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.alpha': 0.25, 'font.size': 10}
  with plt.rc_context(style):
    for name, draw in (
      ('history', _history),
      ('importances', _importances),
      ('parallel_coordinates', _parallel_coordinates),
      ('slices', _slices),
    ):
      figure = draw(plt, trials, distributions)
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
    study.add_trials(_complete(trials))  # without those that were interrupted
    found = optuna.importance.get_param_importances(
      study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
  if found:
    names = list(reversed(found))
    bars = axes.barh([n.replace('_', ' ') for n in names], [found[n] for n in names], color=_BLUE)
    axes.bar_label(bars, fmt='%.2f', padding=4)
    axes.set_xlim(0, 1.12 * max(found.values()))
  else:
    axes.text(0.5, 0.5, 'too few different results to say', ha='center', transform=axes.transAxes)
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
    heights = [_place(d, trial.params[n]) if n in trial.params else np.nan for n, d in distributions.items()]
    clipped = min(max(share, 0.0), 1.0)
    axes.plot([*heights, clipped], color=colours(clipped), alpha=0.35 + 0.6 * clipped, linewidth=1.0 + 1.2 * clipped)
  ticks: dict[int, list[tuple[float, str]]] = {
    i: [(_place(d, v), _short(v)) for v in _ticks(d)] for i, d in enumerate(distributions.values())
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
    seen = [t for t in _complete(trials) if name in t.params]
    values = [t.params[name] for t in seen]
    if isinstance(distribution, CategoricalDistribution):
      axes.set_xticks(range(len(distribution.choices)), [str(choice) for choice in distribution.choices])
      values = [distribution.choices.index(value) for value in values]
    elif _is_log(distribution):
      axes.set_xscale('log')
    elif isinstance(distribution, IntDistribution):
      axes.xaxis.get_major_locator().set_params(integer=True)
    points = _points(
      axes, values, [100 * (t.value or 0.0) for t in seen], limits[0],
      c=[number[t.user_attrs['run']] for t in seen], cmap='Blues', vmin=-0.4 * len(number), vmax=len(number),
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
  """Draws points; those below the axis as triangles on it."""
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
  """Of an axis that shows the better ones apart: the worst tenth may fall out at the bottom."""
  ordered = sorted(values)
  low, high = ordered[len(ordered) // 10], ordered[-1]
  margin = max(0.08 * (high - low), 0.25)
  return low - margin, min(high + margin, 100 + margin)


def _is_log(distribution: BaseDistribution) -> bool:
  return isinstance(distribution, IntDistribution | FloatDistribution) and distribution.log


def _place(distribution: BaseDistribution, value: Any) -> float:
  """Where between 0 and 1 a value is drawn."""
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
