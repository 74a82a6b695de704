"""Export: what the files compute is what the run computes, and they are read without Flax or the model."""

import functools
import json
import os
import re
import subprocess
import sys
import zipfile

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import cnn_jax
from cnn_jax import UsageError, calibration, command, config, evaluate, export
from cnn_jax.model import create_model
from tests.conftest import ROOT, run_command

command.prepare_backend()

_NAMES = ('left', 'right', '<img src=x onerror=alert(1)>', 'größer', 'a b')
# Odd sizes, so that padding is asymmetric and pooling drops a row.
_SHAPE = (17, 22, 3)
_VARIANTS = {
  'default': {},
  'average_pool': {'pool': 'avg', 'activation': 'silu'},
  'group_norm': {'norm': 'group', 'activation': 'gelu', 'residual': True},
  'no_norm': {'norm': 'none', 'residual': True, 'pool': 'none', 'head': 'conv1x1'},
  'strided': {'stride': 2, 'pool': 'none', 'residual': True, 'convs_per_block': 2, 'aggregate': 'flatten'},
  'strided_and_pooled': {'stride': 2, 'features': (4, 6), 'residual': True, 'kernel_size': 4, 'norm': 'group'},
  'two_convolutions': {'convs_per_block': 2, 'residual': True, 'features': (4, 4, 6), 'kernel_size': 5},
  'flat': {'aggregate': 'flatten', 'head': 'conv1x1', 'dropout': 0.5, 'activation': 'gelu'},
}
_BATCHES = (1, 7, 256)


@functools.cache
def _all_images():
  """Coarse patterns under noise: images whose averages differ, as those of noise alone do not."""
  rng, (height, width, channels) = np.random.default_rng(1), _SHAPE
  coarse = rng.integers(0, 256, (256, 3, 4, channels)).repeat(6, axis=1).repeat(6, axis=2)[:, :height, :width]
  return np.where(rng.random((256, *_SHAPE)) < 0.7, coarse, rng.integers(0, 256, (256, *_SHAPE))).astype(np.uint8)


def _images(n=256):
  return _all_images()[:n]


@functools.cache
def _random_run(variant='default', **model):
  """A run with random weights and statistics: scales of either sign, biases and means that are not zero."""
  settings = config.default_config()
  with settings.unlocked():
    settings.model.update({'features': (4, 6, 8)} | _VARIANTS[variant] | model)
  network = create_model(settings.model, len(_NAMES))
  variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *_SHAPE)))
  rng = np.random.default_rng(0)

  # A norm undoes the factor of its convolution but for its epsilon, which would not be seen beside variances of 1.
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

  variables = jax.tree_util.tree_map_with_path(draw, variables)
  variables = {'batch_stats': {}, **variables}
  return evaluate.Run(settings, network, variables, _NAMES, _SHAPE, 'noise', 3, None)


@functools.cache
def _expected(variant='default', **model):
  """Probabilities of `_images()` as `evaluate` and `predict` compute them."""
  run = _random_run(variant, **model)
  return calibration.softmax(evaluate.compute_logits(run.model, run.variables, _images(), 256))


@pytest.fixture(scope='module')
def stablehlo(tmp_path_factory):
  path = tmp_path_factory.mktemp('export') / 'model.stablehlo'
  path.write_bytes(export.to_stablehlo(_random_run()))
  return path


def _load(run, folder):
  path = folder / 'model.stablehlo'
  path.write_bytes(export.to_stablehlo(run))
  return export.load(path)


def _onnx_session(contents):
  pytest.importorskip('onnx', reason='ONNX export needs the extra onnx')
  runtime = pytest.importorskip('onnxruntime', reason='checking ONNX files needs the extra onnx')
  options = runtime.SessionOptions()
  options.intra_op_num_threads = 1
  return runtime.InferenceSession(contents, options, providers=['CPUExecutionProvider'])


def _run_onnx(session, images):
  return session.run(['probabilities'], {'images': images})[0]


