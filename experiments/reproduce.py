"""Trains a published result again, from several seeds, and says whether it comes out as published.

    python -m experiments.reproduce NAME [--seeds=N] [--data_dir=DIR] [--workdir=runs/reproduce/NAME]
    python -m experiments.reproduce --table

The results are in experiments/results.json; the README's table is what --table prints of them. The seeds are as many
as were published, and at least three, from the config's own on. They are ordinary runs in WORKDIR/seed_00000/ and so
on, and the same command goes on with them.

PASS says that the two mean test accuracies differ by no more than chance explains at the level of 5 %, by Welch's
t-test with the standard deviations and numbers of seeds of both (see `margin`), or by one test image. Where the
seeds, the machine and the versions are those of the published result, the same numbers come out and the test is
milder than its level.

Exit status: 0 PASS, 1 off, in either direction, 2 a usage or data error, 3 diverged, 143 stopped after saving.
"""

import dataclasses
import json
import math
import pathlib
import runpy
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cnn_jax import UsageError, command, main
from experiments import runs

OFF = 1
RESULTS = pathlib.Path(__file__).with_name('results.json')


@dataclasses.dataclass(frozen=True)
class Spread:
  """A mean over seeds."""

  mean: float
  std: float | None  # of the sample: n - 1; None of a single seed
  n: int

  def __str__(self) -> str:
    return f'{100 * self.mean:.2f}{"" if self.std is None else f" ± {100 * self.std:.2f}"} %'


@dataclasses.dataclass(frozen=True)
class Published:
  """A row of the README's table."""

  command: str  # as a reader would type it
  config: str  # the same as a file of configs/
  fields: dict[str, Any]  # and what differs from it; `data.source` where the command leaves that open
  data: str
  images: list[int] | None  # of training, validation and test; None: not known
  test_accuracy: Spread  # as a fraction, at the last epoch
  num_parameters: int
  hardware: str
  versions: str
  commit: str


def run(argv: Sequence[str]) -> int:
  """The command; see the module's docstring."""
  parser = command.Parser(__doc__)
  parser.add_argument('name', nargs='?', metavar='NAME', help='of a result')
  parser.add_argument('--seeds', type=int, help='how many; default: as many as published, and at least 3')
  parser.add_argument('--data_dir', help='the image folder, or the TFDS data directory')
  parser.add_argument('--workdir', help='default: runs/reproduce/NAME')
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS, help='another file of results')
  parser.add_argument('--table', action='store_true', help='print the table of all results, and do nothing else')
  args = parser.parse_args(argv)
  rows = load(args.results)
  if args.table:
    print(table(rows))
    return command.DONE
  if args.name not in rows:
    wrong = 'which result? give' if args.name is None else f'there is no result {args.name!r}; give'
    raise UsageError(f'{wrong} one of {", ".join(rows)}.')
  row = rows[args.name]
  seeds = max(3, row.test_accuracy.n) if args.seeds is None else args.seeds
  if seeds < 2:
    raise UsageError(f'--seeds is {seeds}; a standard deviation takes at least 2.')
  config = config_of(row, {'seeds': seeds} | ({'data.dir': args.data_dir} if args.data_dir else {}))
  if config.data.source == 'folder' and not config.data.dir:
    raise UsageError(f'{args.name} was trained on an image folder ({row.data}); give it as --data_dir=DIR.')
  command.prepare_backend()
  from cnn_jax import train

  workdir = pathlib.Path(args.workdir or f'runs/reproduce/{args.name}')
  try:
    result = main.train_and_evaluate(config, workdir, dataset=_load(config, row))
  except train.Diverged as error:
    command.fail(error)
    return command.DIVERGED
  except train.Stopped as stopped:
    print(stopped, file=sys.stderr)
    return command.STOPPED
  values = result['test_accuracy']['values']
  now = Spread(statistics.mean(values), statistics.stdev(values), len(values))
  environment = json.loads((workdir / 'environment.json').read_text())
  text, passed = report(args.name, row, now, result['num_test'], environment)
  print(f'\n{text}')
  return command.DONE if passed else OFF


