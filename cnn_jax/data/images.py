"""Image files to uint8 arrays, with Pillow: any mode and depth, any size, and clear errors.

Policies, the same for training and for prediction:
- EXIF orientation is applied. The first frame of an animation is used.
- Transparent pixels are composited on white.
- A colour image becomes grey by ITU-R 601-2 luma, as Pillow computes it. A grey image becomes RGB with three equal
  channels.
- 16-bit levels are divided by 257. 32-bit integers are interpreted as 16-bit levels. Floats in [0, 1] are multiplied by
  255; other floats in [0, 255] are used as they are. Nothing is clipped silently.
- An image that already has the requested size is not resampled. Others are resampled bicubically with antialiasing.
"""

import os
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from cnn_jax import UsageError

# Raster formats that Pillow decodes by itself. EPS and PDF are left out because they start other programs.
IMAGE_FORMATS = ('PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM', 'TGA', 'JPEG2000')
IMAGE_EXTENSIONS = (
  '.png', '.jpg', '.jpeg', '.gif', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm', '.pbm', '.pnm', '.tga', '.jp2',
)  # fmt: skip
# 89 million, Pillow's own limit: more is a mistake or an attack. Between this and twice this Pillow only warns.
MAX_PIXELS = 2**30 // 12


def load_image(
  file: str | os.PathLike | IO[bytes],
  *,
  size: int | tuple[int, int] = 0,
  channels: int = 0,
  resize: str = 'crop',
  name: str | None = None,
) -> np.ndarray:
  """Decodes one image.

  Args:
    file: a path or an open binary file.
    size: pixels per side, or (height, width); 0 keeps the image's size.
    channels: 1 for grey, 3 for RGB, 0 to keep what the image is.
    resize: how to bring an image to `size`; see `resize_image`.
    name: identifies the file in messages; its path by default.

  Returns:
    uint8 (H, W, C).

  Raises:
    UsageError: the file cannot be read. The message has its name and the reason.
  """
  if name is None:
    name = os.fspath(file) if isinstance(file, str | os.PathLike) else getattr(file, 'name', 'the image')
  try:
    with Image.open(file, formats=IMAGE_FORMATS) as opened:
      image: Image.Image = opened
      if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
      if size:
        # A JPEG decoder can skip detail that resizing would remove; three times the size keeps enough.
        height, width = _pair(size)
        opened.draft(image.mode, (3 * width, 3 * height))
      image.load()
      image = _upright(image)
      image = _grey_or_rgb(image, channels)
      if size:
        image = _fit(image, *_pair(size), resize)
      array = np.asarray(image)
  except Image.UnidentifiedImageError:
    raise UsageError(
      f'{name} is not an image of a known format ({", ".join(IMAGE_FORMATS)}); replace it or remove it.'
    ) from None
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise UsageError(f'{name} has more than {MAX_PIXELS:,} pixels; make it smaller.') from None
  except FileNotFoundError:
    raise UsageError(f'{name} does not exist.') from None
  except IsADirectoryError:
    raise UsageError(f'{name} is a directory, not an image file.') from None
  except MemoryError:
    raise
  # On damaged input decoders raise nearly any exception: OSError, SyntaxError, ValueError, struct.error, ...
  except Exception as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UsageError(f'{name} cannot be read: {reason.rstrip(".")}; replace it or remove it.') from None
  return array if array.ndim == 3 else array[:, :, None]


def resize_image(array: np.ndarray, size: int | tuple[int, int], resize: str, channels: int = 0) -> np.ndarray:
  """Resizes and converts an image that is already an array, as `load_image` does for a file.

  Args:
    array: uint8 (H, W, C); C is 1 or 3.
    size: pixels per side, or (height, width); 0 keeps the size.
    resize: 'crop' (the largest centred part of the requested aspect ratio) | 'pad' (the whole image, centred on black) |
      'stretch' (the aspect ratio changes).
    channels: 1, 3, or 0 to keep the number of channels.

  Returns:
    uint8 (height, width, channels).
  """
  image = _grey_or_rgb(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array), channels)
  if size:
    image = _fit(image, *_pair(size), resize)
  array = np.asarray(image)
  return array if array.ndim == 3 else array[:, :, None]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
  return (size, size) if isinstance(size, int) else size


