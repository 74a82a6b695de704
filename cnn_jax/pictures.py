"""Image files as the input of a run's network: one picture, or a folder with one folder per class."""

import dataclasses
import os
from typing import Any

import numpy as np

from cnn_jax import UsageError
from cnn_jax.data import Split, drawings, layout, listing
from cnn_jax.data.images import load_image
from cnn_jax.data.lazy import LazyImages
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
    image = load_image(file, channels=channels, name=name, bit_depth=run.bit_depth)
    inverted = invert == 'always' or drawings.is_dark_on_light(image)
    if image.shape == run.image_shape:
      return drawings.invert(image) if inverted else image
    if inverted:
      return drawings.fit(image, run.drawing, run.image_shape)
    if hasattr(file, 'seek'):
      file.seek(0)
  options: dict[str, Any] = {'channels': channels, 'resize': run.config.data.resize, 'bit_depth': run.bit_depth}
  image = load_image(file, size=(height, width), name=name, **options)
  return drawings.invert(image) if invert == 'always' and not run.drawing else image


@dataclasses.dataclass(frozen=True)
class Folder:
  """The images of a folder as a split.

  Attributes:
    split: images are read when they are indexed; one that cannot be read is black.
    bad: the index in `split` of each image that could not be read, and the reason; complete when all have been indexed.
    notes: a line about each kind of thing that is not used.
  """

  split: Split
  bad: dict[int, str]
  notes: list[str]


def load_folder(directory: str | os.PathLike, run: Run) -> Folder:
  """Lists the images DIRECTORY/<class>/* as a split with the labels of a run; classes are matched by name.

  Images are read by `load_picture`. Classes of the run may be absent.

  Args:
    directory: the folder that holds one folder per class.
    run: sets the classes and the way of reading.

  Raises:
    UsageError: there are no images, or a folder that holds images does not match any class.
  """
  root = os.path.expanduser(directory)
  if not os.path.isdir(root):
    raise UsageError(f'{root} is not a directory; give one that holds a folder of images per class.')
  passed, labels, found, notes = listing.Passed(), [], [], []
  top = listing.scan(root, passed)
  known = {name: label for names in (run.folder_names, run.class_names) for label, name in enumerate(names)}
  seen = listing.surroundings(root)
  for name in top.folders:
    files = list(listing.walk(os.path.join(root, name), passed, seen))
    if files and listing.text(name) not in known:
      raise UsageError(f'{os.path.join(root, name)} does not match any class of this run; {_hint(root, name, run)}.')
    if not files:
      notes.append(f'{listing.text(os.path.join(root, name))} holds no image; it is not used.')
    found += files
    labels += len(files) * [known.get(listing.text(name), 0)]
  if not found:
    example = os.path.join(root, run.class_names[0])
    kinds = f' but files of other kinds ({passed.kinds()})' if passed.suffixes else ''
    raise UsageError(f'{root} holds no image in a folder named after a class, such as {example}{kinds}; add some.')
  if top.files:
    notes.append(f'Images that lie in no folder of a class and are not used: {len(top.files):,}.')
  bad: dict[int, str] = {}

  def load(index: int) -> np.ndarray:
    try:
      if found[index].problem:
        raise UsageError(f'{found[index].path} {found[index].problem}.')
      return load_picture(found[index].path, run)
    except UsageError as error:
      bad[int(index)] = str(error)
      return np.zeros(run.image_shape, np.uint8)

  names = [listing.text(os.path.relpath(file.path, root)) for file in found]
  images = LazyImages(load, np.arange(len(found)), run.image_shape)
  return Folder(Split(images, np.array(labels, np.int32), names), bad, [*notes, *passed.notes()])


def _hint(root: str, name: str, run: Run) -> str:
  """What to do about a folder that is not one of a run's classes."""
  if layout.split_of(name):
    return f'if it is a split, give it as the folder: {os.path.join(root, name)}'
  near = [known for known in run.class_names if layout.fold(known) == layout.fold(name)]
  if near:
    return f'rename {name!a} to {near[0]!a}'
  return f'rename or remove it. The classes: {listing.shorten(list(run.class_names), 10)}'
