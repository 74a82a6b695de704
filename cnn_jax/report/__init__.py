"""The report: one self-contained HTML page about a run, its result, its errors and its network. Also a command.

python -m cnn_jax.report --workdir=DIR [--output=FILE] [--split=test] [--data_dir=FOLDER]

The page has no scripts, loads nothing, and forbids both by its content security policy. Names of files and classes are
shown as text: Jinja2 escapes them in HTML, and the XML writer in SVG.
"""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import UsageError, command, evaluate, files, inspect, metrics, record
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, Split
from cnn_jax.report import charts, text
from cnn_jax.report.examples import select_examples
from cnn_jax.report.layers import tables
from cnn_jax.report.performance import calibrate, confusion, learning_curves, wilson_interval
from cnn_jax.report.subject import Subject
from cnn_jax.report.walk import follow_image
from cnn_jax.run import Run, check_has_data, check_logits, load_run, load_run_dataset

_LONGEST, _ROWS = 20_000, 50  # characters of the command and the config; rows of versions


def write_report(
  workdir: str | os.PathLike,
  dataset: Dataset | None = None,
  output: str | os.PathLike | None = None,
  data_dir: str | os.PathLike | None = None,
  split: str = 'test',
  logits: Mapping[str, np.ndarray] | None = None,
) -> Path:
  """Writes the page about a run, complete or not, from its last checkpoint.

  Args:
    workdir: the directory of a run that has saved at least once. If the run has several processes, call this from one.
    dataset: the data set of the run, if it is loaded already.
    output: the file to write; report.html in the workdir if None.
    data_dir: where the data set of the run is now, if it was moved and is not loaded.
    split: the split to show: train | validation | test.
    logits: of splits by name, float32 (n, num_classes), if they are computed already, as `evaluate.evaluate_split` does.

  Returns:
    The file.

  Raises:
    UsageError: there is no run or no usable checkpoint, its data are not found or the split is empty, or the file cannot
      be written.
  """
  path = Path(output) if output is not None else Path(workdir) / 'report.html'
  run = load_run(workdir)
  check_has_data(run)
  files.check_output(path)
  dataset = dataset or load_run_dataset(run, data_dir)
  if not len(getattr(dataset, split)):
    raise UsageError(f'the {split} split of "{run.dataset}" is empty; choose another --split.')
  page = _render(_contents(Path(workdir), run, dataset, split, logits or {}))
  try:
    files.write_atomically(path, page)
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror}; correct this or choose another --output.') from error
  return path


def main(argv: Sequence[str]) -> None:
  """The command: writes the page and prints its path."""
  parser = command.Parser('Writes one self-contained HTML page about a run.')
  parser.add_argument('--workdir', type=command.local_path, required=True, help='the run')
  parser.add_argument('--output', type=command.local_path, help='the file to write (default: report.html in the run)')
  parser.add_argument(
    '--data_dir', type=command.local_path, help='where the data set of the run is now, if it was moved'
  )
  parser.add_argument(
    '--split', default='test', choices=['train', 'validation', 'test'], help='the split to show (default: test)'
  )
  args = parser.parse_args(argv)
  command.prepare_backend()
  written = write_report(args.workdir, output=args.output, data_dir=args.data_dir, split=args.split)
  print(command.printable(str(written)))