def _upright(image: Image.Image) -> Image.Image:
  # Reading EXIF takes longer than decoding a small image. It can only be in these fields.
  if not image.info.keys() & {'exif', 'Raw profile type exif', 'XML:com.adobe.xmp', 'xmp'} and image.format != 'TIFF':
    return image
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # a damaged EXIF block does not affect the pixels
    return image


def _grey_or_rgb(image: Image.Image, channels: int) -> Image.Image:
  """Converts to mode L or RGB by the policies at the top."""
  if image.mode.startswith('I;16') or image.mode == 'I':
    image = _from_integers(np.asarray(image).astype(np.int64))
  elif image.mode == 'F':
    image = _from_floats(np.asarray(image))
  elif 'A' in image.mode or 'a' in image.mode or 'transparency' in image.info:
    image = _on_white(image)
  if image.mode == '1':
    image = image.convert('L')
  elif image.mode == 'P':
    image = _without_colour(image.convert('RGB'))
  elif image.mode not in ('L', 'RGB'):
    image = image.convert('RGB')
  mode = {0: image.mode, 1: 'L', 3: 'RGB'}[channels]
  return image if image.mode == mode else image.convert(mode)


def _on_white(image: Image.Image) -> Image.Image:
  grey = image.mode in ('LA', 'La', 'L', '1')
  indexed = image.mode in ('P', 'PA')
  image = image.convert('RGBA')
  white = Image.new('RGBA', image.size, 'white')
  image = Image.alpha_composite(white, image).convert('RGB')
  # The three channels of a grey image are equal, so any of them is exact.
  return image.getchannel(0) if grey else _without_colour(image) if indexed else image


def _without_colour(image: Image.Image) -> Image.Image:
  """Converts RGB to L if that loses nothing, as for a palette of greys."""
  array = np.asarray(image)
  equal = np.array_equal(array[..., 0], array[..., 1]) and np.array_equal(array[..., 0], array[..., 2])
  return image.getchannel(0) if equal else image


def _from_integers(levels: np.ndarray) -> Image.Image:
  if levels.min() < 0 or levels.max() > 65535:
    raise ValueError(f'the levels run from {levels.min()} to {levels.max()}, not from 0 to 65535')
  return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


def _from_floats(levels: np.ndarray) -> Image.Image:
  low, high = float(levels.min()), float(levels.max())
  if not (low >= 0 and high <= 255):  # written so that NaN fails too
    raise ValueError(f'the levels run from {low:g} to {high:g}, neither in [0, 1] nor in [0, 255]')
  return Image.fromarray(np.rint(levels * (255 if high <= 1 else 1)).astype(np.uint8))


def _fit(image: Image.Image, height: int, width: int, resize: str) -> Image.Image:
  if image.size == (width, height):
    return image
  if resize == 'stretch':
    return _resample(image, height, width, (0, 0, image.width, image.height))
  if resize == 'crop':
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (max(left, 0), max(top, 0), min(left + width * scale, image.width), min(top + height * scale, image.height))
    return _resample(image, height, width, box)
  scale = min(width / image.width, height / image.height)
  inner = max(round(image.height * scale), 1), max(round(image.width * scale), 1)
  small = _resample(image, *inner, (0, 0, image.width, image.height))
  framed = Image.new(image.mode, (width, height))
  framed.paste(small, ((width - inner[1]) // 2, (height - inner[0]) // 2))
  return framed


def _resample(image: Image.Image, height: int, width: int, box: tuple) -> Image.Image:
  # Pillow's filters widen with the reduction, which is the antialiasing.
  return image.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
