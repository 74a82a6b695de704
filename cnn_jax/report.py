"""One self-contained HTML page about a run: what it reached, where it errs, how it sees. Also a command.

python -m cnn_jax.report --workdir=DIR [--output=FILE]

The page has no scripts, loads nothing and forbids both to itself. Whatever it shows of files and
class names is text: Jinja2 escapes it in HTML, and matplotlib in SVG.
"""

import base64
import functools
import importlib.resources
import io
import json
import math
import os
import re
import unicodedata
import warnings
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cnn_jax import UsageError, calibration, command, evaluate, metrics, record
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, Split
from cnn_jax.data.augment import normalize
from cnn_jax.evaluate import Run
from cnn_jax.model import CNN, feature_maps, head_kernel

MISTAKES, UNSURE = 25, 15  # images shown of each
TILES, CHANNELS, PATCHES = 16, 6, 8  # maps of a block shown; of these, with patches; patches of each
_BATCH, _BATCH_PIXELS = 50, 400_000  # images per look inside the network, fewer where they are large
_SMALL = 64  # pixels a side up to which images are kept and shown pixel by pixel
_CURVE_POINTS = 400

# Colours that no chart uses otherwise; in the page they become variables that follow light and dark.
_INK, _MUTED, _LINE, _BLUE, _ORANGE, _PAPER = (f'#01010{i}' for i in range(1, 7))
_VARIABLES = {
  _INK: 'var(--ink)',
  _MUTED: 'var(--muted)',
  _LINE: 'var(--line)',
  _BLUE: 'var(--blue)',
  _ORANGE: 'var(--orange)',
  _PAPER: 'var(--paper)',
}
_BLUE_RGB, _ORANGE_RGB = (58, 118, 175), (222, 96, 32)  # in pictures, which do not follow

_CHART_STYLE = {
  'svg.fonttype': 'none',  # text stays text, in the page's fonts
  'svg.hashsalt': 'cnn_jax',
  'text.parse_math': False,  # a class may be called $x$
  'text.usetex': False,
  'axes.formatter.use_mathtext': False,
  'axes.unicode_minus': True,
  'font.size': 11,
  'text.color': _INK,
  'axes.labelcolor': _MUTED,
  'axes.edgecolor': _LINE,
  'axes.labelsize': 11,
  'axes.linewidth': 1,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': _LINE,
  'grid.linewidth': 0.7,
  'xtick.color': _LINE,
  'ytick.color': _LINE,
  'xtick.labelcolor': _MUTED,
  'ytick.labelcolor': _MUTED,
  'xtick.labelsize': 10.5,
  'ytick.labelsize': 10.5,
  'xtick.minor.visible': False,
  'ytick.minor.visible': False,
  'lines.linewidth': 1.8,
}


def write_report(
  workdir: str | os.PathLike, dataset: Dataset | None = None, output: str | os.PathLike | None = None
) -> Path:
  """Writes the page about a run, complete or not, from its last checkpoint.

  Args:
    workdir: of a run that has saved at least once. Of several processes, one may do this.
    dataset: of the run, where it is loaded already.
    output: the file; report.html in the workdir if None.

  Returns:
    The file.

  Raises:
    UsageError: there is no run or no usable checkpoint, its data are not here, or the file
      cannot be written.
  """
  run = evaluate.load_run(workdir)
  page = _render(_contents(Path(workdir), run, dataset or evaluate.load_run_dataset(run)))
  path = Path(output) if output is not None else Path(workdir) / 'report.html'
  temporary = path.with_name(f'.{path.name}.tmp')
  try:
    temporary.write_text(page, encoding='utf-8')
    temporary.replace(path)
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror}; mend that or choose another --output.') from error
  return path