def _assert_same(found, expected):
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_random_runs_can_tell_a_mistake():
  for variant in _VARIANTS:
    probabilities = _expected(variant)
    # Images differ by a hundred times the tolerance and more, and no probability is stuck at 0 or 1.
    assert probabilities.std(axis=0).max() > 1e-3, variant
    assert 0.21 < probabilities.max(axis=1).mean() < 0.9, variant


# --- StableHLO ---


def test_a_stablehlo_model_computes_what_the_run_does_at_any_batch_size(stablehlo):
  model, images = export.load(stablehlo), _images()
  for n in _BATCHES:
    _assert_same(model(images[:n]), _expected()[:n])
  empty = model(images[:0])
  assert empty.shape == (0, len(_NAMES)) and empty.dtype == np.float32


@pytest.mark.parametrize('variant', ['average_pool', 'group_norm', 'strided'])
def test_stablehlo_of_other_models(variant, tmp_path):
  model = _load(_random_run(variant), tmp_path)
  _assert_same(model(_images()[:7]), _expected(variant)[:7])


def test_a_stablehlo_file_is_an_archive_of_a_description_and_a_program(stablehlo):
  with zipfile.ZipFile(stablehlo) as archive:
    assert archive.namelist() == ['model.json', 'program.bin']
    assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
    about = json.loads(archive.read('model.json'))
    program = jax.export.deserialize(bytearray(archive.read('program.bin')))
  assert about == {
    'format': 1, 'class_names': list(_NAMES), 'image_shape': list(_SHAPE), 'dataset': 'noise', 'step': 3,
    'jax': jax.__version__,
  }  # fmt: skip
  assert program.platforms == ('cpu', 'cuda', 'tpu')
  (images,), (probabilities,) = program.in_avals, program.out_avals
  assert images.dtype == np.uint8 and images.shape[1:] == _SHAPE
  assert probabilities.dtype == np.float32 and probabilities.shape == (images.shape[0], len(_NAMES))
  assert str(images.shape[0]) == 'batch'
  text = program.mlir_module()
  # Every other custom call would bind the file to the library that defines it.
  assert set(re.findall(r'custom_call @(\w+)', text)) == {'shape_assertion'}
  # Products keep their digits on GPU and TPU too: three branches of three convolutions, and the head.
  products = re.findall(r'stablehlo\.(?:convolution|dot_general).*', text)
  assert len(products) >= 4
  for product in products:
    assert len(re.findall(r'HIGHEST', product)) == 2, product


def test_a_bfloat16_run_is_exported_in_float32(stablehlo):
  run = _random_run(dtype='bfloat16')
  assert export.to_stablehlo(run) == stablehlo.read_bytes()
  if _has_onnx():
    assert export.to_onnx(run) == export.to_onnx(_random_run())


def test_the_same_run_gives_the_same_bytes_without_paths_of_this_machine(stablehlo):
  before = jax.config.jax_traceback_in_locations_limit
  again = export.to_stablehlo(_random_run())
  assert again == stablehlo.read_bytes()
  assert jax.config.jax_traceback_in_locations_limit == before
  assert os.fsencode(ROOT) not in again and b'.py' not in again


_READER = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    allowed = name in ('cnn_jax', 'cnn_jax.export', 'cnn_jax.command')
    if name.split('.')[0] in ('flax', 'optax', 'orbax', 'ml_collections', 'tensorflow_datasets', 'onnx'):
      raise ImportError('refused: ' + name)
    if name.split('.')[0] == 'cnn_jax' and not allowed:
      raise ImportError('refused: ' + name)

sys.meta_path.insert(0, Refuse())
for name in ('flax', 'cnn_jax.model'):
  try:
    __import__(name)
  except ImportError:
    continue
  sys.exit(name + ' was imported')