def _contents(workdir: Path, run: Run, dataset: Dataset, name: str, logits: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The variables of the template, by section."""
  split = getattr(dataset, name)
  # A temperature that is fitted on validation says nothing about validation.
  fitted = dataset.validation if name != 'validation' else Split(dataset.validation.images[:0], np.zeros(0, np.int32))
  of_split, of_fitted = _logits(run, [(split, logits.get(name)), (fitted, logits.get('validation'))])
  subject, views = Subject(run, split, of_split, name), evaluate.run_views(run.config)
  layers = inspect.layer_table(run.model, run.input_shape)
  with charts.style():
    walk = follow_image(subject, layers)
    head_input = 'global average pooling' if walk['pooled']['stages'] else 'input of the head'
    return {
      'split': name,
      'run_name': text.clean(workdir.absolute().name),
      'small': subject.small,
      'views': len(views.views) if views else 0,
      'result': _result(workdir, dataset, subject, layers),
      'environment': _environment(workdir),
      'curves': learning_curves(workdir),
      'confusion': confusion(of_split, split.labels, subject.classes),
      'calibration': calibrate(of_split, split.labels, of_fitted, fitted.labels),
      'examples': select_examples(subject),
      'walk': walk,
      'layers': tables(layers, head_input, walk['pooled']['size']),
      'config': text.shorten(json.dumps(run.config.to_dict(), indent=2), _LONGEST),
    }


def _logits(run: Run, parts: Sequence[tuple[Split, np.ndarray | None]]) -> list[np.ndarray]:
  """The logits of some splits: those that are given, or else computed by one program in batches of one size."""
  missing = [split for split, given in parts if given is None]
  count = sum(map(len, missing))
  batches = -(-count // run.config.evaluation.batch_size) or 1
  statistics, views = config_lib.statistics(run.config.data), evaluate.run_views(run.config)
  size = -(-count // batches)
  size = size if size <= 64 else -(-size // 32) * 32  # so that it has a divisor; see `evaluate.chunk_size`
  computed = evaluate.compute_logits(run.model, run.variables, _Joined(missing), statistics, size or 1, views)
  ends = np.cumsum([0, *map(len, missing)])
  rest = iter(computed[start:end] for start, end in itertools.pairwise(ends))
  logits = [next(rest) if given is None else given for _, given in parts]
  for found in logits:
    check_logits(found, run)
  return logits


class _Joined:
  """The images of several splits, one after another, for slices in order."""

  def __init__(self, splits: Sequence[Split]):
    self._images = [split.images for split in splits]
    self.shape = (len(self), *self._images[0].shape[1:])

  def __len__(self) -> int:
    return sum(map(len, self._images))

  def __getitem__(self, wanted: slice) -> np.ndarray:
    parts, first = [], 0
    for images in self._images:
      start, end = (min(max(place - first, 0), len(images)) for place in (wanted.start, wanted.stop))
      if start < end:
        parts.append(np.asarray(images[start:end]))
      first += len(images)
    return np.concatenate(parts)


def _render(contents: Mapping[str, Any]) -> str:
  import jinja2

  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('cnn_jax.report', '.'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {name: getattr(text, name) for name in ('percent', 'short_number', 'signed', 'shape', 'count')}
  return environment.get_template('page.html.jinja').render(contents)


def _result(workdir: Path, dataset: Dataset, subject: Subject, layers: Sequence[inspect.Layer]) -> dict[str, Any]:
  """The accuracy, and facts about the data, the network and the training."""
  run, logits, name = subject.run, subject.logits, subject.split_name
  measured = metrics.classification_metrics(logits, subject.split.labels)
  recorded = _numbers(record.read_result(workdir) or {})
  num_train = len(dataset.train)
  low, high = wilson_interval(measured['accuracy'], len(logits))
  facts = [
    (f'{name.capitalize()} images', f'{len(logits):,}'),
    (f'{name.capitalize()} loss', f'{measured["loss"]:.4f} nats'),
  ]
  if len(run.class_names) > 5:
    facts.append(('Top-5 accuracy', text.percent(measured['top5_accuracy'])))
  if name == 'test' and recorded.get('validation_accuracy') is not None:
    facts.append(('Validation accuracy', text.percent(recorded['validation_accuracy'])))
  facts += [
    ('Parameters', f'{sum(layer.parameters for layer in layers):,}'),
    ('Operations per image', text.short_number(sum(layer.operations for layer in layers))),
    ('Training images', f'{num_train:,}'),
    ('Classes', f'{len(run.class_names):,}'),
  ]
  if {'epochs', 'steps'} <= recorded.keys():
    facts.append(('Epochs, steps', f'{recorded["epochs"]:,}, {recorded["steps"]:,}'))
  if 'train_seconds' in recorded:
    facts.append(('Training time', text.duration(recorded['train_seconds'])))
  if recorded.get('images_per_second'):
    facts.append(('Training speed', f'{recorded["images_per_second"]:,.0f} images/s'))
  facts.append(('Seed', str(run.config.seed)))
  then = recorded.get(f'{name}_accuracy', measured['accuracy'])
  differs = abs(then - measured['accuracy']) > 1e-9
  return {
    'accuracy': measured['accuracy'],
    'correct': round(measured['accuracy'] * len(logits)),
    'count': len(logits),
    'low': low,
    'high': high,
    'facts': facts,
    'dataset': text.clean(dataset.name),
    'provenance': text.clean(dataset.provenance),
    'complete': bool(recorded),
    'step': run.step,
    'steps': _num_steps(run.config, num_train),
    'recorded': then if differs else None,
  }


def _environment(workdir: Path) -> dict[str, Any] | None:
  """The contents of environment.json; None if it is missing or damaged."""
  try:
    found = files.read_json(workdir / 'environment.json') or {}
    first = (found['runs'] or [found])[0]
    git = first['git']
    devices = f'{first["num_devices"]} {text.TIMES} {first["device_kind"]} ({first["backend"]})'
    versions = first['versions']
    rows = [
      ('Started', first['start_time']),
      ('Commit', f'{git["commit"]}{", with uncommitted changes" if git["dirty"] else ""}' if git else 'no checkout'),
      ('Devices', devices),
      ('Processor', f'{first["cpu"]}, {first["cpu_cores"]} cores'),
      ('System', first['platform']),
      ('Processes', str(first['num_processes'])),
      *itertools.islice(versions.items(), _ROWS),
    ]
    commit = f'commit {git["commit"][:12]}{" with changes" if git["dirty"] else ""}, ' if git else ''
    summary = (
      f'{devices}, {first["cpu"]}; {commit}cnn_jax {versions["cnn_jax"]}, jax {versions["jax"]}, '
      f'Python {versions["python"]}'
    )
    return {
      'summary': text.clean(summary),
      'command': text.clean(first['command'], _LONGEST),
      'restarts': len(found['runs']),
      'rows': [(text.clean(str(name)), text.clean(str(value))) for name, value in rows],
    }
  except (UsageError, AttributeError, ValueError, KeyError, TypeError, IndexError):
    return None


def _num_steps(config: Any, num_train: int) -> int:
  """The steps of the whole run; 0 if the batch is larger than the training split, with which no run can start."""
  steps_per_epoch = config_lib.steps_per_epoch(config, num_train)
  return steps_per_epoch and config_lib.num_epochs(config, num_train) * steps_per_epoch


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of result.json, which somebody else may have written."""
  return {name: x for name, x in values.items() if type(x) in (int, float) and 0 <= x < 1e15}
