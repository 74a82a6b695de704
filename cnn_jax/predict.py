"""Prediction: classifies image files. Also the classifier that `cnn_jax.load` returns.

    python -m cnn_jax.predict --workdir=RUN IMAGE_OR_FOLDER... [--top_k=5] [--json] [--one_hot] [--[no-]tta]
                              [--checkpoint=last|best] [--invert=auto|never|always] [--batch_size=N]

Pictures may have any size, one or three channels, and any format of `images.IMAGE_FORMATS`; EXIF orientation is
applied. If a run was trained on light drawings on black, such as MNIST, pictures with a light border are treated as
photographs of dark drawings; see `pictures.load_picture`. `--invert=never` turns this off, `always` inverts all pictures.
"""

import argparse
import io
import itertools
import json
import math
import os
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from cnn_jax import UsageError, calibration, command, evaluate, inspect, models, pictures
from cnn_jax import config as config_lib
from cnn_jax.data import augment, listing
from cnn_jax.data.lazy import read_ahead
from cnn_jax.progress import Counter
from cnn_jax.run import Run, check_logits, load_run

_BATCH_SIZE = 256
_BATCH_BYTES = 2**30  # of the largest layer's output
_FILE_WIDTH = 60  # columns of a table's file names, unless the first batch has longer ones


class Classifier:
  """A trained run that classifies pictures.

  A picture is a path, an open binary file, a Pillow image, or a uint8 array (height, width) or
  (height, width, channels) with 1 or 3 channels. Any size is allowed; see `pictures.load_picture`.

  Args:
    run: from `run.load_run`.
    invert: whether to invert dark drawings on light: auto | never | always.
    batch_size: pictures per call of the network. If None, as many as fit into memory, at most 256.
  """

  def __init__(self, run: Run, *, invert: str = 'auto', batch_size: int | None = None):
    self.run = run
    self.class_names = run.class_names
    self._invert = invert
    self._statistics = config_lib.statistics(run.config.data)
    self._maps = jax.jit(
      lambda variables, images: models.infer(run.model, variables, augment.normalize(images, self._statistics))[1]
    )
    self.batch_size = batch_size or _fitting_batch_size(run)

  def predict(self, images: Any, *, tta: bool | None = None) -> np.ndarray:
    """Computes the probabilities of the classes.

    Args:
      images: a picture, or several: a list or another iterable of pictures, or a uint8 array
        (n, height, width, channels).
      tta: whether to average over the flips and shifts by a pixel that the training used as augmentation. None: as
        the run itself was evaluated; see `config.evaluation.views`.

    Returns:
      float64 (num_classes,) for one picture, (n, num_classes) for several.

    Raises:
      UsageError: names the first picture that cannot be read.
    """
    if _is_picture(images):
      return self.predict([images], tta=tta)[0]
    rows = []
    for image, row in self.stream(images, tta=tta):
      if isinstance(row, UsageError):
        raise UsageError(f'{_name(image)}: {row}')
      rows.append(row)
    return np.stack(rows) if rows else np.zeros((0, len(self.class_names)))

  def stream(self, images: Iterable[Any], *, tta: bool | None = None) -> Iterator[tuple[Any, np.ndarray | UsageError]]:
    """Yields (picture, its probabilities or the error) for any number of pictures, in order.

    Threads read a few batches ahead of the network. Memory holds only these.

    Args:
      images: pictures.
      tta: as `predict`.
    """
    views = evaluate.run_views(self.run.config, tta)

    def read(image):
      try:
        return image, self.read(image)
      except UsageError as error:
        return image, error

    loaded = read_ahead(images, read, 2 * self.batch_size)
    size = 0
    while batch := list(itertools.islice(loaded, self.batch_size)):
      # All batches have one shape, so that the network is compiled once: a small one for a few pictures.
      size = size or min(self.batch_size, 1 << (len(batch) - 1).bit_length())
      rows = iter(self._probabilities([x for _, x in batch if not isinstance(x, UsageError)], size, views))
      for image, result in batch:
        yield image, result if isinstance(result, UsageError) else next(rows)

  def read(self, image: Any) -> np.ndarray:
    """Reads a picture as the images of the run are: uint8 (height, width, channels), the centre of which is used.

    Raises:
      UsageError: says why it cannot be read, without its name.
    """
    name = 'the file' if isinstance(image, str | os.PathLike) else 'the image'
    if isinstance(image, np.ndarray):
      image = _from_array(image)
    if isinstance(image, Image.Image):
      image = _as_file(image)
    elif isinstance(image, str | os.PathLike):
      _check_file(image)
    return pictures.load_picture(image, self.run, invert=self._invert, name=name)

  def feature_maps(self, image: Any) -> dict[str, np.ndarray]:
    """Computes the intermediate results for one picture.

    Returns:
      `stage1`, `stage2`, ...: (height, width, features); `pooled`: (features,), the input of the head; `logits`:
      (num_classes,). See `cnn_jax.models`.
    """
    maps = self._maps(self.run.variables, self.read(image)[None])
    return {name: np.asarray(maps[name])[0] for name in [*models.stage_names(maps), 'pooled', 'logits']}

  def class_activation_map(self, image: Any, label: int | str | None = None) -> np.ndarray:
    """Computes the evidence for a class at each place of a picture; see `inspect.class_activation_maps`.

    Args:
      image: a picture.
      label: a class, by name or index; the predicted one if None.

    Returns:
      float32 (height, width) of the maps whose averages the head reads, which cover `augment.centre_crop` of `read`. Its
      mean plus the head's bias is the logit.

    Raises:
      UsageError: the network has no global average pooling, or there is no such class.
    """
    maps = self.feature_maps(image)
    stages = inspect.averaged_stages(maps)
    if not stages:
      raise UsageError(
        'the head of this network does not read averages of maps, so there is no class activation map; '
        'train one with global average pooling.'
      )
    if label is None:
      label = int(np.argmax(maps['logits']))
    elif isinstance(label, str) and label in self.class_names:
      label = self.class_names.index(label)
    elif isinstance(label, str) or not 0 <= label < len(self.class_names):
      raise UsageError(f'{label!r} is not a class of this run; the classes are in class_names.')
    averaged = {name: maps[name][None] for name in stages}
    return inspect.class_activation_maps(self.run.variables, averaged, np.array([[label]]))[0, 0]

  def _probabilities(self, images: list[np.ndarray], size: int, views: evaluate.Views | None) -> np.ndarray:
    batch = np.zeros((size, *self.run.image_shape), np.uint8)
    batch[: len(images)] = np.stack(images) if images else 0
    logits = evaluate.compute_logits(self.run.model, self.run.variables, batch, self._statistics, size, views)
    logits = logits[: len(images)]
    check_logits(logits, self.run)
    return calibration.softmax(logits)


