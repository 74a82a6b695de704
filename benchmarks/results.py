"""The results of a benchmark as files of the repository: results.json, and README.md with the tables of it.

    python -m benchmarks.results

writes the tables of benchmarks/*/README.md from the results.json beside them. A benchmark is a folder with `README.md`,
`results.json` and `run.py`, which defines

    main(argv)                           measures, prints the tables, and writes the file that --json names
    tables(found) -> dict[str, str]      the tables of README.md, by the name of the marks that enclose them
"""

import argparse
import importlib
import json
import os
import pathlib
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cnn_jax import UsageError, command, record
from cnn_jax.files import write_atomically
from cnn_jax.tables import insert

FOLDER = pathlib.Path(__file__).resolve().parent
Tables = Callable[[Mapping[str, Any]], dict[str, str]]
_LIBRARIES = {'python': 'Python', 'jax': 'jax', 'flax': 'flax', 'torch': 'PyTorch'}


def parser(doc: str) -> command.Parser:
  """Makes a parser with the argument of every benchmark.

  Args:
    doc: the text of `--help`.
  """
  made = command.Parser(doc)
  made.add_argument('--json', type=_file, metavar='FILE', help='write the results there; see benchmarks.results')
  return made


def check_counts(args: argparse.Namespace, *names: str) -> None:
  """Checks numbers that count something, before the work that would fail late without them.

  Args:
    args: of the command.
    names: of arguments; one that is None was not given.

  Raises:
    UsageError: one is less than 1.
  """
  for name in names:
    count = getattr(args, name)
    if count is not None and count < 1:
      raise UsageError(f'--{name} is {count}; it must be at least 1.')


def cpu(environment: Mapping[str, Any]) -> str:
  """The cores that an environment.json describes, in words."""
  cores = environment['cpu_cores']
  return f'{cores} {"core" if cores == 1 else "cores"} of {environment["cpu"]}'


def describe(versions: Mapping[str, str] | None = None, **fields: Any) -> dict[str, Any]:
  """The results that this process measured, with the command, the hardware, the versions and the commit.

  Args:
    versions: of programs that ran in other interpreters.
    fields: the measurements.
  """
  with tempfile.TemporaryDirectory() as directory:
    record.write_environment(directory)
    environment = json.loads((pathlib.Path(directory) / 'environment.json').read_text())
  cores, device = cpu(environment), f'{environment["num_devices"]} x {environment["device_kind"]}, '
  git = environment['git']
  return {
    'command': shlex.join(['python', *(re.sub('=/.*', '=PATH', argument) for argument in sys.orig_argv[1:])]),
    'hardware': cores if environment['backend'] == 'cpu' else device + cores,
    'versions': {name: environment['versions'][name] for name in ('python', 'jax', 'flax')} | dict(versions or {}),
    'commit': git and git['commit'][:7] + (' with changes' if git['dirty'] else ''),
    'load_average': os.getloadavg()[2],  # over 15 minutes
    **fields,
  }


def source(found: Mapping[str, Any]) -> str:
  """One sentence about where numbers come from: hardware, versions, commit; what is None is unknown."""
  versions = show_versions(found['versions'] or {}) or 'versions unknown'
  return f'{found["hardware"]}; {versions}; commit {found["commit"] or "unknown"}.'


def show_versions(versions: Mapping[str, str]) -> str:
  """Versions as text: Python 3.13, jax 0.12."""
  return ', '.join(f'{_LIBRARIES.get(name, name)} {version}' for name, version in versions.items())


def publish(found: Mapping[str, Any], tables: Mapping[str, str], path: pathlib.Path | None) -> None:
  """Prints the tables of a benchmark and writes its results.

  Args:
    found: from `describe`.
    tables: of `run.tables`.
    path: a JSON file; the fields that it has and `found` has not are kept. None: nothing is written.
  """
  for table in tables.values():
    print(f'\n{table}')
  if path is not None:
    merged = (read(path) if path.exists() else {}) | dict(found)
    write_atomically(path, json.dumps(merged, indent=2, ensure_ascii=False) + '\n')


def read(path: pathlib.Path) -> dict[str, Any]:
  """The contents of a file of results.

  Raises:
    UsageError: it is missing or not JSON.
  """
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UsageError(f'cannot read {path}: {error}; measure it again or restore it.') from error


def folders(parent: pathlib.Path = FOLDER) -> list[pathlib.Path]:
  """The folders that have results."""
  return sorted(path.parent for path in parent.glob('*/results.json'))


def page(folder: pathlib.Path, tables: Tables | None = None) -> str:
  """README.md of a folder, with the tables of its results.json.

  Args:
    folder: of a benchmark; its parent is a package.
    tables: of its `run.py`; None: imported from there.
  """
  tables = tables or importlib.import_module(f'{folder.parent.name}.{folder.name}.run').tables
  made = (folder / 'README.md').read_text()
  for name, table in tables(read(folder / 'results.json')).items():
    made = insert(made, name, table)
  return made


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  command.Parser(__doc__).parse_args(argv)
  for folder in folders():
    write_atomically(folder / 'README.md', page(folder))


def _file(text: str) -> pathlib.Path:
  path = pathlib.Path(text)
  if not path.parent.is_dir():  # found out before the measurement, not after it
    raise argparse.ArgumentTypeError(f'there is no folder {path.parent}')
  return path


if __name__ == '__main__':
  command.run(main)
