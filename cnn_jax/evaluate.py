"""Exact evaluation: every example of a split counts once, on any number of devices. Also a command.

python -m cnn_jax.evaluate --workdir=DIR [--split=test] [--checkpoint=last]
                           [--data_dir=FOLDER] [--top_k=K] [--tta] [--calibrate]
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax import UsageError, calibration, checkpoint, command, metrics, record
from cnn_jax.data import Dataset, Split, drawings, load_dataset
from cnn_jax.data.augment import normalize, warp
from cnn_jax.model import CNN, create_model


@functools.partial(jax.jit, static_argnames='model')
def eval_step(model: CNN, variables: Any, images: jax.Array) -> jax.Array:
  """Logits of one batch.

  Args:
    model: the network.
    variables: `{'params', 'batch_stats'}`.
    images: uint8 (batch, height, width, channels).

  Returns:
    float32 (batch, num_classes).
  """

  def logits(images):
    return model.apply(variables, normalize(images), train=False)

  part = _part(len(images))
  if part == len(images):
    return logits(images)
  return lax.map(logits, images.reshape(-1, part, *images.shape[1:])).reshape(len(images), -1)


def _part(batch_size: int) -> int:
  """Images to compute at a time: on the CPU few enough for its caches, which is faster (experiments/step_time)."""
  if jax.default_backend() != 'cpu' or jax.device_count() > 1 or jax.__version_info__ < (0, 11):
    return batch_size
  return next((part for part in range(64, 15, -1) if batch_size % part == 0), batch_size)


@functools.partial(jax.jit, static_argnames=('model', 'padding'))
def view_step(
  model: CNN, variables: Any, images: jax.Array, mirror: jax.Array, shift: jax.Array, padding: str
) -> jax.Array:
  """Logarithms of the probabilities of one batch, seen mirrored and shifted.

  Args:
    model, variables, images: as `eval_step`.
    mirror: bool (), left-right.
    shift: int32 (2,), pixels down and to the right.
    padding: what comes in from outside; see `augment.warp`.

  Returns:
    float32 (batch, num_classes).
  """
  n = len(images)
  seen = warp(images, jnp.full(n, mirror), jnp.zeros(n), jnp.ones(n), jnp.broadcast_to(shift, (n, 2)), padding)
  return jax.nn.log_softmax(model.apply(variables, normalize(seen), train=False))


@dataclasses.dataclass(frozen=True)
class Views:
  """The ways in which test-time augmentation looks at an image: those that training taught to be all the same."""

  views: tuple[tuple[bool, int, int], ...]  # (mirror, down, right), the image as it is first
  padding: str  # of the shifts


def tta_views(config_augment: Any) -> Views:
  """The views of test-time augmentation: mirrored if training flips, one pixel each way if it shifts.

  Args:
    config_augment: the section `config.augment` of the run.

  Raises:
    UsageError: training did neither.
  """
  if not (config_augment.flip or config_augment.shift):
    raise UsageError(
      'this run was trained without config.augment.flip and config.augment.shift, '
      'so it has nothing to average over; leave out --tta.'
    )
  shifts = [(0, 0)] + ([(-1, 0), (1, 0), (0, -1), (0, 1)] if config_augment.shift else [])
  mirrors = [False, True] if config_augment.flip else [False]
  return Views(tuple((mirror, *shift) for mirror in mirrors for shift in shifts), config_augment.padding)


def _batch_logits(model: CNN, variables: Any, images: jax.Array, views: Views | None) -> jax.Array:
  if views is None:
    return eval_step(model, variables, images)
  seen = [
    view_step(model, variables, images, np.bool_(mirror), np.array(shift, np.int32), views.padding)
    for mirror, *shift in views.views
  ]
  return functools.reduce(jnp.logaddexp, seen) - np.log(len(seen))


def compute_logits(model: CNN, variables: Any, images: Any, batch_size: int, views: Views | None = None) -> np.ndarray:
  """Logits of many images, over all devices of all processes.

  Args:
    model: the network.
    variables: `{'params', 'batch_stats'}`.
    images: uint8 (n, height, width, channels), n >= 0; an array or whatever gives one for a slice.
    batch_size: images per call over all devices; rounded up to a multiple of them. The last
      batch is padded and the padding's logits dropped.
    views: of test-time augmentation. The probabilities are averaged over them, not the logits: a
      view that is sure and wrong then cannot outvote several that are fairly sure.

  Returns:
    float32 (n, num_classes), on every process; with views, the logarithms of the mean probabilities.
  """
  processes, devices = jax.process_count(), jax.local_devices()
  sharding = NamedSharding(Mesh(np.array(devices), ('batch',)), PartitionSpec('batch'))
  # A batch larger than the split would compute padding only.
  size = min(-(-batch_size // processes), max(1, -(-len(images) // processes)))
  size = -(-size // len(devices)) * len(devices)
  share = -(-len(images) // processes)
  first, end = jax.process_index() * share, min((jax.process_index() + 1) * share, len(images))
  logits = np.zeros((share, model.num_classes), np.float32)
  for start in range(first, end, size):
    batch = np.asarray(images[start : min(start + size, end)])
    padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])
    found = _batch_logits(model, variables, jax.device_put(padded, sharding), views)
    logits[start - first : start - first + len(batch)] = np.asarray(found)[: len(batch)]
  if processes == 1:
    return logits
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(logits, tiled=True)[: len(images)]


def evaluate_split(model: CNN, variables: Any, split: Split, batch_size: int) -> dict[str, float]:
  """Loss, accuracy and top-5 accuracy over a split; see `metrics.classification_metrics`."""
  return metrics.classification_metrics(compute_logits(model, variables, split.images, batch_size), split.labels)


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, read back from its workdir."""

  config: Any
  model: CNN
  variables: Any  # {'params', 'batch_stats'}, numpy arrays
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # height, width, channels of the model's input
  dataset: str  # the name of what it was trained on
  step: int  # updates behind `variables`
  drawing: dict[str, Any] | None  # how the training images lie in their frame; see `drawings.measure`


