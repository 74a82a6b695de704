"""Photographs of drawings, prepared for a network that was trained on light drawings on black, such as MNIST.

A picture of a digit on paper is dark on light, has any size, and is not centred. `measure` determines from the training
images whether they are drawings, and their size and position in the frame. `fit` brings a photograph to that size and
position by the steps that made MNIST (LeCun et al. 1998, section III.A): it scales the drawing's bounding box to a fixed
longer side, then moves the centre of mass to a fixed place.
"""

from typing import Any

import numpy as np
from PIL import Image

_DARK, _LIGHT = 64, 127  # a border is dark below the first level, and light above the second
_MAX_MEASURED = 1000  # training images
_WORKING_SIDE = 512  # pixels to which the longer side of a photograph is reduced
_FAINTEST = 16  # smallest difference of levels between paper and ink


def measure(images: Any) -> dict[str, Any] | None:
  """Determines whether images are light drawings on black, and their size and position in the frame.

  Args:
    images: uint8 (n, height, width, channels), an array or `cnn_jax.data.RandomAccessImages`.

  Returns:
    `longer_side` of the bounding box of a drawing (median) and its `centre` of mass (row, column; mean), in pixels;
    None unless all images are grey and have a dark border.
  """
  if images.shape[3] != 1 or not len(images):
    return None
  chosen = np.unique(np.linspace(0, len(images) - 1, _MAX_MEASURED).astype(int))
  levels = np.asarray(images[chosen])[..., 0]
  if max(map(_border, levels)) >= _DARK:
    return None
  levels = levels[levels.max(axis=(1, 2)) >= _FAINTEST]  # an empty picture has no bounding box
  if not len(levels):
    return None
  sides = [max(bottom - top, right - left) for top, bottom, left, right in (_box(x >= _FAINTEST) for x in levels)]
  centre = np.mean([_centre_of_mass(x) for x in levels], axis=0)
  return {'longer_side': int(np.median(sides)), 'centre': [round(float(c), 3) for c in centre]}


def is_dark_on_light(image: np.ndarray) -> bool:
  """Whether the border of an image, uint8 (height, width, 1), has a median level over 127."""
  return _border(image[..., 0]) > _LIGHT


def invert(image: np.ndarray) -> np.ndarray:
  """Returns the negative of a uint8 image: 255 minus each level."""
  return 255 - image


def fit(image: np.ndarray, drawing: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
  """Converts the photograph of a dark drawing on light paper to the form of the training images.

  The level of the paper is modelled as a plane through the border of the picture, so one side may lie in the shade. A
  pixel that is darker than the plane by more than Otsu's threshold (1979) is ink.

  Args:
    image: uint8 (any height, any width, 1).
    drawing: from `measure`.
    shape: (height, width, 1) of the network's input.

  Returns:
    uint8 of that shape; all black if no drawing is found.
  """
  photograph = Image.fromarray(image[..., 0])
  photograph.thumbnail((_WORKING_SIDE, _WORKING_SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
  levels = np.asarray(photograph).astype(np.float32)
  ink = np.maximum(_paper(levels) - levels, 0)
  frame = np.zeros(shape, np.uint8)
  if ink.max() < _FAINTEST:
    return frame
  threshold = _otsu(ink)
  top, bottom, left, right = _box(ink > threshold)
  # Half the threshold is paper, one and a half times the threshold is ink; the ramp between keeps edges soft.
  drawn = np.clip(ink[top:bottom, left:right] / threshold - 0.5, 0, 1)
  tall, wide = drawn.shape
  scale = min(drawing['longer_side'] / max(tall, wide), shape[0] / tall, shape[1] / wide)
  tall, wide = max(round(tall * scale), 1), max(round(wide * scale), 1)
  small = Image.fromarray(np.rint(255 * drawn).astype(np.uint8)).resize((wide, tall), Image.Resampling.BICUBIC)
  array = np.asarray(small)
  if not array.any():  # specks so far apart that nothing is left of them at this size
    return frame
  row, column = _centre_of_mass(array)
  first_row = min(max(round(drawing['centre'][0] - row), 0), shape[0] - tall)
  first_column = min(max(round(drawing['centre'][1] - column), 0), shape[1] - wide)
  frame[first_row : first_row + tall, first_column : first_column + wide, 0] = array
  return frame


def _border(levels: np.ndarray) -> float:
  """Median level of the outermost pixels of (height, width)."""
  return float(np.median(levels[_edge(levels.shape)]))


def _edge(shape: tuple[int, ...]) -> np.ndarray:
  edge = np.ones(shape, bool)
  edge[1:-1, 1:-1] = False
  return edge


def _paper(levels: np.ndarray) -> np.ndarray:
  """The plane through the levels of the border, by least squares."""
  rows, columns = np.indices(levels.shape)
  terms = np.stack([np.ones(levels.shape), rows, columns], axis=-1)
  edge = _edge(levels.shape)
  plane = np.linalg.lstsq(terms[edge], levels[edge], rcond=None)[0]
  return (terms @ plane).astype(np.float32)


def _otsu(ink: np.ndarray) -> float:
  """The level that splits the pixels into two classes with the largest variance between them."""
  count, edges = np.histogram(ink, 256, (0, float(ink.max())))
  middle = (edges[:-1] + edges[1:]) / 2
  below, above = np.cumsum(count)[:-1], np.cumsum(count[::-1])[::-1][1:]
  mass = np.cumsum(count * middle)
  distance = mass[:-1] / np.maximum(below, 1) - (mass[-1] - mass[:-1]) / np.maximum(above, 1)
  return float(edges[1 + np.argmax(below * above * distance**2)])


def _box(inside: np.ndarray) -> tuple[int, int, int, int]:
  """Top, bottom, left and right of the true pixels; bottom and right are exclusive."""
  rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
  return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def _centre_of_mass(levels: np.ndarray) -> tuple[float, float]:
  levels = levels.astype(np.float64)
  rows, columns = np.indices(levels.shape)
  return float((rows * levels).sum() / levels.sum()), float((columns * levels).sum() / levels.sum())