def main(argv: Sequence[str]) -> int:
  """The command: prints a line per image; the status is 2 if an image could not be read."""
  parser = command.Parser('Classifies image files.')
  parser.add_argument(
    'images', type=command.local_path, nargs='+', metavar='IMAGE_OR_FOLDER', help='files, and folders of files'
  )
  parser.add_argument('--workdir', type=command.local_path, required=True, help='the run')
  parser.add_argument('--top_k', type=int, default=5, help='number of most probable classes to print (default: 5)')
  parser.add_argument('--json', action='store_true', help='print one JSON object per line instead of a table')
  parser.add_argument('--one_hot', action='store_true', help='add the one-hot vector of the predicted class')
  parser.add_argument(
    '--tta',
    action=argparse.BooleanOptionalAction,
    help='average over the flips and shifts that training used (default: config.evaluation.views of the run)',
  )
  parser.add_argument('--checkpoint', default='last', choices=['last', 'best'], help='newest, or best on validation')
  parser.add_argument(
    '--invert',
    default='auto',
    choices=['auto', 'never', 'always'],
    help='invert dark drawings on light, for a run on light drawings on black',
  )
  parser.add_argument('--batch_size', type=int, help='images per call of the network (default: as memory allows)')
  args = parser.parse_args(argv)
  for name in ('top_k', 'batch_size'):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      raise UsageError(f'--{name} is {getattr(args, name)}; give a number of at least 1.')
  command.prepare_backend()
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # the encoding of a terminal may lack characters of a file's name
  classifier = Classifier(load_run(args.workdir, args.checkpoint), invert=args.invert, batch_size=args.batch_size)
  passed = listing.Passed()
  paths = itertools.chain.from_iterable(listing.expand(path, passed) for path in args.images)
  top_k = min(args.top_k, len(classifier.class_names))
  table = _Table(classifier.class_names, top_k, args.one_hot)
  # If the results go to the same terminal, they show the progress themselves.
  counter = None if sys.stdout.isatty() and sys.stderr.isatty() else Counter('images')
  count, failed = 0, 0
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', category=UserWarning, module='PIL')  # about oddities of files that it can read
    results = classifier.stream(paths, tta=args.tta)
    while batch := list(itertools.islice(results, classifier.batch_size)):
      count, failed = count + len(batch), failed + sum(isinstance(result, UsageError) for _, result in batch)
      if args.json:
        lines = [json.dumps(_as_object(*pair, classifier.class_names, top_k, args.one_hot)) for pair in batch]
      else:
        lines = table.lines(batch)
      if counter:
        counter.clear()
      print('\n'.join(lines), flush=True)
      if counter:
        counter.show(count)
  if counter:
    counter.clear()
  for note in passed.notes():
    print(command.printable(note), file=sys.stderr)
  if failed:
    command.fail(f'{failed:,} of {count:,} files could not be classified; their lines give the reasons.')
  return command.USAGE if failed else command.DONE