def load_run(workdir: str | os.PathLike, which: str = 'last') -> Run:
  """Reads a run's config and one of its checkpoints; nothing in the workdir is executed.

  Args:
    workdir: of a run that has saved at least once.
    which: `last`, or `best` on validation.

  Raises:
    UsageError: there is no run, or no checkpoint that is whole.
  """
  config = record.load_config(workdir)
  restored = checkpoint.restore(os.path.join(workdir, 'checkpoints'), None, which=which)
  if restored is None:
    raise UsageError(f'{workdir} has no checkpoint yet; train it with python -m cnn_jax.main --workdir={workdir}.')
  state, step, info = restored
  variables = state.get('ema') or {'params': state['params'], 'batch_stats': state.get('batch_stats') or {}}
  variables.setdefault('batch_stats', {})
  return Run(
    config=config,
    model=create_model(config.model, len(info['class_names'])),
    variables=jax.tree.map(jnp.asarray, variables),
    class_names=tuple(info['class_names']),
    image_shape=tuple(info['image_shape']),
    dataset=info['dataset'],
    step=step,
    drawing=info.get('drawing'),
  )


def load_run_dataset(run: Run) -> Dataset:
  """Loads the data set of a run.

  Raises:
    UsageError: what the config finds here and now is not what the run was trained on.
  """
  dataset = load_dataset(run.config.data)
  if dataset.name != run.dataset:
    raise UsageError(
      f'the run was trained on "{run.dataset}", but its config finds "{dataset.name}" here; '
      'set TFDS_DATA_DIR as it was then.'
    )
  return dataset


def load_picture(file: Any, run: Run, *, invert: str = 'auto', name: str | None = None) -> np.ndarray:
  """Reads an image file as a run's model wants it.

  Where the run was trained on light drawings on black, a picture with a light border is taken for a
  photograph of a dark drawing: it is inverted and, unless it has the model's size, fitted into the
  frame as the training images are. Everything else gets `load_image` with the run's `data.resize`.

  Args:
    file, name: as `images.load_image`.
    run: whose shape and resizing to follow.
    invert: auto | never | always.

  Returns:
    uint8 (height, width, channels).

  Raises:
    UsageError: names the file and says why it cannot be read.
  """
  from cnn_jax.data.images import load_image

  height, width, channels = run.image_shape
  if run.drawing and invert != 'never':
    image = load_image(file, channels=channels, name=name)
    inverted = invert == 'always' or drawings.is_dark_on_light(image)
    if image.shape == run.image_shape:
      return drawings.invert(image) if inverted else image
    if inverted:
      return drawings.fit(image, run.drawing, run.image_shape)
    if hasattr(file, 'seek'):
      file.seek(0)
  image = load_image(file, size=(height, width), channels=channels, resize=run.config.data.resize, name=name)
  return drawings.invert(image) if invert == 'always' and not run.drawing else image


