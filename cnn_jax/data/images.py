"""Image files to uint8 arrays, with Pillow and `jpeg`: any mode and depth, any size, and clear errors.

Policies, the same for training and for prediction:
- EXIF orientation is applied. The first frame of an animation is used.
- Transparent pixels are composited on white.
- A colour image becomes grey by ITU-R 601-2 luma, as Pillow computes it. A grey image becomes RGB with three equal
  channels.
- 16-bit levels are divided by 257, or by less if a set holds 8 to 14 bits in 16; see `data.bit_depth`. 32-bit integers
  are interpreted as 16-bit levels. Floats are fractions or levels by their range, or refused; see `_from_floats`.
- An image that already has the requested size is not resampled. Others are resampled bicubically with antialiasing.
- A JPEG that lacks at most a twentieth of its pixels, and a PNG with any amount of text, are read, with a remark.
"""

import contextlib
import errno
import importlib.util
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from cnn_jax import UsageError, files
from cnn_jax.data import depth, jpeg, kinds, repair, transparent

# Raster formats that Pillow decodes by itself. EPS and PDF are left out because they start other programs.
IMAGE_FORMATS = ('PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM', 'TGA', 'JPEG2000') + (
  ('AVIF',) if importlib.util.find_spec('PIL.AvifImagePlugin') else ()  # from Pillow 11.3 on
)
IMAGE_EXTENSIONS = (
  '.png', '.apng', '.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.gif', '.bmp', '.tif', '.tiff', '.webp', '.avif',
  '.ppm', '.pgm', '.pbm', '.pnm', '.tga', '.jp2', '.j2k', '.j2c', '.jpc', '.jpf', '.jpx',
)  # fmt: skip
# 89 million, Pillow's own limit: more is a mistake or an attack. Between this and twice this Pillow only warns.
MAX_PIXELS = 2**30 // 12
TRUNCATED = 'lacks its last bytes'
_MAX_REPAIRED_BYTES = 2**28
_SMALL_FILE = 2**20
# Resampling of fractions overshoots black and white: at a corner, bicubic by 15 % and Lanczos by 25 %.
_OVERSHOOT = 0.25
# Normalised values and highlights reach several units; a picture in levels to 255 that stays below this is nearly black.
_LEAST_WHITE = 16
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}  # by the orientation of EXIF
_reading = threading.local()  # `remarks`: the warnings about the file that this thread reads


class Picture(NamedTuple):
  """An image that was read, and what was noticed.

  Attributes:
    pixels: uint8 (H, W, C).
    cut: the share of the area that cropping to the requested aspect ratio removed, from 0 to 1.
    bits: of 8, 10, 12, 14 and 16, the fewest that hold the levels of a 16-bit file; 0 for other files.
    remarks: oddities that did not prevent reading: `TRUNCATED`, and warnings of Pillow.
  """

  pixels: np.ndarray
  cut: float
  bits: int
  remarks: tuple[str, ...]


class UnreadableError(UsageError):
  """A file that is not a readable image; `reason` is the predicate of a sentence about it, as 'is a PDF document'."""

  def __init__(self, name: Any, reason: str, remedy: str = 'replace it or remove it'):
    super().__init__(f'{name} {reason}; {remedy}.')
    self.name, self.reason = str(name), reason


def load_image(file: str | os.PathLike | IO[bytes], **options: Any) -> np.ndarray:
  """Decodes one image: uint8 (H, W, C); see `read_image`."""
  return read_image(file, **options).pixels


def read_image(
  file: str | os.PathLike | IO[bytes],
  *,
  size: int | tuple[int, int] = 0,
  channels: int = 0,
  resize: str = 'crop',
  name: str | None = None,
  bit_depth: int = 0,
) -> Picture:
  """Decodes one image.

  Args:
    file: a path of a regular file, or an open binary file.
    size: pixels per side, or (height, width); 0 keeps the image's size.
    channels: 1 for grey, 3 for RGB, 0 to keep what the image is.
    resize: how to bring an image to `size`; see `resize_image`.
    name: identifies the file in messages; its path by default.
    bit_depth: the bits that the levels of 16-bit files use, 8 to 16. If 0, a file that uses less than 16 is refused,
      because it may be dark, or have another range.

  Raises:
    UnreadableError: the file cannot be read. The message has its name and the reason.
    UsageError: memory does not suffice; its cause is the MemoryError.
  """
  if name is None:
    name = os.fspath(file) if isinstance(file, str | os.PathLike) else getattr(file, 'name', 'the image')
  _reading.remarks = []
  try:
    with _open(file) as stream:
      return _read_or_repair(stream, (size, channels, resize, bit_depth))
  except MemoryError as error:  # not the file's fault, so it must not be left out as one that cannot be read
    resized = ' at {}x{} pixels'.format(*_pair(size)) if size else ''
    remedy = 'set a smaller config.data.image_size' if size else 'make it smaller'
    raise UsageError(f'{name} does not fit into memory{resized}; {remedy}, or free memory.') from error
  except _RefusedError as refused:
    raise UnreadableError(name, refused.reason, refused.remedy) from None
  except Exception as error:
    raise UnreadableError(name, _explain(error)) from None


