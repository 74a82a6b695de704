"""The parts of the report: text, pictures, charts, and the tables of the walk through the network."""

import base64
import io
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from cnn_jax import inspect
from cnn_jax.data.augment import Statistics
from cnn_jax.report import charts, layers, performance, pictures, stages, text, walk
from tests.helpers import LEVELS


def test_numbers_as_text():
  assert [text.short_number(x) for x in (7, 1234, 56_789_000, 2.5e9, 3e12)] == ['7', '1.23 k', '56.8 M', '2.5 G', '3 T']
  assert [text.duration(x) for x in (119.94, 120, 7140, 7200)] == ['119.9 s', '2.0 min', '119.0 min', '2.0 h']
  assert (text.percent(0.98765), text.percent(math.nan)) == ('98.77%', '\u2013')
  assert (text.signed(-1.5), text.signed(0.25)) == ('\u22121.500', '+0.250')
  assert (text.count(1, 'image'), text.count(1000, 'image')) == ('1 image', '1,000 images')


def test_long_and_hostile_names_become_harmless():
  assert text.clean('a\x00\u202eb') == 'a\\x00\\u202eb'
  assert text.clean('\udcff') == '\\udcff'
  assert len(text.clean('x' * 10**6)) == 200
  assert text.shorten('abcdef', 4) == 'abc\u2026'


def test_the_interval_of_a_proportion():
  # Wilson's interval for 5 of 10 by hand: 0.5 +- 1.96 / 13.8416 * sqrt(2.5 + 0.9604).
  assert performance.wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
  low, high = performance.wilson_interval(1.0, 100)
  assert 0.96 < low < high == pytest.approx(1)


def test_small_pictures_are_exact_and_large_photographs_compressed():
  rng = np.random.default_rng(0)

  def decode(uri):
    kind, _, data = uri.partition(';base64,')
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))

  small = rng.integers(0, 256, (8, 9, 1), np.uint8)
  kind, decoded = decode(pictures.data_uri(small))
  assert kind == 'data:image/png'
  np.testing.assert_array_equal(decoded, small[..., 0])
  waves = np.sin(np.linspace(0, 9, 160))[:, None, None] * np.cos(np.linspace(0, 7, 160))[None, :, None]
  photograph = np.clip(128 + 90 * waves + rng.normal(0, 4, (160, 160, 3)), 0, 255).astype(np.uint8)
  kind, decoded = decode(pictures.data_uri(photograph))
  assert kind == 'data:image/webp'
  assert np.abs(decoded.astype(int) - photograph).mean() < 8


def test_pictures_are_reduced_but_never_enlarged():
  image = np.zeros((200, 100, 3), np.uint8)
  image[:100] = 200
  reduced = pictures.fit(image, 50)
  assert reduced.shape == (50, 25, 3)
  assert (reduced[:24] == 200).all() and (reduced[26:] == 0).all()
  assert pictures.fit(image, 400) is image
  assert pictures.heat(np.ones((640, 64), np.float32)).shape == (64, 6, 3)


def test_a_heat_map_is_dark_below_zero_and_brightest_at_its_maximum():
  colours = pictures.heat(np.array([[-5.0, 0.0, 1.0, 2.0]], np.float32))[0].astype(int).sum(axis=1)
  assert colours[0] == colours[1] < colours[2] < colours[3]


def test_a_rectangle_outside_the_image_is_clear():
  image = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
  patch = pictures.cut(image, -1, 2, 3, 3)
  np.testing.assert_array_equal(patch[..., 3], [[0, 0, 0], [255, 255, 0], [255, 255, 0]])
  np.testing.assert_array_equal(patch[1:, :2, 0], [[2, 3], [6, 7]])


def test_tiles_lie_in_rows_with_clear_gaps():
  tiles = np.full((3, 24, 24, 3), 9, np.uint8)
  sheet = pictures.sheet(tiles, 2)
  assert sheet.shape == (24 + 2 + 24, 24 + 2 + 24, 4)
  assert (sheet[24:26, :, 3] == 0).all() and (sheet[:, 24:26, 3] == 0).all()
  assert (sheet[26:, 26:, 3] == 0).all()  # the place of a fourth tile
  assert (sheet[:24, :24] == [9, 9, 9, 255]).all()
  assert pictures.sheet(np.zeros((1, 3, 3, 4), np.uint8), 4).shape == (24, 24, 4)