def _fitting_batch_size(run: Run) -> int:
  """Pictures per batch such that the largest output of a layer, in float32, takes at most `_BATCH_BYTES`."""
  outputs = [layer.output for layer in inspect.layer_table(run.model, run.input_shape)]
  largest = max(math.prod(shape) for shape in [run.image_shape, *outputs])
  return max(1, min(_BATCH_SIZE, _BATCH_BYTES // (4 * largest)))


def _as_object(
  path: str, result: np.ndarray | UsageError, class_names: Sequence[str], top_k: int, one_hot: bool
) -> dict[str, Any]:
  if isinstance(result, UsageError):
    return {'file': path, 'error': str(result)}
  best = _top(result, top_k)
  label = best[0]
  described = {
    'file': path,
    'label': class_names[label],
    'probability': float(result[label]),
    'top_k': [[class_names[i], float(result[i])] for i in best],
  }
  return described | ({'one_hot': _one_hot(result)} if one_hot else {})


class _Table:
  """Formats batches as lines of a table. The first batch decides the widths, since the others are not read yet."""

  def __init__(self, class_names: Sequence[str], top_k: int, one_hot: bool):
    self._class_names = [command.printable(name) for name in class_names]
    self._top_k, self._one_hot = top_k, one_hot
    self._width = 0

  def lines(self, batch: Sequence[tuple[str, np.ndarray | UsageError]]) -> list[str]:
    lines = []
    names = [command.printable(path) for path, _ in batch]
    if not self._width:
      self._width = max(4, min(_FILE_WIDTH, max(map(len, names))))
      lines.append(self._line('file', 'class', 'probability', f'top {self._top_k}', 'one-hot'))
    for name, (_, result) in zip(names, batch, strict=True):
      if isinstance(result, UsageError):
        lines.append(f'{name:<{self._width}}  error: {command.printable(str(result))}')
        continue
      best = _top(result, self._top_k)
      ranked = ', '.join(f'{self._class_names[i]} {result[i]:.4f}' for i in best)
      vector = '[' + ' '.join(map(str, _one_hot(result))) + ']'
      lines.append(self._line(name, self._class_names[best[0]], f'{result[best[0]]:.4f}', ranked, vector))
    return lines

  def _line(self, name: str, label: str, probability: str, ranked: str, vector: str) -> str:
    cells = [f'{name:<{self._width}}', f'{label:<{max(5, *map(len, self._class_names))}}', f'{probability:<11}']
    cells += [vector] if self._one_hot else []
    cells += [ranked] if self._top_k > 1 else []  # last, because its width varies
    return '  '.join(cells).rstrip()


def _top(probabilities: np.ndarray, k: int) -> list[int]:
  """The k most probable classes; the lower index first if two are equal."""
  return [int(i) for i in np.argsort(-probabilities, kind='stable')[:k]]


def _one_hot(probabilities: np.ndarray) -> list[int]:
  vector = [0] * len(probabilities)
  vector[int(np.argmax(probabilities))] = 1
  return vector


def _is_picture(images: Any) -> bool:
  if isinstance(images, np.ndarray):
    return images.ndim < 4
  return isinstance(images, str | os.PathLike | Image.Image) or hasattr(images, 'read')


def _name(image: Any) -> str:
  return str(image) if isinstance(image, str | os.PathLike) else type(image).__name__


def _from_array(array: np.ndarray) -> Image.Image:
  if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
    raise UsageError(
      f'the array is {array.dtype} of shape {array.shape}; give uint8 (height, width), or (height, width, channels) '
      'with 1 or 3 channels.'
    )
  if not array.size:
    raise UsageError(f'the array of shape {array.shape} has no pixels; give an image.')
  return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _as_file(image: Image.Image) -> io.BytesIO:
  """A Pillow image as a file in memory, so that it is read exactly as a file is."""
  kind = 'TIFF' if image.mode in ('I', 'F') else 'PNG'
  if kind == 'PNG' and image.mode not in ('1', 'L', 'LA', 'I;16', 'P', 'RGB', 'RGBA'):
    image = image.convert('RGBA' if 'A' in image.mode or 'a' in image.mode else 'RGB')
  file = io.BytesIO()
  options = {'compress_level': 1} if kind == 'PNG' else {}
  image.save(file, kind, exif=image.getexif(), **options)
  file.seek(0)
  return file


def _check_file(path: str | os.PathLike) -> None:
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return  # the reader reports the reason
  if stat.S_ISDIR(mode):
    try:
      os.listdir(path)
    except OSError as error:
      raise UsageError(f'the folder cannot be listed: {error.strerror}.') from None
    raise UsageError('the folder holds no image.')
  if not stat.S_ISREG(mode):
    raise UsageError('it is not a file but a pipe or a device.')  # reading may never end


if __name__ == '__main__':
  command.run(main)
