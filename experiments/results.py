"""The results of an experiment as files of the repository: results.json, and README.md with the tables of it.

An experiment is a folder with `run.py`, `README.md`, `results.json` and `figure.png`. `run.py` defines

    main(argv)                           trains everything and publishes the results
    tables(found) -> dict[str, str]      the tables of README.md, by the name of the marks that enclose them

`python -m experiments.results` writes the tables of all READMEs from the results, after a change of either.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from cnn_jax import command, record
from cnn_jax.files import write_atomically
from cnn_jax.tables import format_mean_std

FOLDER = Path(__file__).resolve().parent


def summary(values: Sequence[float | None]) -> dict[str, Any]:
  """Mean, standard deviation of the sample (n - 1), n, minimum and maximum of the values of all seeds, and the values.

  All but `n` and `values` are None if a value is None or not finite; the deviation of a single value is None.
  """
  known = [value for value in values if value is not None and math.isfinite(value)]
  complete = len(known) == len(values) > 0
  return {
    'mean': statistics.mean(known) if complete else None,
    'std': statistics.stdev(known) if complete and len(known) > 1 else None,
    'n': len(values),
    'min': min(known) if complete else None,
    'max': max(known) if complete else None,
    'values': list(values),
  }


def show(measured: Mapping[str, Any]) -> str:
  """Formats the `summary` of fractions: 99.61 ± 0.04 %."""
  return '-' if measured['mean'] is None else format_mean_std(measured['mean'], measured['std'])


def show_range(measured: Mapping[str, Any]) -> list[str]:
  """Formats the `summary` of fractions as four cells: mean and deviation, the worst seed, the best seed, n."""
  worst, best = ('-' if value is None else f'{100 * value:.2f} %' for value in (measured['min'], measured['max']))
  return [show(measured), worst, best, str(measured['n'])]


def grid(measurements: Iterable[Mapping[str, Any]], row: str, column: str, value: str) -> dict[Any, dict[Any, Any]]:
  """Arranges measurements as {row: {column: value}}, in the order of their first appearance.

  Args:
    measurements: objects with the three fields.
    row, column, value: names of fields.
  """
  made: dict[Any, dict[Any, Any]] = {}
  for one in measurements:
    made.setdefault(one[row], {})[one[column]] = one[value]
  return made


def source(found: Mapping[str, Any]) -> str:
  """One sentence about where numbers come from: hardware, versions, commit, seeds; what was not recorded is left out."""
  versions = [f'{name} {version}' for name, version in (found['versions'] or {}).items() if version]
  first, *rest = found['seeds']
  seeds = f'seeds {first} to {rest[-1]}' if rest else f'seed {first}'
  parts = [found['hardware'], ', '.join(versions), f'commit {found["commit"]}', seeds]
  return '; '.join(part for part in parts if part) + '.'


def provenance(workdir: Path) -> dict[str, Any]:
  """Hardware, versions and commit of the runs below a workdir, from their environment.json; several are all named."""
  environments = [json.loads(path.read_text()) for path in sorted(workdir.rglob('environment.json'))]
  libraries = ('python', 'jax', 'flax', 'optax')
  return {
    'hardware': _all(hardware(environment) for environment in environments),
    'versions': {name: _all(environment['versions'][name] for environment in environments) for name in libraries},
    'commit': _all(commit(environment) for environment in environments),
  }


def hardware(environment: Mapping[str, Any]) -> str:
  """The machine that an environment.json describes, in words."""
  if environment['backend'] == 'cpu':
    return results.cpu(environment)
  return f'{environment["num_devices"]} {environment["device_kind"]} ({environment["backend"]})'


def commit(environment: Mapping[str, Any]) -> str:
  """The commit that an environment.json names, in words."""
  git = environment['git']
  return f'{git["commit"][:7]}{" with changes" if git["dirty"] else ""}' if git else 'unknown'


def publish(
  found: Mapping[str, Any],
  tables: results.Tables,
  output: Path | None,
  draw: Callable[[Path], None] | None = None,
) -> None:
  """Prints the tables of an experiment, and writes its files if there is a folder for them.

  Args:
    found: fields of results.json; they replace those of the same name that the file has.
    tables: of the experiment's `run.py`.
    output: a folder, made if it does not exist; gets results.json and the figure, and its README.md, if it has one,
      the tables.
    draw: draws the figure at the path of a PNG.
  """
  for table in tables(found).values():
    print(f'\n{table}')
  if output is None:
    return
  output.mkdir(parents=True, exist_ok=True)
  path = output / 'results.json'
  record.write_json(path, (results.read(path) if path.exists() else {}) | dict(found))
  if draw:
    draw(output / 'figure.png')
  if (output / 'README.md').exists():
    write_atomically(output / 'README.md', results.page(output, tables))


def folders() -> list[Path]:
  """The folders of the experiments that have results."""
  return results.folders(FOLDER)


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  command.Parser('Writes the tables of experiments/*/README.md from the results.json beside them.').parse_args(argv)
  for folder in folders():
    write_atomically(folder / 'README.md', results.page(folder))


def _all(values: Iterable[str]) -> str:
  return ', '.join(dict.fromkeys(values))


if __name__ == '__main__':
  command.run(main)