@contextlib.contextmanager
def attributed_warnings() -> Iterator[None]:
  """While this is open, warnings of Pillow become remarks about the picture that the warning thread reads."""

  def remark(message: Any, *_: Any, **__: Any) -> None:
    getattr(_reading, 'remarks', []).append(str(message))

  with warnings.catch_warnings():
    warnings.filterwarnings('always', category=UserWarning, module='PIL')
    show = warnings.showwarning

    def keep(message: Any, category: Any, *rest: Any, **more: Any) -> None:
      # Everything else goes where it would have gone.
      (remark if issubclass(category, UserWarning) else show)(message, category, *rest, **more)

    warnings.showwarning = keep
    yield


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


class _RefusedError(Exception):
  """A file that is not a readable image; see `UnreadableError`."""

  def __init__(self, reason: str, remedy: str = 'replace it or remove it'):
    super().__init__(reason)
    self.reason, self.remedy = reason, remedy


def _open(file: str | os.PathLike | IO[bytes]) -> contextlib.AbstractContextManager[IO[bytes]]:
  if not isinstance(file, str | os.PathLike):
    return contextlib.nullcontext(file)
  # Making a buffered file, and reading it in pieces, takes a fifth of the time of decoding a small image.
  descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
  try:
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size < _SMALL_FILE:
      data = os.read(descriptor, status.st_size + 1)
      if len(data) == status.st_size:
        return io.BytesIO(data)
  finally:
    os.close(descriptor)
  return files.open_regular(file)  # a pipe or a device might never end


def _read_or_repair(stream: IO[bytes], options: tuple) -> Picture:
  """Reads an image, if necessary from a repaired copy; raises `_RefusedError` or MemoryError."""
  start = stream.tell()
  try:
    return _read(stream, *options)
  except (MemoryError, _RefusedError):
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise _RefusedError(f'has more than {MAX_PIXELS:,} pixels', 'make it smaller') from None
  # On damaged input decoders raise nearly any exception: OSError, SyntaxError, ValueError, struct.error, ...
  except Exception as error:
    stream.seek(start)
    head = stream.read(kinds.BYTES)
    if isinstance(error, Image.UnidentifiedImageError):
      kind = kinds.describe(head)
      known = f'is not an image of a known format ({", ".join(IMAGE_FORMATS)})'
      raise _RefusedError(f'is {kind}' if kind else known) from None
    stream.seek(start)
    repaired, remark = _repair(stream, head, error)
    try:
      picture = _read(io.BytesIO(repaired), *options)
    except (MemoryError, _RefusedError):
      raise
    except Exception:
      raise _RefusedError(_explain(error)) from None
    return picture._replace(remarks=(*remark, *picture.remarks))


def _repair(stream: IO[bytes], head: bytes, error: Exception) -> tuple[bytes, tuple[str, ...]]:
  """Returns a copy of a file that can perhaps be read, and a remark about it; raises `_RefusedError`."""
  jpeg = head.startswith(b'\xff\xd8') and 'truncated' in str(error)
  if not jpeg and not (head.startswith(b'\x89PNG') and 'text' in str(error).lower()):
    raise _RefusedError(_explain(error))
  data = stream.read(_MAX_REPAIRED_BYTES)
  try:
    return (repair.complete_jpeg(data, _pixels), (TRUNCATED,)) if jpeg else (repair.strip_png_text(data), ())
  except repair.TruncatedError as truncated:
    raise _RefusedError(f'is cut off: {truncated}') from None
  except Exception:
    raise _RefusedError(_explain(error)) from None


def _pixels(data: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(data), formats=('JPEG',)) as image:
    return np.asarray(image)


def _explain(error: Exception) -> str:
  """The predicate of a sentence about a file that cannot be read."""
  if isinstance(error, FileNotFoundError):
    return 'does not exist'
  if isinstance(error, OSError) and error.errno == errno.EINVAL and error.filename is not None:  # of files.open_regular
    directory = os.path.isdir(error.filename)
    return 'is a directory, not an image file' if directory else 'is a pipe or a device, not a file'
  reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  return f'cannot be read: {(reason.splitlines() or [type(error).__name__])[0].rstrip(".")}'


