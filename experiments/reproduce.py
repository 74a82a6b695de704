"""Trains a published result again from several seeds and tests whether the accuracy is reproduced.

    python -m experiments.reproduce NAME [--seeds=N] [--data_dir=DIR] [--workdir=runs/reproduce/NAME]
    python -m experiments.reproduce --table

The published results are in experiments/results.json; `--table` prints them as README.md shows them. As many seeds as
were published are trained, at least three, starting from the seed of the config. They are ordinary runs in
WORKDIR/seed_00000/ and so on, and the same command continues them.

PASS means that the mean test accuracies, published and measured, differ by no more than chance explains at the 5 %
level (Welch's t-test with the standard deviations and numbers of seeds of both; see `margin`), or by one test image. If
seeds, machine and versions are those of the published result, the numbers are the same and the test is weaker than
its level.

Exit status: 0 PASS, 1 OFF in either direction, 2 a usage or data error, 3 diverged, 143 stopped after saving.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cnn_jax import UsageError, command, tables
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, load_dataset
from cnn_jax.main import train_and_evaluate
from experiments import results

OFF = 1
RESULTS = results.FOLDER / 'results.json'


@dataclasses.dataclass(frozen=True)
class Spread:
  """A mean over seeds."""

  mean: float
  std: float | None  # of the sample: n - 1; None for a single seed
  n: int

  def __str__(self) -> str:
    return tables.format_mean_std(self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class Published:
  """A row of the table of results."""

  command: str  # as a reader types it
  config: str  # the config file of that command, from the top folder, with its variant
  fields: dict[str, Any]  # the fields that differ from it, and `data.source` if the command leaves it open
  data: str
  images: list[int] | None  # of training, validation and test; None: unknown
  test_accuracy: Spread  # as a fraction, at the last epoch
  num_parameters: int
  hardware: str
  versions: str
  commit: str


def main(argv: Sequence[str]) -> int:
  """The command; see the module's docstring."""
  parser = command.Parser(__doc__ or '')
  parser.add_argument('name', nargs='?', metavar='NAME', help='of a published result')
  parser.add_argument('--seeds', type=int, help='how many; default: as many as published, at least 3')
  parser.add_argument('--data_dir', help='the image folder, or the TFDS data directory')
  parser.add_argument('--workdir', type=Path, help='default: runs/reproduce/NAME')
  parser.add_argument('--results', type=Path, default=RESULTS, help='another file of results')
  parser.add_argument('--table', action='store_true', help='print the table of all results and exit')
  args = parser.parse_args(argv)
  rows = load(args.results)
  if args.table:
    print(table(rows))
    return command.DONE
  if args.name not in rows:
    wrong = 'which result?' if args.name is None else f'there is no result {args.name!r};'
    raise UsageError(f'{wrong} give one of {", ".join(rows)}.')
  row = rows[args.name]
  seeds = max(3, row.test_accuracy.n) if args.seeds is None else args.seeds
  if seeds < 2:
    raise UsageError(f'--seeds is {seeds}; a standard deviation needs at least 2.')
  config = config_of(row, {'seeds': seeds} | ({'data.dir': args.data_dir} if args.data_dir else {}))
  if config.data.source == 'folder' and not config.data.dir:
    raise UsageError(f'{args.name} was trained on an image folder ({row.data}); give it as --data_dir=DIR.')
  command.prepare_backend()
  workdir = args.workdir or Path('runs/reproduce') / args.name
  result = train_and_evaluate(config, workdir, dataset=_load_dataset(config, row))
  values = result['test_accuracy']['values']
  now = Spread(statistics.mean(values), statistics.stdev(values), len(values))
  environment = json.loads((workdir / 'environment.json').read_text())
  text, passed = report(args.name, row, now, result['num_test'], environment)
  print(f'\n{text}')
  return command.DONE if passed else OFF


