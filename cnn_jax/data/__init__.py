"""Data sets: what they are, and `load_dataset`. The sources are in `sources.py`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class RandomAccessImages(Protocol):
  """Images that are decoded when they are asked for: a set too large for the memory."""

  shape: tuple[int, ...]  # (N, H, W, C)
  dtype: np.dtype  # uint8

  def __len__(self) -> int: ...

  def __getitem__(self, index: Any) -> np.ndarray:
    """One image (H, W, C) for an integer, (n, H, W, C) for a slice or an integer array of n."""
    ...


@dataclasses.dataclass(frozen=True)
class Split:
  """One part of a data set.

  Attributes:
    images: uint8 (N, H, W, C), C is 1 (grey) or 3 (RGB).
    labels: int32 (N,), indices into `Dataset.class_names`.
    names: path of each image relative to the folder, where the images are files.
  """

  images: np.ndarray | RandomAccessImages
  labels: np.ndarray
  names: Sequence[str] | None = None

  def __len__(self) -> int:
    return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set: train on `train`, select on `validation` (may be empty), report `test` once."""

  name: str
  provenance: str  # where the images come from and how they were split, for the record
  class_names: tuple[str, ...]
  train: Split
  validation: Split
  test: Split


def load_dataset(config_data) -> Dataset:
  """Loads the data set that `config.data` describes.

  Args:
    config_data: the section `config.data` of a checked config.

  Returns:
    The data set; its splits share one image shape.

  Raises:
    UsageError: a set that is not there, a folder or file that cannot be used.
  """
  from cnn_jax.data import sources

  return sources.load(config_data)
