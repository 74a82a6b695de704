"""The network `resnet`: it is torchvision's, and every command works with it."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnn_jax import Stopped, export, inspect, models, record, signals, train
from cnn_jax import config as config_lib
from cnn_jax.data import load_dataset
from cnn_jax.models import resnet
from cnn_jax.run import load_run
from tests.helpers import ROOT, call_command

pytestmark = pytest.mark.usefixtures('quick_compilation')

# The published numbers of parameters for 1,000 classes.
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160}


def _config(**fields):
  return config_lib.vary(config_lib.default_config('resnet'), {f'model.{name}': x for name, x in fields.items()}).model


@pytest.fixture(scope='module', params=[18, 50])
def reference(request):
  """A narrow network, torchvision's weights for it, and what torchvision computes."""
  arrays = dict(np.load(ROOT / 'tests' / 'references' / f'resnet{request.param}.npz'))
  arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
  config = _config(depth=request.param, width=8)
  variables = {'params': {}, 'batch_stats': {}}
  for name, (path, order) in resnet.foreign_names(config)['torchvision and timm'].items():
    node = variables
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = arrays[f'weights/{name}'].transpose(order)
  return models.create(config, 10), variables, arrays


def test_it_computes_what_torchvision_does(reference):
  model, variables, arrays = reference
  logits, maps = jax.jit(model.apply)(variables, arrays['images'])
  for stage in ('stage1', 'stage2', 'stage3', 'stage4'):
    np.testing.assert_allclose(maps[stage][:1], arrays[f'maps/{stage}'], atol=1e-4)
  np.testing.assert_allclose(logits, arrays['logits'], atol=1e-4)


def test_it_learns_as_torchvision_does(reference):
  model, variables, arrays = reference

  def loss(params):
    (logits, _), updated = model.apply(
      variables | {'params': params}, arrays['images'], train=True, mutable=['batch_stats']
    )
    return jnp.mean(jnp.square(logits)), (logits, updated['batch_stats'])

  one_device = jax.vmap(jax.grad(loss, has_aux=True), axis_name='batch', in_axes=None, axis_size=1)
  gradient, (logits, statistics) = jax.tree.map(lambda x: x[0], jax.jit(one_device)(variables['params']))
  np.testing.assert_allclose(logits, arrays['train/logits'], atol=1e-4)
  # The gradient of the first convolution has passed through all others.
  expected = arrays['train/gradient']
  np.testing.assert_allclose(gradient['stem_conv']['kernel'], expected, atol=1e-3 * np.abs(expected).max())
  np.testing.assert_allclose(statistics['stem_norm']['mean'], arrays['train/running_mean'], atol=1e-6)


