"""Moving the pixels of images, on the device: mirrored, rotated, zoomed, sheared, shifted and cropped by one gather."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Of a random crop, as published (Szegedy et al., arXiv 1409.4842) and in torchvision: width / height, and how many pairs
# of area and aspect are tried until the rectangle lies in the image.
_ASPECTS = (3 / 4, 4 / 3)
CROP_DRAWS = 22  # of `random_window`: 10 areas, 10 aspects, and the place
# Of an elastic distortion: the width of the Gaussian is a part of the side of the image, 4 of 28 pixels as published
# (Simard et al. 2003), and the noise lies on a grid of that spacing, of which one point is beyond each border.
_SMOOTHING = 1 / 7
ELASTIC_DRAWS = (2, 10, 10)  # of `smooth_field`


class Affine(NamedTuple):
  """Where the pixels of a result come from: (row, column) times `matrix`, plus `offset`, both about the centre.

  Attributes:
    matrix: float32 (B, 2, 2).
    offset: float32 (B, 2), pixels.
  """

  matrix: Array
  offset: Array


def warp(
  images: Array,
  mirror: Array,
  angle: Array,
  zoom: Array,
  shift: Array,
  padding: str,
  window: Array | None = None,
  after: Affine | None = None,
  size: tuple[int, int] | None = None,
  displacement: Array | None = None,
) -> Array:
  """Crops, distorts, mirrors left-right, rotates and zooms about the centre, shifts, then maps, by bilinear interpolation.

  Each pixel of the result is read from the image once, so what a rotation or a shift brings in is the image outside the
  crop, as far as there is any.

  Args:
    images: uint8 (B, H, W, C).
    mirror: bool (B,).
    angle: float32 (B,), radians, anticlockwise on the screen.
    zoom: float32 (B,), greater than 1 enlarges.
    shift: int32 (B, 2), pixels down and to the right.
    padding: the pixels outside the image: 'constant' (mean level of the four corners) | 'reflect'.
    window: float32 (B, 4), top, left, height and width of the part that is brought to the size of the result first. A
      larger window is sampled without smoothing. Down to half its size no pixel of it is skipped, and fine patterns
      alias a little.
    after: the last step.
    size: (h, w) of the result; None: of the images. Another one needs a window.
    displacement: float32 (B, 2, h, w), by how many pixels of the result, down and to the right, the place moves from which
      a pixel comes.

  Returns:
    float32 (B, h, w, C) in [0, 255].
  """
  height, width = size or images.shape[1:3]
  row = jnp.arange(height)[None, :, None].astype(jnp.float32)
  column = jnp.arange(width)[None, None, :].astype(jnp.float32)
  if after is not None:
    row, column = _map(after, row - (height - 1) / 2, column - (width - 1) / 2)
    row, column = row + (height - 1) / 2, column + (width - 1) / 2
  row, column = _source_coordinates(row, column, height, width, mirror, angle, zoom, shift)
  if displacement is not None:
    row, column = row + displacement[:, 0], column + displacement[:, 1]
  if window is not None:
    row, column = _in_window(row, column, window[:, :, None, None], (height, width), images.shape[1:3])
  # A frame of one pixel before and two after the image, so that all four neighbours of any place exist.
  framed = _pad(images, ((1, 2), (1, 2)), 'constant')
  row, column = _in_frame(row, images.shape[1], padding), _in_frame(column, images.shape[2], padding)
  top, left = jnp.floor(row), jnp.floor(column)
  neighbours = _gather_2x2(framed, top, left)
  # Without the barrier XLA may fuse the gather into each of its uses and compute it several times.
  neighbours, below_top, right_of_left = jax.lax.optimization_barrier((neighbours, row - top, column - left))
  return _bilinear(neighbours, below_top[..., None], right_of_left[..., None])


def crop(
  images: Array, mirror: Array, shift: Array, padding: str, window: Array, size: tuple[int, int] | None = None
) -> Array:
  """What `warp` does without a rotation and a zoom; a tenth of the time on a CPU, since whole rows are read.

  Args:
    images, mirror, shift, padding, window, size: as for `warp`.

  Returns:
    float32 (B, h, w, C) in [0, 255].
  """
  height, width = size or images.shape[1:3]
  row = (jnp.arange(height)[None] - shift[:, :1]).astype(jnp.float32)
  column = (jnp.arange(width)[None] - shift[:, 1:]).astype(jnp.float32)
  column = jnp.where(mirror[:, None], width - 1 - column, column)
  row, column = _in_window(row, column, window[:, :, None], (height, width), images.shape[1:3])
  # The barriers keep XLA from computing what is gathered from once for each of its uses.
  barrier = jax.lax.optimization_barrier
  framed = barrier(_pad(images, ((1, 2), (1, 2)), 'constant'))

  def read(image: Array, row: Array, column: Array) -> Array:
    above, left = jnp.floor(row), jnp.floor(column)
    rows = [image.at[above.astype(jnp.int32) + i].get(mode='promise_in_bounds').astype(jnp.float32) for i in range(2)]
    lines = barrier(rows[0] + (rows[1] - rows[0]) * (row - above)[:, None, None])
    parts = [lines.at[:, left.astype(jnp.int32) + i].get(mode='promise_in_bounds') for i in range(2)]
    return parts[0] + (parts[1] - parts[0]) * (column - left)[None, :, None]

  places = _in_frame(row, images.shape[1], padding), _in_frame(column, images.shape[2], padding)
  return jax.vmap(read)(framed, *barrier(places))


def random_window(smallest: float, draws: Array, height: int, width: int) -> Array:
  """The window of a random resized crop, by the rule of torchvision.

  Area and aspect are drawn up to ten times, until the rectangle lies in the image; the area is uniform, and so is the
  logarithm of the aspect. If none does, it is the largest rectangle in the centre whose aspect is allowed.

  Args:
    smallest: share of the area of the image.
    draws: float32 (B, CROP_DRAWS), uniform in [0, 1).
    height, width: of the image.

  Returns:
    float32 (B, 4), whole numbers: top, left, height, width.
  """
  area = (smallest + (1 - smallest) * draws[:, :10]) * (height * width)
  low, high = (math.log(aspect) for aspect in _ASPECTS)
  aspect = jnp.exp(low + (high - low) * draws[:, 10:20])
  tall, wide = jnp.round(jnp.sqrt(area / aspect)), jnp.round(jnp.sqrt(area * aspect))
  fits = (tall >= 1) & (wide >= 1) & (tall <= height) & (wide <= width)
  first = jnp.argmax(fits, axis=1)[:, None]
  largest = min(height, round(width / _ASPECTS[0])), min(width, round(height * _ASPECTS[1]))
  tall, wide = (
    jnp.where(fits.any(1), jnp.take_along_axis(size, first, 1)[:, 0], most)
    for size, most in zip((tall, wide), largest, strict=True)
  )
  found = fits.any(1)
  top = jnp.where(found, jnp.floor(draws[:, 20] * (height - tall + 1)), jnp.floor((height - tall) / 2))
  left = jnp.where(found, jnp.floor(draws[:, 21] * (width - wide + 1)), jnp.floor((width - wide) / 2))
  return jnp.stack([top, left, tall, wide], axis=1)


def smooth_field(noise: Array, height: int, width: int) -> Array:
  """White noise smoothed by a Gaussian, of standard deviation 1 at each pixel: an elastic distortion.

  Simard, Steinkraus and Platt, "Best practices for convolutional neural networks applied to visual document analysis",
  2003. The correlation of two pixels is exp(-(d / 2s)^2) at a distance d, where s is a seventh of the side.

  Args:
    noise: float32 (B, *ELASTIC_DRAWS), independent, of standard deviation 1.
    height, width: of the result.

  Returns:
    float32 (B, 2, height, width).
  """

  def weights(side: int, points: int) -> np.ndarray:
    place = np.linspace(0, 1 / _SMOOTHING, side)
    values = np.exp(-((place[:, None] - np.arange(points) + 1) ** 2) / 2)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)

  rows, columns = (weights(side, points) for side, points in zip((height, width), noise.shape[2:], strict=True))
  return jnp.einsum('bcij,yi,xj->bcyx', noise, rows, columns, precision='highest')


def translate(images: Array, shift: Array, limit: int, padding: str) -> Array:
  """Moves each image by whole pixels, without interpolation.

  Args:
    images: (B, H, W, C) of any type.
    shift: int32 (B, 2), pixels down and to the right.
    limit: the largest shift, static under jit.
    padding: as for `warp`.

  Returns:
    (B, H, W, C) of the same type.
  """
  padded = _pad(images, ((limit, limit), (limit, limit)), padding)

  def window(image, offset):
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

  return jax.vmap(window)(padded, limit - shift)


def _map(affine: Affine, row: Array, column: Array) -> tuple[Array, Array]:
  matrix, offset = affine.matrix[..., None, None], affine.offset[..., None, None]
  return (
    matrix[:, 0, 0] * row + matrix[:, 0, 1] * column + offset[:, 0],
    matrix[:, 1, 0] * row + matrix[:, 1, 1] * column + offset[:, 1],
  )


def _source_coordinates(
  row: Array, column: Array, height: int, width: int, mirror: Array, angle: Array, zoom: Array, shift: Array
) -> tuple[Array, Array]:
  """Row and column, float32 (B, H, W), of the place in the image from which each pixel of the result comes."""
  centre = jnp.array([(height - 1) / 2, (width - 1) / 2], jnp.float32)
  down, right = (shift[:, axis, None, None].astype(jnp.float32) for axis in range(2))
  row = row - centre[0] - down
  column = column - centre[1] - right
  cos, sin = (jnp.cos(angle) / zoom)[:, None, None], (jnp.sin(angle) / zoom)[:, None, None]
  from_row = cos * row + sin * column + centre[0]
  from_column = cos * column - sin * row + centre[1]
  return from_row, jnp.where(mirror[:, None, None], width - 1 - from_column, from_column)


def _in_window(
  row: Array, column: Array, window: Array, size: tuple[int, ...], image_size: tuple[int, ...]
) -> tuple[Array, Array]:
  """Coordinates in the image of places in the result, to whose size a window is brought; (B, 4, ...) holds the windows.

  The outer half of the image's outer pixels has their level, so that a crop at the border shows no padding.
  """
  top, left, tall, wide = (window[:, i] for i in range(4))
  row = top + (row + 0.5) * (tall / size[0]) - 0.5
  column = left + (column + 0.5) * (wide / size[1]) - 0.5
  return _clip_half(row, image_size[0]), _clip_half(column, image_size[1])


def _clip_half(place: Array, size: int) -> Array:
  return jnp.where(jnp.abs(place - (size - 1) / 2) <= size / 2, jnp.clip(place, 0, size - 1), place)


def _in_frame(place: Array, size: int, padding: str) -> Array:
  """Coordinates in an image with a frame, of which one pixel lies before and two behind."""
  if padding == 'reflect':
    place = _reflect(place, size)
  return jnp.clip(place, -1, size) + 1


def _gather_2x2(images: Array, top: Array, left: Array) -> Array:
  """Reads 2x2 neighbouring pixels at once.

  A gather takes about 10 ns per element on the CPU, so the four pixels are packed into the four bytes of one element:
  1 ms instead of 4 for 128 images of 28x28.

  Args:
    images: uint8 (B, H, W, C).
    top, left: float32 (B, h, w), whole numbers: the first of the four pixels.

  Returns:
    uint32 (B, h, w, C); from the lowest byte: top left, top right, bottom left, bottom right.
  """
  packed = images.astype(jnp.uint32)
  packed = packed[:, :, :-1] | packed[:, :, 1:] << 8
  packed = packed[:, :-1] | packed[:, 1:] << 16
  batch, rows, columns, channels = packed.shape
  if rows * columns > 2**24 or batch * rows * columns >= 2**31:
    # float32 has no place for such an index, or int32 has none for the whole batch.
    index = top.astype(jnp.int32) * columns + left.astype(jnp.int32)
    gather = jax.vmap(lambda pixels, index: pixels.at[index].get(mode='promise_in_bounds'))
    return gather(packed.reshape(batch, rows * columns, channels), index)
  index = (top * columns + left).astype(jnp.int32) + (jnp.arange(batch) * rows * columns)[:, None, None]
  packed = packed.reshape(-1, channels)
  if channels == 1:
    return packed[:, 0].at[index].get(mode='promise_in_bounds')[..., None]
  return packed.at[index].get(mode='promise_in_bounds')


def _bilinear(neighbours: Array, y: Array, x: Array) -> Array:
  """Interpolates between 2x2 pixels.

  Args:
    neighbours: from `_gather_2x2`.
    y, x: float32 (B, h, w, 1) in [0, 1), the distance from the top and the left pixels.

  Returns:
    float32 (B, h, w, C).
  """
  # Through int32: the CPU converts it to float by one vector instruction, unlike uint32.
  corner = [(neighbours >> bits & 255).astype(jnp.int32).astype(jnp.float32) for bits in (0, 8, 16, 24)]
  above = corner[0] + (corner[1] - corner[0]) * x
  below = corner[2] + (corner[3] - corner[2]) * x
  return above + (below - above) * y


def _pad(images: Array, widths: tuple, padding: str) -> Array:
  widths = ((0, 0), *widths, (0, 0))
  if padding == 'reflect':
    return jnp.pad(images, widths, mode='reflect')
  corners = images[:, :: max(images.shape[1] - 1, 1), :: max(images.shape[2] - 1, 1)]
  level = jnp.round(corners.astype(jnp.float32).mean((1, 2), keepdims=True)).astype(images.dtype)
  inside = jnp.pad(jnp.ones((1, *images.shape[1:3], 1), bool), widths)
  return jnp.where(inside, jnp.pad(images, widths), level)


def _reflect(place: Array, size: int) -> Array:
  """Folds coordinates into [0, size - 1] by reflection at the first and the last pixel."""
  period = max(2 * (size - 1), 1)
  place = place - period * jnp.floor(place * (1 / period))  # jnp.mod takes three times as long on the CPU
  return jnp.clip(jnp.minimum(place, period - place), 0, size - 1)
