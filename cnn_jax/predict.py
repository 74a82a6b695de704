"""Classifies image files, and what a notebook needs of a trained run.

    python -m cnn_jax.predict --workdir=RUN IMAGE_OR_FOLDER... [--top_k=5] [--json] [--one_hot] [--tta]
                              [--checkpoint=last|best] [--invert=auto|never|always] [--batch_size=N]

Any size, grey or colour, any format of `images.IMAGE_FORMATS`; EXIF orientation is respected. A run
on grey images with a dark border, as MNIST is, takes pictures with a light border for photographs of
dark drawings: they are inverted and, unless they have the model's size, brought into the frame as
MNIST's digits are (`data/drawings.py`). `--invert=never` turns that off, `always` does it to all.
"""

import functools
import io
import itertools
import json
import os
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from cnn_jax import UsageError, calibration, command, evaluate
from cnn_jax.data import augment, files
from cnn_jax.model import feature_maps, head_kernel

_BATCH_SIZE = 256
_BATCH_BYTES = 2**30  # of the first block's maps, the largest
_FILE_WIDTH = 60  # columns of a table's file names, unless there are longer ones


class Classifier:
  """A trained run, ready to classify pictures.

  A picture is a path, an open binary file, a Pillow image, or a uint8 array (height, width) or
  (height, width, channels) with 1 or 3 channels; any size: it is read as `evaluate.load_picture` says.

  Args:
    run: from `evaluate.load_run`.
    invert: what to do with dark drawings on light: auto | never | always.
    batch_size: pictures per call of the network.
  """

  def __init__(self, run: evaluate.Run, *, invert: str = 'auto', batch_size: int | None = None):
    self.run = run
    self.class_names = run.class_names
    self._invert = invert
    self._feature_maps = jax.jit(functools.partial(feature_maps, run.model))
    height, width, channels = run.image_shape
    fitting = _BATCH_BYTES // (4 * height * width * max(run.model.features[0], channels))
    self.batch_size = batch_size or max(1, min(_BATCH_SIZE, fitting))

  def predict(self, images: Any, *, tta: bool = False) -> np.ndarray:
    """Probabilities of the classes.

    Args:
      images: a picture, or several: a list or another iterable of pictures, or a uint8 array
        (n, height, width, channels).
      tta: average over the flips and one-pixel shifts that training made the network indifferent to.

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

  def stream(self, images: Iterable[Any], *, tta: bool = False) -> Iterator[tuple[Any, np.ndarray | UsageError]]:
    """Yields (picture, probabilities or what is wrong with it) of any number of pictures, in order.

    Threads read some batches ahead of the network; nothing else is kept.
    """
    views = evaluate.tta_views(self.run.config.augment) if tta else None

    def read(image):
      try:
        return image, self.read(image)
      except UsageError as error:
        return image, error

    loaded = files.read_ahead(images, read, 2 * self.batch_size)
    size = 0
    while batch := list(itertools.islice(loaded, self.batch_size)):
      # One shape for all batches, so that the network is compiled once: a small one for a few pictures.
      size = size or min(self.batch_size, 1 << (len(batch) - 1).bit_length())
      rows = iter(self._probabilities([x for _, x in batch if not isinstance(x, UsageError)], size, views))
      for image, found in batch:
        yield image, found if isinstance(found, UsageError) else next(rows)

  def read(self, image: Any) -> np.ndarray:
    """The network's input for a picture: uint8 (height, width, channels).

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
    return evaluate.load_picture(image, self.run, invert=self._invert, name=name)

  def feature_maps(self, image: Any) -> dict[str, np.ndarray]:
    """What each part of the network makes of one picture.

    Returns:
      `block1`, `block2`, ...: (height, width, features); `gap` (or `flatten`): (features,);
      `logits`: (num_classes,). See `model.feature_maps`.
    """
    maps = self._feature_maps(self.run.variables, augment.normalize(self.read(image)[None]))
    return {name: np.asarray(x)[0] for name, x in maps.items()}

  def class_activation_map(self, image: Any, label: int | str | None = None) -> np.ndarray:
    """Where in a picture the evidence for a class is (Zhou et al. 2016, arXiv 1512.04150).

    With global average pooling it is exact: the mean of the map plus the head's bias is the logit.

    Args:
      image: a picture.
      label: a class, by name or index; the predicted one where not given.

    Returns:
      float32 (height, width) of the last block's maps.

    Raises:
      UsageError: the network has no global average pooling, or there is no such class.
    """
    model = self.run.model
    if model.aggregate != 'gap':
      raise UsageError("a class activation map needs config.model.aggregate='gap'; this run has 'flatten'.")
    maps = self.feature_maps(image)
    if label is None:
      label = int(np.argmax(maps['logits']))
    elif isinstance(label, str) and label in self.class_names:
      label = self.class_names.index(label)
    elif isinstance(label, str) or not 0 <= label < len(self.class_names):
      raise UsageError(f'{label!r} is not a class of this run; the classes are in class_names.')
    return maps[f'block{len(model.features)}'].astype(np.float32) @ head_kernel(model, self.run.variables)[:, label]

  def _probabilities(self, images: list[np.ndarray], size: int, views: evaluate.Views | None) -> np.ndarray:
    batch = np.zeros((size, *self.run.image_shape), np.uint8)
    batch[: len(images)] = np.stack(images) if images else 0
    logits = evaluate.compute_logits(self.run.model, self.run.variables, batch, size, views)
    return calibration.softmax(logits[: len(images)])


