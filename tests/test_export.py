"""Export: the files compute what the run computes, for any network."""

import functools
import hashlib
import json
import os
import re
import sys
import zipfile
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import cnn_jax
from cnn_jax import UsageError, calibration, checkpoint, config, export, models, record, run
from tests.helpers import ROOT, call_command, logits_of

_NAMES = ('left', 'right', '<img src=x onerror=alert(1)>', 'größer', 'a b')
# Odd sizes, so that padding is asymmetric and pooling drops a row.
_SHAPE = (17, 22, 3)
_VARIANTS = {
  'default': {},
  'average_pool': {'pool': 'avg', 'activation': 'silu'},
  'group_norm': {'norm': 'group', 'activation': 'gelu', 'residual': True},
  'no_norm': {'norm': 'none', 'residual': True, 'pool': 'none', 'head': 'conv1x1'},
  'strided': {'stride': 2, 'pool': 'none', 'residual': True, 'convs_per_block': 2, 'aggregate': 'flatten'},
  'strided_and_pooled': {'stride': 2, 'residual': True, 'kernel_size': 4, 'norm': 'group'},
  'two_convolutions': {'convs_per_block': 2, 'residual': True, 'features': (4, 4, 6), 'kernel_size': 5},
  'flat': {'aggregate': 'flatten', 'head': 'conv1x1', 'dropout': 0.5, 'activation': 'gelu'},
}
_BATCHES = (1, 7, 64)
_STATISTICS = (120.0, 128.0, 135.0), (140.0, 127.0, 115.0)  # per channel