@pytest.mark.parametrize('depth', PARAMETERS)
def test_numbers_of_parameters_and_foreign_names(depth):
  config = _config(depth=depth)
  shapes = models.init_shapes(models.create(config, 1000), (224, 224, 3))
  assert models.num_parameters(shapes['params']) == PARAMETERS[depth]
  ours = [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
  named = [path for path, _ in resnet.foreign_names(config)['torchvision and timm'].values()]
  assert sorted(named) == sorted(ours)  # every variable once


def test_operations_by_hand():
  layers = {layer.path: layer for layer in inspect.layer_table(models.create(_config(depth=50), 1000), (224, 224, 3))}
  stem = layers[('stem_conv',)]
  assert stem.output == (112, 112, 64)
  assert stem.operations == 2 * 112 * 112 * 7 * 7 * 3 * 64
  # Version 1.5: the 1x1 convolution still has all places, the 3x3 convolution has the stride.
  assert layers[('stage2_block1', 'conv1')].output == (56, 56, 128)
  assert layers[('stage2_block1', 'conv2')].output == (28, 28, 128)
  assert layers[('stage2_block1', 'projection')].output == (28, 28, 512)
  total = sum(layer.operations for layer in layers.values())
  assert total / 2 == pytest.approx(4.09e9, rel=1e-3)  # torchvision's table says 4.09 GFLOPS, multiplications alone


@pytest.mark.parametrize(('bottleneck', 'features'), [(False, 8), (True, 2)])
def test_a_fresh_block_passes_its_input(bottleneck, features):
  # The scale of the last norm of its branch is zero, that of the others one.
  block = resnet.Block(features, 1, bottleneck, momentum=0.9, dtype=jnp.float32, train=False)
  x = np.random.default_rng(0).normal(size=(2, 5, 5, 8)).astype(np.float32)
  y, variables = block.init_with_output(jax.random.key(0), x)
  np.testing.assert_array_equal(y, np.maximum(x, 0))
  scales = {name: float(layer['scale'].mean()) for name, layer in variables['params'].items() if 'norm' in name}
  assert scales == ({'norm1': 1, 'norm2': 1, 'norm3': 0} if bottleneck else {'norm1': 1, 'norm2': 0})


def test_the_stems():
  small, large = (models.create(_config(width=4, stem=stem), 3) for stem in ('3x3', '7x7'))
  assert [x.shape[1:3] for x in list(models.map_shapes(small, (32, 32, 3)).values())[:4]] == [
    (32, 32), (16, 16), (8, 8), (4, 4),
  ]  # fmt: skip
  assert [x.shape[1:3] for x in list(models.map_shapes(large, (224, 224, 3)).values())[:4]] == [
    (56, 56), (28, 28), (14, 14), (7, 7),
  ]  # fmt: skip


def test_receptive_fields_by_hand():
  # 7x7 with stride 2: 7 pixels; pooling 3x3 with stride 2: 2 * 2 more; four 3x3 convolutions at stride 4: 4 * 2 * 4 more.
  # Stage 2: a convolution with stride 2 adds 2 * 4, three more at stride 8 add 3 * 2 * 8.
  fields = inspect.receptive_fields(models.create(_config(width=4), 3), (128, 120, 3))
  assert fields['stage1'] == (inspect.Field(-21, 43, 4),) * 2
  assert fields['stage2'] == (inspect.Field(-49, 99, 8),) * 2
  assert fields['stage3'] is None


# --- the commands ---

DIGITS = [
  '--config=configs/digits.py', '--config.epochs=2', '--config.schedule.warmup_epochs=0.5', '--config.log.report=False',
  '--config.model.name=resnet', '--config.model.width=4', '--config.model.stem=3x3',
]  # fmt: skip


def _call(command, *arguments):
  done = call_command(f'cnn_jax.{command}', *arguments)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def run(tmp_path_factory, quick_compilation):
  """The workdir of a short run on the digits."""
  workdir = tmp_path_factory.mktemp('resnet') / 'run'
  printed = _call('main', *DIGITS, f'--workdir={workdir}')
  assert 'stage4' in printed
  return workdir


def test_a_resumed_run_ends_as_one_without_a_pause(run, tmp_path):
  config = config_lib.load(DIGITS[0].partition('=')[2], DIGITS[1:])
  dataset = load_dataset(config.data)
  stopping = signals.Stopping()
  stopping.received.append(signal.SIGTERM)
  with pytest.raises(Stopped):
    train.train(config, dataset, tmp_path, stopping=stopping)
  train.train(config, dataset, tmp_path)
  record.write_config(tmp_path, config)
  jax.tree.map(np.testing.assert_array_equal, load_run(run).variables, load_run(tmp_path).variables)


def test_evaluation_with_calibration(run):
  found = json.loads(_call('evaluate', f'--workdir={run}', '--calibrate'))
  assert found['accuracy'] == json.loads((run / 'result.json').read_text())['test_accuracy']
  assert found['temperature'] > 0


def test_fine_tuning_with_frozen_stages(run, tmp_path):
  _call(
    'main', *DIGITS, '--config.epochs=1', f'--config.init_from={run}', '--config.model.frozen_stages=2',
    f'--workdir={tmp_path}',
  )  # fmt: skip
  before, after = load_run(run), load_run(tmp_path)
  stages = models.parameters_by_stage(after.model, after.image_shape)
  trees = (stages, before.variables['params'], after.variables['params'])
  for stage, old, new in zip(*map(jax.tree.leaves, trees), strict=True):
    assert np.array_equal(old, new) == (stage <= 2)


def test_prediction_and_exports_agree(run, tmp_path):
  picture = np.asarray(load_dataset(load_run(run).config.data).test.images[0])
  Image.fromarray(picture[..., 0]).save(tmp_path / 'digit.png')
  line = json.loads(
    _call('predict', f'--workdir={run}', tmp_path / 'digit.png', '--json', '--top_k=10', '--invert=never')
  )
  expected = [dict(line['top_k'])[name] for name in load_run(run).class_names]
  _call('export', f'--workdir={run}', f'--output={tmp_path / "model.stablehlo"}')
  np.testing.assert_allclose(export.load(tmp_path / 'model.stablehlo')(picture[None])[0], expected, atol=1e-5)
  pytest.importorskip('onnx', reason='ONNX export needs the extra onnx')
  runtime = pytest.importorskip('onnxruntime', reason='checking ONNX files needs the extra onnx')
  _call('export', f'--workdir={run}', f'--output={tmp_path / "model.onnx"}')
  session = runtime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
  for batch in (1, 3):
    found = session.run(['probabilities'], {'images': np.repeat(picture[None], batch, axis=0)})[0]
    np.testing.assert_allclose(found, np.tile(np.float32(expected), (batch, 1)), atol=1e-5)


def test_the_report(run, tmp_path):
  _call('report', f'--workdir={run}', f'--output={tmp_path / "report.html"}')
  page = (tmp_path / 'report.html').read_text()
  assert 'Stage 4' in page or 'stage4' in page