import numpy as np
import cnn_jax.export
model = cnn_jax.export.load(sys.argv[1])
assert model.image_shape == (17, 22, 3), model.image_shape
print(ascii(model.class_names))
np.save(sys.argv[3], model(np.load(sys.argv[2])))
"""


def test_loading_needs_neither_flax_nor_the_model(stablehlo, tmp_path):
  np.save(tmp_path / 'images.npy', _images()[:7])
  files = [stablehlo, tmp_path / 'images.npy', tmp_path / 'found.npy']
  done = subprocess.run(
    [sys.executable, '-c', _READER, *files], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == ascii(_NAMES)
  _assert_same(np.load(tmp_path / 'found.npy'), _expected()[:7])


def test_a_loaded_model_says_what_images_it_takes(stablehlo):
  model = export.load(stablehlo)
  for wrong in (_images(2).astype(np.float32), _images(2)[..., :1], _images(1)[0], _images(2).tolist()):
    with pytest.raises(UsageError, match=r'give uint8 \(n, 17, 22, 3\)'):
      model(wrong)


def test_the_program_can_be_part_of_another(stablehlo):
  model = export.load(stablehlo)
  best = jax.jit(lambda images: jnp.argmax(model.program(images), axis=-1))
  np.testing.assert_array_equal(best(_images()[:7]), _expected()[:7].argmax(axis=1))


def test_files_that_are_no_models_are_named(stablehlo, tmp_path):
  contents = stablehlo.read_bytes()
  middle = len(contents) // 2
  bad = {
    'absent': None,
    'empty': b'',
    'text': b'hello',
    'cut': contents[:middle],
    'flipped': contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :],
  }
  for name, data in bad.items():
    path = tmp_path / f'{name}.stablehlo'
    if data is not None:
      path.write_bytes(data)
    with pytest.raises(UsageError, match=re.escape(str(path))):
      export.load(path)
  for members in ({'other': b''}, {'model.json': b'{"format": 2}', 'program.bin': b''}, {'model.json': b'['}):
    with zipfile.ZipFile(tmp_path / 'other.stablehlo', 'w') as archive:
      for name, data in members.items():
        archive.writestr(name, data)
    with pytest.raises(UsageError, match='other.stablehlo'):
      export.load(tmp_path / 'other.stablehlo')


def test_a_program_that_cannot_run_here_is_named_when_it_is_loaded(tmp_path):
  elsewhere = jax.export.export(jax.jit(lambda x: x / 2), platforms=['tpu'])(
    jax.ShapeDtypeStruct((1, 2, 2, 1), np.uint8)
  )
  about = {'format': 1, 'class_names': ['a'], 'image_shape': [2, 2, 1], 'jax': '0.0.1'}
  with zipfile.ZipFile(tmp_path / 'elsewhere.stablehlo', 'w') as archive:
    archive.writestr('model.json', json.dumps(about))
    archive.writestr('program.bin', bytes(elsewhere.serialize()))
  with pytest.raises(UsageError, match=r'elsewhere.stablehlo was written with jax 0\.0\.1'):
    export.load(tmp_path / 'elsewhere.stablehlo')


# --- ONNX ---


@pytest.mark.parametrize('variant', _VARIANTS)
def test_an_onnx_model_computes_what_the_run_does_at_any_batch_size(variant):
  pytest.importorskip('onnx', reason='ONNX export needs the extra onnx')
  session, images = _onnx_session(export.to_onnx(_random_run(variant))), _images()
  for n in _BATCHES:
    _assert_same(_run_onnx(session, images[:n]), _expected(variant)[:n])


def test_an_onnx_file_describes_itself():
  onnx = pytest.importorskip('onnx', reason='ONNX export needs the extra onnx')
  session = _onnx_session(export.to_onnx(_random_run()))
  (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
  assert (images.name, images.type, images.shape) == ('images', 'tensor(uint8)', ['batch', *_SHAPE])
  assert (probabilities.type, probabilities.shape) == ('tensor(float)', ['batch', len(_NAMES)])
  about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
  assert about == {'class_names': list(_NAMES), 'image_shape': list(_SHAPE), 'dataset': 'noise', 'step': 3}
  proto = onnx.load_from_string(export.to_onnx(_random_run()))
  assert proto.opset_import[0].version == 17 and proto.ir_version == 8


def test_batch_norm_is_folded_where_pooling_lets_it():
  onnx = pytest.importorskip('onnx', reason='ONNX export needs the extra onnx')

  def operators(run):
    return [node.op_type for node in onnx.load_from_string(export.to_onnx(run)).graph.node][5:]  # after normalize

  folded = ['Conv', 'Relu']
  pooled, head = ['Conv', 'MaxPool', 'Mul', 'Add', 'Relu'], ['GlobalAveragePool', 'Flatten', 'Gemm', 'Softmax']
  run = _random_run()
  assert operators(run) == pooled * 2 + folded + head  # the last block is not pooled
  assert operators(_random_run(pool='none')) == folded * 3 + head
  positive = jax.tree_util.tree_map_with_path(
    lambda path, leaf: np.abs(leaf) if path[-1].key == 'scale' else leaf, run.variables
  )
  positive_run = evaluate.Run(run.config, run.model, positive, _NAMES, _SHAPE, 'noise', 3, None)
  assert operators(positive_run) == ['Conv', 'MaxPool', 'Relu'] * 2 + folded + head
  logits = evaluate.compute_logits(run.model, positive, _images(), 256)
  session = _onnx_session(export.to_onnx(positive_run))
  _assert_same(_run_onnx(session, _images()), calibration.softmax(logits))


def test_same_padding_puts_the_odd_pixel_below_and_to_the_right():
  # By hand, stride 2, a 3x3 kernel: 17 rows need 1 above and 1 below, 22 columns 0 left and 1 right.
  graph = pytest.importorskip('onnx', reason='ONNX export needs the extra onnx') and export._Graph()
  maps = export._add_conv(graph, 'conv', export._Maps('x', 17, 22, 3), np.zeros((3, 3, 3, 4), np.float32), None, 2)
  (node,) = graph.nodes
  assert list(next(a.ints for a in node.attribute if a.name == 'pads')) == [1, 0, 1, 1]
  assert (maps.height, maps.width, maps.channels) == (9, 11, 4)


def test_without_onnx_its_export_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'onnx', None)
  with pytest.raises(UsageError, match=r'cnn_jax\[onnx\]'):
    export.to_onnx(_random_run())


# --- the command ---


def test_the_command_exports_what_predict_computes(digits_run, tmp_path):
  classifier = cnn_jax.load(digits_run)
  images = evaluate.load_run_dataset(classifier.run).train.images[:1024]
  assert len(images) == 1024
  expected = classifier.predict(images)
  done = run_command('cnn_jax.export', f'--workdir={digits_run}', f'--output={tmp_path / "model.stablehlo"}')
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.startswith(f'{tmp_path}/model.stablehlo: 10 classes, uint8 images of 8x8x1, step ')
  assert [path.name for path in tmp_path.iterdir()] == ['model.stablehlo']
  models = [export.load(tmp_path / 'model.stablehlo')]
  assert models[0].class_names == classifier.class_names
  if _has_onnx():
    export.main([f'--workdir={digits_run}', f'--output={tmp_path / "model.onnx"}'])
    models.append(functools.partial(_run_onnx, _onnx_session((tmp_path / 'model.onnx').read_bytes())))
  for model in models:
    for n in _BATCHES:
      starts = range(0, 1024 - n + 1, n)
      found = np.concatenate([model(images[start : start + n]) for start in starts])
      assert len(found) > 1000
      _assert_same(found, expected[: len(found)])


def _has_onnx():
  try:
    import onnxruntime  # noqa: F401
  except ImportError:
    return False
  return True


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
  monkeypatch.setattr(evaluate, 'load_run', lambda *_: _random_run())
  (tmp_path / 'model.stablehlo').mkdir()
  with pytest.raises(UsageError, match='cannot be written'):
    export.main(['--workdir=run', f'--output={tmp_path}/model.stablehlo'])
  assert [path.name for path in tmp_path.iterdir()] == ['model.stablehlo']