class _Residual(nn.Module):
  """A network that only this test has: a stem as that of ResNet, depthwise convolution, squeeze-excite, layer norm."""

  num_classes: int = len(_NAMES)
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train=False, positions=None):
    norm = functools.partial(nn.BatchNorm, use_running_average=True, dtype=self.dtype)
    x = nn.Conv(8, (7, 7), strides=2, padding=((3, 3), (3, 3)), use_bias=False, dtype=self.dtype, name='a')(x)
    x = nn.max_pool(nn.relu(norm(name='b')(x)), (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    y = nn.Conv(8, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, dtype=self.dtype, name='c')(x)
    y = nn.hard_swish(norm(name='d')(y))
    y = y * nn.sigmoid(nn.Dense(8, dtype=self.dtype, name='e')(y.mean((1, 2))))[:, None, None, :]
    x = nn.relu(x + y)
    y = nn.Conv(8, (5, 5), feature_group_count=8, dtype=self.dtype, name='f')(x)
    y = nn.gelu(nn.LayerNorm(dtype=self.dtype, name='g')(y), approximate=False)
    x = x + nn.Dense(8, dtype=self.dtype, name='h')(y)
    pooled = x.mean((1, 2))
    logits = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(pooled).astype(jnp.float32)
    return logits, {'stage1': x, 'pooled': pooled, 'logits': logits}


@functools.cache
def _all_images():
  """Coarse patterns under noise: images whose averages differ, unlike those of noise alone."""
  rng, (height, width, channels) = np.random.default_rng(1), _SHAPE
  coarse = rng.integers(0, 256, (64, 3, 4, channels)).repeat(6, axis=1).repeat(6, axis=2)[:, :height, :width]
  return np.where(rng.random((64, *_SHAPE)) < 0.7, coarse, rng.integers(0, 256, (64, *_SHAPE))).astype(np.uint8)


def _images(n=64):
  return _all_images()[:n]


@functools.cache
def _random_run(variant='default', **model):
  """A run with random weights and statistics: scales of either sign, biases and means that are not zero."""
  settings = config.default_config()
  settings.data.mean, settings.data.std = _STATISTICS
  if variant == 'another network':
    network = _Residual(**model)
  else:
    with settings.unlocked():
      settings.model.update({'features': (4, 8)} | _VARIANTS[variant] | model)
    network = models.create(settings.model, len(_NAMES))
  rng = np.random.default_rng(0)

  # A norm undoes the factor of its convolution except for its epsilon, which variances of 1 would hide.
  factor = {'none': 1, 'batch': 0.1, 'group': 0.01}[settings.model.norm]

  def draw(path, leaf):
    kind, normal = path[-1].key, rng.standard_normal(leaf.shape)
    if kind == 'kernel':
      value = normal * np.sqrt(2 / np.prod(leaf.shape[:-1])) * (1 if path[1].key == 'head' else factor)
    elif kind == 'var':
      value = factor**2 * rng.uniform(0.3, 3, leaf.shape)
    else:
      value = normal * {'scale': 1, 'bias': 0.3, 'mean': 0.3 * factor}[kind]
    return value.astype(np.float32)

  variables = jax.tree_util.tree_map_with_path(draw, models.init_shapes(network, _SHAPE))
  return run.Run(settings, network, variables, _NAMES, _SHAPE, 'noise', 3, None)


@functools.cache
def _expected(variant='default'):
  """Probabilities of `_images()` as `evaluate` and `predict` compute them."""
  random_run = _random_run(variant)
  found = calibration.softmax(logits_of(random_run, _images(), 64))
  if variant == 'default':
    mean, std = np.array(_STATISTICS, np.float32)
    logits, _ = random_run.model.apply(random_run.variables, (_images() - mean) / std)
    _assert_same(calibration.softmax(np.asarray(logits)).astype(np.float32), found)
  # Images differ by a hundred times the tolerance and more, and no probability is stuck at 0 or 1.
  assert found.std(axis=0).max() > 1e-3, variant
  assert 0.21 < found.max(axis=1).mean() < 0.95, variant
  return found


@pytest.fixture(scope='module')
def stablehlo(tmp_path_factory):
  path = tmp_path_factory.mktemp('export') / 'model.stablehlo'
  path.write_bytes(export.to_stablehlo(_random_run()))
  return path


@pytest.fixture(scope='module')
def onnx():
  pytest.importorskip('onnxruntime', reason='checking ONNX files needs the extra onnx')
  return pytest.importorskip('onnx', reason='ONNX export needs the extra onnx')


def _onnx_session(contents):
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  return onnxruntime.InferenceSession(contents, options, providers=['CPUExecutionProvider'])


def _run_onnx(session, images):
  return session.run(['probabilities'], {'images': images})[0]


def _assert_same(found, expected):
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# --- StableHLO ---


def test_a_stablehlo_model_computes_what_the_run_does_at_any_batch_size(stablehlo):
  model, images = export.load(stablehlo), _images()
  for n in _BATCHES:
    _assert_same(model(images[:n]), _expected()[:n])
  empty = model(images[:0])
  assert empty.shape == (0, len(_NAMES)) and empty.dtype == np.float32


def test_stablehlo_of_another_network(tmp_path):
  path = tmp_path / 'model.stablehlo'
  path.write_bytes(export.to_stablehlo(_random_run('another network')))
  _assert_same(export.load(path)(_images(7)), _expected('another network')[:7])


def test_a_stablehlo_file_is_an_archive_of_a_description_and_a_program(stablehlo):
  with zipfile.ZipFile(stablehlo) as archive:
    assert archive.namelist() == ['model.json', 'program.bin']
    assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
    about = json.loads(archive.read('model.json'))
    contents = archive.read('program.bin')
    program = jax.export.deserialize(bytearray(contents))
  assert about == {
    'format': 1, 'class_names': list(_NAMES), 'image_shape': list(_SHAPE), 'dataset': 'noise', 'step': 3,
    'resize': 'crop', 'drawing': None, 'sha256': hashlib.sha256(contents).hexdigest(), 'jax': jax.__version__,
  }  # fmt: skip
  assert program.platforms == ('cpu', 'cuda', 'tpu')
  (images,), (probabilities,) = program.in_avals, program.out_avals
  assert images.dtype == np.uint8 and images.shape[1:] == _SHAPE
  assert probabilities.dtype == np.float32 and probabilities.shape == (images.shape[0], len(_NAMES))
  assert str(images.shape[0]) == 'batch'
  text = program.mlir_module()
  # Any other custom call would bind the file to the library that defines it.
  assert set(re.findall(r'custom_call @(\w+)', text)) == {'shape_assertion'}
  # Products keep their digits on GPU and TPU too: the convolutions of each platform, and the head.
  products = re.findall(r'stablehlo\.(?:convolution|dot_general).*', text)
  assert len(products) >= 3
  for product in products:
    assert len(re.findall(r'HIGHEST', product)) == 2, product


def test_a_bfloat16_run_gives_the_same_bytes_as_float32_without_paths_of_this_machine(stablehlo):
  before = jax.config.jax_traceback_in_locations_limit
  again = export.to_stablehlo(_random_run(dtype='bfloat16'))
  assert again == stablehlo.read_bytes()
  assert jax.config.jax_traceback_in_locations_limit == before
  assert os.fsencode(ROOT) not in again and b'.py' not in again


def test_the_program_can_be_part_of_another(stablehlo):
  model = export.load(stablehlo)
  best = jax.jit(lambda images: jnp.argmax(model.program(images), axis=-1))
  np.testing.assert_array_equal(best(_images()[:7]), _expected()[:7].argmax(axis=1))


# --- ONNX ---


@pytest.mark.parametrize('variant', [*_VARIANTS, 'another network'])
def test_an_onnx_model_computes_what_the_run_does_at_any_batch_size(variant, onnx):
  session, images = _onnx_session(export.to_onnx(_random_run(variant))), _images()
  for n in _BATCHES:
    _assert_same(_run_onnx(session, images[:n]), _expected(variant)[:n])


def test_an_onnx_file_describes_itself(onnx):
  contents = export.to_onnx(_random_run())
  session = _onnx_session(contents)
  (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
  assert (images.name, images.type, images.shape) == ('images', 'tensor(uint8)', ['batch', *_SHAPE])
  assert (probabilities.type, probabilities.shape) == ('tensor(float)', ['batch', len(_NAMES)])
  about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
  assert about == {
    'class_names': list(_NAMES), 'image_shape': list(_SHAPE), 'dataset': 'noise', 'step': 3,
    'resize': 'crop', 'drawing': None,
  }  # fmt: skip
  proto = onnx.load_from_string(contents)
  assert proto.opset_import[0].version == 17 and proto.ir_version == 8
  # TensorRT allows uint8 as the input of a Cast alone.
  assert [node.op_type for node in proto.graph.node if 'images' in node.input] == ['Cast']
  # Nodes have the names of the layers.
  assert any('block1/conv1' in node.name for node in proto.graph.node if node.op_type == 'Conv')
  assert export.to_onnx(_random_run(dtype='bfloat16')) == contents


def test_batch_norm_is_folded_where_pooling_lets_it(onnx):
  def operators(run):
    nodes = [node.op_type for node in onnx.load_from_string(export.to_onnx(run)).graph.node]
    return nodes[nodes.index('Conv') : nodes.index('ReduceSum')]

  pooled, folded = ['Conv', 'MaxPool', 'Mul', 'Add', 'Relu'], ['Conv', 'Relu']
  assert operators(_random_run()) == pooled + folded  # the last block is not pooled
  assert operators(_random_run(pool='none')) == folded * 2


def test_without_onnx_its_export_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'onnx', None)
  with pytest.raises(UsageError, match=r'cnn_jax\[onnx\]'):
    export.to_onnx(_random_run())


# --- the command ---


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A workdir that holds the random run as a checkpoint."""
  workdir, saved = tmp_path_factory.mktemp('runs') / 'noise', _random_run()
  workdir.mkdir()
  record.write_config(workdir, saved.config)
  info = {'dataset': saved.dataset, 'class_names': list(_NAMES), 'image_shape': list(_SHAPE)}
  checkpoint.save(workdir / 'checkpoints', saved.step, saved.variables, info=info, keep=1)
  return workdir


def test_the_command_exports_what_predict_computes(workdir, onnx, tmp_path):
  del onnx
  expected = cnn_jax.load(workdir).predict(_images())
  for name in ('model.stablehlo', 'model.onnx'):
    done = call_command('cnn_jax.export', f'--workdir={workdir}', f'--output={tmp_path / name}')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith(f'{tmp_path / name}: 5 classes, uint8 images of 17x22x3, step 3, ')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['model.onnx', 'model.stablehlo']
  model = export.load(tmp_path / 'model.stablehlo')
  assert model.class_names == _NAMES
  _assert_same(model(_images()), expected)
  _assert_same(_run_onnx(_onnx_session((tmp_path / 'model.onnx').read_bytes()), _images()), expected)


@pytest.mark.parametrize(
  ('output', 'message'),
  [
    ('model.pt', r'\.stablehlo or \.onnx'),
    ('model', r'\.stablehlo or \.onnx'),
    ('absent/model.onnx', 'does not exist'),
  ],
)
def test_an_output_that_cannot_be_is_named_before_the_run_is_read(output, message, tmp_path):
  with pytest.raises(UsageError, match=message):
    export.main([f'--workdir={tmp_path}/no_run', f'--output={tmp_path}/{output}'])


def test_a_failed_write_leaves_nothing_behind(monkeypatch, tmp_path):
  monkeypatch.setattr(run, 'load_run', lambda *_: _random_run())
  (tmp_path / 'model.stablehlo').mkdir()
  with pytest.raises(UsageError, match='it is there and is not a file'):
    export.main(['--workdir=run', f'--output={tmp_path}/model.stablehlo'])
  assert [path.name for path in tmp_path.iterdir()] == ['model.stablehlo']
