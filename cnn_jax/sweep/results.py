"""The tables that a sweep writes: results.csv and results.md."""

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from cnn_jax.files import write_atomically
from cnn_jax.sweep.trials import Trials
from cnn_jax.tables import markdown, mean_std

BASELINE = 'default_seed_{seed}'  # the run of the unchanged config with the seed of the trials

# Why a trial has no accuracy; the user attribute of that name holds the reason.
_FAILURES = ('diverged', 'infeasible', 'failed')


def best(finished: Mapping[str, FrozenTrial]) -> FrozenTrial | None:
  """The trial with the highest accuracy on validation, of equals the one with the lowest loss; None if none completed.

  Equal accuracies are common on a small validation split: the 143 images of the digits allow 144 values.
  """
  ranked = _ranked(finished)
  return ranked[0] if ranked and ranked[0].state == TrialState.COMPLETE else None


def write(workdir: str | os.PathLike, trials: Trials, final: Trials | None, command: str) -> None:
  """Writes results.csv and results.md.

  Args:
    workdir: of the sweep.
    trials: the finished ones are listed, the best first. The table holds no times, so that the same trials give the same
      table.
    final: the runs from fresh seeds, if they are finished: several seeds of the chosen configuration, as many of the
      unchanged config, and last the unchanged config with the seed of the trials.
    command: quoted in results.md.
  """
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  ranked = _ranked(trials.finished())
  header, rows = _table(ranked)
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  writer.writerow(header)
  writer.writerows([['' if cell is None else cell for cell in row] for row in rows])
  write_atomically(workdir / 'results.csv', file.getvalue())

  parts = [f'# {trials.study.study_name}', f'```sh\n{command}\n```', _provenance(workdir, trials)]
  chosen = best(trials.finished())
  if final is not None and chosen is not None:
    parts += ['## The chosen configuration', _comparison(chosen, final)]
  cells = [[_cell(name, value) for name, value in zip(header, row, strict=True)] for row in rows]
  parts += [
    f'## {len(rows)} trials, the best on validation first',
    *([_repeats(trials).strip()] if _repeats(trials) else []),
    markdown([name.replace('_', ' ') for name in header], cells),
  ]
  if chosen is not None and final is not None:
    parts += [f'![{name}]({name}.png)' for name in ('history', 'importances', 'parallel_coordinates', 'slices')]
  write_atomically(workdir / 'results.md', '\n\n'.join(parts) + '\n')


def summary(trials: Trials, final: Trials | None) -> str:
  """The result of a sweep in a few lines."""
  chosen = best(trials.finished())
  assert chosen is not None
  ends = [state(trial) for trial in trials.finished().values()]
  counts = [f'{ends.count(name)} {name}' for name in ('complete', 'pruned', *_FAILURES) if name in ends]
  parameters = ', '.join(f'{name}={short(value)}' for name, value in chosen.params.items())
  lines = [
    f'{len(ends)} trials: {", ".join(counts)}.{_repeats(trials)}',
    f'Best on validation: {chosen.user_attrs["run"]}, {chosen.value:.2%}: {parameters}.',
  ]
  if final is not None:
    lines += [
      f'{label}: {accuracy} on validation, {test} on test (n = {n}).' for label, accuracy, _, test, n in _spreads(final)
    ]
  return '\n'.join(lines)


def state(trial: FrozenTrial) -> str:
  """How a trial ended: complete, pruned, diverged, infeasible or failed; the attribute of the last three says why."""
  return next((name for name in _FAILURES if name in trial.user_attrs), trial.state.name.lower())


def short(value: Any) -> str:
  """The value of a parameter with four significant digits."""
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def _repeats(trials: Trials) -> str:
  """A sentence about the proposals that were skipped, after a space; empty if there were none."""
  if not (number := trials.num_repeats()):
    return ''
  return f' {number} {"proposal" if number == 1 else "proposals"} repeated an earlier trial and {"was" if number == 1 else "were"} skipped.'


