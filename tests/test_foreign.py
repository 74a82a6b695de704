"""Weights of other libraries: the kinds of files, the tables of names, and starting from them."""

import functools
import io
import json
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cnn_jax import UsageError, foreign, models, weights
from cnn_jax import config as config_lib
from tests.helpers import ROOT, call_command
from tests.networks import SIDES, SMALL
from tests.torch_writer import Tensor, write_archive, write_legacy

pytestmark = pytest.mark.usefixtures('quick_compilation')

FOREIGN = [name for name in models.names() if models.foreign_names(models.default_config(name))]
EACH_NETWORK = pytest.mark.parametrize('name', FOREIGN)


def _config(name):
  config = models.default_config(name)
  config.update(SMALL[name])
  return config


@functools.cache
def _expected(name, classes=5, channels=3):
  """The shapes of the variables of a small variant."""
  return models.init_shapes(models.create(_config(name), classes), (SIDES[name], SIDES[name], channels))


def _tensors(name, library, classes=5):
  """Random weights of a small variant as another library would have them."""
  rng = np.random.default_rng(0)
  flat = {tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(_expected(name, classes))}
  table = models.foreign_names(_config(name))[library]
  return {
    theirs: rng.normal(size=[flat[path].shape[order.index(axis)] for axis in range(len(order))]).astype(np.float32)
    for theirs, (path, order) in table.items()
  }


def _save(path, tensors):
  if path.suffix == '.safetensors':
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
  elif path.suffix == '.npz':
    np.savez(path, **tensors)
  else:
    (write_legacy if 'legacy' in path.name else write_archive)(path, {name: Tensor(x) for name, x in tensors.items()})
  return path


@pytest.mark.parametrize('file', ['w.safetensors', 'w.npz', 'w.pth', 'legacy.pt', 'w.bin'])
def test_each_kind_of_file_gives_the_arrays_it_holds(tmp_path, file):
  tensors = {'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3), 'n': np.array(3), 'h': np.ones(2, np.float16)}
  found = foreign.read(_save(tmp_path / file, tensors))
  assert set(found) == set(tensors)
  for name, array in tensors.items():
    np.testing.assert_array_equal(found[name], array)
    assert found[name].dtype == array.dtype


def test_bfloat16(tmp_path):
  array = np.arange(6, dtype=ml_dtypes.bfloat16)
  np.testing.assert_array_equal(foreign.read(_save(tmp_path / 'w.safetensors', {'a': array}))['a'], array)


def test_what_is_a_file_of_weights(tmp_path):
  (tmp_path / 'run.pth').mkdir()
  assert foreign.is_file('w.pth') and foreign.is_file('a/w.safetensors') and foreign.is_file('w.npz')
  assert not foreign.is_file('runs/mine') and not foreign.is_file(str(tmp_path / 'run.pth'))
  with pytest.raises(UsageError, match='no known kind of weights; the kinds: .safetensors, .npz, .pth'):
    foreign.read('w.h5')


@EACH_NETWORK
def test_each_table_covers_every_variable_once_and_all_in_the_same_order(name):
  leaves = jax.tree_util.tree_leaves_with_path(_expected(name))
  tables = [[path for path, _ in table.values()] for table in models.foreign_names(_config(name)).values()]
  for paths in tables:
    assert sorted(paths) == sorted(tuple(key.key for key in path) for path, _ in leaves)
    assert paths == tables[0]


@EACH_NETWORK
def test_the_table_with_the_most_names_is_used(name):
  config, expected = _config(name), _expected(name)
  for library, table in models.foreign_names(config).items():
    tensors = _tensors(name, library)
    counts = {'bn1.num_batches_tracked': np.array(7)}
    found = foreign.convert(tensors | counts, config, expected, 'w.pth')
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda x: x.shape, expected)
    for theirs, (path, order) in table.items():
      array = found
      for part in path:
        array = array[part]
      np.testing.assert_array_equal(array, tensors[theirs].transpose(order))
      assert array.dtype == np.float32


def test_what_does_not_fit_is_listed_by_name():
  config, expected = _config('resnet'), _expected('resnet')
  tensors = _tensors('resnet', 'torchvision and timm', classes=9)  # other classes are allowed
  tensors['conv1.weight'] = tensors['conv1.weight'][:3]
  tensors['extra'] = tensors.pop('bn1.bias')
  message = (
    r'^w.pth does not fit the network of config.model by the names of torchvision and timm: conv1.weight is \(3, 3, 3, 3\) '
    r'there and \(4, 3, 3, 3\) here; bn1.bias is missing; extra is left over; set --config.model.\* to the network'
  )
  with pytest.raises(UsageError, match=message):
    foreign.convert(tensors, config, expected, 'w.pth')
  with pytest.raises(UsageError, match=r'conv1.weight is missing; .*; and \d+ more; ') as caught:
    foreign.convert({50 * 'long': np.ones(3)}, config, expected, 'w.pth')
  assert len(str(caught.value)) < 400
  with pytest.raises(UsageError, match="other libraries have no network like 'cnn'"):
    foreign.convert(tensors, models.default_config('cnn'), {}, 'w.pth')
  tensors = _tensors('resnet', 'torchvision and timm')
  tensors['bn1.bias'] = np.full_like(tensors['bn1.bias'], np.inf)
  with pytest.raises(UsageError, match='bn1.bias in w.pth holds numbers that are not finite'):
    foreign.convert(tensors, config, expected, 'w.pth')


