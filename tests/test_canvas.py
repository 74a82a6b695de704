"""Images that are decoded to a canvas, out of which the network's input is cropped, or sampled in training."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import UsageError, evaluate, export, models, plan
from cnn_jax import config as config_lib
from cnn_jax.config import default_config
from cnn_jax.data import augment, load_dataset
from cnn_jax.data.augment import Statistics
from cnn_jax.predict import Classifier
from cnn_jax.report.subject import Subject
from cnn_jax.run import load_run, load_run_dataset
from tests.datasets import make_noisy_folder, settings
from tests.helpers import QUICK, call_command, logits_of, untrained_run

pytestmark = pytest.mark.usefixtures('quick_compilation')

STATISTICS = Statistics((127.5,), (127.5,), 6)
PLAIN = STATISTICS._replace(crop=0)
KEY = jax.random.key(0)


def _augment(**fields):
  config = default_config().augment
  config.update(fields)
  return config


def _transform(config, statistics, images):
  function = functools.partial(augment.transform, config, statistics, KEY, jnp.arange(len(images)))
  return np.asarray(jax.jit(function, compiler_options=QUICK)(jnp.asarray(images)))


def _canvases(n=6, height=9, width=9, channels=1):
  return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


# The input in evaluation --------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('height', 'width', 'rows', 'columns'),
  [
    (9, 9, slice(1, 7), slice(1, 7)),
    (10, 8, slice(2, 8), slice(1, 7)),
    (6, 5, slice(0, 6), slice(0, 5)),
    (12, 4, slice(3, 9), slice(0, 4)),
  ],
)
def test_the_input_is_the_centre_of_the_canvas(height, width, rows, columns):
  images = _canvases(height=height, width=width)
  np.testing.assert_array_equal(augment.centre_crop(images, STATISTICS), images[:, rows, columns])
  expected = augment.normalize(images[:, rows, columns], PLAIN)
  np.testing.assert_array_equal(augment.normalize(images, STATISTICS), expected)
  assert augment.input_shape(images.shape[1:], STATISTICS) == expected.shape[1:]
  np.testing.assert_array_equal(augment.centre_crop(images, PLAIN), images)


def test_views_are_those_of_the_crop():
  config = default_config()
  config.model.features = (4,)
  model = models.create(config.model, 3)
  variables = models.init(model, KEY, (6, 6, 1))
  views = evaluate.tta_views(_augment(flip=True, shift=1))
  images = _canvases()
  canvas = evaluate.compute_logits(model, variables, images, STATISTICS, 6, views)
  crop = evaluate.compute_logits(model, variables, augment.centre_crop(images, STATISTICS), PLAIN, 6, views)
  np.testing.assert_allclose(canvas, crop, atol=1e-6)


# The input in training ----------------------------------------------------------------------------


def test_without_augmentation_training_has_the_input_of_evaluation():
  images = _canvases()
  np.testing.assert_array_equal(_transform(_augment(), STATISTICS, images), augment.normalize(images, STATISTICS))


def test_a_canvas_of_the_size_of_the_input_changes_nothing():
  images = _canvases(height=6, width=6)
  config = _augment(crop=0.3, flip=True, shift=1)
  of_canvas, plain = (_transform(config, statistics, images) for statistics in (STATISTICS, PLAIN))
  np.testing.assert_array_equal(of_canvas, plain)


def test_a_shift_moves_in_the_pixels_of_the_canvas():
  images = _canvases(n=40)
  found = _transform(_augment(shift=1), STATISTICS, images)
  places = set()
  for image, moved in zip(images, found, strict=True):
    matches = [
      (top, left)
      for top in range(3)
      for left in range(3)
      if np.array_equal(augment.normalize(image[top : top + 6, left : left + 6], PLAIN), moved)
    ]
    assert len(matches) == 1
    places.update(matches)
  assert len(places) == 9


def test_crops_come_from_the_whole_canvas():
  canvas = (np.arange(16)[:, None] * 8 + np.arange(16)[None]).astype(np.uint8)[None, :, :, None]
  images = np.repeat(canvas, 300, 0)
  found = _transform(_augment(crop=0.1), STATISTICS, images)
  levels = found * 127.5 + 127.5
  assert levels.shape == (300, 6, 6, 1)
  assert levels.min() < 10
  assert levels.max() > 125  # the corners of the canvas are 0 and 135
  assert (np.diff(levels, axis=1) > -1e-3).all()
  assert (np.diff(levels, axis=2) > -1e-3).all()


def test_a_window_that_is_reduced_is_sampled_between_its_pixels():
  """By hand: 8 pixels to 4 puts each new pixel in the middle between two old ones."""
  ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, None, :, None] * 10, (2, 8, 8, 1))
  statistics = Statistics((0.0,), (1.0,), 8)
  for fields in ({}, {'rotate': 1e-9}):  # by rows, and by the warp
    found = _transform(_augment(image_size=4, **fields), statistics, ramp)
    np.testing.assert_allclose(found[..., 0], np.broadcast_to([5, 25, 45, 65], (2, 4, 4)), atol=1e-4)


@pytest.mark.parametrize('fields', [{'crop': 0.3, 'flip': True}, {'trivial': True}, {'erase': 1.0, 'shift': 1}])
def test_the_size_of_training_may_be_another(fields):
  function = functools.partial(augment.transform, _augment(image_size=5, **fields), STATISTICS, KEY, jnp.arange(6))
  assert jax.eval_shape(function, _canvases()).shape == (6, 5, 5, 1)


# The config ---------------------------------------------------------------------------------------


def _config(size, canvas=0, training=0, **fields):
  made = {'data.image_size': size, 'data.canvas_size': canvas, 'augment.image_size': training}
  return config_lib.vary(default_config(), made | fields)


def test_one_function_has_the_shapes():
  config = _config(224, 256, 160)
  assert config_lib.input_shape(config, (256, 256, 3)) == (224, 224, 3)
  assert config_lib.input_shape(config, (256, 256, 3), training=True) == (160, 160, 3)
  assert config_lib.input_shape(_config(224, 256), (256, 256, 3), training=True) == (224, 224, 3)
  assert config_lib.input_shape(_config(224), (224, 224, 3), training=True) == (224, 224, 3)
  assert config_lib.input_shape(_config(0), (28, 20, 1)) == (28, 20, 1)
  assert config_lib.statistics(_config(224, 256).data).crop == 224


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ((0, 256), r'data.canvas_size is 256 but config.data.image_size is 0; set it to'),
    ((0, 0, 16), r'augment.image_size is 16 but config.data.image_size is 0; set it to'),
    ((224, 200), r'canvas_size is 200 and config.data.image_size 224, .* make the canvas at least 224, or 0'),
    ((128, 0, 160), r'augment.image_size is 160 but images are decoded to 128 pixels .*canvas_size at least 160'),
    ((128, 144, 160), r'decoded to 144 pixels'),
  ],
)
def test_sizes_that_do_not_fit_are_one_line(sizes, message):
  with pytest.raises(UsageError, match=message):
    _config(*sizes)


def test_kept_maps_have_one_size():
  frozen = {'model.frozen_stages': 1, 'fine_tuning.views': 2}
  with pytest.raises(UsageError, match='the maps that config.fine_tuning.views keeps have one size'):
    _config(24, 0, 16, **frozen)
  _config(24, 32, 24, **frozen)


def test_a_network_for_one_size_is_not_trained_at_another():
  config = _config(16, 16, 12, **{'model.features': (4, 4), 'model.aggregate': 'flatten'})
  with pytest.raises(UsageError, match='fit images of 16 pixels a side alone'):
    config_lib.check_data(config, 1000, 3, (16, 16, 1))
  config_lib.check_data(_config(16, 16, 12, **{'model.features': (4, 4)}), 1000, 3, (16, 16, 1))
  with pytest.raises(UsageError, match=r'these have 2x2; .* a larger config.augment.image_size'):
    config_lib.check_data(_config(16, 16, 2), 1000, 3, (16, 16, 1))
  with pytest.raises(UsageError, match='shift is 12 but images are 12x12'):
    config_lib.check_data(_config(16, 20, 12, **{'augment.shift': 12}), 1000, 3, (20, 20, 1))


def test_sources_decode_to_the_canvas():
  dataset = load_dataset(settings('bundled', name='digits', image_size=8, canvas_size=10))
  assert dataset.train.images.shape[1:] == (10, 10, 1)


def test_the_plan_has_the_state_of_the_input():
  config = _config(16, 20, 12, **{'model.features': (4, 4), 'batch_size': 8})
  state = jax.eval_shape(lambda: plan.make_plan(config, 100, 3, (20, 20, 1)).state)
  expected = models.init_shapes(models.create(config.model, 3), (16, 16, 1))
  assert jax.tree.map(lambda x: x.shape, state.params) == jax.tree.map(lambda x: x.shape, expected['params'])


# All readers of a run -----------------------------------------------------------------------------


def test_prediction_evaluation_and_export_agree(tmp_path):
  run = untrained_run((13, 12, 3), aggregate='gap')
  run.config.data.update({'image_size': 10, 'canvas_size': 13})
  assert run.input_shape == (10, 10, 3)
  images = _canvases(2, 13, 12, 3)
  # Computed here, from the pixels on.
  centre = (images[:, 1:11, 1:11].astype(np.float32) - 127.5) / 127.5
  expected = np.asarray(models.infer(run.model, run.variables, centre)[0])
  np.testing.assert_allclose(logits_of(run, images), expected, atol=1e-5)
  probabilities = jax.nn.softmax(expected)
  classifier = Classifier(run)
  np.testing.assert_allclose(classifier.predict(images), probabilities, atol=1e-5)
  maps = classifier.feature_maps(images[0])
  assert maps['stage1'].shape[:2] == (5, 5)
  np.testing.assert_allclose(maps['logits'], expected[0], atol=1e-5)
  (tmp_path / 'model.stablehlo').write_bytes(export.to_stablehlo(run))
  exported = export.load(tmp_path / 'model.stablehlo')
  assert exported.image_shape == (13, 12, 3)
  np.testing.assert_allclose(exported(images), probabilities, atol=1e-5)


def test_the_onnx_file_crops():
  reference = pytest.importorskip('onnx.reference')
  run = untrained_run((9, 9, 1))
  run.config.data.update({'image_size': 6, 'canvas_size': 9})
  import onnx

  session = reference.ReferenceEvaluator(onnx.load_from_string(export.to_onnx(run)))
  (probabilities,) = session.run(None, {'images': _canvases(2)})
  np.testing.assert_allclose(probabilities, jax.nn.softmax(logits_of(run, _canvases(2))), atol=1e-5)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The workdir of a run whose canvas is larger than its input, and its folder of pictures."""
  place = tmp_path_factory.mktemp('canvas')
  make_noisy_folder(place / 'set', 12, (21, 18), 40)
  done = call_command(
    'cnn_jax.main', '--config=configs/image_folder.py', f'--config.data.dir={place / "set"}', f'--workdir={place / "run"}',
    '--config.data.image_size=10', '--config.data.canvas_size=13', '--config.augment.image_size=8', '--config.epochs=2',
    '--config.min_steps=0', '--config.batch_size=8', '--config.model.features=(4, 6)', '--config.augment.crop=0.3',
    '--config.augment.shift=1', '--config.log.report=False', '--config.log.tensorboard=False', '--config.adapt_to_data=False',
    '--config.schedule.warmup_epochs=0.5',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert '10 x 10 x 4' in done.stdout or '5 x 5 x 4' in done.stdout  # the table is of the input in evaluation
  return place / 'run', place / 'set'


@pytest.mark.faults
def test_the_commands_agree(trained):
  workdir, pictures = trained
  run = load_run(workdir)
  assert (run.image_shape, run.input_shape) == ((13, 13, 3), (10, 10, 3))
  of_split, of_folder = (
    json.loads(call_command('cnn_jax.evaluate', f'--workdir={workdir}', *arguments).stdout)
    for arguments in ((), (f'--data_dir={pictures / "test"}',))
  )
  assert of_split['loss'] == pytest.approx(of_folder['loss'], abs=1e-6)
  files = sorted((pictures / 'test').glob('*/*.png'))
  done = call_command('cnn_jax.predict', f'--workdir={workdir}', '--json', *files)
  predicted = [json.loads(line) for line in done.stdout.splitlines()]
  losses = [-np.log(dict(p['top_k'])[file.parent.name]) for p, file in zip(predicted, files, strict=True)]
  assert np.mean(losses) == pytest.approx(of_split['loss'], abs=1e-6)


@pytest.mark.faults
def test_the_report_shows_the_input(trained):
  run = load_run(trained[0])
  split = load_run_dataset(run).test
  subject = Subject(run, split, np.zeros((len(split), 2), np.float32))
  np.testing.assert_array_equal(subject.pixels(3), np.asarray(split.images[3])[1:11, 1:11])
  (found,) = subject.inside(np.array([3]))
  assert found.maps['stage1'].shape == (1, 5, 5, 4)
  done = call_command('cnn_jax.report', f'--workdir={trained[0]}')
  assert done.returncode == 0, done.stderr


@pytest.mark.faults
def test_weights_of_another_input_size_can_be_used(trained, tmp_path):
  workdir, pictures = trained
  done = call_command(
    'cnn_jax.main', '--config=configs/image_folder.py', f'--config.data.dir={pictures}', f'--workdir={tmp_path}',
    '--config.data.image_size=12', '--config.data.canvas_size=14', '--config.epochs=1', '--config.min_steps=0',
    '--config.batch_size=8', '--config.model.features=(4, 6)', f'--config.init_from={workdir}', '--config.log.report=False',
    '--config.log.tensorboard=False', '--config.adapt_to_data=False', '--config.schedule.warmup_epochs=0.5',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / 'result.json').read_text())['steps'] == 2
