"""Pictures of the page: arrays as data addresses, heat maps, sheets of tiles."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

SMALL = 64  # pixels per side up to which pictures are kept and shown pixel by pixel
BLUE, ORANGE = (58, 118, 175), (222, 96, 32)  # in pictures, which do not follow the light or dark theme of the page
_LIGHT = {BLUE: (176, 230, 255), ORANGE: (255, 226, 130)}  # of the largest values of maps over photographs


def data_uri(pixels: np.ndarray) -> str:
  """Encodes an image as a data address: lossless PNG, or lossy WebP if that is less than half as long.

  Args:
    pixels: uint8 (height, width, channels), 1, 3 or 4 channels.
  """
  image = _to_image(pixels)
  kind, encoded = 'png', _encode(image, 'PNG', compress_level=1)
  if len(encoded) > 6000:  # small pictures stay exact
    lossy = _encode(image, 'WEBP', quality=80, method=2)
    if len(lossy) < len(encoded) / 2:  # true for photographs
      kind, encoded = 'webp', lossy
  if kind == 'png':
    encoded = _encode(image, 'PNG')  # smaller, and slower, which large photographs would feel
  return f'data:image/{kind};base64,{base64.b64encode(encoded).decode()}'


def fit(pixels: np.ndarray, side: int = SMALL) -> np.ndarray:
  """Reduces an image uint8 (height, width, channels) to at most `side` pixels per side; never enlarges it."""
  size = _fitted(pixels.shape, side)
  if size == pixels.shape[1::-1]:
    return pixels
  return np.asarray(_to_image(pixels).resize(size, Image.Resampling.BOX)).reshape(*size[::-1], pixels.shape[2])


def heat(values: np.ndarray) -> np.ndarray:
  """Draws a map, from zero and below (dark) to its largest value (bright).

  Args:
    values: float32 (height, width); reduced to at most `SMALL` positions per side.

  Returns:
    uint8 (height, width, 3).
  """
  import matplotlib

  size = _fitted(values.shape, SMALL)
  if size != values.shape[::-1]:
    values = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))
  scaled = np.clip(values / max(float(values.max()), 1e-12), 0, 1)
  return matplotlib.colormaps['magma'](scaled, bytes=True)[:, :, :3]


def kernel_tiles(kernel: np.ndarray) -> np.ndarray:
  """Draws the kernels of a convolution, each scaled by its largest weight.

  Args:
    kernel: float32 (height, width, channels, n).

  Returns:
    uint8 (n, height, width, 3). Three channels become colours with zero in mid-grey; of any other number of channels
    the first is drawn from blue (negative) through white to orange (positive).
  """
  if kernel.shape[2] == 3:
    scale = np.max(np.abs(kernel), axis=(0, 1, 2))
    tiles = 127.5 + 127.5 * kernel / np.maximum(scale, 1e-12)
  else:
    first = kernel[:, :, 0]
    amount = first / np.maximum(np.max(np.abs(first), axis=(0, 1)), 1e-12)
    colour = np.where(amount[:, :, None] < 0, np.reshape(BLUE, (3, 1)), np.reshape(ORANGE, (3, 1)))
    tiles = 247 + np.abs(amount[:, :, None]) * (colour - 247)
  return np.moveaxis(np.round(tiles).astype(np.uint8), 3, 0)


def overlay(evidence: np.ndarray, rgb: tuple[int, int, int], shape: Sequence[int]) -> np.ndarray:
  """Turns a class activation map into a layer of one colour to lay over an image.

  Args:
    evidence: float32 (height, width), at most 1; opaque at 1, clear at zero and below.
    rgb: of the layer.
    shape: (height, width) of the image.

  Returns:
    uint8 (height, width, 4), with the aspect of the image.
  """
  scale = SMALL / max(shape)
  size = (max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale)))
  alpha = np.round(_enlarge(evidence, size) * 200).astype(np.uint8)
  return np.dstack([np.broadcast_to(np.array(rgb, np.uint8), (*alpha.shape, 3)), alpha])


def highlight(image: np.ndarray, evidence: np.ndarray, rgb: tuple[int, int, int]) -> np.ndarray:
  """Lays a class activation map over a photograph: a colour that becomes light, over a darker picture with less colour.

  Args:
    image: uint8 (height, width, 1 or 3).
    evidence: float32 (rows, columns), at most 1; the picture shows through where it is zero or less.
    rgb: of the map up to half of its largest value, `BLUE` or `ORANGE`.

  Returns:
    uint8 (height, width, 3).
  """
  amount = _enlarge(evidence, image.shape)[..., None]
  colour = np.array(rgb, np.float32)
  ramp = colour + np.maximum(2 * amount - 1, 0) * (np.array(_LIGHT[rgb], np.float32) - colour)
  opacity = 0.85 * amount**0.6
  return np.round(_pale(image, 0.7) * (1 - opacity) + ramp * opacity).astype(np.uint8)


def spotlight(image: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Darkens a photograph where a map is less than about half of its largest value.

  Args:
    image: uint8 (height, width, 1 or 3).
    values: float32 (rows, columns), a map of the image.

  Returns:
    uint8 (height, width, 3).
  """
  amount = _enlarge(values / max(float(values.max()), 1e-12), image.shape)
  light = np.clip((amount[..., None] - 0.3) / 0.3, 0, 1)
  return np.round(image * light + _pale(image, 0.55) * (1 - light)).astype(np.uint8)


