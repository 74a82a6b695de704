"""Image files of every mode, depth and format; sizes and channels; one clear error for each unusable file."""

import importlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from cnn_jax import UsageError
from cnn_jax.data import images
from cnn_jax.data.images import IMAGE_FORMATS, load_image, resize_image

GREY = np.random.default_rng(0).integers(0, 256, (6, 9), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image, format='PNG', **options):
  stream = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format, **options)
  stream.seek(0)
  return stream


@pytest.mark.parametrize('format', ['PNG', 'BMP', 'TIFF', 'PPM', 'TGA', 'GIF', 'WEBP', 'JPEG2000'])
def test_lossless_formats_give_the_pixels_back(format):
  options = {'WEBP': {'lossless': True}}.get(format, {})
  if format != 'GIF':  # it has only palettes
    np.testing.assert_array_equal(load_image(encoded(RGB, format, **options)), RGB)
  grey = load_image(encoded(GREY, format, **options), channels=1)
  assert grey.shape == (6, 9, 1) and grey.dtype == np.uint8
  np.testing.assert_allclose(grey[..., 0], GREY, atol=1 if format == 'WEBP' else 0)


def test_jpeg_is_nearly_the_image():
  smooth = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (16, 1))
  np.testing.assert_allclose(load_image(encoded(smooth, 'JPEG', quality=95))[..., 0].astype(int), smooth, atol=4)


def test_grey_of_colour_is_luma_and_grey_in_rgb_has_equal_channels():
  luma = RGB.astype(np.int64) @ np.array([299, 587, 114]) / 1000
  np.testing.assert_allclose(load_image(encoded(RGB), channels=1)[..., 0], luma, atol=1)
  np.testing.assert_array_equal(load_image(encoded(GREY), channels=3), np.stack([GREY] * 3, -1))


def test_sixteen_bits_are_scaled_not_clipped():
  levels = np.array([[0, 257, 25700, 65535], [128, 129, 32768, 65000]], np.uint16)
  expected = np.rint(levels / 257).astype(np.uint8)
  for format in ('PNG', 'TIFF'):
    np.testing.assert_array_equal(load_image(encoded(levels, format))[..., 0], expected)
  np.testing.assert_array_equal(load_image(encoded(levels.astype(np.int32), 'TIFF'))[..., 0], expected)


def test_integers_beyond_sixteen_bits_are_an_error():
  with pytest.raises(UsageError, match=r'big.tif.* 0 to 65535'):
    load_image(encoded(np.array([[0, 70000]], np.int32), 'TIFF'), name='big.tif')


@pytest.mark.parametrize(
  ('levels', 'expected'),
  [
    ([0, 0.2, 1], [0, 51, 255]),
    ([0, 0.2, 1.003], [0, 51, 255]),
    ([-0.2, 0.2, 1.25], [0, 51, 255]),
    ([-1e-7, 0.2, 0.4], [0, 51, 102]),
    ([0, 99.6, 255], [0, 100, 255]),
    ([0, 1, 16], [0, 1, 16]),
    ([0, 0, 0], [0, 0, 0]),
  ],
)
def test_floats_are_fractions_or_levels(levels, expected):
  array = load_image(encoded(np.array([levels], np.float32), 'TIFF'))
  np.testing.assert_array_equal(array[0, :, 0], expected)