def main(argv: Sequence[str]) -> int:
  """The command: a line for each image; status 2 where one could not be read."""
  parser = command.Parser('Classifies image files.')
  parser.add_argument('images', nargs='+', metavar='IMAGE_OR_FOLDER', help='files, and folders of files')
  parser.add_argument('--workdir', required=True, help='the run')
  parser.add_argument('--top_k', type=int, default=5, help='how many of the most probable classes (default: 5)')
  parser.add_argument('--json', action='store_true', help='one JSON object a line instead of a table')
  parser.add_argument('--one_hot', action='store_true', help='add the one-hot vector of the class')
  parser.add_argument('--tta', action='store_true', help='average over flips and shifts, as the training augmented')
  parser.add_argument('--checkpoint', default='last', choices=['last', 'best'], help='newest, or best on validation')
  parser.add_argument(
    '--invert',
    default='auto',
    choices=['auto', 'never', 'always'],
    help='dark drawings on light, for a run on the opposite',
  )
  parser.add_argument('--batch_size', type=int, help='images per call of the network (default: by their size)')
  args = parser.parse_args(argv)
  for name in ('top_k', 'batch_size'):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      raise UsageError(f'--{name} is {getattr(args, name)}; give a number from 1 on.')
  command.prepare_backend()
  warnings.filterwarnings('ignore', category=UserWarning, module='PIL')  # of oddities in files that it can read
  sys.stdout.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]  # a terminal may lack a name's letters
  run = evaluate.load_run(args.workdir, args.checkpoint)
  classifier = Classifier(run, invert=args.invert, batch_size=args.batch_size)
  paths = itertools.chain.from_iterable(map(files.walk, args.images))
  top_k = min(args.top_k, len(classifier.class_names))
  count, wrong = 0, 0
  progress = _Progress()
  results = classifier.stream(paths, tta=args.tta)
  table = _Table(classifier.class_names, top_k, args.one_hot)
  while batch := list(itertools.islice(results, classifier.batch_size)):
    count, wrong = count + len(batch), wrong + sum(isinstance(found, UsageError) for _, found in batch)
    if args.json:
      lines = [json.dumps(_as_object(*pair, classifier.class_names, top_k, args.one_hot)) for pair in batch]
    else:
      lines = table.lines(batch)
    progress.clear()
    print('\n'.join(lines), flush=True)
    progress.show(count)
  progress.clear()
  if wrong:
    command.fail(f'{wrong:,} of {count:,} files could not be classified; their lines say why.')
  return command.USAGE if wrong else command.DONE


