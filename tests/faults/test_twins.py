"""Pictures that occur twice: found whatever was done to them, and nothing found that is not there."""

import io
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cnn_jax.data import load_dataset, twins
from tests.datasets import settings
from tests.faults.tools import write_photographs

pytestmark = pytest.mark.usefixtures('offline')


def scene(seed, side=96):
  """A picture with large and small shapes of random colours."""
  rng = np.random.default_rng(seed)
  image = Image.new('RGB', (side, side), tuple(rng.integers(0, 256, 3).tolist()))
  draw = ImageDraw.Draw(image)
  for _ in range(25):
    x, y, w, h = rng.integers(0, side, 4) * (1, 1, 0.4, 0.4)
    draw.ellipse((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
  return image


def altered(image, way):
  side = image.size[0]
  if way == 'smaller':
    return image.resize((side * 3 // 4,) * 2, Image.Resampling.BICUBIC).resize((side,) * 2, Image.Resampling.BICUBIC)
  if way == 'darker':
    return image.point(lambda level: int(level * 0.85 + 5))
  if way == 'JPEG':
    stream = io.BytesIO()
    image.save(stream, 'JPEG', quality=75)
    return Image.open(stream)
  return image


def find(pictures):
  images = np.stack([np.asarray(image) for image in pictures])
  return twins.find(images, twins.sign(images))


def describe(train, test, labels=None):
  splits = {
    'train': [(f'train/{i}.png', 0) for i in range(len(train))],
    'test': [(f'test/{i}.png', labels[i] if labels else 0) for i in range(len(test))],
  }
  return twins.describe(splits, *find([*train, *test]), ('cat', 'dog'))


@pytest.mark.parametrize('way', ['same', 'JPEG', 'smaller', 'darker'])
def test_test_pictures_that_are_in_train_are_counted(way):
  train = [scene(i) for i in range(60)]
  test = [altered(train[7 * i], way) for i in range(8)] + [scene(100 + i) for i in range(12)]
  (note,) = describe(train, test)
  assert note.startswith('8 of 20 test pictures are also in train')
  assert 'test/0.png = train/0.png, test/1.png = train/7.png, test/2.png = train/14.png' in note
  assert ('8 of them slightly altered' in note) == (way != 'same')


def test_one_picture_in_two_classes_is_named():
  train = [scene(i) for i in range(10)]
  notes = describe(train, [train[3], scene(50)], [1, 0])
  expected = '1 pictures are in two classes, such as train/3.png = test/0.png (cat and dog)'
  assert any(expected in note for note in notes)


def test_pictures_twice_in_train_are_counted():
  train = [scene(i) for i in range(10)]
  (note,) = describe([*train, train[0], train[0], train[5]], [scene(90)])
  examples = 'train/10.png = train/0.png, train/12.png = train/5.png'
  assert note == f'3 of 13 train pictures occur there already, such as {examples}.'


def flat(seed):
  return Image.new('RGB', (96, 96), tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist()))


def icon(seed):
  """A shape on white: a square, a ring or a disc of one of five colours, somewhere."""
  rng = np.random.default_rng(seed)
  image = Image.new('RGB', (96, 96), 'white')
  x, y, size = rng.integers(4, 40), rng.integers(4, 40), rng.integers(12, 50)
  colour = ('red', 'green', 'blue', 'black', 'orange')[rng.integers(5)]
  draw = ImageDraw.Draw(image)
  box = (int(x), int(y), int(x + size), int(y + size))
  (draw.rectangle if rng.integers(2) else draw.ellipse)(
    box, **({'fill': colour} if rng.integers(2) else {'outline': colour})
  )
  return image


def noise(seed):
  return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 96, 3), np.uint8))


def gradient(seed):
  """A sky: brighter upwards, with some noise, as many photographs have it."""
  rng = np.random.default_rng(seed)
  ramp = np.linspace(rng.uniform(150, 255), rng.uniform(0, 120), 96)[:, None, None] * rng.uniform(0.5, 1, 3)
  return Image.fromarray(np.clip(ramp + rng.normal(0, 6, (96, 96, 3)), 0, 255).astype(np.uint8))


@pytest.mark.parametrize(('make', 'most'), [(flat, 0), (icon, 0), (noise, 0), (scene, 0), (gradient, 0)])
def test_pictures_of_one_kind_are_not_twins(make, most):
  groups, _ = find([make(1000 + i) for i in range(300)])
  assert sum(map(len, groups)) <= most * 300


def test_the_time_is_proportional_to_the_set():
  rng = np.random.default_rng(0)

  def seconds(count):
    images = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    start = time.process_time()
    twins.find(images, twins.sign(images))
    return time.process_time() - start

  seconds(100)
  assert seconds(16_000) < 16 * max(seconds(2_000), 0.05)


@pytest.mark.parametrize('side', [1, 2, 5, 8, 9, 31, 500])
def test_pictures_of_any_size_have_signatures(side):
  rng = np.random.default_rng(0)
  for channels in (1, 3):
    images = rng.integers(0, 256, (3, side, side + 1, channels), np.uint8)
    assert twins.sign(images).shape == (3, twins.width(channels))
    groups, near = find([*images, *images])
    assert side == 1 or (groups, near) == ([[0, 3], [1, 4], [2, 5]], [])


def test_a_folder_whose_test_is_a_copy_of_train_is_noted(tmp_path):
  for split in ('train', 'test'):
    write_photographs(tmp_path / 'set' / split)
  dataset = load_dataset(settings('folder', dir=str(tmp_path / 'set'), validation=0.0))
  assert any('40 of 40 test pictures are also in train' in note for note in dataset.notes)


def test_a_set_without_twins_has_no_note_about_them(tmp_path):
  write_photographs(tmp_path / 'set')
  assert not any('such as' in note for note in load_dataset(settings('folder', dir=str(tmp_path / 'set'))).notes)