@pytest.mark.parametrize('filter', [Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
@pytest.mark.parametrize('size', [16, 50, 65, 100, 500])
def test_resampled_fractions_keep_their_scale(filter, size):
  corner = np.zeros((64, 64), np.float32)
  corner[32:, 32:] = 1
  resampled = Image.fromarray(corner).resize((size, size), filter)
  expected = np.rint(np.clip(np.asarray(resampled), 0, 1) * 255)
  np.testing.assert_array_equal(load_image(encoded(resampled, 'TIFF'))[..., 0], expected)


@pytest.mark.parametrize(
  'levels', [[-1, 1], [0, 1.3], [0, 2], [-2.1, 2.6], [0, 15.9], [-0.3, 0.9], [-3, 200], [0, 300], [0, np.nan], [0, np.inf],
             [-np.inf, 1], [np.nan, np.nan]],
)  # fmt: skip
def test_floats_of_another_or_an_unknown_range_are_an_error(levels):
  with pytest.raises(UsageError, match=r'^x\.tif has floats from .*; scale them') as error:
    load_image(encoded(np.array([levels], np.float32), 'TIFF'), name='x.tif')
  assert '\n' not in str(error.value)


def test_one_bit_becomes_black_and_white():
  bits = GREY > 127
  np.testing.assert_array_equal(load_image(encoded(Image.fromarray(bits)))[..., 0], bits * 255)


def test_transparency_is_laid_on_white():
  rgba = np.zeros((1, 3, 4), np.uint8)
  rgba[0, :, 3] = (0, 128, 255)  # black: invisible, half, opaque
  np.testing.assert_array_equal(load_image(encoded(rgba))[0, :, 0], (255, 127, 0))
  la = Image.fromarray(rgba).convert('LA')
  array = load_image(encoded(la))
  assert array.shape == (1, 3, 1)
  np.testing.assert_array_equal(array[0, :, 0], (255, 127, 0))
  keyed = load_image(encoded(Image.fromarray(RGB), transparency=tuple(int(v) for v in RGB[2, 3])))
  np.testing.assert_array_equal(keyed[2, 3], (255, 255, 255))
  np.testing.assert_array_equal(keyed[0, 0], RGB[0, 0])


def _png(rows, depth, key=None, colour=False):
  """A PNG of rows of packed levels, with a transparent level or colour."""

  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  width = 8 * len(rows[0]) // (depth * (3 if colour else 1))
  header = struct.pack('>IIBBBBB', width, len(rows), depth, 2 if colour else 0, 0, 0, 0)
  keyed = b'' if key is None else chunk(b'tRNS', struct.pack(f'>{len(key)}H', *key))
  data = chunk(b'IDAT', zlib.compress(b''.join(b'\0' + row for row in rows)))
  return io.BytesIO(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + keyed + data + chunk(b'IEND', b''))


@pytest.mark.parametrize('depth', [1, 2, 4, 8, 16])
def test_a_transparent_level_is_laid_on_white_whatever_the_depth(depth):
  highest = 2**depth - 1
  levels = sorted({0, 1, highest // 3, highest // 2, highest})
  levels += [0] * (-len(levels) % 8)  # whole bytes
  packed = int(''.join(f'{level:0{depth}b}' for level in levels), 2).to_bytes(depth * len(levels) // 8)
  for key in levels:
    array = load_image(_png([packed], depth, [key]))
    expected = [255 if level == key else np.rint(level * 255 / highest) for level in levels]
    assert array.shape == (1, 8, 1)
    np.testing.assert_array_equal(array[0, :, 0], expected)
    np.testing.assert_array_equal(load_image(_png([packed], depth, [key]), channels=3)[0, :, 2], expected)


@pytest.mark.parametrize('bits', [16, 12])
def test_a_transparent_colour_of_sixteen_bits_is_compared_by_both_bytes(bits):
  key = (0x0102, 0x0304, 0x0506)
  others = [(0x0102, 0x0304, 0x0507), (0x0202, 0x0304, 0x0506), (2, 4, 6), (0x0202, 0x0404, 0x0606)]
  colours = np.array([key, *others, [2**bits - 1] * 3], '>u2')
  array = images.read_image(_png([colours.tobytes()], 16, key, colour=True), bit_depth=bits)
  assert array.bits == bits
  assert (array.pixels[0, 0] == 255).all()
  np.testing.assert_allclose(array.pixels[0, 1:], colours[1:] * (255 / (2**bits - 1)), atol=1)


@pytest.mark.parametrize('colour', [False, True])
def test_a_transparent_level_does_not_count_for_the_range(colour):
  key = [65535] * (3 if colour else 1)
  levels = np.array([[0] * len(key), [4095] * len(key), key], '>u2')
  picture = images.read_image(_png([levels.tobytes()], 16, key, colour=colour), bit_depth=12)
  assert picture.bits == 12
  np.testing.assert_array_equal(picture.pixels[0, :, 0], (0, 255, 255))


def test_a_palette_is_looked_up():
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).copy()
  image.putpalette([255, 0, 0, 0, 255, 0, 9, 9, 9])
  np.testing.assert_array_equal(load_image(encoded(image))[0], [(255, 0, 0), (0, 255, 0), (9, 9, 9)])
  invisible = load_image(encoded(image, transparency=1))
  np.testing.assert_array_equal(invisible[0], [(255, 0, 0), (255, 255, 255), (9, 9, 9)])
  image.putpalette([7, 7, 7, 0, 0, 0, 9, 9, 9])
  np.testing.assert_array_equal(load_image(encoded(image))[0], [(7,), (0,), (9,)])


@pytest.mark.parametrize('mode', ['CMYK', 'YCbCr'])
def test_other_colour_spaces_become_rgb(mode):
  image = Image.fromarray(RGB).convert(mode)
  format = 'TIFF'
  np.testing.assert_array_equal(load_image(encoded(image, format)), np.asarray(image.convert('RGB')))


def test_exif_orientation_is_applied():
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned: display with a quarter turn clockwise
  np.testing.assert_array_equal(load_image(encoded(RGB, exif=exif)), np.rot90(RGB, -1))
  np.testing.assert_array_equal(load_image(encoded(RGB, 'TIFF', exif=exif)), np.rot90(RGB, -1))


def test_the_first_frame_of_an_animation_is_used():
  frames = [Image.new('L', (4, 4), level) for level in (10, 200)]
  stream = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  assert (load_image(stream) == 10).all()


@pytest.mark.parametrize('resize', ['crop', 'pad', 'stretch'])
def test_an_image_of_the_requested_size_is_not_resampled(resize):
  np.testing.assert_array_equal(load_image(encoded(RGB), size=(6, 9), resize=resize), RGB)


def test_crop_keeps_the_centre_pad_the_whole_image_and_stretch_changes_the_aspect_ratio():
  # Three squares in a row: black, grey, white.
  wide = np.repeat(np.repeat(np.array([[0, 128, 255]], np.uint8), 8, 0), 8, 1)[..., None]
  assert (resize_image(wide, 8, 'crop') == 128).all()
  padded = resize_image(wide, 24, 'pad')[..., 0]
  assert (padded[:8] == 0).all() and (padded[16:] == 0).all()
  np.testing.assert_array_equal(padded[8:16], wide[..., 0])
  stretched = resize_image(wide, (16, 24), 'stretch')[..., 0]
  np.testing.assert_array_equal(stretched[:8], wide[..., 0])
  assert resize_image(wide, (5, 4), 'crop', channels=3).shape == (5, 4, 3)


def test_reduction_averages_so_that_fine_stripes_become_grey():
  stripes = np.tile(np.array([[0, 255]], np.uint8), (64, 32))[..., None]
  small = resize_image(stripes, 8, 'stretch').astype(int)
  np.testing.assert_allclose(small[1:-1, 1:-1], 127.5, atol=4)


def test_a_file_is_read_by_its_path_and_resized(tmp_path):
  Image.fromarray(RGB).save(tmp_path / 'a.png')
  np.testing.assert_array_equal(load_image(tmp_path / 'a.png'), RGB)
  assert load_image(str(tmp_path / 'a.png'), size=4, channels=1).shape == (4, 4, 1)


def test_each_failure_names_the_file_and_the_reason(tmp_path):
  whole = encoded(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).getvalue()
  cases = {
    'text.png': (b'not an image', 'is a text file'),
    'empty.png': (b'', 'is empty'),
    'noise.png': (bytes(range(255, 0, -1)), 'known format'),
    'half.png': (whole[: len(whole) // 2], 'cannot be read'),
    'damaged.png': (whole[:200] + bytes(50) + whole[250:], 'cannot be read'),
    'page.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'is a PostScript file'),
  }
  for name, (content, reason) in cases.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f'{name} .*{reason}') as error:
      load_image(tmp_path / name)
    assert '\n' not in str(error.value)
  with pytest.raises(UsageError, match=r'nowhere.png does not exist'):
    load_image(tmp_path / 'nowhere.png')
  with pytest.raises(UsageError, match='is a directory'):
    load_image(tmp_path)


def test_a_decompression_bomb_is_an_error_before_it_is_decoded():
  header = b'P5 20000 10000 255\n'
  with pytest.raises(UsageError, match='pixels; make it smaller'):
    load_image(io.BytesIO(header))
  for action in ('ignore', 'error'):  # between its limit and twice its limit Pillow alone would only warn
    with warnings.catch_warnings():
      warnings.simplefilter(action)
      with pytest.raises(UsageError, match='pixels; make it smaller'):
        load_image(io.BytesIO(b'P5 9500 9500 255\n'))


@pytest.mark.parametrize(
  ('size', 'reason'),
  [
    (2**31 - 1, 'at 2147483647x2147483647 pixels; set a smaller config.data.image_size'),
    ((2**20, 2**30), 'at 1048576x1073741824 pixels; set a smaller config.data.image_size'),
    (0, '; make it smaller'),
  ],
)
def test_a_size_beyond_memory_is_one_line_and_no_fault_of_the_file(monkeypatch, size, reason):
  def exhaust(*_):
    raise MemoryError

  monkeypatch.setattr(images, '_resample' if size else '_grey_or_rgb', exhaust)
  with pytest.raises(UsageError, match=f'^x.png does not fit into memory ?{reason}, or free memory.$') as error:
    load_image(encoded(RGB), size=size, name='x.png')
  assert not isinstance(error.value, images.UnreadableError)  # `on_bad_image=skip` leaves those out
  assert isinstance(error.value.__cause__, MemoryError)


def test_importing_the_module_does_not_change_the_filters_of_warnings():
  before, loaded = list(warnings.filters), dict(vars(images))
  importlib.reload(images)
  vars(images).update(loaded)  # other modules have its classes
  assert list(warnings.filters) == before


def test_formats_that_start_other_programs_are_not_listed():
  assert not {'EPS', 'PDF', 'WMF'} & set(IMAGE_FORMATS)


def test_a_damaged_exif_block_does_not_hide_the_image():
  stream = encoded(RGB, exif=b'Exif\0\0II*\0' + struct.pack('<IH', 8, 400) + b'\xff' * 30)
  assert load_image(stream).shape in (RGB.shape, (9, 6, 3))


def test_a_large_jpeg_shrinks_to_the_same_picture():
  y, x = np.mgrid[:800, :1000]
  picture = ((np.sin(x / 100) + np.cos(y / 80) + 2) * 60).astype(np.uint8)
  small = load_image(encoded(picture, 'JPEG', quality=95), size=32)[..., 0].astype(int)
  np.testing.assert_allclose(small, resize_image(picture[..., None], 32, 'crop')[..., 0], atol=4)
