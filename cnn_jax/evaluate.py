"""Exact evaluation: every example of a split counts exactly once, on any number of devices. Also a command.

python -m cnn_jax.evaluate --workdir=DIR [--split=test] [--checkpoint=last] [--top_k=K] [--[no-]tta] [--calibrate]
python -m cnn_jax.evaluate --workdir=DIR --data_dir=FOLDER                 # new images, FOLDER/<class>/*
python -m cnn_jax.evaluate --workdir=DIR --data_dir=FOLDER --split=test    # the data set of the run, elsewhere
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnn_jax import UsageError, calibration, command, distribute, metrics, models, parts, peers
from cnn_jax import config as config_lib
from cnn_jax.data import Split
from cnn_jax.data.augment import Statistics, centre_crop, input_shape, normalize
from cnn_jax.data.geometry import translate
from cnn_jax.data.lazy import read_ahead

_BATCH_BYTES = 2**25  # of the images that are read at a time


@functools.partial(jax.jit, static_argnames=('model', 'statistics'))
def eval_step(model: nn.Module, variables: Any, images: jax.Array, statistics: Statistics) -> jax.Array:
  """Computes the logits of one batch.

  Args:
    model: the network.
    variables: `{'params', 'batch_stats'}`.
    images: uint8 (batch, height, width, channels).
    statistics: of the network's input; see `config.statistics`.

  Returns:
    float32 (batch, num_classes).
  """
  return _in_chunks(lambda images: models.infer(model, variables, normalize(images, statistics))[0], images, statistics)


@functools.partial(jax.jit, static_argnames=('model', 'statistics', 'padding'))
def view_step(
  model: nn.Module,
  variables: Any,
  images: jax.Array,
  statistics: Statistics,
  mirror: jax.Array,
  shift: jax.Array | None,
  padding: str,
) -> jax.Array:
  """Computes the log-probabilities of one batch after mirroring and shifting the network's input.

  Args:
    model, variables, images, statistics: as `eval_step`.
    mirror: bool (), whether to exchange left and right.
    shift: int32 (2,), pixels down and to the right, at most one each; None: none.
    padding: how to fill the pixels from outside the image; see `geometry.translate`.

  Returns:
    float32 (batch, num_classes).
  """

  def log_probabilities(images):
    images = centre_crop(images, statistics)
    view = jnp.where(mirror, images[:, :, ::-1], images)
    if shift is not None:
      view = translate(view, jnp.broadcast_to(shift, (len(images), 2)), 1, padding)
    return jax.nn.log_softmax(models.infer(model, variables, normalize(view, statistics))[0])

  return _in_chunks(log_probabilities, images, statistics)


def chunk_size(batch_size: int, num_pixels: int) -> int:
  """The images that `eval_step` passes through the network at a time.

  One CPU device is faster if they fit into its caches (benchmarks/step_time), and then needs a fraction of the memory.
  At most 64 small images do, and 10 of 128 x 128 pixels or more. The size is the largest divisor of the batch that is
  at least a quarter of that, so that nothing is padded. Without such a divisor the batch is padded. Elsewhere, and up to
  so many images, the whole batch is one chunk.

  Args:
    batch_size: images.
    num_pixels: of the network's input.
  """
  most = parts.FORWARD if num_pixels >= parts.PIXELS else 64
  if jax.default_backend() != 'cpu' or jax.device_count() > 1 or jax.__version_info__ < (0, 11) or batch_size <= most:
    return batch_size
  return next((size for size in range(most, most // 4 - 1, -1) if batch_size % size == 0), most)


def _in_chunks(function: Callable[[jax.Array], jax.Array], images: jax.Array, statistics: Statistics) -> jax.Array:
  """Applies a function of a batch chunk by chunk."""
  n = len(images)
  height, width, _ = input_shape(images.shape[1:], statistics)
  size = chunk_size(n, height * width)
  if size == n:
    return function(images)
  padded = jnp.pad(images, [(0, -n % size)] + [(0, 0)] * (images.ndim - 1))
  return lax.map(function, padded.reshape(-1, size, *images.shape[1:])).reshape(len(padded), -1)[:n]


@dataclasses.dataclass(frozen=True)
class Views:
  """The variants of an image over which test-time augmentation averages."""

  views: tuple[tuple[bool, int, int], ...]  # (mirror, down, right); the unchanged image comes first
  padding: str  # how shifts fill the pixels from outside the image
  weights: tuple[float, ...] = ()  # of the mean of log-probabilities; (): the mean of probabilities


def tta_views(config_augment: Any, rule: str = 'cross') -> Views:
  """Chooses the views of test-time augmentation: mirrored if training flips, one pixel each way if it shifts.

  Args:
    config_augment: the section `config.augment` of the run.
    rule: `cross`: shifts to the four sides, all views with equal weights. `diagonal`: shifts to two corners, which
      together have the weight of the image in its place (Jordan, arXiv 2404.00498, section 3.5).

  Raises:
    UsageError: training used neither flips nor shifts.
  """
  if not (config_augment.flip or config_augment.shift):
    raise UsageError(
      'this run was trained without config.augment.flip and config.augment.shift, '
      'so there are no views to average over; leave out --tta.'
    )
  around = {'cross': [(-1, 0), (1, 0), (0, -1), (0, 1)], 'diagonal': [(1, 1), (-1, -1)]}[rule]
  shifts = [(0, 0)] + (around if config_augment.shift else [])
  mirrors = [False, True] if config_augment.flip else [False]
  views = tuple((mirror, *shift) for mirror in mirrors for shift in shifts)
  if rule == 'cross':
    return Views(views, config_augment.padding)
  views = tuple((mirror, down, -right if mirror else right) for mirror, down, right in views)  # shifted, then mirrored
  relative = [2 if (down, right) == (0, 0) else 1 for _, down, right in views]
  return Views(views, config_augment.padding, tuple(weight / sum(relative) for weight in relative))


def run_views(config: Any, tta: bool | None = None) -> Views | None:
  """The views over which the predictions of a run are averaged; None: there are none.

  Args:
    config: of the run.
    tta: whether to average; None: as the run does itself, `config.evaluation.views`.

  Raises:
    UsageError: see `tta_views`.
  """
  wanted = config.evaluation.views if tta is None else tta
  return tta_views(config.augment, config.evaluation.view_rule) if wanted else None


def compute_logits(
  model: nn.Module,
  variables: Any,
  images: Any,
  statistics: Statistics,
  batch_size: int,
  views: Views | None = None,
) -> np.ndarray:
  """Computes the logits of many images, over all devices of all processes.

  Args:
    model: the network.
    variables: `{'params', 'batch_stats'}`.
    images: uint8 (n, height, width, channels), n >= 0; an array, or an object with that shape that returns an array for
      a slice.
    statistics: of the network's input; see `config.statistics`.
    batch_size: images per call over all devices, rounded up to a multiple of their number. The last batch is padded,
      and the logits of the padding are dropped.
    views: average over these views. Without weights, probabilities are averaged rather than logits, so that one view with
      a confident error cannot outvote several that are moderately confident.

  Returns:
    float32 (n, num_classes), on every process; with views, the logarithms of the mean probabilities.
  """
  processes, devices = jax.process_count(), jax.local_device_count()
  # A batch larger than the split would consist of padding.
  size = min(-(-most_at_a_time(images, batch_size) // processes), max(1, -(-len(images) // processes)))
  size = -(-size // devices) * devices
  share = -(-len(images) // processes)
  first, end = jax.process_index() * share, min((jax.process_index() + 1) * share, len(images))
  logits = np.zeros((share, model.num_classes), np.float32)
  for start, batch in _read_batches(images, range(first, end, size), end):
    if len(batch) < size:
      batch = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])
    result = batch_logits(model, variables, distribute.shard(batch), statistics, views)
    count = min(size, end - start)
    logits[start - first : start - first + count] = np.asarray(result)[:count]
  return distribute.gather(logits)[: len(images)]


def most_at_a_time(images: Any, batch_size: int) -> int:
  """The images of a batch of evaluation: fewer than it should have if they are read and many would fill the memory.

  Args:
    images: see `compute_logits`.
    batch_size: `config.evaluation.batch_size`.
  """
  if isinstance(images, np.ndarray):
    return batch_size
  # A multiple of 20, so that `chunk_size` is the same as for the usual batches.
  return min(batch_size, max(20, _BATCH_BYTES // max(1, int(np.prod(images.shape[1:]))) // 20 * 20))


def _read_batches(images: Any, starts: range, end: int) -> Iterator[tuple[int, np.ndarray]]:
  """Yields the start of each batch and its images; if they must be read, a thread reads the next one in the meantime."""

  def read(start: int) -> tuple[int, np.ndarray]:
    return start, np.asarray(images[start : min(start + starts.step, end)])

  batches = map(read, starts) if isinstance(images, np.ndarray) else read_ahead(starts, read, ahead=1, group=1)
  while True:
    with peers.deadline('Reading images to evaluate'):
      batch = next(batches, None)
    if batch is None:
      return
    yield batch


def batch_logits(
  model: nn.Module, variables: Any, images: jax.Array, statistics: Statistics, views: Views | None
) -> jax.Array:
  """Computes the logits of one batch on the devices; see `compute_logits`."""
  if views is None:
    return eval_step(model, variables, images, statistics)
  shifted = any(shift != [0, 0] for _, *shift in views.views)
  log_probabilities = [
    view_step(
      model,
      variables,
      images,
      statistics,
      np.bool_(mirror),
      np.array(shift, np.int32) if shifted else None,
      views.padding,
    )
    for mirror, *shift in views.views
  ]
  if views.weights:
    weighted = [weight * x for weight, x in zip(views.weights, log_probabilities, strict=True)]
    return jax.nn.log_softmax(functools.reduce(jnp.add, weighted))
  return functools.reduce(jnp.logaddexp, log_probabilities) - np.log(len(log_probabilities))


def evaluate_split(
  model: nn.Module,
  variables: Any,
  split: Split,
  config: Any,
  measure: Callable[[np.ndarray, np.ndarray], dict[str, Any]] = metrics.classification_metrics,
) -> dict[str, Any]:
  """Computes the measures of a split, such as loss and accuracy, as a run with this config does.

  Args:
    model: the network.
    variables: `{'params', 'batch_stats'}`.
    split: at least one example.
    config: of the run; the sections `data` and `evaluation` say how.
    measure: computes them from the logits (n, num_classes) and the labels (n,).
  """
  statistics, size = config_lib.statistics(config.data), config.evaluation.batch_size
  return measure(compute_logits(model, variables, split.images, statistics, size, run_views(config)), split.labels)


def main(argv: Sequence[str]) -> int:
  """The command: prints one JSON object with the metrics of a split, or of a folder of images."""
  parser = command.Parser('Evaluates a run on a split of its data set, or on a folder of new images.')
  parser.add_argument('--workdir', type=command.local_path, required=True, help='the run')
  parser.add_argument(
    '--split', choices=['train', 'validation', 'test'], help='the split of its data set (default: test)'
  )
  parser.add_argument(
    '--data_dir',
    type=command.local_path,
    help='evaluate the images DATA_DIR/<class>/* instead; with --split, where the data set of the run is now',
  )
  parser.add_argument('--checkpoint', default='last', choices=['last', 'best'], help='newest, or best on validation')
  parser.add_argument('--top_k', type=int, help='add the top-k accuracy for this k')
  parser.add_argument(
    '--tta',
    action=argparse.BooleanOptionalAction,
    help='average over the flips and shifts that training used (default: config.evaluation.views of the run)',
  )
  parser.add_argument(
    '--calibrate',
    action='store_true',
    help='fit a temperature on validation, and add the calibrated loss and calibration error',
  )
  args = parser.parse_args(argv)
  if args.calibrate and args.split == 'validation':
    raise UsageError(
      '--calibrate fits on the validation split, so it cannot be evaluated there; choose another --split.'
    )
  if args.top_k is not None and args.top_k < 1:
    raise UsageError(f'--top_k is {args.top_k}; give a number of at least 1.')
  # Only the command reads runs and image files; training imports this module without these modules.
  from cnn_jax.pictures import load_folder
  from cnn_jax.run import check_logits, load_run, load_run_dataset

  command.prepare_backend()
  run = load_run(args.workdir, args.checkpoint)
  views = run_views(run.config, args.tta)
  statistics = config_lib.statistics(run.config.data)
  name = args.split or 'test'
  new_images = args.data_dir and not args.split
  if args.calibrate or not new_images:
    dataset = load_run_dataset(run, args.data_dir if args.split else None)
  folder = load_folder(args.data_dir, run) if new_images else None
  split = folder.split if folder else getattr(dataset, name)
  if not len(split.labels):
    raise UsageError(f'the {name} split of "{run.dataset}" is empty; choose another --split.')
  if args.calibrate and not len(dataset.validation.labels):
    raise UsageError(f'the validation split of "{run.dataset}" is empty, so leave out --calibrate.')

  def logits_of(split: Split) -> np.ndarray:
    logits = compute_logits(run.model, run.variables, split.images, statistics, run.config.evaluation.batch_size, views)
    check_logits(logits, run)
    return logits

  logits = logits_of(split)
  if folder:  # an image that cannot be read is left out, and the others are evaluated
    for line in (*folder.notes, *(folder.bad[index] for index in sorted(folder.bad))):
      print(command.printable(line), file=sys.stderr)
    read = np.setdiff1d(np.arange(len(split)), list(folder.bad))
    if not len(read):
      raise UsageError(f'no image of {args.data_dir} can be read; the first: {folder.bad[0]}')
    logits, split = logits[read], dataclasses.replace(split, labels=split.labels[read])
  measured = metrics.classification_metrics(logits, split.labels)
  if args.top_k:
    measured[f'top{args.top_k}_accuracy'] = metrics.top_k_accuracy(logits, split.labels, args.top_k)
  measured['calibration_error'] = _calibration_error(logits, split.labels, 1.0)
  if args.calibrate:
    temperature = calibration.fit_temperature(logits_of(dataset.validation), dataset.validation.labels)
    measured |= {
      'temperature': temperature,
      'calibrated_loss': metrics.classification_metrics(logits / temperature, split.labels)['loss'],
      'calibrated_calibration_error': _calibration_error(logits, split.labels, temperature),
    }
  source = {'data_dir': args.data_dir} if new_images else {'split': name}
  print(json.dumps({'dataset': run.dataset, **source, 'step': run.step, 'n': len(split.labels)} | measured))
  if folder and folder.bad:
    command.fail(f'{len(folder.bad):,} of {len(folder.split):,} images could not be read; see above.')
  return command.USAGE if folder and folder.bad else command.DONE


def _calibration_error(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
  return calibration.expected_calibration_error(calibration.softmax(logits, temperature), labels)


if __name__ == '__main__':
  command.run(main)
