"""What the experiments share: a config trained from several seeds, and how its results are told and drawn.

Every run of an experiment is an ordinary run in a workdir of its own, so the same command goes on with an experiment
that was stopped or killed: complete runs answer with what they recorded.
"""

import argparse
import ast
import contextlib
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cnn_jax import UsageError, command, main, record
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, Split


def run(experiment: Callable[[Sequence[str]], None]) -> NoReturn:
  """Runs an experiment as a command, with the exit statuses of `cnn_jax.main`."""

  def guarded(argv: Sequence[str]) -> int:
    if not {'-h', '--help'} & set(argv):
      command.prepare_backend()
    from cnn_jax import train

    try:
      experiment(argv)
    except train.Diverged as error:
      command.fail(error)
      return command.DIVERGED
    except train.Stopped as stopped:
      print(stopped, file=sys.stderr)
      return command.STOPPED
    return command.DONE

  command.run(guarded)


def parser(doc: str, name: str, seeds: int) -> command.Parser:
  """The arguments that every experiment has; `override` takes the rest, `--config.FIELD=VALUE`.

  Args:
    doc: what `--help` says.
    name: of the experiment, and of its folder in runs/.
    seeds: how many, by default.
  """
  made = command.Parser(doc)
  made.formatter_class = argparse.RawDescriptionHelpFormatter
  made.add_argument('--seeds', type=int, default=seeds, help='runs of each kind: seeds 0, 1, ... (%(default)s)')
  made.add_argument('--workdir', type=Path, default=Path('runs') / name, help='of all runs (%(default)s)')
  made.add_argument('--json', type=Path, help='write the results there')
  made.add_argument('--plot', type=Path, help='draw the figure there, a .png')
  return made


def override(config: Any, arguments: Sequence[str]) -> Any:
  """A checked copy of a config with some fields set.

  Args:
    config: from a file of configs/.
    arguments: `--config.FIELD=VALUE`, as `cnn_jax.main` takes them.

  Raises:
    UsageError: an argument is not of that form, or the field or its value is wrong.
  """
  fields = {}
  for argument in arguments:
    name, equals, value = argument.partition('=')
    if not equals or not name.startswith('--config.'):
      raise UsageError(f'{argument!r} is not an argument; see --help. A field is set by --config.NAME=VALUE.')
    with contextlib.suppress(ValueError, SyntaxError):  # what is no literal is a string
      value = ast.literal_eval(value)
    fields[name.removeprefix('--config.')] = value
  return vary(config, fields)


def vary(config: Any, fields: Mapping[str, Any]) -> Any:
  """A checked copy of a config with some fields set, given as {'model.features': (32, 64)}.

  Raises:
    UsageError: names the field that is wrong.
  """
  made = config.copy_and_resolve_references().lock()
  for field, value in fields.items():
    try:
      made.update_from_flattened_dict({field: value})
    except (KeyError, TypeError, ValueError) as error:
      raise UsageError(f'config.{field}: {error.args[0]}') from error
  config_lib.check(made)
  return made


def train(
  config: Any, workdir: str | os.PathLike, seed: int, dataset: Dataset, *, evaluate_test: bool = True
) -> dict[str, Any]:
  """What `train_and_evaluate` returns for one seed, in the workdir that `record.seed_workdir` gives it.

  Reports and TensorBoard events, which nobody would look at, are off.
  """
  config = vary(config, {'seed': seed, 'log.report': False, 'log.tensorboard': False})
  place = record.seed_workdir(workdir, seed)
  return main.train_and_evaluate(config, place, dataset=dataset, evaluate_test=evaluate_test)


def train_seeds(
  config: Any, workdir: str | os.PathLike, seeds: int, dataset: Dataset, *, evaluate_test: bool = True
) -> list[dict[str, Any]]:
  """The results of the seeds 0, 1, ...; see `train`."""
  return [train(config, workdir, seed, dataset, evaluate_test=evaluate_test) for seed in range(seeds)]


def select(
  config: Any,
  candidates: Mapping[str, Mapping[str, Any]],
  epochs: int,
  workdir: str | os.PathLike,
  seeds: int,
  dataset: Dataset,
) -> str:
  """Trains variants of a config for a few epochs and compares them on validation; none looks at the test split.

  Args:
    config: with a validation split.
    candidates: name -> fields that differ from the config.
    epochs: of each; the warm-up is shortened in proportion.
    workdir, seeds, dataset: as `train_seeds`.

  Returns:
    A table, in the order of the candidates.
  """
  warmup = config.schedule.warmup_epochs * epochs / config.epochs
  rows = []
  for name, fields in candidates.items():
    made = vary(config, {'epochs': epochs, 'schedule.warmup_epochs': warmup, **fields})
    place = Path(workdir) / f'select_{epochs}_epochs' / name.replace(' ', '_')
    results = train_seeds(made, place, seeds, dataset, evaluate_test=False)
    rows.append(
      [
        name,
        f'{results[0]["num_parameters"]:,}',
        f'{statistics.mean(r["images_per_second"] or 0 for r in results):,.0f}',
        mean_std([r['validation_accuracy'] for r in results]),
        f'{statistics.mean(r["validation_loss"] for r in results):.4f}',
        str(seeds),
      ]
    )
  return table(['candidate', 'parameters', 'images/s', 'validation accuracy', 'validation loss', 'n'], rows)


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """What a JSON file holds; where there is none yet, `measure` is called and its result kept there."""
  if not path.exists():
    record.write_json(path, measure())
  return json.loads(path.read_text())


