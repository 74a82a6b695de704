"""Pictures of every format and kind as the input of a network, and photographs of drawings."""

import numpy as np
import pytest
from PIL import Image

from cnn_jax import UsageError, config, pictures, predict
from cnn_jax.data import drawings, load_dataset
from cnn_jax.data.images import resize_image
from tests.helpers import untrained_run

_DRAWING = {'longer_side': 8, 'centre': [4.0, 4.0]}


@pytest.fixture(scope='module')
def classifier():
  return predict.Classifier(untrained_run(drawing=_DRAWING))


def _grey():
  rng = np.random.default_rng(3)
  image = rng.integers(0, 256, (8, 8), np.uint8)
  image[0] = image[-1] = image[:, 0] = image[:, -1] = 0
  return image


_ROTATED = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 6: np.rot90, 8: lambda x: np.rot90(x, -1)}  # fmt: skip


@pytest.mark.parametrize('orientation', _ROTATED)
@pytest.mark.parametrize('extension', ['png', 'tiff', 'webp'])
def test_orientation_is_undone(classifier, tmp_path, extension, orientation):
  path = tmp_path / f'x.{extension}'
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored = Image.fromarray(np.ascontiguousarray(_ROTATED[orientation](_grey())))
  stored.save(path, exif=exif, **({'lossless': True} if extension == 'webp' else {}))
  np.testing.assert_array_equal(classifier.read(path)[..., 0], _grey())


@pytest.mark.parametrize(
  ('extension', 'convert'),
  [
    ('png', lambda x: Image.fromarray(x)),
    ('png', lambda x: Image.fromarray(x).convert('RGB')),
    ('png', lambda x: Image.fromarray(x).convert('RGBA')),
    ('png', lambda x: Image.fromarray(x).convert('LA')),
    ('png', lambda x: Image.fromarray(x.astype(np.uint16) * 257)),
    ('tiff', lambda x: Image.fromarray(x.astype(np.uint16) * 257)),
    ('tiff', lambda x: Image.fromarray(x.astype(np.float32))),
    ('tiff', lambda x: Image.fromarray(x)),
    ('tiff', lambda x: Image.merge('CMYK', [Image.new('L', (8, 8))] * 3 + [Image.fromarray(255 - x)])),
    ('gif', lambda x: Image.fromarray(x)),
    ('bmp', lambda x: Image.fromarray(x).convert('RGB')),
    ('pgm', lambda x: Image.fromarray(x)),
    ('tga', lambda x: Image.fromarray(x)),
    ('jp2', lambda x: Image.fromarray(x)),
  ],
  ids=['grey', 'rgb', 'rgba', 'la', 'png16', 'tiff16', 'float', 'tiff', 'cmyk', 'gif', 'bmp', 'pgm', 'tga', 'jp2'],
)
def test_lossless_formats_agree(classifier, tmp_path, extension, convert):
  path = tmp_path / f'x.{extension}'
  convert(_grey()).save(path)
  np.testing.assert_array_equal(classifier.read(path)[..., 0], _grey())


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I', 'F'])
def test_pillow_images_of_every_mode_are_read(classifier, mode):
  picture = Image.fromarray(_grey())
  if mode == 'I':
    picture = Image.fromarray(_grey().astype(np.int32) * 257)
  read = classifier.read(picture.convert(mode) if mode != 'I' else picture)
  if mode == '1':
    assert set(np.unique(read)) <= {0, 255}
  else:
    np.testing.assert_allclose(read[..., 0].astype(int), _grey(), atol=1)


def test_arrays_that_are_no_pictures_are_refused(classifier):
  for wrong in (np.zeros((8, 8)), np.zeros((8, 8, 5), np.uint8), np.zeros((8,), np.uint8), np.zeros((0, 8), np.uint8)):
    with pytest.raises(UsageError, match='shape'):
      classifier.read(wrong)


def test_other_sizes_are_resized_as_for_training(classifier):
  rng = np.random.default_rng(0)
  image = np.zeros((20, 30, 1), np.uint8)
  image[5:15, 5:25] = rng.integers(0, 256, (10, 20, 1))
  np.testing.assert_array_equal(classifier.read(image), resize_image(image, 8, 'crop'))


# Dark drawings on light ---------------------------------------------------------------------------


