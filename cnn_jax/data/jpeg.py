"""The pixels of JPEG files: with simplejpeg if it is installed, and with Pillow otherwise, in the same bits.

Both bind libjpeg-turbo, and both use its accurate transform and its smooth upsampling. Pillow reads the headers in either
case, and decodes whatever simplejpeg does not decode without a warning, so that policies and messages are the same.
"""

import functools
import os
from types import ModuleType
from typing import IO, Any

import PIL
from PIL import Image, features

FORMATS = ('JPEG', 'MPO')  # as Pillow names them
_KEPT = 3  # times the requested size is what a reduced picture has at least
_COLOURS = {'L': 'GRAY', 'RGB': 'RGB'}  # of Pillow's modes; CMYK is left to Pillow
_MAX_BYTES = 2**28  # of a file that is read whole
_BLOCK = 8  # pixels a side of a block of JPEG


def load(opened: Image.Image, stream: IO[bytes], start: int, size: tuple[int, int] | None) -> Image.Image:
  """Decodes the pixels of a JPEG file, without detail that resizing would remove.

  Args:
    opened: the image as Pillow has opened it; it is used up.
    stream: of the file.
    start: where the file begins in it.
    size: (height, width) that are needed; the picture is reduced, by the transform, to three times that or more. None:
      all pixels are.

  Raises:
    OSError: the file breaks off, or is damaged.
  """
  if size:
    opened.draft(opened.mode, (_KEPT * size[1], _KEPT * size[0]))
  image = _decode(opened, stream, start)
  if image is None:
    stream.seek(start)
    opened.load()
  if _ends_in_zeros(stream):
    raise OSError('truncated')  # zero bytes are valid pixels, of which the decoder makes a plain rest
  return opened if image is None else image


def decoder() -> str:
  """Names and versions of what decodes images here; pixels of another decoder may differ in the last bit."""
  pillow = f'pillow {PIL.__version__}, libjpeg {features.version("jpg")}'
  return pillow if (library := _library()) is None else f'{pillow}, simplejpeg {library.__version__}'


@functools.cache
def _library() -> ModuleType | None:
  try:
    import simplejpeg
  except ImportError:  # not installed, or not for this system
    return None
  return simplejpeg


def _decode(opened: Image.Image, stream: IO[bytes], start: int) -> Image.Image | None:
  """Decodes with simplejpeg; None if it is not installed, or warns."""
  (scale, *_) = getattr(opened, 'decoderconfig', ()) or (1,)
  # The sides of a small picture do not determine by how much it is reduced.
  if (library := _library()) is None or opened.mode not in _COLOURS or (scale > 1 and min(opened.size) < _BLOCK):
    return None
  stream.seek(start)
  data = stream.read(_MAX_BYTES)
  width, height = opened.size
  reduced: dict[str, Any] = {'min_height': height, 'min_width': width, 'min_factor': scale} if scale > 1 else {}
  try:
    pixels = library.decode_jpeg(data, _COLOURS[opened.mode], **reduced)
  except ValueError:  # an error or a warning of libjpeg
    return None
  if pixels.shape[:2] != (height, width):
    return None
  return Image.fromarray(pixels[..., 0] if opened.mode == 'L' else pixels)


def _ends_in_zeros(stream: IO[bytes]) -> bool:
  """Whether a JPEG ends in zero bytes without an end marker before them, as an interrupted copy leaves it."""
  place = stream.tell()
  end = stream.seek(0, os.SEEK_END)
  stream.seek(max(0, end - 16))
  found = not stream.read().strip(b'\0')
  if found:
    stream.seek(0)
    found = not stream.read(_MAX_BYTES).rstrip(b'\0').endswith(b'\xff\xd9')
  stream.seek(place)
  return found
