"""The report: one self-contained HTML page about a run, its result, its errors and its network. Also a command.

python -m cnn_jax.report --workdir=DIR [--output=FILE]

The page has no scripts, loads nothing, and forbids both by its content security policy. Names of files and classes are
shown as text: Jinja2 escapes them in HTML, and the XML writer in SVG.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import UsageError, command, evaluate, files, inspect, metrics, record
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset
from cnn_jax.report import charts, pictures, text
from cnn_jax.report.examples import select_examples
from cnn_jax.report.performance import calibrate, confusion, learning_curves, wilson_interval
from cnn_jax.report.subject import Subject
from cnn_jax.report.walk import follow_image, kind_name
from cnn_jax.run import Run, load_run, load_run_dataset


def write_report(
  workdir: str | os.PathLike, dataset: Dataset | None = None, output: str | os.PathLike | None = None
) -> Path:
  """Writes the page about a run, complete or not, from its last checkpoint.

  Args:
    workdir: the directory of a run that has saved at least once. If the run has several processes, call this from one.
    dataset: the data set of the run, if it is loaded already.
    output: the file to write; report.html in the workdir if None.

  Returns:
    The file.

  Raises:
    UsageError: there is no run or no usable checkpoint, its data are not found, or the file cannot be written.
  """
  path = Path(output) if output is not None else Path(workdir) / 'report.html'
  run = load_run(workdir)
  if not path.parent.is_dir():
    raise UsageError(f'cannot write {path}: its folder does not exist; create it or choose another --output.')
  page = _render(_contents(Path(workdir), run, dataset or load_run_dataset(run)))
  try:
    files.write_atomically(path, page)
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror}; correct this or choose another --output.') from error
  return path


def main(argv: Sequence[str]) -> None:
  """The command: writes the page and prints its path."""
  parser = command.Parser('Writes one self-contained HTML page about a run.')
  parser.add_argument('--workdir', required=True, help='the run')
  parser.add_argument('--output', help='the file to write (default: report.html in the run)')
  args = parser.parse_args(argv)
  command.prepare_backend()
  print(write_report(args.workdir, output=args.output))


def _contents(workdir: Path, run: Run, dataset: Dataset) -> dict[str, Any]:
  """The variables of the template, by section."""
  batch_size = run.config.evaluation.batch_size
  logits, validation_logits = (
    evaluate.compute_logits(run.model, run.variables, split.images, batch_size)
    for split in (dataset.test, dataset.validation)
  )
  subject = Subject(run, dataset.test, logits)
  layers = inspect.layer_table(run.model, run.image_shape)
  with charts.style():
    return {
      'run_name': text.clean(workdir.absolute().name),
      'small': max(run.image_shape[:2]) <= pictures.SMALL,
      'result': _result(workdir, run, dataset, logits, layers),
      'environment': _environment(workdir),
      'curves': learning_curves(workdir),
      'confusion': confusion(logits, dataset.test.labels, subject.classes),
      'calibration': calibrate(logits, dataset.test.labels, validation_logits, dataset.validation.labels),
      'examples': select_examples(subject),
      'walk': follow_image(subject, layers),
      'layers': _layers(subject, layers),
      'config': json.dumps(run.config.to_dict(), indent=2),
    }


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


def _result(
  workdir: Path, run: Run, dataset: Dataset, logits: np.ndarray, layers: Sequence[inspect.Layer]
) -> dict[str, Any]:
  """The accuracy, and facts about the data, the network and the training."""
  measured = metrics.classification_metrics(logits, dataset.test.labels)
  recorded = record.read_result(workdir) or {}
  num_train = len(dataset.train)
  low, high = wilson_interval(measured['accuracy'], len(logits))
  facts = [
    ('Test images', f'{len(logits):,}'),
    ('Test loss', f'{measured["loss"]:.4f} nats'),
  ]
  if len(run.class_names) > 5:
    facts.append(('Top-5 accuracy', text.percent(measured['top5_accuracy'])))
  if recorded.get('validation_accuracy') is not None:
    facts.append(('Validation accuracy', text.percent(recorded['validation_accuracy'])))
  facts += [
    ('Parameters', f'{sum(layer.parameters for layer in layers):,}'),
    ('Operations per image', text.short_number(sum(layer.operations for layer in layers))),
    ('Training images', f'{num_train:,}'),
    ('Classes', f'{len(run.class_names):,}'),
  ]
  if recorded:
    facts.append(('Epochs, steps', f'{recorded["epochs"]:,}, {recorded["steps"]:,}'))
    facts.append(('Training time', text.duration(recorded['train_seconds'])))
    if recorded.get('images_per_second'):
      facts.append(('Training speed', f'{recorded["images_per_second"]:,.0f} images/s'))
  facts.append(('Seed', str(run.config.seed)))
  differs = abs(recorded.get('test_accuracy', measured['accuracy']) - measured['accuracy']) > 1e-9
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
    'steps': config_lib.num_epochs(run.config, num_train) * config_lib.steps_per_epoch(run.config, num_train),
    'recorded': recorded['test_accuracy'] if differs else None,
  }


def _environment(workdir: Path) -> dict[str, Any] | None:
  """The contents of environment.json; None if it is missing or damaged."""
  try:
    found = json.loads((workdir / 'environment.json').read_text())
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
      *versions.items(),
    ]
    commit = f'commit {git["commit"][:12]}{" with changes" if git["dirty"] else ""}, ' if git else ''
    summary = (
      f'{devices}, {first["cpu"]}; {commit}cnn_jax {versions["cnn_jax"]}, jax {versions["jax"]}, '
      f'Python {versions["python"]}'
    )
    return {
      'summary': text.clean(summary),
      'command': command.printable(first['command']),
      'restarts': len(found['runs']),
      'rows': [(text.clean(str(name)), text.clean(str(value))) for name, value in rows],
    }
  except (OSError, ValueError, KeyError, TypeError, IndexError):
    return None


def _layers(subject: Subject, layers: Sequence[inspect.Layer]) -> dict[str, Any]:
  """The table of the layers; the input of the head gets a row of its own."""
  rows = []
  for layer in layers:
    if layer.path == ('head',):
      rows.append(
        {
          'name': 'global average pooling' if subject.has_activation_maps else 'input of the head',
          'kind': '',
          'kernel': '',
          'shape': str(inspect.head_kernel(subject.run.variables).shape[0]),
          'parameters': 0,
          'operations': 0,
        }
      )
    rows.append(
      {
        'name': ' · '.join(layer.path),
        'kind': kind_name(layer.kind),
        'kernel': text.shape(layer.kernel) if layer.kernel else '',
        'shape': text.shape(layer.output),
        'parameters': layer.parameters,
        'operations': layer.operations,
      }
    )
  return {
    'rows': rows,
    'parameters': sum(layer.parameters for layer in layers),
    'operations': sum(layer.operations for layer in layers),
  }