def test_kernels_are_drawn_by_sign_or_as_colours():
  kernel = np.array([[[-2.0], [0.0], [2.0]]], np.float32)[..., None]  # 1x3 weights of one grey channel
  (tile,) = pictures.kernel_tiles(kernel)
  assert tile[0].tolist() == [list(pictures.BLUE), [247] * 3, list(pictures.ORANGE)]
  colour = np.zeros((1, 1, 3, 2), np.float32)
  colour[0, 0, :, 0] = (4, 0, -4)
  assert pictures.kernel_tiles(colour)[:, 0, 0].tolist() == [[255, 128, 0], [128, 128, 128]]


def test_an_overlay_is_opaque_only_at_positive_evidence():
  layer = pictures.overlay(np.array([[-1.0, 1.0]], np.float32), (1, 2, 3), (10, 20))
  assert layer.shape == (32, 64, 4)
  assert (layer[..., :3] == [1, 2, 3]).all()
  assert (layer[:, :16, 3] == 0).all() and (layer[:, -4:, 3] == 200).all()


def test_evidence_colours_a_photograph_only_where_it_is_positive():
  grey = np.full((40, 80, 3), 200, np.uint8)
  drawn = pictures.highlight(grey, np.array([[-1.0, 1.0]], np.float32), pictures.ORANGE)
  assert drawn.shape == grey.shape
  assert (drawn[:, :10] == 140).all()  # darker
  red, green, blue = drawn[:, -10:].astype(int).mean(axis=(0, 1))
  assert red > green > blue + 40
  assert pictures.highlight(grey[..., :1], np.ones((1, 1), np.float32), pictures.BLUE).shape == grey.shape


def test_a_photograph_keeps_its_colours_where_a_channel_responds():
  photograph = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
  lit = pictures.spotlight(photograph, np.array([[-3.0, 5.0]], np.float32))
  np.testing.assert_array_equal(lit[:, 50:], photograph[:, 50:])
  assert lit[:, :10].mean() < 0.6 * photograph[:, :10].mean()
  assert pictures.spotlight(photograph[..., :1], np.zeros((2, 2), np.float32)).shape == (60, 60, 3)


def test_stages_of_a_deep_network_share_steps():
  def grouped(*sides, limit=5):
    return stages.group_stages([(side, side) for side in sides], limit)

  # EfficientNet-Lite: the 8 stages have maps of 5 sizes.
  assert grouped(112, 56, 28, 14, 14, 7, 7, 7) == [[0], [1], [2], [3, 4], [5, 6, 7]]
  assert grouped(56, 28, 14, 7) == [[0], [1], [2], [3]]
  assert grouped(8, 8, 8, 8, 8) == [[0], [1], [2], [3], [4]]
  assert grouped(64, 32, 16, 8, 4, 2, limit=3) == [[0, 1], [2, 3], [4, 5]]
  assert grouped(*[9] * 10) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_deep_networks_have_a_table_of_stages():
  deep = [layer('Conv', (3, 3, 4, 4), 100, stage) for stage in (1, 2) for _ in range(12)]
  deep.append(layer('Dense', (4, 2), 10, 3, 'head'))
  tables = layers.tables(deep, 'mean', 4)
  assert [row['name'] for row in tables['stages']] == ['stage 1', 'stage 2', 'mean', 'head']
  assert tables['stages'][0]['kind'] == '12 convolutions 3\u00d73'
  assert [row['parameters'] for row in tables['stages']] == [1200, 1200, 0, 10]
  assert (len(tables['rows']), tables['parameters'], tables['operations']) == (26, 2410, 250)
  assert layers.tables(deep[-3:], 'mean', 4)['stages'] is None