def _enlarge(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """Enlarges a map smoothly to the size of an image (height, width, ...): float32, from 0 to 1."""
  image = Image.fromarray(values.astype(np.float32))
  return np.clip(np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)), 0, 1)


def _pale(image: np.ndarray, brightness: float) -> np.ndarray:
  """A darker image with little colour, so that coloured and bright places stand out: float32 (height, width, 3)."""
  grey = image.astype(np.float32).mean(axis=2, keepdims=True)
  return np.broadcast_to(brightness * (0.75 * grey + 0.25 * image), (*image.shape[:2], 3))


def cut(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
  """Cuts a rectangle out of an image; the part that lies outside the image is clear.

  Args:
    image: uint8 (rows, columns, 1 or 3).
    top, left: may be negative.
    height, width: of the rectangle.

  Returns:
    uint8 (height, width, 4).
  """
  rgb = np.broadcast_to(image, (*image.shape[:2], 3))
  patch = np.zeros((height, width, 4), np.uint8)
  y = slice(max(top, 0), min(top + height, image.shape[0]))
  x = slice(max(left, 0), min(left + width, image.shape[1]))
  inside = patch[y.start - top : y.stop - top, x.start - left : x.stop - left]
  inside[..., :3], inside[..., 3] = rgb[y, x], 255
  return patch


def sheet(tiles: np.ndarray, columns: int, gap_share: float = 0.08) -> np.ndarray:
  """Lays tiles out in rows with clear gaps; tiles of less than 24 pixels are enlarged so that a gap is thin.

  Args:
    tiles: uint8 (n, height, width, 3 or 4), n >= 1.
    columns: tiles per row.
    gap_share: width of a gap as a fraction of the width of a tile.

  Returns:
    uint8 (height, width, 4).
  """
  n, height, width, channels = tiles.shape
  columns = min(columns, n)
  rows = -(-n // columns)
  zoom = max(1, 24 // width)
  tiles = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)
  height, width = height * zoom, width * zoom
  gap = max(1, round(gap_share * width))
  pixels = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
  for i, tile in enumerate(tiles):
    y, x = i // columns * (height + gap), i % columns * (width + gap)
    pixels[y : y + height, x : x + width, :channels] = tile
    if channels == 3:
      pixels[y : y + height, x : x + width, 3] = 255
  return pixels


def _encode(image: Image.Image, kind: str, **options: int) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def _to_image(pixels: np.ndarray) -> Image.Image:
  return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _fitted(shape: Sequence[int], side: int) -> tuple[int, int]:
  """Width and height of an image (height, width, ...) reduced to at most `side` pixels per side."""
  scale = min(1, side / max(shape[:2]))
  return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))
