"""JPEG files with simplejpeg and without it: the same pixels, remarks and messages, whatever the file."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from cnn_jax import UsageError
from cnn_jax.data import images, jpeg

pytest.importorskip('simplejpeg')


def smooth(height, width):
  y, x = np.mgrid[:height, :width] / 17
  levels = np.stack([np.sin(x), np.cos(y), np.sin(x * y / 9)], -1) * 90 + 128
  return np.random.default_rng(0).normal(levels, 5).clip(0, 255).astype(np.uint8)


def encode(pixels=None, mode='RGB', format='JPEG', **options):
  stream = io.BytesIO()
  Image.fromarray(smooth(97, 131) if pixels is None else pixels).convert(mode).save(stream, format, **options)
  return stream.getvalue()


def both(monkeypatch, data, **options):
  """What is read with simplejpeg and without it, and whether simplejpeg was used."""
  used = []
  decode = jpeg._decode
  monkeypatch.setattr(jpeg, '_decode', lambda *args: (used.append(image := decode(*args)), image)[1])
  found = []
  for library in (jpeg._library(), None):
    monkeypatch.setattr(jpeg, '_library', lambda library=library: library)
    try:
      picture = images.read_image(io.BytesIO(data), name='x.jpg', **options)
      found.append((picture.pixels.shape, picture.pixels.tobytes(), picture.remarks))
    except UsageError as error:
      found.append(str(error))
  monkeypatch.undo()
  return *found, bool(used) and used[0] is not None


FILES = {
  **{f'subsampling {number}': {'subsampling': number} for number in (0, 1, 2)},
  'grey': {'mode': 'L'},
  'progressive': {'progressive': True},
  'restarts': {'restart_marker_rows': 1, 'quality': 30},
  'odd': {'pixels': smooth(41, 8)},
  'MPO': {'format': 'MPO', 'save_all': True, 'append_images': [Image.new('RGB', (131, 97))]},
}


@pytest.mark.parametrize('options', FILES.values(), ids=FILES)
@pytest.mark.parametrize('size', [0, (17, 20), 9, 4])  # 4 and 9 reduce the picture by the transform
def test_both_decoders_give_the_same_bits(monkeypatch, options, size):
  one, other, used = both(monkeypatch, encode(**options), size=size)
  assert one == other
  assert used


def test_what_simplejpeg_cannot_read_is_read_by_pillow(monkeypatch):
  inks, other, used = both(monkeypatch, encode(mode='CMYK'))
  assert inks == other and not used and inks[0] == (97, 131, 3)
  tiny, other, used = both(monkeypatch, encode(smooth(6, 6)), size=1)
  assert tiny == other and not used


def test_a_picture_is_turned_as_the_camera_was(monkeypatch):
  exif = Image.Exif()
  exif[0x0112] = 6
  turned, other, used = both(monkeypatch, encode(exif=exif))
  assert turned == other and used and turned[0] == (131, 97, 3)
  upright = images.load_image(io.BytesIO(encode()))
  assert turned[1] == np.rot90(upright, -1).tobytes()


@pytest.mark.parametrize('kept', [-1, -2, -60, 0.5, 300, 20, 2])
@pytest.mark.parametrize('zeros', [0, 100])
def test_a_file_that_breaks_off_is_repaired_or_refused_alike(monkeypatch, kept, zeros):
  data = encode()
  data = data[: int(kept * len(data)) if isinstance(kept, float) else kept] + bytes(zeros)
  one, other, used = both(monkeypatch, data)
  assert one == other and (isinstance(one, str) or one[2] == (images.TRUNCATED,))
  assert not used or zeros


@pytest.mark.parametrize('seed', range(40))
def test_a_damaged_file_is_read_or_refused_alike(monkeypatch, seed):
  rng, data = np.random.default_rng(seed), bytearray(encode(smooth(24, 24)))
  for place in rng.integers(0, len(data), 1 + seed % 4).tolist():
    data[place] = int(rng.integers(256))
  one, other, _ = both(monkeypatch, bytes(data), size=(seed % 2) * 3)
  assert one == other


def test_the_decoder_is_named(monkeypatch):
  assert ', simplejpeg ' in jpeg.decoder()
  jpeg._library.cache_clear()
  monkeypatch.setitem(sys.modules, 'simplejpeg', None)  # as if it were not installed
  try:
    assert 'simplejpeg' not in jpeg.decoder() and jpeg.decoder().startswith('pillow ')
    assert images.load_image(io.BytesIO(encode())).shape == (97, 131, 3)
  finally:
    jpeg._library.cache_clear()