# Data -------------------------------------------------------------------------------------------


def subset(dataset: Dataset, size: int, seed: int) -> Dataset:
  """A data set with a part of its training images: of every class alike many, as far as there are.

  Subsets of one seed lie within one another: 300 images are the 100 and 200 more.

  Args:
    dataset: whose validation and test splits stay as they are.
    size: training images.
    seed: of the choice.

  Raises:
    UsageError: there are fewer.
  """
  labels = dataset.train.labels
  if size > len(labels):
    raise UsageError(f'{dataset.name} has {len(labels)} training images, which is less than {size}.')
  order = np.random.default_rng(seed).permutation(len(labels))
  rank = np.empty(len(labels), np.int64)  # of each image among those of its class, in that order
  for label in range(len(dataset.class_names)):
    members = order[labels[order] == label]
    rank[members] = np.arange(len(members))
  chosen = order[np.argsort(rank[order], kind='stable')][:size]
  images = np.asarray(dataset.train.images[chosen])
  # The name goes into the record, and keeps a run from being resumed on other images.
  return dataclasses.replace(
    dataset,
    name=f'{dataset.name}, {size:,} training images chosen with seed {seed}',
    train=Split(images, labels[chosen]),
  )


# Tables -----------------------------------------------------------------------------------------


def mean_std(shares: Sequence[float]) -> str:
  """Mean and standard deviation of shares, in percent: 99.61 ± 0.04 %."""
  spread = f' ± {100 * statistics.stdev(shares):.2f}' if len(shares) > 1 else ''
  return f'{100 * statistics.mean(shares):.2f}{spread} %'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown."""
  return '\n'.join(f'| {" | ".join(line)} |' for line in [header, ['---'] * len(header), *rows])


# Figures ----------------------------------------------------------------------------------------

COLOURS = ('#1f6f8b', '#d1603d', '#6b8f3c', '#7d5a9b', '#8a8a8a')
_INK, _LINE = '#333333', '#bbbbbb'
_STYLE = {
  'font.size': 10,
  'text.color': _INK,
  'axes.labelcolor': _INK,
  'axes.edgecolor': _LINE,
  'axes.linewidth': 0.8,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.titlesize': 11,
  'axes.titlelocation': 'left',
  'xtick.color': _LINE,
  'ytick.color': _LINE,
  'xtick.labelcolor': _INK,
  'ytick.labelcolor': _INK,
  'lines.linewidth': 1.6,
}


@contextlib.contextmanager
def figure(
  path: str | os.PathLike, *, widths: Sequence[float] = (1,), size: tuple[float, float] = (6.0, 4.0)
) -> Iterator[Any]:
  """Gives a figure and its axes side by side, an array, to draw on; writes the PNG afterwards.

  Args:
    path: of the PNG.
    widths: of the axes, in proportion.
    size: of the figure, inches.
  """
  import matplotlib as mpl

  mpl.use('Agg')
  import matplotlib.pyplot as plt

  with plt.rc_context(_STYLE):
    ratios = {'width_ratios': widths}
    made, axes = plt.subplots(1, len(widths), figsize=size, layout='constrained', squeeze=False, gridspec_kw=ratios)
    yield made, axes[0]
    made.savefig(path, dpi=150)
    plt.close(made)


def error_axis(axes: Any) -> None:
  """Makes the vertical axis one of errors in percent, on a logarithmic scale with plain numbers."""
  from matplotlib import ticker

  axes.set_yscale('log')
  for which in (axes.yaxis.set_major_locator, axes.yaxis.set_minor_locator):
    which(ticker.NullLocator())
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f'{y:g}'))
  axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  axes.set_ylabel('test error, %')


def curves(axes: Any, x: Sequence[float], lines: Mapping[str, Sequence[Sequence[float]]]) -> None:
  """Draws lines through means with bars of a standard deviation, every seed as a point, each line named at its end.

  Args:
    axes: with scales set, as the names are put apart where they are.
    x: of the points.
    lines: name -> the values of all seeds at each x.
  """
  ends = []
  for (name, values), colour in zip(lines.items(), COLOURS, strict=False):
    means = [statistics.mean(v) for v in values]
    bars = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    axes.plot(x, means, color=colour)
    axes.errorbar(x, means, bars, fmt='none', color=colour, alpha=0.5, capsize=2.5, elinewidth=1)
    axes.plot(
      [place for place, v in zip(x, values, strict=True) for _ in v], [value for v in values for value in v],
      'o', color=colour, markersize=3.5, alpha=0.45, markeredgewidth=0,
    )  # fmt: skip
    ends.append((means[-1], name, colour))
  axes.spines.bottom.set_bounds(x[0], x[-1])
  name_ends(axes, x[-1], ends)


def name_ends(axes: Any, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
  """Writes names to the right of the ends of lines, a line of text apart where the ends are closer."""
  axes.figure.canvas.draw()  # settles the scales
  apart = 13 * axes.figure.dpi / 72
  lowest = -np.inf
  for y, name, colour in sorted(ends):
    height = axes.transData.transform((x, y))[1]
    placed = max(height, lowest + apart)
    lowest = placed
    axes.annotate(
      name, (x, y), (8, (placed - height) * 72 / axes.figure.dpi), textcoords='offset points', va='center', color=colour
    )  # fmt: skip