def load_folder(directory: str | os.PathLike, run: Run) -> Split:
  """The images of DIRECTORY/<class>/*, which a run was not trained on; classes are matched by name.

  Images are read by `load_picture` when they are asked for. Not every class must be there.

  Raises:
    UsageError: no images, or a folder that is not called as a class.
  """
  from cnn_jax.data import files

  root = Path(directory).expanduser()
  if not root.is_dir():
    raise UsageError(f'{root} is not a directory; give one with a folder of images for each class.')
  labels, paths = [], []
  for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith('.')):
    if folder.name not in run.class_names:
      known = ', '.join(run.class_names[:10]) + (', ...' if len(run.class_names) > 10 else '')
      raise UsageError(f'{folder} is not called as a class of this run; rename or remove it. The classes: {known}.')
    found = [path for path in files.walk(str(folder)) if path != str(folder)]
    paths += found
    labels += len(found) * [run.class_names.index(folder.name)]
  if not paths:
    raise UsageError(f'{root} holds no image in a folder called as a class, such as {root / run.class_names[0]}.')
  names = [os.path.relpath(path, root) for path in paths]
  return Split(_Pictures(paths, run), np.array(labels, np.int32), names)


class _Pictures:
  """Image files that are read, by several threads, when they are indexed; see `data.RandomAccessImages`."""

  dtype = np.dtype(np.uint8)

  def __init__(self, paths: Sequence[str], run: Run):
    self._paths, self._run = np.array(paths), run
    self.shape: tuple[int, ...] = (len(paths), *run.image_shape)

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index) -> np.ndarray:
    chosen = self._paths[index]
    if isinstance(chosen, str):
      return load_picture(str(chosen), self._run)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
      images = list(pool.map(lambda path: load_picture(str(path), self._run), chosen))
    return np.stack(images) if images else np.zeros((0, *self.shape[1:]), np.uint8)


def main(argv: Sequence[str]) -> None:
  """The command: prints one JSON object with the metrics of a split, or of a folder of images."""
  parser = command.Parser('Evaluates a run on a split of its data set, or on a folder of images it has never seen.')
  parser.add_argument('--workdir', required=True, help='the run')
  parser.add_argument('--split', choices=['train', 'validation', 'test'], help='of its data set (default: test)')
  parser.add_argument('--data_dir', help='evaluate the images in DATA_DIR/<class>/* instead')
  parser.add_argument('--checkpoint', default='last', choices=['last', 'best'], help='newest, or best on validation')
  parser.add_argument('--top_k', type=int, help='add the top-k accuracy of this k')
  parser.add_argument('--tta', action='store_true', help='average over flips and shifts, as the training augmented')
  parser.add_argument('--calibrate', action='store_true', help='fit a temperature on validation and report with it too')
  args = parser.parse_args(argv)
  if args.split and args.data_dir:
    raise UsageError('--split and --data_dir exclude each other; give one of them.')
  if args.calibrate and args.split == 'validation':
    raise UsageError('--calibrate fits on the validation split, so that cannot be its test; choose another --split.')
  if args.top_k is not None and args.top_k < 1:
    raise UsageError(f'--top_k is {args.top_k}; give a number from 1 on.')
  command.prepare_backend()
  run = load_run(args.workdir, args.checkpoint)
  views = tta_views(run.config.augment) if args.tta else None
  name = args.split or 'test'
  if args.calibrate or not args.data_dir:
    dataset = load_run_dataset(run)
  split = load_folder(args.data_dir, run) if args.data_dir else getattr(dataset, name)
  if not len(split.labels):
    raise UsageError(f'the {name} split of "{run.dataset}" is empty; choose another --split.')
  if args.calibrate and not len(dataset.validation.labels):
    raise UsageError(f'the validation split of "{run.dataset}" is empty, so leave out --calibrate.')

  def logits_of(split: Split) -> np.ndarray:
    return compute_logits(run.model, run.variables, split.images, run.config.evaluation.batch_size, views)

  logits = logits_of(split)
  measured = metrics.classification_metrics(logits, split.labels)
  if args.top_k:
    measured[f'top{args.top_k}_accuracy'] = _top_k_accuracy(logits, split.labels, args.top_k)
  measured['calibration_error'] = _calibration_error(logits, split.labels, 1.0)
  if args.calibrate:
    temperature = calibration.fit_temperature(logits_of(dataset.validation), dataset.validation.labels)
    measured |= {
      'temperature': temperature,
      'calibrated_loss': metrics.classification_metrics(logits / temperature, split.labels)['loss'],
      'calibrated_calibration_error': _calibration_error(logits, split.labels, temperature),
    }
  of = {'data_dir': args.data_dir} if args.data_dir else {'split': name}
  print(json.dumps({'dataset': run.dataset, **of, 'step': run.step, 'n': len(split.labels)} | measured))


def _top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
  of_label = np.take_along_axis(logits, labels[:, None], axis=1)
  return float(np.mean(np.sum(logits > of_label, axis=1) < k))


def _calibration_error(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
  return calibration.expected_calibration_error(calibration.softmax(logits, temperature), labels)


if __name__ == '__main__':
  command.run(main)
