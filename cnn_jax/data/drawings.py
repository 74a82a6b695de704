"""Photographs of drawings for a model that learnt light ones on black, as MNIST's digits are.

A picture of a digit on paper is dark on light, of any size, and not in the middle. `measure` finds
out, once, from the training images, whether they are drawings and how they lie in their frame; `fit`
brings a photograph there, by the steps that made MNIST (LeCun et al. 1998, section III.A): the
drawing's box scaled to one longer side, then its centre of mass put to one place.
"""

from typing import Any

import numpy as np
from PIL import Image

_DARK, _LIGHT = 64, 127  # a border below is dark, above is light
_MEASURED = 1000  # training images looked at
_WORKING_SIDE = 512  # pixels that a photograph is reduced to
_FAINTEST = 16  # levels between paper and ink


def measure(images: Any) -> dict[str, Any] | None:
  """Whether images are light drawings on black, and how those lie in their frame.

  Args:
    images: uint8 (n, height, width, channels), an array or whatever gives one for an index array.

  Returns:
    `longer_side` of the box around a drawing (median) and its `centre` of mass (row, column; mean),
    in pixels; None unless all are grey and have a dark border.
  """
  if images.shape[3] != 1 or not len(images):
    return None
  chosen = np.unique(np.linspace(0, len(images) - 1, _MEASURED).astype(int))
  levels = np.asarray(images[chosen])[..., 0]
  if max(map(_border, levels)) >= _DARK:
    return None
  levels = levels[levels.max(axis=(1, 2)) >= _FAINTEST]  # an empty picture has no box
  if not len(levels):
    return None
  sides = [max(bottom - top, right - left) for top, bottom, left, right in (_box(x >= _FAINTEST) for x in levels)]
  centre = np.mean([_centre_of_mass(x) for x in levels], axis=0)
  return {'longer_side': int(np.median(sides)), 'centre': [round(float(c), 3) for c in centre]}


def is_dark_on_light(image: np.ndarray) -> bool:
  """Whether the border of an image, uint8 (height, width, 1), is light: its median level is over 127."""
  return _border(image[..., 0]) > _LIGHT


def invert(image: np.ndarray) -> np.ndarray:
  """The negative: 255 minus each level, uint8."""
  return 255 - image


def fit(image: np.ndarray, drawing: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
  """Makes of the photograph of a dark drawing on light paper what the model was trained on.

  The paper's light is taken for a plane through the border of the picture, so one side may lie in
  the shade; what is darker by more than Otsu's threshold (1979) is ink.

  Args:
    image: uint8 (any height, any width, 1).
    drawing: from `measure`.
    shape: (height, width, 1) of the model's input.

  Returns:
    uint8 of that shape; black where no drawing is seen.
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
  # Half the threshold is still paper, one and a half are ink; the slope between keeps soft edges.
  drawn = np.clip(ink[top:bottom, left:right] / threshold - 0.5, 0, 1)
  tall, wide = drawn.shape
  scale = min(drawing['longer_side'] / max(tall, wide), shape[0] / tall, shape[1] / wide)
  tall, wide = max(round(tall * scale), 1), max(round(wide * scale), 1)
  small = Image.fromarray(np.rint(255 * drawn).astype(np.uint8)).resize((wide, tall), Image.Resampling.BICUBIC)
  array = np.asarray(small)
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
  """The plane through the border's levels, least squares."""
  rows, columns = np.indices(levels.shape)
  terms = np.stack([np.ones(levels.shape), rows, columns], axis=-1)
  edge = _edge(levels.shape)
  plane = np.linalg.lstsq(terms[edge], levels[edge], rcond=None)[0]
  return (terms @ plane).astype(np.float32)


def _otsu(ink: np.ndarray) -> float:
  """The level that parts the pixels into two classes whose means differ most, weighted by their sizes."""
  count, edges = np.histogram(ink, 256, (0, float(ink.max())))
  middle = (edges[:-1] + edges[1:]) / 2
  below, above = np.cumsum(count)[:-1], np.cumsum(count[::-1])[::-1][1:]
  mass = np.cumsum(count * middle)
  distance = mass[:-1] / np.maximum(below, 1) - (mass[-1] - mass[:-1]) / np.maximum(above, 1)
  return float(edges[1 + np.argmax(below * above * distance**2)])


def _box(inside: np.ndarray) -> tuple[int, int, int, int]:
  """Top, bottom, left, right of what is true; bottom and right exclusive."""
  rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
  return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def _centre_of_mass(levels: np.ndarray) -> tuple[float, float]:
  levels = levels.astype(np.float64)
  rows, columns = np.indices(levels.shape)
  return float((rows * levels).sum() / levels.sum()), float((columns * levels).sum() / levels.sum())