def test_precision_recall_and_confusions_by_hand():
  labels, predicted = np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0])
  with charts.style():
    found = performance.confusion(np.eye(4)[predicted], labels, 'abcd')
  assert [row['count'] for row in found['classes']] == [3, 1, 1, 0]
  assert [row['recall'] for row in found['classes']][:3] == pytest.approx([1 / 3, 1, 0])
  assert [row['precision'] for row in found['classes']][:2] == pytest.approx([1 / 2, 1 / 3])
  assert math.isnan(found['classes'][2]['precision'])  # never predicted
  assert [row['f1'] for row in found['classes']][:3] == pytest.approx([2 / 5, 1 / 2, 0])
  assert found['macro_f1'] == pytest.approx(0.3)  # of the classes that occur
  assert [(pair['true'], pair['predicted'], pair['count']) for pair in found['pairs']] == [('a', 'b', 2), ('c', 'a', 1)]
  many = performance.confusion(np.eye(1000)[[0, 1, 2]], np.array([0, 1, 1]), [f'c{i}' for i in range(1000)])
  assert not many['svg']
  assert [row['name'] for row in many['classes']] == ['c2', 'c1', 'c0']  # the worst first; the others do not occur


def test_pixel_table_shows_the_part_that_varies_most():
  image = np.zeros((40, 30, 3), np.uint8)
  image[21:31, 12:22, 0] = 255 * (np.indices((10, 10)).sum(axis=0) % 2)  # a chessboard
  image[0, 0, 0] = 3
  table = walk.pixel_table(image, LEVELS)
  assert (table['top'], table['left'], table['bottom'], table['right']) == (21, 12, 30, 21)
  assert table['rows'] == image[21:31, 12:22, 0].tolist()
  assert table['frame'] == pytest.approx([52.5, 40, 25, 100 / 3])
  assert not table['whole']
  small = walk.pixel_table(np.full((3, 5, 1), 255, np.uint8), LEVELS)
  assert small['whole'] and small['normalised'] == '1.000'
  assert small['range'] == ['\u22121', '1']
  colours = walk.pixel_table(image, Statistics((51.0, 0.0, 0.0), (102.0, 1.0, 1.0)))  # of the first channel
  assert colours['range'] == ['\u22120.5', '2']


def layer(kind, kernel, parameters, stage=1, name='x'):
  return inspect.Layer((name,), kind, stage, kernel, (7, 7, 4), parameters, 10)


def test_layers_are_counted_by_type_and_kernel():
  counted = [
    layer('BatchNorm', None, 8),
    layer('Conv', (3, 3, 1, 4), 36),
    layer('Conv', (1, 1, 4, 4), 16),
    layer('Conv', (3, 3, 4, 4), 144),
    layer('Squeeze', None, 1000),
  ]
  counted = layers.describe_layers(counted).replace('\u00d7', 'x')
  assert counted == '2 convolutions 3x3, 1 convolution 1x1, 1 batch norm, 1 Squeeze; 1,204 parameters'
  assert layers.describe_layers([]) == 'No layers with parameters; 0 parameters'


def test_charts_hold_no_fixed_colours_and_no_clashing_ids():
  steps = np.arange(5.0)
  falling = {'train': (steps, np.array([2.0, 1.0, 0.5, 0.3, 0.2])), 'validation': (steps[:1], np.array([1.5]))}
  perfect = {'train': (steps, np.array([0.5, 0.9, 0.99, 1.0, 1.0]))}
  with charts.style():
    drawn = [
      charts.curves('loss', 'Loss', falling),
      charts.curves('accuracy', 'Accuracy', perfect),
      charts.curves('learning_rate', 'Rate', perfect),
      charts.confusion_matrix(np.array([[3, 1], [0, 4]]), ['$a$ <b>', 'c' * 40]),
      charts.reliability(*np.array([[0.3, 0.9], [0.5, 0.8], [4, 0]]), 'Reliability'),
      charts.vector(np.linspace(0, 1, 1100)),
    ]
  ids = []
  for svg in drawn:
    root = ElementTree.fromstring(str(svg))
    ids += [element.attrib['id'] for element in root.iter() if 'id' in element.attrib]
    assert '#0101' not in svg
    assert 'var(--' in svg
    assert root.attrib['aria-label']
  assert len(ids) == len(set(ids))
  words = [''.join(ElementTree.fromstring(str(svg)).itertext()).split() for svg in drawn]
  assert {'0.2', '0.5', '1', '2'} & set(words[0])
  assert '99%' in words[1]
  assert {'$a$', '<b>'} <= set(words[3])
  assert 'c' * 11 + '\u2026' in words[3]