def receptive_field(config_model: Any, size: int, block: int, position: int) -> tuple[int, int]:
  """The pixels that one place of a block's maps depends on, along one axis.

  Args:
    config_model: the section `config.model`; group norm, which looks at a whole image, is left out.
    size: pixels of the image along the axis.
    block: from 1.
    position: in the block's maps, along the axis.

  Returns:
    First and last pixel. They lie outside the image where the place sees padding.
  """
  layers = []  # (kernel, stride, padding before) from the image on
  for i in range(block):
    for j in range(config_model.convs_per_block):
      kernel, stride = config_model.kernel_size, config_model.stride if i > 0 and j == 0 else 1
      outputs = -(-size // stride)
      padding = max((outputs - 1) * stride + kernel - size, 0)  # SAME
      layers.append((kernel, stride, padding // 2))
      size = outputs
    if config_model.pool != 'none' and i < len(config_model.features) - 1:
      layers.append((2, 2, 0))
      size //= 2
  first = last = position
  for kernel, stride, padding in reversed(layers):
    first, last = first * stride - padding, last * stride - padding + kernel - 1
  return first, last


def class_activation_maps(run: Run, maps: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """Where in an image the evidence for a class lies (Zhou et al. 2016, arXiv 1512.04150).

  With global average pooling this is exact: the mean of a map, plus the head's bias, is the logit.

  Args:
    run: with `aggregate` 'gap'.
    maps: float (n, height, width, features), the last block's.
    classes: int (n, k), k classes for each image.

  Returns:
    float (n, k, height, width).
  """
  kernel = head_kernel(run.model, run.variables)
  return np.einsum('nhwf,fnk->nkhw', maps, kernel[:, classes])


def main(argv: Sequence[str]) -> None:
  """The command: writes the page and prints where it is."""
  parser = command.Parser('Writes one self-contained HTML page about a run.')
  parser.add_argument('--workdir', required=True, help='the run')
  parser.add_argument('--output', help='the file (default: report.html in the run)')
  args = parser.parse_args(argv)
  command.prepare_backend()
  print(write_report(args.workdir, output=args.output))


def _contents(workdir: Path, run: Run, dataset: Dataset) -> dict[str, Any]:
  """What the template shows, by section."""
  import matplotlib

  batch_size = run.config.evaluation.batch_size
  logits = evaluate.compute_logits(run.model, run.variables, dataset.test.images, batch_size)
  validation_logits = evaluate.compute_logits(run.model, run.variables, dataset.validation.images, batch_size)
  classes = [_clean(name) for name in run.class_names]
  with matplotlib.rc_context(_CHART_STYLE), warnings.catch_warnings():
    # A name in a script that matplotlib's font lacks is only measured with it; the page's font shows it.
    warnings.filterwarnings('ignore', message='Glyph')
    look = _Look(run, dataset.test, logits, classes)
    layers = _layers(run)
    return {
      'run_name': _clean(workdir.absolute().name),
      'small': max(run.image_shape[:2]) <= _SMALL,
      'result': _result(workdir, run, dataset, logits, layers),
      'environment': _environment(workdir),
      'curves': _curves(workdir),
      'confusion': _confusion(logits, dataset.test.labels, classes),
      'calibration': _calibration(logits, dataset.test.labels, validation_logits, dataset.validation.labels),
      'examples': look.examples(),
      'walk': look.walk(),
      'layers': layers,
      'config': json.dumps(_as_json(run.config.to_dict()), indent=2),
    }


def _render(contents: Mapping[str, Any]) -> str:
  import jinja2

  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  environment.filters |= {'percent': _percent, 'short': _short_number}
  template = importlib.resources.files('cnn_jax').joinpath('report.html.jinja').read_text(encoding='utf-8')
  return environment.from_string(template).render(contents)


# Sections ---------------------------------------------------------------------------------------


def _result(workdir: Path, run: Run, dataset: Dataset, logits: np.ndarray, layers: Mapping[str, Any]) -> dict[str, Any]:
  measured = metrics.classification_metrics(logits, dataset.test.labels)
  recorded = record.read_result(workdir) or {}
  num_train = len(dataset.train)
  low, high = _wilson(measured['accuracy'], len(logits))
  facts = [
    ('Test images', f'{len(logits):,}'),
    ('Test loss', f'{measured["loss"]:.4f} nats'),
  ]
  if len(run.class_names) > 5:
    facts.append(('Among the top five', _percent(measured['top5_accuracy'])))
  if recorded.get('validation_accuracy') is not None:
    facts.append(('Validation accuracy', _percent(recorded['validation_accuracy'])))
  facts += [
    ('Parameters', f'{layers["parameters"]:,}'),
    ('Operations an image', _short_number(layers['operations'])),
    ('Training images', f'{num_train:,}'),
    ('Classes', f'{len(run.class_names):,}'),
  ]
  if recorded:
    facts.append(('Epochs, steps', f'{recorded["epochs"]:,}, {recorded["steps"]:,}'))
    facts.append(('Training time', _duration(recorded['train_seconds'])))
    if recorded.get('images_per_second'):
      facts.append(('Training speed', f'{recorded["images_per_second"]:,.0f} images/s'))
  facts.append(('Seed', str(run.config.seed)))
  steps = config_lib.num_epochs(run.config, num_train) * config_lib.steps_per_epoch(run.config, num_train)
  differs = abs(recorded.get('test_accuracy', measured['accuracy']) - measured['accuracy']) > 1e-9
  return {
    'accuracy': measured['accuracy'],
    'right': round(measured['accuracy'] * len(logits)),
    'count': len(logits),
    'low': low,
    'high': high,
    'facts': facts,
    'dataset': _clean(dataset.name),
    'provenance': _clean(dataset.provenance),
    'complete': bool(recorded),
    'step': run.step,
    'steps': steps,
    'recorded': recorded['test_accuracy'] if differs else None,
  }


def _environment(workdir: Path) -> dict[str, Any] | None:
  """What environment.json says; None where it is missing or not whole."""
  try:
    found = json.loads((workdir / 'environment.json').read_text())
    first = (found['runs'] or [found])[0]
    git = first['git']
    devices = f'{first["num_devices"]} \u00d7 {first["device_kind"]} ({first["backend"]})'
    rows = [
      ('Started', first['start_time']),
      (
        'Commit',
        f'{git["commit"]}{", with changes not committed" if git["dirty"] else ""}' if git else 'not a checkout',
      ),
      ('Devices', devices),
      ('Processor', f'{first["cpu"]}, {first["cpu_cores"]} cores'),
      ('System', first['platform']),
      ('Processes', str(first['num_processes'])),
      *((name, version) for name, version in first['versions'].items()),
    ]
    commit = f'commit {git["commit"][:12]}{" with changes" if git["dirty"] else ""}, ' if git else ''
    versions = first['versions']
    return {
      'summary': _clean(
        f'On {devices}, {first["cpu"]}; {commit}cnn_jax {versions["cnn_jax"]}, jax {versions["jax"]}, '
        f'Python {versions["python"]}'
      ),
      'command': _clean(first['command']),
      'restarts': len(found['runs']),
      'rows': [(_clean(str(name)), _clean(str(value))) for name, value in rows],
    }
  except (OSError, ValueError, KeyError, TypeError, IndexError):
    return None


def _curves(workdir: Path) -> list[dict[str, Any]]:
  """Charts of metrics.jsonl: loss, accuracy, learning rate."""
  lines = []
  try:
    for line in (workdir / 'metrics.jsonl').read_text().splitlines():
      entry = json.loads(line)
      lines.append((entry['split'], entry['step'], entry))
  except (OSError, ValueError, KeyError, TypeError):
    pass  # a run that was killed may leave half a line; what is before it counts

  def series(split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(step, entry[name]) for s, step, entry in lines if s == split and entry.get(name) is not None]
    points = np.array(found, np.float64).reshape(-1, 2)
    size = -(-len(points) // _CURVE_POINTS) or 1
    means = [np.mean(points[i : i + size], axis=0) for i in range(0, len(points), size)]
    steps, values = np.array(means).reshape(-1, 2).T
    return steps, values

  charts = []
  for name, title, splits in (
    ('loss', 'Loss, nats', ('train', 'validation')),
    ('accuracy', 'Accuracy', ('train', 'validation')),
    ('learning_rate', 'Learning rate', ('train',)),
  ):
    curves = {split: series(split, name) for split in splits}
    curves = {split: curve for split, curve in curves.items() if len(curve[0])}
    if not curves:
      continue
    figure, axes = _chart(380, 240)
    if name == 'accuracy':
      # Errors on a logarithmic axis, labelled as accuracies: 99 and 99.5 % are far apart there.
      positive = np.concatenate([1 - y for _, y in curves.values()])
      floor = np.min(positive[positive > 0], initial=1.0) / 2
      curves = {split: (x, np.maximum(1 - y, floor)) for split, (x, y) in curves.items()}
    for split, (x, y) in curves.items():
      colour, marker = (_BLUE, '') if split == 'train' else (_ORANGE, 'o' if len(x) < 60 else '')
      if len(x) == 1:
        marker = 'o'
      axes.plot(x, y, color=colour, marker=marker, markersize=3.5, label=split)
    if name == 'accuracy':
      _label_errors_as_accuracies(axes)
    elif name == 'loss' and all(np.min(y) > 0 for _, y in curves.values()):
      axes.set_yscale('log')
      _label_plainly(axes.yaxis)
    else:
      axes.set_ylim(bottom=0)
    axes.set_xlabel('step')
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(_ticker().FuncFormatter(lambda x, _: f'{x:,.0f}'))
    last = {split: y[-1] if name != 'accuracy' else 1 - y[-1] for split, (_, y) in curves.items()}
    values = '; '.join(f'last {split} value {value:.4g}' for split, value in last.items())
    charts.append({'title': title, 'svg': _svg(figure, f'{title} against the training step; {values}.')})
  return charts


def _confusion(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
  from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

  n = len(classes)
  predicted = np.argmax(logits, axis=1)
  matrix = confusion_matrix(labels, predicted, labels=np.arange(n))
  precision, recall, f1, support = precision_recall_fscore_support(
    labels, predicted, labels=np.arange(n), zero_division=np.nan
  )
  share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  errors = share * (1 - np.eye(n))
  opacity = np.where(np.eye(n, dtype=bool), 0.55 * share, 0.85 * np.sqrt(errors / max(errors.max(), 1e-9)))
  colours = np.where(np.eye(n, dtype=bool)[..., None], _BLUE_RGB, _ORANGE_RGB) / 255
  figure, axes = _chart(400, 400)
  axes.imshow(np.concatenate([colours, opacity[..., None]], axis=2), interpolation='none', aspect='auto')
  axes.grid(False)
  axes.set_xlabel('predicted')
  axes.set_ylabel('true')
  axes.tick_params(length=0)
  if n <= 20:
    names = [_shortened(name, 12) for name in classes]
    wide = max(map(len, names)) > 3
    axes.set_xticks(np.arange(n), names, rotation=45 if wide else 0, ha='right' if wide else 'center')
    axes.set_yticks(np.arange(n), names)
    for i, j in np.argwhere(matrix):
      axes.text(j, i, f'{matrix[i, j]:,}', ha='center', va='center', fontsize=10.5 if n <= 10 else 8)
  pairs = [(int(i), int(j)) for i, j in np.argwhere(matrix * (1 - np.eye(n, dtype=int)))]
  pairs.sort(key=lambda pair: (-matrix[pair], pair))
  return {
    'svg': _svg(
      figure,
      f'Confusion matrix of {n} classes: {np.trace(matrix):,} of {matrix.sum():,} images lie on the diagonal, '
      'where prediction and truth agree.',
      grow=1.3,
    ),
    'numbers': n <= 20,
    'pairs': [
      {'true': classes[i], 'predicted': classes[j], 'count': int(matrix[i, j]), 'share': share[i, j]}
      for i, j in pairs[:10]
    ],
    'num_pairs': len(pairs),
    'classes': [
      {'name': name, 'precision': p, 'recall': r, 'f1': f, 'count': int(s)}
      for name, p, r, f, s in zip(classes, precision, recall, f1, support, strict=True)
    ],
    'macro_f1': float(np.nanmean(f1)),
  }


def _calibration(
  logits: np.ndarray, labels: np.ndarray, validation_logits: np.ndarray, validation_labels: np.ndarray
) -> dict[str, Any]:
  def measure(temperature: float, title: str) -> dict[str, Any]:
    probabilities = calibration.softmax(logits, temperature)
    error = calibration.expected_calibration_error(probabilities, labels)
    likelihood = -np.mean(np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)))
    figure = _reliability_chart(*calibration.reliability(probabilities, labels))
    alt = f'Reliability diagram {title}: accuracy against confidence in bins; calibration error {_percent(error)}.'
    return {'title': title, 'error': error, 'loss': float(likelihood), 'svg': _svg(figure, alt)}

  before = measure(1.0, 'as trained')
  if not len(validation_labels):
    return {'before': before, 'after': None, 'temperature': None}
  temperature = calibration.fit_temperature(validation_logits, validation_labels)
  after = measure(temperature, 'after temperature scaling')
  return {
    'before': before,
    'after': after,
    'temperature': temperature,
    'fitted_on': len(validation_labels),
    'no_mistakes': bool(np.all(np.argmax(validation_logits, axis=1) == validation_labels)),
  }


def _reliability_chart(confidence: np.ndarray, accuracy: np.ndarray, count: np.ndarray) -> Any:
  edges = np.linspace(0, 1, len(count) + 1)
  full = count > 0
  figure, (axes, below) = _chart(380, 330, rows=(3, 1))
  axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
  axes.bar(edges[:-1][full], accuracy[full], 1 / len(count), align='edge', color=_BLUE, alpha=0.35, edgecolor=_PAPER)
  axes.plot(confidence[full], accuracy[full], 'o', color=_BLUE, markersize=4.5)
  axes.vlines(confidence[full], accuracy[full], confidence[full], color=_ORANGE, linewidth=2)
  axes.set_ylabel('accuracy')
  axes.set_xticklabels([])
  below.bar(edges[:-1], count, 1 / len(count), align='edge', color=_MUTED, alpha=0.55, edgecolor=_PAPER)
  below.set_yscale('log')
  below.set_ylim(0.5, 2 * max(count.max(), 1))
  _label_plainly(below.yaxis)
  below.set_xlabel('confidence: the probability of the class predicted')
  below.set_ylabel('images')
  for ax in (axes, below):
    ax.set_xlim(0, 1)
  axes.set_ylim(0, 1.02)
  below.xaxis.set_major_formatter(_ticker().PercentFormatter(1, 0))
  axes.yaxis.set_major_formatter(_ticker().PercentFormatter(1, 0))
  return figure


def _layers(run: Run) -> dict[str, Any]:
  """Parameters, shapes and operations of each layer; two operations are one multiplication and one addition."""
  images = jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32)
  shapes = jax.eval_shape(
    lambda variables, x: run.model.apply(variables, x, train=False, capture_intermediates=True)[1]['intermediates'],
    run.variables,
    images,
  )
  rows = []
  params = run.variables['params']
  size: tuple[int, ...] = run.image_shape[:2]
  for top in sorted(params, key=lambda name: (name == 'head', _natural(name))):
    if top == 'head':
      (vector,) = shapes[run.model.aggregate]
      name = 'global average pooling' if run.model.aggregate == 'gap' else 'flatten'
      rows.append({'name': name, 'shape': _shape(vector.shape[1:]), 'parameters': 0, 'operations': 0, 'kind': ''})
    layers = {top: (params[top], shapes[top])}
    if 'kernel' not in params[top]:
      layers = {f'{top} · {name}': (params[top][name], shapes[top][name]) for name in sorted(params[top], key=_natural)}
    for name, (weights, output) in layers.items():
      output_shape = output['__call__'][0].shape[1:]
      kernel = weights.get('kernel')
      if ' conv' in name:  # whose output may have been pooled already; padding keeps the size, but for the stride
        stride = run.model.stride if name.endswith(' conv1') and top != 'block1' else 1
        size = tuple(-(-side // stride) for side in size)
        output_shape = (*size, kernel.shape[-1])
      places = math.prod(output_shape[:-1])
      rows.append(
        {
          'name': name,
          'kind': '' if kernel is None else '\u00d7'.join(map(str, kernel.shape)),
          'shape': _shape(output_shape),
          'parameters': sum(p.size for p in jax.tree.leaves(weights)),
          'operations': 0 if kernel is None else 2 * kernel.size * places,
        }
      )
    if top != 'head':
      size = shapes[top]['__call__'][0].shape[1:3]
  return {
    'rows': rows,
    'parameters': sum(row['parameters'] for row in rows),
    'operations': sum(row['operations'] for row in rows),
  }


class _Look:
  """Looks inside the network: class activation maps, and one image's way through it."""

  def __init__(self, run: Run, test: Split, logits: np.ndarray, classes: Sequence[str]):
    self._run, self._test, self._logits, self._classes = run, test, logits, classes
    self._probabilities = calibration.softmax(logits)
    self._predicted = np.argmax(logits, axis=1)
    self._confidence = np.max(self._probabilities, axis=1)

  def examples(self) -> dict[str, Any]:
    """The most confident mistakes, and the images whose most probable class is least probable."""
    wrong = np.flatnonzero(self._predicted != self._test.labels)
    mistakes = wrong[np.argsort(-self._confidence[wrong], kind='stable')][:MISTAKES]
    unsure = np.argsort(self._confidence, kind='stable')[:UNSURE]
    # The rival of a wrong class is the true one, otherwise the second most probable.
    second = np.argsort(-self._logits, axis=1, kind='stable')[:, 1]
    chosen = np.concatenate([mistakes, unsure])
    rivals = np.concatenate([self._test.labels[mistakes], second[unsure]])
    classes = np.stack([self._predicted[chosen], rivals], axis=1)
    cards = [self._card(int(i), pair) for i, pair in zip(chosen, classes, strict=True)]
    if self._run.model.aggregate == 'gap':
      last = f'block{len(self._run.model.features)}'
      maps = np.concatenate([np.asarray(maps[last]) for _, maps in self._looks(chosen)])[: len(chosen)]
      for card, evidence in zip(cards, class_activation_maps(self._run, maps, classes), strict=True):
        scale = max(float(evidence.max()), 1e-9)
        for side, one, colour in zip(card['sides'], evidence, (_ORANGE_RGB, _BLUE_RGB), strict=True):
          side['map'] = self._overlay(one / scale, colour)
    return {
      'mistakes': cards[: len(mistakes)],
      'unsure': cards[len(mistakes) :],
      'num_mistakes': len(wrong),
      'has_maps': self._run.model.aggregate == 'gap',
    }

  def walk(self) -> dict[str, Any]:
    """One test image from its pixels to its one-hot vector, with the numbers on the way."""
    right = np.flatnonzero(self._predicted == self._test.labels)
    index = int(right[0]) if len(right) else 0
    image = np.asarray(self._test.images[index])
    ((_, found),) = self._looks(np.array([index]))
    maps = {name: np.asarray(values)[0] for name, values in found.items()}
    return {
      'name': self._name(index),
      'true': self._classes[self._test.labels[index]],
      'predicted': self._classes[self._predicted[index]],
      'picture': self._picture(image),
      'height': image.shape[0],
      'width': image.shape[1],
      'channels': image.shape[2],
      'pixels': _pixel_table(image),
      'kernels': self._kernels(maps['block1']),
      'blocks': self._blocks(maps),
      'vector': self._vector(maps, index),
      'outputs': self._outputs(maps['logits'], index),
    }

  def _card(self, index: int, pair: np.ndarray) -> dict[str, Any]:
    true = int(self._test.labels[index])
    return {
      'name': self._name(index),
      'picture': self._picture(np.asarray(self._test.images[index])),
      'true': self._classes[true],
      'right': int(pair[0]) == true,
      'sides': [
        {'class': self._classes[c], 'probability': self._probabilities[index, c], 'map': None} for c in map(int, pair)
      ],
    }

  def _name(self, index: int) -> str:
    return _clean(str(self._test.names[index])) if self._test.names is not None else f'test image {index:,}'

  def _picture(self, pixels: np.ndarray) -> str:
    return _data_uri(_fit(pixels, 160))

  def _overlay(self, evidence: np.ndarray, rgb: tuple[int, int, int]) -> str:
    """A class activation map, scaled to at most 1, as a veil to lay over the image; negative parts are clear."""
    height, width = self._run.image_shape[:2]
    scale = 64 / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smooth = np.asarray(Image.fromarray(evidence.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    alpha = np.round(np.clip(smooth, 0, 1) * 200).astype(np.uint8)
    return _data_uri(np.dstack([np.broadcast_to(np.array(rgb, np.uint8), (*alpha.shape, 3)), alpha]))

  def _looks(self, indices: np.ndarray) -> Iterator[tuple[dict[str, Any], dict[str, jax.Array]]]:
    """What `_look` finds in some images, batch by batch; the last batch's maps are padded."""
    height, width = self._run.image_shape[:2]
    size = max(4, min(_BATCH, _BATCH_PIXELS // (height * width)))
    for start in range(0, len(indices), size):
      batch = indices[start : start + size]
      images = np.asarray(self._test.images[np.resize(batch, size)])  # padded by repeating
      strongest, maps = _look(self._run.model, self._run.variables, images)
      n = len(batch)
      yield {name: [np.asarray(x)[:n] for x in pair] for name, pair in strongest.items()}, maps

  def _kernels(self, maps: np.ndarray) -> dict[str, Any]:
    """The first convolution's kernels, and the numbers of the one that answers this image most."""
    weights = self._run.variables['params']['block1']['conv1']
    kernels = np.asarray(weights['kernel'], np.float32)  # (k, k, channels in, channels out)
    if kernels.shape[2] == 3:
      scale = np.max(np.abs(kernels), axis=(0, 1, 2), keepdims=True)
      tiles = np.round(127.5 + 127.5 * kernels / np.maximum(scale, 1e-12)).astype(np.uint8)
    else:
      tiles = _diverging(kernels[:, :, 0] / np.maximum(np.max(np.abs(kernels[:, :, 0]), axis=(0, 1)), 1e-12))
    channel = int(np.argmax(maps.mean(axis=(0, 1))))
    one = kernels[:, :, 0, channel]
    return {
      'sheet': _data_uri(_sheet(np.moveaxis(tiles, 3, 0)[:64], 8, 0.2)),
      'colour': kernels.shape[2] == 3,
      'count': kernels.shape[3],
      'shown': min(64, kernels.shape[3]),
      'side': kernels.shape[0],
      'channel': channel,
      'numbers': [[f'{x:+.2f}'.replace('-', '\u2212') for x in row] for row in one],
    }

  def _blocks(self, maps: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each block's strongest maps of the image, and the patches of other images that excite these channels most."""
    height, width = self._run.image_shape[:2]
    count = len(self._test)
    size = min(count, max(100, min(2000, 1_600_000 // (height * width))))
    # Evenly spread, because a folder's images lie class by class.
    sample = np.unique(np.linspace(0, count - 1, size).round().astype(int))
    found = [strongest for strongest, _ in self._looks(sample)]
    strongest = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    config, blocks = self._run.config.model, []
    depth = len(config.features)
    for i in range(1, depth + 1):
      values = maps[f'block{i}']
      largest, where = strongest[f'block{i}']
      order = np.argsort(-values.mean(axis=(0, 1)), kind='stable')
      channels = []
      for channel in map(int, order[:CHANNELS]):
        if largest[:, channel].max() <= 0:
          continue
        best = np.argsort(-largest[:, channel], kind='stable')[:PATCHES]
        places = [divmod(int(where[j, channel]), values.shape[1]) for j in best]
        patches = [self._patch(int(sample[j]), i, place) for j, place in zip(best, places, strict=True)]
        channels.append(
          {
            'channel': channel,
            'map': _data_uri(_heat(_fit_map(values[:, :, channel]))),
            'patches': _data_uri(_sheet(np.stack(patches), PATCHES)),
            'count': len(patches),
            'largest': float(largest[best[0], channel]),
            'here': float(values[:, :, channel].max()),
          }
        )
      first, last = receptive_field(config, height, i, values.shape[0] // 2)
      shown = order[:TILES]
      tiles = np.stack([_heat(_fit_map(values[:, :, channel])) for channel in shown])
      blocks.append(
        {
          'number': i,
          'subject': _subject(i, depth),
          'layers': _block_layers(config, i),
          'shape': _shape(values.shape),
          'count': values.shape[2],
          'shown': len(shown),
          'sheet': _data_uri(_sheet(tiles, 4)),
          'field': last - first + 1,
          'channels': channels,
          'silent': int(np.sum(values.max(axis=(0, 1)) <= 0)),
          'sample': len(sample),
        }
      )
    return blocks

  def _patch(self, index: int, block: int, place: tuple[int, int]) -> np.ndarray:
    """What one place of a block's maps sees of an image, clear where that lies outside: RGBA (h, w, 4)."""
    image = np.asarray(self._test.images[index])
    rgb = np.broadcast_to(image, (*image.shape[:2], 3))
    height, width = image.shape[:2]
    top, bottom = receptive_field(self._run.config.model, height, block, place[0])
    left, right = receptive_field(self._run.config.model, width, block, place[1])
    # A field larger than the image is cut to its size, or the image would drown in emptiness.
    top, bottom = (0, height - 1) if bottom - top + 1 >= height else (top, bottom)
    left, right = (0, width - 1) if right - left + 1 >= width else (left, right)
    patch = np.zeros((bottom - top + 1, right - left + 1, 4), np.uint8)
    y, x = slice(max(top, 0), min(bottom + 1, height)), slice(max(left, 0), min(right + 1, width))
    patch[y.start - top : y.stop - top, x.start - left : x.stop - left] = np.dstack(
      [rgb[y, x], np.full((y.stop - y.start, x.stop - x.start), 255, np.uint8)]
    )
    return _fit(patch, _SMALL)

  def _vector(self, maps: Mapping[str, np.ndarray], index: int) -> dict[str, Any]:
    """The vector before the head, and how the largest terms add up to the logit of the class predicted."""
    vector = maps[self._run.model.aggregate]
    predicted = int(self._predicted[index])
    weights = head_kernel(self._run.model, self._run.variables)[:, predicted]
    bias = float(np.asarray(self._run.variables['params']['head']['bias'], np.float32)[predicted])
    terms = vector * weights
    largest = np.argsort(-np.abs(terms), kind='stable')[:5]
    width = -(-len(vector) // 512)
    heights = np.array([vector[i : i + width].max() for i in range(0, len(vector), width)])
    figure, axes = _chart(380, 150)
    axes.bar(np.arange(len(heights)) * width, heights, 0.8 * width, align='edge', color=_BLUE, linewidth=0)
    axes.set_xlim(-0.5, len(vector) + 0.5)
    axes.set_xlabel('channel' if width == 1 else f'number; the largest of every {width}')
    return {
      'aggregate': self._run.model.aggregate,
      'size': len(vector),
      'svg': _svg(figure, f'The {len(vector)} numbers before the head; the largest is {vector.max():.3f}.'),
      'terms': [
        {'channel': int(i), 'value': float(vector[i]), 'weight': float(weights[i]), 'product': float(terms[i])}
        for i in largest
      ],
      'rest': float(terms.sum() - terms[largest].sum()),
      'bias': bias,
      'logit': float(self._logits[index, predicted]),
      'class': self._classes[predicted],
    }

  def _outputs(self, logits: np.ndarray, index: int) -> dict[str, Any]:
    """Logits, softmax and one-hot vector of the most probable classes, in the classes' order."""
    probabilities = calibration.softmax(logits[None])[0]
    shown = np.sort(np.argsort(-logits, kind='stable')[:10])
    predicted = int(self._predicted[index])
    return {
      'rows': [
        {
          'class': self._classes[i],
          'logit': float(logits[i]),
          'probability': float(probabilities[i]),
          'one_hot': int(i == predicted),
        }
        for i in map(int, shown)
      ],
      'others': len(logits) - len(shown),
      'others_probability': float(max(0.0, 1 - probabilities[shown].sum())),
    }


@functools.partial(jax.jit, static_argnames='model')
def _look(
  model: CNN, variables: Any, images: jax.Array
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], dict[str, jax.Array]]:
  """Of each block, the largest value of each channel and its flat position, (batch, features); all maps, float32."""
  maps = {name: x.astype(jnp.float32) for name, x in feature_maps(model, variables, normalize(images)).items()}
  flat = {name: x.reshape(x.shape[0], -1, x.shape[-1]) for name, x in maps.items() if name.startswith('block')}
  return {name: (x.max(axis=1), x.argmax(axis=1)) for name, x in flat.items()}, maps


def _pixel_table(image: np.ndarray) -> dict[str, Any]:
  """Numbers of the part of an image where they differ most, at most 10 by 10, of its first channel."""
  channel = image[:, :, 0]
  window = (min(10, channel.shape[0]), min(10, channel.shape[1]))
  spread = np.lib.stride_tricks.sliding_window_view(channel, window).std(axis=(2, 3))
  top, left = (int(i) for i in np.unravel_index(np.argmax(spread), spread.shape))
  part = channel[top : top + window[0], left : left + window[1]]
  example = min(part.ravel().tolist(), key=lambda value: abs(value - 128))
  return {
    'rows': part.tolist(),
    'top': top,
    'left': left,
    'bottom': top + window[0] - 1,
    'right': left + window[1] - 1,
    'whole': window == channel.shape,
    # Position and size of that part in percent of the picture, for its frame.
    'frame': [
      100 * x / side for x, side in zip((top, left, *window), (channel.shape[0], channel.shape[1]) * 2, strict=True)
    ],
    'example': example,
    'normalised': 2 * example / 255 - 1,
  }


def _subject(block: int, depth: int) -> str:
  """What blocks at this depth tend to answer to."""
  subjects = ('edges', 'textures', 'parts', 'objects')
  return subjects[round((block - 1) * 3 / max(depth - 1, 1))]


def _block_layers(config: Any, block: int) -> str:
  side = config.kernel_size
  layers = [
    f'{side}\u00d7{side} convolution' + (f' ({config.convs_per_block} times)' if config.convs_per_block > 1 else '')
  ]
  if block > 1 and config.stride > 1:
    layers[0] += f' with stride {config.stride}'
  if config.pool != 'none' and block < len(config.features):
    layers.append({'max': '2\u00d72 max pooling', 'avg': '2\u00d72 average pooling'}[config.pool])
  if config.norm != 'none':
    layers.append(f'{config.norm} norm')
  layers.append({'relu': 'ReLU', 'gelu': 'GELU', 'silu': 'SiLU'}[config.activation])
  return ', '.join(layers) + (', with a shortcut' if config.residual else '')


# Pictures ---------------------------------------------------------------------------------------


def _data_uri(pixels: np.ndarray) -> str:
  """An image uint8 (height, width, 1, 3 or 4) as a data: address: exact where it is small or a sheet of small ones."""
  image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
  buffer = io.BytesIO()
  image.save(buffer, 'PNG')
  kind = 'png'
  if buffer.tell() > 6000:
    lossy = io.BytesIO()
    image.save(lossy, 'WEBP', quality=80)
    if lossy.tell() < buffer.tell() / 2:  # a photograph
      buffer, kind = lossy, 'webp'
  return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def _fit(pixels: np.ndarray, side: int) -> np.ndarray:
  """Reduces an image to at most `side` pixels a side."""
  height, width = pixels.shape[:2]
  scale = side / max(height, width)
  if scale >= 1:
    return pixels
  image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  return np.asarray(image.resize(size, Image.Resampling.BOX)).reshape(size[1], size[0], pixels.shape[2])


def _fit_map(values: np.ndarray) -> np.ndarray:
  """Reduces a map (height, width) to at most 64 places a side."""
  scale = _SMALL / max(values.shape)
  if scale >= 1:
    return values
  size = (max(1, round(values.shape[1] * scale)), max(1, round(values.shape[0] * scale)))
  return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))


def _heat(values: np.ndarray) -> np.ndarray:
  """A map (height, width) from 0 (dark) to its largest value (bright), RGB."""
  import matplotlib

  scaled = np.clip(values / max(float(values.max()), 1e-12), 0, 1)
  return matplotlib.colormaps['magma'](scaled, bytes=True)[:, :, :3]


def _diverging(values: np.ndarray) -> np.ndarray:
  """Numbers in [-1, 1] (h, w, n): blue below zero, white, orange above; uint8 (h, w, 3, n)."""
  amount = np.abs(values)[:, :, None, :]
  colour = np.where(values[:, :, None, :] < 0, np.reshape(_BLUE_RGB, (3, 1)), np.reshape(_ORANGE_RGB, (3, 1)))
  return np.round(247 + amount * (colour - 247)).astype(np.uint8)


def _sheet(tiles: np.ndarray, columns: int, gap_share: float = 0.08) -> np.ndarray:
  """Lays tiles uint8 (n, h, w, 3 or 4) out in rows with clear gaps: RGBA (height, width, 4)."""
  n, height, width, channels = tiles.shape
  columns = min(columns, n)
  rows = -(-n // columns)
  # Small tiles are enlarged, so that a gap is thin beside them.
  zoom = max(1, 24 // width)
  tiles = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)
  height, width = height * zoom, width * zoom
  gap = max(1, round(gap_share * width))
  sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
  for i, tile in enumerate(tiles):
    y, x = i // columns * (height + gap), i % columns * (width + gap)
    sheet[y : y + height, x : x + width, :channels] = tile
    if channels == 3:
      sheet[y : y + height, x : x + width, 3] = 255
  return sheet


# Charts -----------------------------------------------------------------------------------------


def _chart(width: int, height: int, rows: Sequence[int] = (1,)) -> tuple[Any, Any]:
  """A figure of so many CSS pixels (72 of matplotlib's units an inch) and its axes."""
  from matplotlib.figure import Figure

  figure = Figure((width / 72, height / 72), layout='constrained')
  figure.get_layout_engine().set(w_pad=2 / 72, h_pad=2 / 72)
  return figure, figure.subplots(len(rows), 1, height_ratios=rows)


def _svg(figure: Any, description: str, grow: float = 1.0) -> Any:
  """A figure as inline SVG in the page's colours, without scripts, addresses or ids that could clash.

  It shrinks with the page, and grows to `grow` times its size. The text matplotlib wrote is parsed and written anew, so what stands in it stays text.
  """
  import markupsafe

  buffer = io.BytesIO()
  figure.savefig(
    buffer, format='svg', transparent=True, metadata={'Creator': None, 'Date': None, 'Format': None, 'Type': None}
  )
  root = ElementTree.fromstring(buffer.getvalue())
  prefix = f'c{zlib.crc32(description.encode()):08x}-'
  links = re.compile(r'url\(#([^)]+)\)')
  used = set()
  for element in root.iter():
    for name, value in element.attrib.items():
      used.update(links.findall(value))
      if name.endswith('href') and value.startswith('#'):
        used.add(value[1:])
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag.endswith('}style') or child.tag.endswith('}metadata'):
        parent.remove(child)
  for element in root.iter():
    element.tag = element.tag.rsplit('}', 1)[-1]
    attributes = {}
    for name, value in element.attrib.items():
      name = name.rsplit('}', 1)[-1]
      if name == 'id' and value not in used:
        continue
      if name == 'id':
        value = prefix + value
      elif name == 'href' and value.startswith('#'):
        value = '#' + prefix + value[1:]
      value = links.sub(lambda match: f'url(#{prefix}{match.group(1)})', value)
      for colour, variable in _VARIABLES.items():
        value = value.replace(colour, variable)
      attributes[name] = value
    element.attrib.clear()
    element.attrib.update(attributes)
  width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
  root.attrib.clear()
  root.attrib.update(
    {
      'viewBox': f'0 0 {width:g} {height:g}',
      'role': 'img',
      'aria-label': description,
      'style': f'max-width: {grow * width:g}px',
    }
  )
  return markupsafe.Markup(ElementTree.tostring(root, encoding='unicode'))


def _label_errors_as_accuracies(axes: Any) -> None:
  """Turns an axis of error rates into a logarithmic one of accuracies, better ones above."""
  axes.set_yscale('log')
  low, high = sorted(axes.get_ylim())
  high = min(high, 1.0)
  ticks = [e * 10.0**p for p in range(0, -9, -1) for e in (1, 0.5, 0.2) if low <= e * 10.0**p <= high]
  if len(ticks) > 8:
    ticks = [tick for tick in ticks if math.log10(tick) == round(math.log10(tick))]
  elif len(ticks) < 3:
    ticks = list(np.geomspace(high, low, 4))
  axes.set_ylim(high, low)
  axes.set_yticks(ticks, [f'{100 * (1 - tick):.6g}%' if tick < 1 else '0%' for tick in ticks])
  axes.yaxis.set_minor_locator(_ticker().NullLocator())


def _label_plainly(axis: Any) -> None:
  """Labels a logarithmic axis with plain numbers, at most five of them."""
  axis.set_major_locator(_ticker().LogLocator(numticks=5))
  axis.set_major_formatter(_ticker().FuncFormatter(lambda x, _: f'{x:,.10g}'))
  axis.set_minor_locator(_ticker().NullLocator())


def _ticker() -> Any:
  import matplotlib.ticker

  return matplotlib.ticker


# Text -------------------------------------------------------------------------------------------


def _clean(text: str) -> str:
  """Text that HTML and SVG can hold: what is not a character of a file's name becomes an escape like \\x1b."""
  text = text.encode('utf-8', 'backslashreplace').decode()
  return ''.join(
    character.encode('unicode_escape').decode() if unicodedata.category(character) in ('Cc', 'Cf', 'Cn') else character
    for character in text
  )


def _shortened(text: str, length: int) -> str:
  return text if len(text) <= length else text[: length - 1] + '…'


def _percent(share: float, digits: int = 2) -> str:
  return '\u2013' if math.isnan(share) else f'{share:.{digits}%}'


def _short_number(number: float) -> str:
  for size, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= size:
      return f'{number / size:.3g} {letter}'
  return f'{number:.0f}'


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f'{seconds:.1f} s'
  minutes, hours = seconds / 60, seconds / 3600
  return f'{minutes:.1f} min' if minutes < 120 else f'{hours:.1f} h'


def _shape(shape: Sequence[int]) -> str:
  return ' \u00d7 '.join(map(str, shape))


def _natural(name: str) -> tuple[bool, int, str]:
  """Sorts conv1, norm1, conv2, norm2, ..., and what has no number after them."""
  number = re.search(r'\d+$', name)
  return (number is None, int(number.group()) if number else 0, name)


def _wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
  """The 95 % interval of a share of n (Wilson 1927)."""
  centre = (share + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  return centre - half, centre + half


def _as_json(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {name: _as_json(item) for name, item in value.items()}
  return list(value) if isinstance(value, tuple) else value


if __name__ == '__main__':
  command.run(main)