def margin(one: Spread, other: Spread, num_test: int, level: float = 0.05) -> float:
  """How far apart chance may bring two means of the same distribution.

  Welch's t-test: t(1 - level / 2, degrees) * sqrt(s1^2 / n1 + s2^2 / n2), with the degrees of freedom of Welch and
  Satterthwaite (B. L. Welch, The generalization of "Student's" problem when several different population variances
  are involved, Biometrika 34, 1947). A single seed is taken to scatter as the other side's do, which leaves
  Student's interval for one more value. Not less than one test image, below which an accuracy says nothing.

  Args:
    one, other: of accuracies, as fractions; not both of a single seed.
    num_test: images behind each accuracy.
    level: share of true reproductions that may be called off.
  """
  from scipy import stats

  if one.std is None:
    one, other = other, one
  if one.std is None:
    raise ValueError('two single seeds say nothing of how seeds scatter')
  first, second = one.std**2 / one.n, (one.std if other.std is None else other.std) ** 2 / other.n
  if first + second == 0:
    return 1 / num_test
  if other.std is None:
    degrees = one.n - 1.0
  else:
    degrees = (first + second) ** 2 / (first**2 / (one.n - 1) + second**2 / (other.n - 1))
  return max(float(stats.t.ppf(1 - level / 2, degrees)) * math.sqrt(first + second), 1 / num_test)


def report(name: str, row: Published, now: Spread, num_test: int, environment: Mapping[str, Any]) -> tuple[str, bool]:
  """What is said at the end, and whether the result has been reproduced.

  Args:
    name, row: of the published result.
    now: its test accuracy here.
    num_test: test images.
    environment: what environment.json holds of the runs here.
  """
  then = row.test_accuracy
  difference, allowed = now.mean - then.mean, margin(then, now, num_test)
  passed = abs(difference) <= allowed
  verdict = 'PASS' if passed else f'OFF by {100 * (abs(difference) - allowed):.2f} points more than chance'
  git = environment['git']
  commit = f'{git["commit"][:7]}{", changed since" if git["dirty"] else ""}' if git else 'unknown'
  versions = ', '.join(f'{library} {environment["versions"][library]}' for library in ('jax', 'flax', 'optax'))
  if environment['backend'] == 'cpu':
    hardware = f'{environment["cpu_cores"]} cores of {environment["cpu"]}'
  else:
    hardware = f'{environment["num_devices"]} {environment["device_kind"]} ({environment["backend"]})'
  lines = [
    '| result | published | now | difference | chance allows | verdict |',
    '| --- | --- | --- | --- | --- | --- |',
    f'| {name} | {then} (n = {then.n}) | {now} (n = {now.n}) | {round(100 * difference, 2) + 0.0:+.2f} points '
    f'| {100 * allowed:.2f} points | {verdict} |',
    '',
    f'published: {row.hardware}; {row.versions}; commit {row.commit}',
    f'now: {hardware}; {versions}, Python {environment["versions"]["python"]}; commit {commit}',
  ]
  return '\n'.join(lines), passed


def config_of(row: Published, fields: Mapping[str, Any]) -> Any:
  """The checked config of a result, with some fields set besides.

  Raises:
    UsageError: there is no such file, or a field is wrong.
  """
  try:
    config = runpy.run_path(row.config)['get_config']()
  except OSError as error:
    raise UsageError(f'cannot read {row.config}: {error.strerror}; start this from the top folder.') from error
  return runs.vary(config, {**row.fields, **fields})


def load(path: pathlib.Path) -> dict[str, Published]:
  """Reads a file of results: name -> the fields of `Published`.

  Raises:
    UsageError: it is not there, or not such a file.
  """
  try:
    rows = json.loads(path.read_text())
    return {name: Published(**row | {'test_accuracy': Spread(**row['test_accuracy'])}) for name, row in rows.items()}
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}; give a file of results.') from error
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UsageError(f'{path} is not a file of results: {error}; see experiments/results.json.') from error


def table(rows: Mapping[str, Published]) -> str:
  """The results as the README has them, in Markdown."""
  lines = [
    '| command | data | test accuracy | n | parameters | commit |',
    '| --- | --- | --- | --- | --- | --- |',
    *(
      f'| `{row.command}` | {row.data} | {row.test_accuracy} | {row.test_accuracy.n} | {row.num_parameters:,} '
      f'| {row.commit} |'
      for row in rows.values()
    ),
  ]
  return '\n'.join(lines)


def _load(config: Any, row: Published) -> Any:
  """The data set, if it is divided as it was for the published result."""
  from cnn_jax.data import load_dataset

  dataset = load_dataset(config.data)
  images = [len(dataset.train), len(dataset.validation), len(dataset.test)]
  if row.images not in (None, images):
    raise UsageError(
      f'{dataset.name} has {images} training, validation and test images here, but the published result is of '
      f'{row.images} ({row.data}); give those as --data_dir or TFDS_DATA_DIR.'
    )
  return dataset


if __name__ == '__main__':
  command.run(run)