def _ranked(finished: Mapping[str, FrozenTrial]) -> list[FrozenTrial]:
  """Complete trials before pruned ones and those before failed ones, higher accuracies first, lower losses first."""

  def key(trial: FrozenTrial) -> tuple[Any, ...]:
    value = -math.inf if trial.value is None else trial.value
    loss = trial.user_attrs.get('validation_loss')
    return (
      trial.state != TrialState.COMPLETE,
      state(trial) in _FAILURES,
      -value,
      math.inf if loss is None else loss,
      trial.user_attrs['run'],
    )

  return sorted(finished.values(), key=key)


def _table(ranked: Sequence[FrozenTrial]) -> tuple[list[str], list[list[Any]]]:
  names = sorted({name for trial in ranked for name in trial.params})
  header = ['trial', 'state', 'validation_accuracy', 'validation_loss', 'epochs', 'parameters', *names, 'reason']
  rows = [
    [
      trial.user_attrs['run'],
      state(trial),
      trial.value,
      None if (loss := trial.user_attrs.get('validation_loss')) is None else round(loss, 6),
      trial.last_step,
      trial.user_attrs.get('num_parameters'),
      *(trial.params.get(name) for name in names),
      trial.user_attrs.get(state(trial)),
    ]
    for trial in ranked
  ]
  if not any(row[-1] for row in rows):
    header, rows = header[:-1], [row[:-1] for row in rows]
  return header, rows


def _comparison(chosen: FrozenTrial, final: Trials) -> str:
  parameters = ', '.join(f'`{name}` {short(value)}' for name, value in chosen.params.items())
  baseline = final.finished()[final.runs[-1]]
  return (
    f'{chosen.user_attrs["run"]}: {parameters}. With the seed of the trials it reaches {_on_validation(chosen)}, the '
    f'unchanged config {_on_validation(baseline)}.\n\n'
    'Both trained again from n seeds that no trial used; mean ± standard deviation at the last epoch. These runs are '
    'the first that are evaluated on the test split.\n\n'
    + markdown(['configuration', 'validation', 'validation loss', 'test', 'n'], _spreads(final))
  )


def _on_validation(trial: FrozenTrial) -> str:
  if 'validation_accuracy' not in trial.user_attrs:
    return f'nothing ({state(trial)})'
  accuracy, loss = (trial.user_attrs[f'validation_{name}'] for name in ('accuracy', 'loss'))
  return f'{mean_std([accuracy])} on validation (loss {short(loss)})'


def _spreads(final: Trials) -> list[list[str]]:
  """Of the chosen configuration and of the unchanged config: name, accuracy, loss, test accuracy, number of seeds."""
  finished, rows = final.finished(), []
  for label, runs in itertools.groupby(final.runs[:-1], key=lambda run: run.split('_seed_')[0]):
    trials = [finished[run] for run in runs]
    trained = [trial.user_attrs for trial in trials if state(trial) not in _FAILURES]
    failures = [state(trial) for trial in trials if state(trial) in _FAILURES]
    rows.append(
      [
        label,
        mean_std([run['validation_accuracy'] for run in trained]) if trained else '-',
        mean_std([run['validation_loss'] for run in trained], percent=False, digits=4) if trained else '-',
        mean_std([run['test_accuracy'] for run in trained]) if trained else '-',
        ', '.join([str(len(trained)), *(f'{failures.count(name)} {name}' for name in dict.fromkeys(failures))]),
      ]
    )
  return rows


def _provenance(workdir: Path, trials: Trials) -> str:
  parts = [f'Data: {trials.study.user_attrs.get("dataset", "not loaded yet")}.']
  # If other machines trained the trials, their workdirs hold the environments.
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
      f'{found["cpu_cores"]} {"core" if found["cpu_cores"] == 1 else "cores"}; {versions}, '
      f'optuna {optuna.__version__}{commit}.'
    )
  return ' '.join(parts)


def _cell(name: str, value: Any) -> str:
  if value is None:
    return ''
  if name == 'validation_accuracy':
    return f'{100 * value:.2f} %'
  return f'{value:,}' if name == 'parameters' else short(value)
