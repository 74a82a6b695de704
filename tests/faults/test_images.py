"""Image files as people have them: damaged, unusual, of another kind, or of another range of levels."""

import contextlib
import io
import os
import random
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from cnn_jax import UsageError
from cnn_jax.data import images
from cnn_jax.data.images import load_image, read_image
from tests.faults.tools import call_command, folder_arguments, one_line, read_json, run_command, write_photographs

pytestmark = pytest.mark.usefixtures('offline')


def picture(height=96, width=80, seed=0):
  """A smooth colour picture with some noise, as a photograph has."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width] / 20
  levels = np.stack([np.sin(x + seed), np.cos(y), np.sin(x * y / 5)], -1) * 80 + 128
  return np.clip(levels + rng.normal(0, 8, levels.shape), 0, 255).astype(np.uint8)


def encode(pixels, format, **options):
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, format, **options)
  return stream.getvalue()


def chunk(kind, data):
  return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png16(levels):
  """A PNG with 16 bits per level, of grey (height, width, 1), grey and alpha, RGB or RGBA."""
  height, width, channels = levels.shape
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in levels)
  header = struct.pack('>IIBBBBB', width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
  parts = (b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)


# Refused though readable --------------------------------------------------------------------------

JPEGS = {
  'plain': {},
  'progressive': {'progressive': True},
  'full colour': {'subsampling': 0, 'quality': 95},
  'restarts': {'restart_marker_blocks': 3},
  'restart rows': {'restart_marker_rows': 1},
}


@pytest.mark.parametrize('options', JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize('lacking', [1, 2])
def test_a_jpeg_without_its_end_is_read_exactly(options, lacking):
  whole = encode(picture(), 'JPEG', **options)
  read = read_image(io.BytesIO(whole[:-lacking]))
  np.testing.assert_array_equal(read.pixels, load_image(io.BytesIO(whole)))
  assert read.remarks == (images.TRUNCATED,)


@pytest.mark.parametrize('options', JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize('share', [0.3, 0.5, 0.8])
@pytest.mark.parametrize('fill', [b'', b'\0'])
def test_half_a_jpeg_is_refused_even_if_zeros_fill_it_up(options, share, fill):
  whole = encode(picture(), 'JPEG', **options)
  kept = int(share * len(whole))
  with pytest.raises(UsageError, match=r'x\.jpg (is cut off: .* missing|cannot be read: )'):
    load_image(io.BytesIO(whole[:kept] + fill * (len(whole) - kept)), name='x.jpg')


def test_a_jpeg_that_lacks_a_few_pixels_is_read_and_keeps_the_others():
  whole = encode(picture(256, 256), 'JPEG')
  read = read_image(io.BytesIO(whole[:-30]))
  assert read.remarks == (images.TRUNCATED,)
  np.testing.assert_array_equal(read.pixels[:232], load_image(io.BytesIO(whole))[:232])


@pytest.mark.parametrize('kind', ['tEXt', 'zTXt', 'iTXt'])
def test_a_png_with_megabytes_of_text_is_read(kind):
  info = PngImagePlugin.PngInfo()
  for number in range(3):
    text = 'x' * 30_000_000 if kind == 'zTXt' else 'x' * 2_000_000
    add = info.add_itxt if kind == 'iTXt' else info.add_text
    add(f'notes {number}', text, **({'zip': kind != 'tEXt'}))
  stored = encode(picture(), 'PNG', pnginfo=info)
  np.testing.assert_array_equal(load_image(io.BytesIO(stored)), picture())
  assert (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY) == (2**20, 2**26)


@pytest.mark.parametrize('suffix', ['.avif', '.jfif', '.jpe', '.mpo', '.j2k', '.jpx', '.apng'])
def test_more_suffixes_are_image_files(tmp_path, suffix):
  format = {'.avif': 'AVIF', '.mpo': 'MPO', '.j2k': 'JPEG2000', '.jpx': 'JPEG2000', '.apng': 'PNG'}.get(suffix, 'JPEG')
  if format == 'AVIF' and 'AVIF' not in images.IMAGE_FORMATS:
    pytest.skip('this Pillow has no AVIF')
  (tmp_path / f'x{suffix}').write_bytes(encode(picture(), format))
  assert suffix in images.IMAGE_EXTENSIONS
  error = np.abs(load_image(tmp_path / f'x{suffix}').astype(int) - picture())
  assert error.mean() < 12


# Files of another kind ----------------------------------------------------------------------------

KINDS = {
  b'': 'is empty',
  b'<!DOCTYPE html><html><body>404': 'is an HTML page',
  b'\n  <HTML><head>': 'is an HTML page',
  '\ufeff<html>'.encode(): 'is an HTML page',
  b'%PDF-1.7\n%\xe2\xe3\xcf\xd3': 'is a PDF',
  b'\0\0\0\x18ftypheic\0\0\0\0mif1heic': 'is a HEIC photograph',
  b'\0\0\0\x1cftypmif1\0\0\0\0mif1heic': 'is a HEIC photograph',
  b'\0\0\0\x20ftypisom\0\0\2\0': 'is a video',
  b'PK\x03\x04\x14\0': 'is a zip archive',
  b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n': 'is a pointer of Git LFS',
  'ein gewöhnlicher Text'.encode(): 'is a text file',
  b'{"error": "not found"}': 'is a JSON file',
  b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>': 'is an SVG drawing',
  b'\0\x05\x16\x07\0\2\0\0Mac OS X': 'is a companion file of macOS',
  bytes(4096): 'is filled with zero bytes',
  b'\x1f\x8b\x08\0': 'is a gzip archive',
}


@pytest.mark.parametrize(('content', 'reason'), KINDS.items(), ids=range(len(KINDS)))
def test_the_reason_names_what_the_file_is(tmp_path, content, reason):
  (tmp_path / 'x.jpg').write_bytes(content)
  with pytest.raises(UsageError, match=f'x.jpg {reason}') as error:
    load_image(tmp_path / 'x.jpg')
  assert '\n' not in str(error.value)


def test_pipes_and_devices_are_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / 'x.jpg')
  start = time.monotonic()
  for path in (tmp_path / 'x.jpg', '/dev/zero', '/dev/tty'):
    if os.path.exists(path):
      with pytest.raises(UsageError, match='pipe or a device|cannot be read'):
        load_image(path)
  assert time.monotonic() - start < 2


@pytest.mark.faults
def test_all_bad_files_are_listed_at_once_or_left_out(tmp_path):
  folder = write_photographs(tmp_path / 'set')
  for number, content in enumerate(list(KINDS)[:5]):
    (folder / 'cat' / f'bad{number}.jpg').write_bytes(content)
  line = one_line(call_command('cnn_jax.main', *folder_arguments(folder, tmp_path / 'run')))
  assert '5 of 45 images' in line and 'on_bad_image=skip' in line
  assert all(f'bad{number}.jpg is' in line for number in range(5))
  done = call_command('cnn_jax.main', *folder_arguments(folder, tmp_path / 'run', data__on_bad_image='skip'))
  assert done.returncode == 0, done.stderr
  assert 'left out: 5' in done.stdout + done.stderr


def test_an_error_lists_twenty_files_and_counts_the_rest(tmp_path):
  folder = write_photographs(tmp_path / 'set')
  for number in range(33):
    (folder / 'dog' / f'bad{number:02}.png').write_bytes(b'')
  line = one_line(call_command('cnn_jax.main', *folder_arguments(folder, tmp_path / 'run')))
  assert line.count('is empty') == 20 and 'and 13 more' in line


def test_a_class_without_a_readable_picture_is_an_error(tmp_path):
  folder = write_photographs(tmp_path / 'set')
  for file in (folder / 'dog').iterdir():
    file.write_bytes(b'')
  arguments = folder_arguments(folder, tmp_path / 'run', data__on_bad_image='skip')
  assert 'none of the 20 images of a class' in one_line(call_command('cnn_jax.main', *arguments))


@pytest.mark.faults
def test_warnings_about_extra_data_name_the_file_and_are_few(tmp_path):
  folder = write_photographs(tmp_path / 'set')
  damaged = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 400) + b'\xff' * 30
  for number in range(12):
    (folder / 'cat' / f'exif{number:02}.jpg').write_bytes(encode(picture(16, 16, number), 'JPEG', exif=damaged))
  done = run_command('cnn_jax.main', *folder_arguments(folder, tmp_path / 'run'))
  assert done.returncode == 0, done.stderr
  assert 'UserWarning' not in done.stderr
  (line,) = [line for line in (done.stdout + done.stderr).splitlines() if 'damaged extra data' in line]
  assert line.count('exif') == 5 and ': 12 (' in line


def test_warnings_become_remarks_and_others_stay_warnings():
  damaged = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 400) + b'\xff' * 30
  stored = encode(picture(16, 16), 'JPEG', exif=damaged)
  with warnings.catch_warnings(record=True) as others, images.attributed_warnings():
    warnings.simplefilter('always')
    assert 'EXIF' in read_image(io.BytesIO(stored)).remarks[0]
    warnings.warn('of another kind', RuntimeWarning, stacklevel=1)
  assert [str(other.message) for other in others] == ['of another kind']


# Levels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
def test_levels_of_any_depth_become_the_same_pixels(channels, bits):
  eight = np.random.default_rng(0).integers(0, 256, (7, 5, channels))
  eight[0, 0] = 255
  levels = np.rint(eight * ((2**bits - 1) / 255)).astype(np.uint16)
  if channels in (2, 4):  # opaque, as most writers put it: 16 bits whatever the colours have
    levels[..., -1] = 65535
  read = read_image(io.BytesIO(png16(levels)), bit_depth=bits)
  assert read.bits == bits
  expected = {1: eight, 2: eight[..., :1], 3: eight, 4: eight[..., :3]}[channels]
  np.testing.assert_allclose(read.pixels.astype(int), expected, atol=1)


def test_an_alpha_of_16_bits_lays_grey_on_white():
  levels = np.array([[[0, 0], [0, 32768], [0, 65535], [65535, 65535]]])
  np.testing.assert_array_equal(read_image(io.BytesIO(png16(levels))).pixels, [[[255], [127], [0], [255]]])


def test_a_tiff_of_16_bit_colours_is_scaled_too():
  rgb = np.random.default_rng(0).integers(0, 4096, (4, 6, 3), dtype='<u2')
  tags = [(256, 6), (257, 4), (258, None), (259, 1), (262, 2), (273, None), (277, 3), (278, 4), (279, rgb.nbytes)]
  place = 10 + 12 * len(tags)
  entries = b''
  for tag, value in tags:
    if tag == 258:
      entries += struct.pack('<HHII', tag, 3, 3, place)
    else:
      entries += struct.pack('<HHII', tag, 4, 1, place + 6 if value is None else value)
  data = b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + struct.pack('<3H', 16, 16, 16)
  data = data[:place] + struct.pack('<3H', 16, 16, 16) + rgb.tobytes()
  read = read_image(io.BytesIO(data), bit_depth=12)
  np.testing.assert_allclose(read.pixels, rgb * (255 / 4095), atol=0.51)


@pytest.fixture(scope='module')
def twelve_bit_run(tmp_path_factory):
  """A run on 16-bit PNG files that hold 12 bits: the classes differ by their levels alone."""
  root = tmp_path_factory.mktemp('twelve')
  rng = np.random.default_rng(0)
  for name, low in (('dark', 0), ('light', 2500)):
    (root / 'set' / name).mkdir(parents=True)
    for index in range(40):
      levels = rng.integers(low, low + 1500, (16, 16, 1)).astype(np.uint16)
      (root / 'set' / name / f'{index:02}.png').write_bytes(png16(levels))
  os.environ['XDG_CACHE_HOME'], before = str(root / 'cache'), os.environ.get('XDG_CACHE_HOME')
  try:
    done = call_command('cnn_jax.main', *folder_arguments(root / 'set', root / 'run', epochs=8, augment__flip=False))
  finally:
    os.environ.pop('XDG_CACHE_HOME') if before is None else os.environ.update(XDG_CACHE_HOME=before)
  return root, done


@pytest.mark.faults
def test_twelve_bits_in_sixteen_are_learned_and_predicted_one_by_one(twelve_bit_run):
  root, done = twelve_bit_run
  assert done.returncode == 0, done.stderr
  assert 'hold levels of 12 bits' in done.stdout + done.stderr
  assert read_json(root / 'run' / 'result.json')['test_accuracy'] > 0.9
  for name in ('dark', 'light'):
    file = root / 'set' / name / '03.png'
    done = call_command('cnn_jax.predict', f'--workdir={root / "run"}', file, '--json')
    assert f'"label": "{name}"' in done.stdout
  full = root / 'full.png'
  full.write_bytes(png16(np.full((16, 16, 1), 60000, np.uint16)))
  done = call_command('cnn_jax.predict', f'--workdir={root / "run"}', full)
  assert done.returncode == 2 and '16 bits, more than the 12' in done.stdout


def test_a_dark_picture_of_unknown_range_is_refused_but_black_and_full_range_are_read():
  with pytest.raises(UsageError, match='uses only 12 of its 16 bits'):
    load_image(io.BytesIO(png16(np.full((4, 4, 3), 3000, np.uint16))))
  assert not load_image(io.BytesIO(png16(np.zeros((4, 4, 1), np.uint16)))).any()
  assert load_image(io.BytesIO(png16(np.full((4, 4, 1), 65535, np.uint16)))).min() == 255


@pytest.mark.faults
def test_the_depth_can_be_set(twelve_bit_run, tmp_path):
  root, _ = twelve_bit_run
  for bits, fits in ((16, True), (14, True), (10, False)):
    arguments = folder_arguments(root / 'set', tmp_path / f'run{bits}', data__bit_depth=bits, epochs=1)
    done = call_command('cnn_jax.main', *arguments, '--config.schedule.warmup_epochs=0.5')
    assert (done.returncode == 0) == fits, done.stderr
    assert fits or 'more than the 10 of' in done.stderr


# Crop ---------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize(('size', 'noted'), [((48, 16), True), ((16, 20), True), ((16, 17), False)])
def test_what_cropping_cuts_off_is_said(tmp_path, size, noted):
  folder = write_photographs(tmp_path / 'set', size=size)
  done = call_command('cnn_jax.main', *folder_arguments(folder, tmp_path / 'run', epochs=2))
  share = round(100 * (1 - min(size) / max(size)))
  assert done.returncode == 0, done.stderr
  assert (f'cuts off {share} % of the area' in done.stdout + done.stderr) == noted


# Random damage ------------------------------------------------------------------------------------


def _examples():
  small = picture(12, 10)
  formats = ['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM', 'TGA', 'JPEG2000']
  made = [encode(small, format) for format in formats]
  made += [encode(small, 'JPEG', progressive=True), encode(small, 'TIFF', compression='tiff_lzw')]
  made += [encode(small[..., 0], 'GIF'), png16(small[..., :1].astype(np.uint16)), png16(small.astype(np.uint16) * 9)]
  return made


EXAMPLES = _examples()


@pytest.mark.faults
@settings(max_examples=1500, deadline=5000, suppress_health_check=list(HealthCheck), database=None)
@given(st.sampled_from(EXAMPLES), st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([0, 8, 12, 16]))
def test_damaged_files_are_read_or_refused(content, seed, damages, bit_depth):
  rng, data = random.Random(seed), bytearray(content)
  for _ in range(damages):
    place = rng.randrange(len(data) or 1)
    kind = rng.randrange(4)
    if kind == 0:
      data[place : place + 1] = bytes([rng.randrange(256)])
    elif kind == 1:
      data[place : place + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
    elif kind == 2:
      data[place : place + 4] = rng.choice([b'\xff' * 4, bytes(4), b'\x7f\xff\xff\xff', b'\0\0\x40\0'])
    elif rng.random() < 0.3:
      del data[place:]
  with contextlib.suppress(UsageError):
    pixels = load_image(io.BytesIO(bytes(data)), size=8, bit_depth=bit_depth, channels=3)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