def _read(stream: IO[bytes], size: int | tuple[int, int], channels: int, resize: str, bit_depth: int) -> Picture:
  start = stream.tell()
  with Image.open(stream, formats=IMAGE_FORMATS) as opened:
    if opened.width * opened.height > MAX_PIXELS:
      raise Image.DecompressionBombError
    if opened.format == 'TGA' and _other_kind(stream, start):  # a TGA has no signature
      raise Image.UnidentifiedImageError
    deep, grey_alpha = depth.is_deep(opened), depth.is_grey_alpha(opened)
    transparent.scale_key(opened)
    if opened.format in jpeg.FORMATS:
      pixels = jpeg.load(opened, stream, start, _pair(size) if size else None)
    else:
      opened.load()
      pixels = opened
    image, bits = _upright(pixels, opened), 0
    if deep:
      clear = None
      if transparent.is_keyed(image):
        image, clear = transparent.cut_out(image, None if image.mode[0] == 'I' else _lower_bytes(stream, start))
      image, bits = _shallow(image, depth.declared_bits(opened), bit_depth, stream, start)
      if grey_alpha:
        image = image.convert('LA')  # Pillow reads it as colour
      if clear is not None:
        image.paste('white', mask=clear)
    image = _grey_or_rgb(image, channels)
    cut = 0.0
    if size:
      cut = _cut_share(image.size, *_pair(size)) if resize == 'crop' else 0.0
      image = _fit(image, *_pair(size), resize)
    array = np.asarray(image)
  return Picture(array if array.ndim == 3 else array[:, :, None], cut, bits, tuple(_reading.remarks[:1]))


def _other_kind(stream: IO[bytes], start: int) -> str:
  place = stream.tell()
  stream.seek(start)
  kind = kinds.describe(stream.read(kinds.BYTES))
  stream.seek(place)
  return kind


def _shallow(
  image: Image.Image, declared: int, bit_depth: int, stream: IO[bytes], start: int
) -> tuple[Image.Image, int]:
  """Converts 16-bit levels to 8 bits, and returns the bits that they need unless that is declared; see `depth`."""
  grey = image.mode.startswith('I')
  needed = depth.bits_of(image)
  if declared:
    return depth.scale_grey(image, declared), 0
  if needed and not bit_depth and needed < 16:
    raise _RefusedError(
      f'uses only {needed} of its 16 bits per level, so the range is unknown',
      'convert it to 8 bits or, for training, set config.data.bit_depth',
    )
  bits = bit_depth or 16
  if needed > bits:
    raise _RefusedError(
      f'has levels of {needed} bits, more than the {bits} of the training images or of config.data.bit_depth'
    )
  if grey:
    return depth.scale_grey(image, bits), needed
  if bits == 16:  # the upper bytes are the levels
    return image, needed
  return depth.scale_colour(image, _lower_bytes(stream, start), bits), needed


def _lower_bytes(stream: IO[bytes], start: int) -> np.ndarray:
  """uint8 (H, W, C), the lower bytes of 16-bit colours; see `depth.take_lower_bytes`."""
  stream.seek(start)
  with Image.open(stream, formats=IMAGE_FORMATS) as opened:
    channels = depth.take_lower_bytes(opened)
    if channels is None:
      raise _RefusedError('has levels of 16 bits in a form that cannot be scaled', 'convert it to 8 bits')
    opened.load()
    return np.asarray(_upright(opened, opened))[..., channels]


def _cut_share(size: tuple[int, int], height: int, width: int) -> float:
  """The share of the area of an image of (width, height) that cropping to an aspect ratio removes."""
  ratio = size[0] * height / (size[1] * width)
  return 1 - min(ratio, 1 / ratio)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
  return (size, size) if isinstance(size, int) else size


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
  """Turns the pixels of an image as the camera was turned, which `opened`, from the file, holds."""
  # Reading EXIF takes longer than decoding a small image. It can only be in these fields.
  if not opened.info.keys() & {'exif', 'Raw profile type exif', 'XML:com.adobe.xmp', 'xmp'} and opened.format != 'TIFF':
    return image
  try:
    turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
  except Exception:  # a damaged EXIF block does not affect the pixels
    return image
  return image if turn is None else image.transpose(turn)


def _grey_or_rgb(image: Image.Image, channels: int) -> Image.Image:
  """Converts to mode L or RGB by the policies at the top."""
  if image.mode == 'F':
    image = _from_floats(np.asarray(image))
  elif 'A' in image.mode or 'a' in image.mode or transparent.is_keyed(image):
    image = transparent.on_white(image)
  if image.mode == '1':
    image = image.convert('L')
  elif image.mode == 'P':
    image = transparent.without_colour(image.convert('RGB'))
  elif image.mode not in ('L', 'RGB'):
    image = image.convert('RGB')
  mode = {0: image.mode, 1: 'L', 3: 'RGB'}[channels]
  return image if image.mode == mode else image.convert(mode)


def _from_floats(levels: np.ndarray) -> Image.Image:
  """Reads floats as fractions of white, or as levels from 0 to 255; what may be either, or neither, is refused."""
  low, high = float(levels.min()), float(levels.max())
  if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
    return Image.fromarray(np.rint(np.clip(levels, 0, 1) * 255).astype(np.uint8))
  if not (low >= 0 and _LEAST_WHITE <= high <= 255):  # written so that NaN fails too
    raise _RefusedError(
      f'has floats from {low:g} to {high:g}, so it is unknown which are black and white',
      f'scale them to 0 to 1, or to 0 to 255 with one of at least {_LEAST_WHITE}, or convert it to 8 bits',
    )
  return Image.fromarray(np.rint(levels).astype(np.uint8))


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
