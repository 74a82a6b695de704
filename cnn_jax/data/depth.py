"""Levels of more than 8 bits, which files often store in 16.

How many bits are used does not stand in the file: the fields for it (`sBIT` of PNG, `MaxSampleValue` of TIFF) describe
levels that have been scaled already, or are for statistics. A single picture cannot show it either, since it may be dark.
So the number of bits belongs to the set: `data.bit_depth`, or the fewest that hold the levels of all its pictures.
"""

import re
import sys
from typing import Any

import numpy as np
from PIL import Image

DEPTHS = (8, 10, 12, 14, 16)
_DEEP = re.compile(r'(RGB|RGBA|RGBX|LA);16([BLN])')


def is_deep(image: Image.Image) -> bool:
  """Whether an image that was opened but not loaded has 16 bits per level, or more."""
  return image.mode.startswith('I') or any(';16' in _raw_mode(tile) for tile in getattr(image, 'tile', ()))


def is_grey_alpha(image: Image.Image) -> bool:
  """Whether an image that was opened but not loaded has 16-bit grey levels and an alpha, which Pillow loads as RGBA."""
  return any(_raw_mode(tile).startswith('LA;16') for tile in getattr(image, 'tile', ()))


def declared_bits(image: Image.Image) -> int:
  """The bits per level of a TIFF that stores 12 as 12; 0 for other files."""
  return 12 if getattr(image, 'tag_v2', {}).get(258) == (12,) else 0


def bits_of(image: Image.Image) -> int:
  """The fewest of 8, 10, 12, 14 and 16 bits that hold the levels of a loaded deep image; 0 if all of it is black.

  Raises:
    ValueError: a level does not fit into 16 bits.
  """
  array = np.asarray(image)
  if array.ndim == 3:  # Pillow keeps the upper bytes
    colours = array[..., :3] if array.shape[2] == 4 and image.mode != 'CMYK' else array
    highest = 256 * int(colours.max()) + 255
  else:
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest > 65535:
      raise ValueError(f'the levels run from {lowest} to {highest}, not from 0 to 65535')
  return next(bits for bits in DEPTHS if highest < 1 << bits) if highest else 0


def scale_grey(image: Image.Image, bits: int) -> Image.Image:
  """Scales the levels of an image of mode I or I;16, of so many bits, to 8 bits."""
  return Image.fromarray(_scale(np.asarray(image).astype(np.int64), bits))


def take_lower_bytes(image: Image.Image) -> list[int] | None:
  """Makes an image that was opened but not loaded yield the lower bytes of its 16-bit colours.

  Pillow keeps the upper byte alone, and takes the lower one if it is told the other order.

  Returns:
    For each channel of the image, the channel where its lower bytes will be; None if Pillow cannot yield them.
  """
  tiles = getattr(image, 'tile', [])
  modes = {_raw_mode(tile) for tile in tiles}
  if len(modes) != 1 or not (found := _DEEP.fullmatch(modes.pop())):
    return None
  kind, order = found.groups()
  if kind == 'LA':  # both bytes of both channels become the four channels
    raw, channels = 'RGBA', [1, 1, 1, 3]
  else:
    little = order == 'L' or (order == 'N' and sys.byteorder == 'little')
    raw, channels = f'{kind};16{"B" if little else "L"}', list(range(len(image.getbands())))
  image.tile = [  # type: ignore[attr-defined]
    tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:])) for tile in tiles
  ]
  return channels


def scale_colour(upper: Image.Image, lower: np.ndarray, bits: int) -> Image.Image:
  """Joins the bytes of 16-bit colours, and scales levels of so many bits to 8 bits.

  Args:
    upper: RGB, or RGBA with an alpha of 16 bits.
    lower: uint8 of the same shape, the lower bytes.
    bits: of the colours. The alpha has as many, or 16 if it needs more.
  """
  levels = 256 * np.asarray(upper).astype(np.int64) + lower
  scaled = _scale(np.minimum(levels, (1 << bits) - 1), bits)
  if levels.shape[2] == 4:
    alpha = levels[..., 3]
    scaled[..., 3] = _scale(alpha, 16 if alpha.max() >= 1 << bits else bits)
  return Image.fromarray(scaled)


def _scale(levels: np.ndarray, bits: int) -> np.ndarray:
  """Maps 0..2^bits - 1 to 0..255, rounded."""
  largest = (1 << bits) - 1
  return ((levels * 510 + largest) // (2 * largest)).astype(np.uint8)


def _raw_mode(tile: Any) -> str:
  args = tile[3]
  mode = args if isinstance(args, str) else args[0] if isinstance(args, tuple) and args else ''
  return mode if isinstance(mode, str) else ''