def _as_object(
  path: str, found: np.ndarray | UsageError, class_names: Sequence[str], top_k: int, one_hot: bool
) -> dict[str, Any]:
  if isinstance(found, UsageError):
    return {'file': path, 'error': str(found)}
  best = _top(found, top_k)
  label = best[0]
  described = {
    'file': path,
    'label': class_names[label],
    'probability': float(found[label]),
    'top_k': [[class_names[i], float(found[i])] for i in best],
  }
  return described | ({'one_hot': _one_hot(found)} if one_hot else {})


class _Table:
  """Lines of a table whose widths the first batch decides, since the rest has not been seen yet."""

  def __init__(self, class_names: Sequence[str], top_k: int, one_hot: bool):
    self._class_names = [_printable(name) for name in class_names]
    self._top_k, self._one_hot = top_k, one_hot
    self._width = 0

  def lines(self, batch: Sequence[tuple[str, np.ndarray | UsageError]]) -> list[str]:
    lines = []
    shown = [_printable(path) for path, _ in batch]
    if not self._width:
      self._width = max(4, min(_FILE_WIDTH, max(map(len, shown))))
      lines.append(self._line('file', 'class', 'probability', f'top {self._top_k}', 'one-hot'))
    for path, (_, found) in zip(shown, batch, strict=True):
      if isinstance(found, UsageError):
        lines.append(f'{path:<{self._width}}  error: {_printable(str(found))}')
        continue
      best = _top(found, self._top_k)
      ranked = ', '.join(f'{self._class_names[i]} {found[i]:.4f}' for i in best)
      vector = '[' + ' '.join(map(str, _one_hot(found))) + ']'
      lines.append(self._line(path, self._class_names[best[0]], f'{found[best[0]]:.4f}', ranked, vector))
    return lines

  def _line(self, path: str, label: str, probability: str, ranked: str, vector: str) -> str:
    cells = [f'{path:<{self._width}}', f'{label:<{max(5, *map(len, self._class_names))}}', f'{probability:<11}']
    cells += [vector] if self._one_hot else []
    cells += [ranked] if self._top_k > 1 else []  # last: its width varies
    return '  '.join(cells).rstrip()


class _Progress:
  """Says on standard error how far a long list is: a live line on a terminal, a line every 10 s elsewhere."""

  def __init__(self):
    self._began = self._shown = time.monotonic()
    # Where the results go to the same terminal, they are progress enough.
    self._live = sys.stderr.isatty() and not sys.stdout.isatty()
    self._silent = sys.stderr.isatty() and sys.stdout.isatty()
    self._standing = False

  def show(self, count: int) -> None:
    now = time.monotonic()
    if self._silent or now - self._shown < (0 if self._live else 10):
      return
    self._shown = now
    text = f'{count:,} images, {count / (now - self._began):,.0f} a second'
    self._standing = self._live
    print(f'\r{text}\x1b[K' if self._live else text, end='' if self._live else '\n', file=sys.stderr, flush=True)

  def clear(self) -> None:
    if self._standing:
      print('\r\x1b[K', end='', file=sys.stderr, flush=True)
      self._standing = False


def _top(probabilities: np.ndarray, k: int) -> list[int]:
  """The k most probable classes; of equals, the first first."""
  return [int(i) for i in np.argsort(-probabilities, kind='stable')[:k]]


def _one_hot(probabilities: np.ndarray) -> list[int]:
  vector = [0] * len(probabilities)
  vector[int(np.argmax(probabilities))] = 1
  return vector


def _printable(text: str) -> str:
  """Text in which control characters, and what turns or hides text, are escaped: a file may be named anything."""
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


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
    raise UsageError(f'the array of shape {array.shape} has no pixels.')
  return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _as_file(image: Image.Image) -> io.BytesIO:
  """A Pillow image as a file in memory, so that all that holds for files holds for it."""
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
    return  # the reader says why
  if stat.S_ISDIR(mode):
    raise UsageError('the folder holds no image that can be read.')
  if not stat.S_ISREG(mode):
    raise UsageError('it is not a file but a pipe or a device.')  # which may never end


if __name__ == '__main__':
  command.run(main)