def test_negatives_are_inverted_for_a_run_on_drawings(classifier):
  image, negative = _grey()[..., None], 255 - _grey()[..., None]
  np.testing.assert_array_equal(classifier.read(negative), image)
  np.testing.assert_array_equal(classifier.read(image), image)
  never, always = (predict.Classifier(classifier.run, invert=invert) for invert in ('never', 'always'))
  np.testing.assert_array_equal(never.read(negative), negative)
  np.testing.assert_array_equal(never.read(image), image)
  np.testing.assert_array_equal(always.read(image), negative)


def test_only_always_inverts_for_a_run_that_is_not_on_drawings():
  light = np.full((8, 8, 1), 200, np.uint8)
  for invert, level in {'auto': 200, 'never': 200, 'always': 55}.items():
    assert (predict.Classifier(untrained_run(), invert=invert).read(light) == level).all()


def test_a_photograph_from_a_file_is_fitted_into_the_frame(classifier, tmp_path):
  paper = np.full((40, 60), 220, np.uint8)
  paper[5:15, 40:45] = 30  # a stroke, upper right, twice as high as wide
  Image.fromarray(paper).save(tmp_path / 'x.png')
  fitted = pictures.load_picture(tmp_path / 'x.png', classifier.run)[..., 0]
  expected = np.zeros((8, 8), np.uint8)
  expected[:, 2:6] = 255  # in the centre, its longer side that of the training images
  np.testing.assert_array_equal(fitted, expected)


@pytest.fixture(scope='module')
def mnist():
  settings = config.default_config()
  settings.data.source = 'bundled'
  return load_dataset(settings.data)


def photograph(image, factor=8, top=60, left=130, height=400, width=500):
  """A drawing in dark ink on paper whose left side is in the shade, as a camera might record it."""
  side = factor * image.shape[0]
  ink = np.zeros((height, width))
  large = Image.fromarray(image[..., 0]).resize((side, side), Image.Resampling.BICUBIC)
  ink[top : top + side, left : left + side] = np.asarray(large) / 255
  paper = 160 + 70 * np.arange(width) / width + np.random.default_rng(0).normal(0, 3, (height, width))
  return np.clip(paper * (1 - 0.7 * ink), 0, 255).astype(np.uint8)[..., None]


def test_drawings_are_measured(mnist):
  # MNIST: scaled to fit 20x20, centre of mass in the centre of 28x28 (LeCun et al. 1998).
  found = drawings.measure(mnist.train.images)
  assert found['longer_side'] == 20
  assert found['centre'] == pytest.approx([14, 14], abs=0.1)
  assert drawings.measure(255 - mnist.train.images) is None
  assert drawings.measure(np.repeat(mnist.train.images[:100], 3, axis=3)) is None
  one_light_border = mnist.train.images[:100].copy()
  one_light_border[57, 0] = one_light_border[57, -1] = one_light_border[57, :, 0] = 255
  assert drawings.measure(one_light_border) is None
  assert drawings.measure(np.zeros((5, 8, 8, 1), np.uint8)) is None


def test_photographs_become_what_mnist_is(mnist):
  drawing = drawings.measure(mnist.train.images)
  likeness = []
  for image in mnist.test.images[::20]:
    photo = photograph(image)
    assert drawings.is_dark_on_light(photo)
    assert not drawings.is_dark_on_light(image)
    fitted = drawings.fit(photo, drawing, (28, 28, 1))
    assert fitted.shape == (28, 28, 1)
    assert fitted.dtype == np.uint8
    likeness.append(np.corrcoef(fitted.ravel(), image.ravel())[0, 1])
  # The same but for the edges. Thin strokes suffer most if rounding moves them by a pixel.
  assert np.median(likeness) > 0.95
  assert min(likeness) > 0.75


def test_the_position_of_a_drawing_in_a_photograph_does_not_matter(mnist):
  drawing = drawings.measure(mnist.train.images)
  image = mnist.test.images[0]
  one = drawings.fit(photograph(image, top=10, left=10), drawing, (28, 28, 1))
  other = drawings.fit(photograph(image, factor=5, top=200, left=300), drawing, (28, 28, 1))
  assert np.abs(one.astype(int) - other).mean() < 8


def test_an_empty_photograph_is_black():
  drawing = {'longer_side': 20, 'centre': [14.0, 14.0]}
  assert not drawings.fit(np.full((50, 70, 1), 220, np.uint8), drawing, (28, 28, 1)).any()