def margin(one: Spread, other: Spread, num_test: int, level: float = 0.05) -> float:
  """The largest difference of two means from the same distribution that chance explains.

  Welch's t-test: t(1 - level / 2, degrees) * sqrt(s1^2 / n1 + s2^2 / n2), with the degrees of freedom of Welch and
  Satterthwaite (B. L. Welch, The generalization of "Student's" problem when several different population variances
  are involved, Biometrika 34, 1947). A single seed is assumed to have the standard deviation of the other side, which
  gives Student's prediction interval for one more value. The margin is at least one test image, the resolution of an
  accuracy.

  Args:
    one, other: accuracies as fractions; at most one of a single seed.
    num_test: test images per accuracy.
    level: the probability that a true reproduction fails the test.
  """
  from scipy import stats

  if one.std is None:
    one, other = other, one
  if one.std is None:
    raise ValueError('both sides are a single seed, so the standard deviation over seeds is unknown')
  first, second = one.std**2 / one.n, (one.std if other.std is None else other.std) ** 2 / other.n
  if first + second == 0:
    return 1 / num_test
  if other.std is None:
    degrees = one.n - 1.0
  else:
    degrees = (first + second) ** 2 / (first**2 / (one.n - 1) + second**2 / (other.n - 1))
  return max(float(stats.t.ppf(1 - level / 2, degrees)) * math.sqrt(first + second), 1 / num_test)


def report(name: str, row: Published, now: Spread, num_test: int, environment: Mapping[str, Any]) -> tuple[str, bool]:
  """Compares a published result with one measured now.

  Args:
    name, row: of the published result.
    now: the test accuracy measured now.
    num_test: test images.
    environment: the contents of environment.json of the new runs.

  Returns:
    A table with the machines and versions of both, and whether the result is reproduced.
  """
  then = row.test_accuracy
  difference, allowed = now.mean - then.mean, margin(then, now, num_test)
  passed = abs(difference) <= allowed
  verdict = 'PASS' if passed else f'OFF by {100 * (abs(difference) - allowed):.2f} points more than chance'
  versions = ', '.join(f'{library} {environment["versions"][library]}' for library in ('jax', 'flax', 'optax'))
  compared = tables.markdown(
    ['result', 'published', 'now', 'difference', 'chance allows', 'verdict'],
    [
      [
        name,
        f'{then} (n = {then.n})',
        f'{now} (n = {now.n})',
        f'{round(100 * difference, 2) + 0.0:+.2f} points',
        f'{100 * allowed:.2f} points',
        verdict,
      ]
    ],
  )
  lines = [
    compared,
    '',
    f'published: {row.hardware}; {row.versions}; commit {row.commit}',
    f'now: {results.hardware(environment)}; {versions}, Python {environment["versions"]["python"]}; '
    f'commit {results.commit(environment)}',
  ]
  return '\n'.join(lines), passed


def config_of(row: Published, fields: Mapping[str, Any]) -> ConfigDict:
  """The checked config of a published result.

  Args:
    row: the result.
    fields: more fields to set.

  Raises:
    UsageError: there is no such file, or a field is wrong.
  """
  return config_lib.vary(config_lib.load(str(results.FOLDER.parent / row.config)), {**row.fields, **fields})


def load(path: Path = RESULTS) -> dict[str, Published]:
  """Reads a file of results: name -> row.

  Raises:
    UsageError: the file is missing or has another form.
  """
  try:
    rows = json.loads(path.read_text())
    return {name: Published(**row | {'test_accuracy': Spread(**row['test_accuracy'])}) for name, row in rows.items()}
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}; give a file of results.') from error
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UsageError(f'{path} is not a file of results: {error}; see experiments/results.json.') from error


def table(rows: Mapping[str, Published]) -> str:
  """The table of results, in Markdown."""
  return tables.markdown(
    ['command', 'data', 'test accuracy', 'n', 'parameters', 'commit'],
    [
      [
        f'`{row.command}`',
        row.data,
        str(row.test_accuracy),
        str(row.test_accuracy.n),
        f'{row.num_parameters:,}',
        row.commit,
      ]
      for row in rows.values()
    ],
  )


def page(readme: str) -> str:
  """The text of README.md with the table of experiments/results.json between its marks `results`; see `tables.insert`."""
  return tables.insert(readme, 'results', table(load()))


def _load_dataset(config: ConfigDict, row: Published) -> Dataset:
  """The data set, if its splits have the sizes of the published result."""
  dataset = load_dataset(config.data)
  images = [len(dataset.train), len(dataset.validation), len(dataset.test)]
  if row.images not in (None, images):
    raise UsageError(
      f'{dataset.name} has {images} training, validation and test images here, but the published result has '
      f'{row.images} ({row.data}); give that data set as --data_dir or TFDS_DATA_DIR.'
    )
  return dataset


if __name__ == '__main__':
  command.run(main)