@pytest.mark.parametrize(('name', 'library', 'file'), [
  ('resnet', 'torchvision and timm', 'w.pth'), ('efficientnet', 'timm', 'w.safetensors'),
])  # fmt: skip
def test_a_run_starts_from_a_file_with_a_head_of_its_own(tmp_path, name, library, file):
  config = config_lib.default_config(name)
  config.model.update(SMALL[name])
  tensors = _tensors(name, library, classes=7)
  config.init_from = str(_save(tmp_path / file, tensors))
  fresh = jax.tree.map(lambda x: np.full(x.shape, 9, np.float32), _expected(name, classes=3, channels=1))
  started = weights.start(config, fresh, ['a', 'b', 'c'])
  found = foreign.convert(tensors, config.model, fresh, 'there')
  assert np.shape(found['params']['head']['bias']) == (7,)
  kernel = started['params']['stem_conv']['kernel']
  np.testing.assert_allclose(kernel, found['params']['stem_conv']['kernel'].sum(2, keepdims=True), rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, started['params']['head'], fresh['params']['head'])
  jax.tree.map(np.testing.assert_array_equal, started['batch_stats'], found['batch_stats'])
  assert weights.statistics_of(config) == models.foreign_levels(name)


def test_a_file_that_is_not_there_is_one_line():
  config = config_lib.default_config('resnet')
  config.init_from = 'no.safetensors'
  message = '^no.safetensors cannot be read: No such file or directory.$'
  with pytest.raises(UsageError, match=message):
    weights.statistics_of(config)  # before anything is recorded
  with pytest.raises(UsageError, match=message):
    weights.start(config, {}, ['a'])


def test_convnext_computes_what_timm_does():
  arrays = np.load(ROOT / 'tests' / 'references' / 'convnext.npz')
  config = models.default_config('convnext')
  config.update({'width': 4, 'depth': 0.1})
  model = models.create(config, 10)
  tensors = {name.removeprefix('weights/'): x for name, x in arrays.items() if name.startswith('weights/')}
  variables = foreign.convert(tensors, config, models.init_shapes(model, (64, 64, 3)), 'timm')
  logits, _ = jax.jit(model.apply)(variables, arrays['images'].astype(np.float32))
  np.testing.assert_allclose(logits, arrays['logits'], rtol=1e-4, atol=1e-4)


# --- hostile files ---


def _header(header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(text)) + text + data


@pytest.mark.parametrize('contents', [
  b'', b'\0', struct.pack('<Q', 2**62) + b'{}', struct.pack('<Q', 2**40), _header(b'{'), _header(b'[]'),
  _header({'a': {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 4]}}, bytes(4)),
  _header({'a': {'dtype': 'F32', 'shape': [2**62, 4], 'data_offsets': [0, 0]}}),
  _header({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [-4, 0]}}, bytes(4)),
  _header({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 400]}}, bytes(4)),
  _header({'a': {'dtype': 'F8_E4M3', 'shape': [1], 'data_offsets': [0, 1]}}, bytes(1)),
  _header({'a': {'dtype': 'object', 'shape': [1], 'data_offsets': [0, 1]}}, bytes(1)),
  _header(b'{"a":' + 5000 * b'[' + 5000 * b']' + b'}'),
])  # fmt: skip
def test_a_hostile_safetensors_file_is_one_line(tmp_path, contents):
  path = tmp_path / 'w.safetensors'
  path.write_bytes(contents)
  with pytest.raises(UsageError, match=r'w\.safetensors is not a whole \.safetensors file') as caught:
    foreign.read(path)
  assert len(str(caught.value)) < 400


class _Canary:
  """Its pickle makes a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


def _member(array_header, data=b''):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    text = array_header.encode().ljust(118) + b'\n'
    archive.writestr('a.npy', b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text + data)
  return file.getvalue()


def test_a_hostile_npz_file_is_one_line_and_nothing_of_it_runs(tmp_path):
  canary, path = tmp_path / 'canary', tmp_path / 'w.npz'
  np.savez(path, a=np.array([_Canary(canary)], object))
  bomb = io.BytesIO()
  with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('a.npy', bytes(10**7))
  shape = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"
  pairs = [
    path.read_bytes(), bomb.getvalue(), b'', b'PK', _member(shape % 10**15), _member(shape % -1),
    _member(shape.replace('<f4', 'O') % 1, b'\x80\x04N.'), _member(shape.replace('<f4', '<U9') % 0),
    _member(f"__import__('os').system('touch {canary}')"),
  ]  # fmt: skip
  for contents in pairs:
    path.write_bytes(contents)
    with pytest.raises(UsageError, match=r'w\.npz is not a whole \.npz file of numbers'):
      foreign.read(path)
  assert not canary.exists()


@pytest.mark.faults
def test_a_command_that_starts_from_a_hostile_file_ends_with_one_line(tmp_path):
  canary = tmp_path / 'canary'
  hostile = tmp_path / 'hostile.pth'
  hostile.write_bytes(b"cposix\nsystem\n(S'touch %s'\ntR." % str(canary).encode())
  whole = _save(tmp_path / 'whole.pth', _tensors('resnet', 'torchvision and timm'))
  cut = tmp_path / 'cut.pth'
  cut.write_bytes(whole.read_bytes()[:-100])
  for path, message in ((hostile, 'names posix.system, which is not part of'), (cut, 'is not a whole PyTorch file')):
    done = call_command(
      'cnn_jax.main', '--config=configs/digits.py', '--config.model.name=resnet', '--config.model.width=4',
      '--config.data.mean=(127.5,)', '--config.data.std=(127.5,)', f'--config.init_from={path}',
      f'--workdir={tmp_path / path.stem}',
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert message in line
  assert not canary.exists()
