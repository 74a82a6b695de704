"""Transparent pixels, which are composited on white: by an alpha channel, or by a key, the one level or colour (`tRNS` of
PNG) that is transparent."""

import numpy as np
from PIL import Image

_KEY = 'transparency'  # where Pillow keeps the key
_GREYS = {'L;2': 3, 'L;4': 15}  # the highest level by raw mode


def is_keyed(image: Image.Image) -> bool:
  """Whether an image has a level or colour that is transparent."""
  return _KEY in image.info


def scale_key(image: Image.Image) -> None:
  """Scales the key of a grey PNG of 2 or 4 bits, opened but not loaded, as Pillow scales its levels but not its key."""
  highest = next((_GREYS.get(str(tile[3])) for tile in getattr(image, 'tile', ())), None)
  if highest and isinstance(key := image.info.get(_KEY), int):
    image.info[_KEY] = key * 255 // highest


def cut_out(image: Image.Image, lower: np.ndarray | None) -> tuple[Image.Image, Image.Image]:
  """Finds the transparent pixels of a keyed image of 16 bits, whose key has 16 bits too.

  Args:
    image: I;16, or RGB that holds the upper bytes.
    lower: uint8 of the same shape, the lower bytes of RGB.

  Returns:
    The image with black in place of the transparent pixels, so that their level does not count for the range, and
    without its key; and their mask.
  """
  array, key = np.asarray(image), np.array(image.info[_KEY])
  levels = array if lower is None else 256 * array.astype(np.int64) + lower
  clear = levels == key if lower is None else (levels == key).all(axis=-1)
  opaque = array * (~clear if lower is None else ~clear[..., None])
  return Image.fromarray(opaque.astype(array.dtype)), Image.fromarray(clear)


def on_white(image: Image.Image) -> Image.Image:
  """Composites an image with transparent pixels on white: mode L or RGB."""
  grey = image.mode in ('LA', 'La', 'L', '1')
  indexed = image.mode in ('P', 'PA')
  image = image.convert('RGBA')
  white = Image.new('RGBA', image.size, 'white')
  image = Image.alpha_composite(white, image).convert('RGB')
  # The three channels of a grey image are equal, so any of them is exact.
  return image.getchannel(0) if grey else without_colour(image) if indexed else image


def without_colour(image: Image.Image) -> Image.Image:
  """Converts RGB to L if that loses nothing, as for a palette of greys."""
  array = np.asarray(image)
  equal = np.array_equal(array[..., 0], array[..., 1]) and np.array_equal(array[..., 0], array[..., 2])
  return image.getchannel(0) if equal else image
