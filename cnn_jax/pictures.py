"""Image files as the input of a run's network: one picture, or a folder with one folder per class."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import UsageError, files
from cnn_jax.data import Split, drawings
from cnn_jax.data.decode import LazyImages
from cnn_jax.data.images import IMAGE_EXTENSIONS, load_image
from cnn_jax.run import Run


def load_picture(file: Any, run: Run, *, invert: str = 'auto', name: str | None = None) -> np.ndarray:
  """Reads an image file as the input of a run's network.

  If the run was trained on light drawings on black, a picture with a light border is treated as a photograph of a dark
  drawing: it is inverted and, unless it has the network's size, scaled and centred as the training images are
  (`data/drawings.py`). Other pictures are read by `load_image` with the run's `data.resize`.

  Args:
    file, name: as `images.load_image`.
    run: sets the shape, the way of resizing and, for drawings, their size and position in the frame.
    invert: whether to invert: auto (as above) | never | always.

  Returns:
    uint8 (height, width, channels).

  Raises:
    UsageError: names the file and says why it cannot be read.
  """
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
  """Lists the images DIRECTORY/<class>/* as a split with the labels of a run; classes are matched by name.

  Images are read by `load_picture` when they are indexed. Classes of the run may be absent.

  Args:
    directory: the folder that holds one folder per class.
    run: sets the classes and the way of reading.

  Raises:
    UsageError: there are no images, or a folder does not match any class.
  """
  root = Path(directory).expanduser()
  if not root.is_dir():
    raise UsageError(f'{root} is not a directory; give one that holds a folder of images per class.')
  labels, paths = [], []
  for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith('.')):
    if folder.name not in run.class_names:
      known = ', '.join(run.class_names[:10]) + (', ...' if len(run.class_names) > 10 else '')
      raise UsageError(f'{folder} does not match any class of this run; rename or remove it. The classes: {known}.')
    found = [path for path in files.walk(str(folder), IMAGE_EXTENSIONS) if path != str(folder)]
    paths += found
    labels += len(found) * [run.class_names.index(folder.name)]
  if not paths:
    raise UsageError(
      f'{root} holds no image in a folder named after a class, such as {root / run.class_names[0]}; add some.'
    )
  names = [os.path.relpath(path, root) for path in paths]
  images = LazyImages(lambda index: load_picture(paths[index], run), np.arange(len(paths)), run.image_shape)
  return Split(images, np.array(labels, np.int32), names)
