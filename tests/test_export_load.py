"""Reading exported models: without Flax, from files of older versions, and from files that are damaged."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile

import jax
import jax.export
import numpy as np
import pytest

from cnn_jax import UsageError, export
from tests.helpers import ROOT

_FILE = ROOT / 'tests' / 'references' / 'export-v0.1.stablehlo'
_NAMES = ('left', 'right', 'größer')
_IMAGES = (np.arange(120).reshape(4, 5, 6, 1) ** 2 % 251).astype(np.uint8)
_PROBABILITIES = np.array(
  [
    [0.190726, 0.5703606, 0.2389134],
    [0.2320455, 0.5334259, 0.2345286],
    [0.222205, 0.5655649, 0.2122301],
    [0.235411, 0.5649997, 0.1995893],
  ]
)


def _assert_same(found, expected):
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_file_of_version_0_1_still_loads():
  """Written by cnn_jax 0.1.0 with jax 0.10.0; the probabilities are those that it computed."""
  model = export.load(_FILE)
  assert model.class_names == ('left', 'right', 'größer') and model.image_shape == (5, 6, 1)
  _assert_same(model(_IMAGES), _PROBABILITIES)


def test_an_empty_batch_gives_no_probabilities():
  found = export.load(_FILE)(_IMAGES[:0])
  assert found.shape == (0, 3) and found.dtype == np.float32


def test_a_loaded_model_refuses_other_images():
  model = export.load(_FILE)
  for wrong in (_IMAGES.astype(np.float32), _IMAGES[:, 1:], _IMAGES[0], _IMAGES.tolist()):
    with pytest.raises(UsageError, match=r'give uint8 \(n, 5, 6, 1\)'):
      model(wrong)


_READER = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    small = ('command', 'compiled', 'export', 'files', 'passwords', 'signals')
    allowed = name in ('cnn_jax', *(f'cnn_jax.{part}' for part in small))
    if name.split('.')[0] in ('flax', 'optax', 'orbax', 'ml_collections', 'tensorflow_datasets', 'onnx'):
      raise ImportError('refused: ' + name)
    if name.split('.')[0] == 'cnn_jax' and not allowed:
      raise ImportError('refused: ' + name)

sys.meta_path.insert(0, Refuse())
for name in ('flax', 'cnn_jax.models'):
  try:
    __import__(name)
  except ImportError:
    continue
  sys.exit(name + ' was imported')
import numpy as np
import cnn_jax.export
model = cnn_jax.export.load(sys.argv[1])
assert model.image_shape == (5, 6, 1), model.image_shape
print(ascii(model.class_names))
np.save(sys.argv[3], model(np.load(sys.argv[2])))
"""


def test_loading_needs_neither_flax_nor_the_model(tmp_path):
  np.save(tmp_path / 'images.npy', _IMAGES)
  files = [_FILE, tmp_path / 'images.npy', tmp_path / 'found.npy']
  done = subprocess.run(
    [sys.executable, '-c', _READER, *files], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == ascii(_NAMES)
  _assert_same(np.load(tmp_path / 'found.npy'), _PROBABILITIES)


def _archive(about, program, **options):
  contents = io.BytesIO()
  with zipfile.ZipFile(contents, 'w', **options) as archive:
    archive.writestr('model.json', about if isinstance(about, str) else json.dumps(about))
    archive.writestr('program.bin', program)
  return contents.getvalue()


def _refuse(path, contents, match=''):
  """Asserts that loading these contents raises a `UsageError` of one line that names the file."""
  path.write_bytes(contents)
  with pytest.raises(UsageError, match=re.escape(str(path))) as caught:
    export.load(path)
  assert '\n' not in str(caught.value) and re.search(match, str(caught.value)), caught.value


def test_files_that_are_no_models_are_named(tmp_path):
  contents, path = _FILE.read_bytes(), tmp_path / 'bad.stablehlo'
  with pytest.raises(UsageError, match='bad.stablehlo cannot be read'):
    export.load(path)
  middle = len(contents) // 2
  flipped = contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :]
  for data in (b'', b'hello', contents[:middle], flipped):
    _refuse(path, data, 'damaged')
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('other', b'')
  _refuse(path, path.read_bytes(), 'damaged')
  os.mkfifo(tmp_path / 'pipe')
  for odd in (tmp_path, tmp_path / 'pipe'):
    with pytest.raises(UsageError, match='not a regular file'):
      export.load(odd)


def test_damaged_descriptions_are_named(tmp_path):
  with zipfile.ZipFile(_FILE) as archive:
    about, program = json.loads(archive.read('model.json')), archive.read('program.bin')
  path = tmp_path / 'bad.stablehlo'
  _refuse(path, _archive(about, program, compression=zipfile.ZIP_DEFLATED), 'damaged')
  _refuse(path, _archive('[' * 100_000, program), 'damaged')
  _refuse(path, _archive('[]', program), 'format other than 1')
  _refuse(path, _archive(about | {'format': 2}, program), 'format other than 1')
  for names in (None, [], 'abc', ['a', 1], {'a': 1}):
    _refuse(path, _archive(about | {'class_names': names}, program), 'class_names')
  for shape in (None, [5, 6], [5, 6, 0], [5, 6, 1.0], [5, 6, True], ['5', 6, 1], 3):
    _refuse(path, _archive(about | {'image_shape': shape}, program), 'image_shape')
  for shape in ([5, 7, 1], [100_000, 100_000, 1], [2**70, 1, 1]):
    _refuse(path, _archive(about | {'image_shape': shape}, program), 'cannot run')
  _refuse(path, _archive(about | {'class_names': ['one']}, program), 'does not fit')


def test_damaged_programs_are_named(tmp_path):
  with zipfile.ZipFile(_FILE) as archive:
    about, program = json.loads(archive.read('model.json')), archive.read('program.bin')
  rng, path = np.random.default_rng(0), tmp_path / 'bad.stablehlo'
  # The tables of the serialisation are at both ends, and the checksum of the archive does not cover them here.
  broken = [b'', b'\0' * 100, program[:50], program[: len(program) // 2], bytes(rng.bytes(1000)), program[::-1]]
  for data in broken:
    _refuse(path, _archive(about, data), 'cannot run')
  refused = 0
  for start in range(0, 80, 4):
    path.write_bytes(_archive(about, program[:start] + b'\xff\xff\xff\x7f' + program[start + 4 :]))
    try:  # some of these bytes are padding
      export.load(path)
    except UsageError:
      refused += 1
  assert refused >= 10


def test_a_program_that_is_not_as_it_was_written_is_refused_before_xla_reads_it(tmp_path):
  """A program with a flipped bit may end the process."""
  with zipfile.ZipFile(_FILE) as archive:
    about, program = json.loads(archive.read('model.json')), archive.read('program.bin')
  about['sha256'] = hashlib.sha256(program).hexdigest()
  path = tmp_path / 'model.stablehlo'
  path.write_bytes(_archive(about, program))
  _assert_same(export.load(path)(_IMAGES), _PROBABILITIES)
  for place in range(0, len(program), len(program) // 40):
    _refuse(
      path, _archive(about, program[:place] + b'?' + program[place + 1 :]), 'program.bin is not as it was written'
    )
  for sha256 in (None, '', 3):
    _refuse(path, _archive(about | {'sha256': sha256}, program), 'program.bin is not as it was written')
  for field, value in (('resize', 3), ('drawing', 'x')):
    _refuse(path, _archive(about | {field: value}, program), 'resize or drawing')


def test_a_program_that_cannot_run_here_is_named_when_it_is_loaded(tmp_path):
  elsewhere = jax.export.export(jax.jit(lambda x: x / 2), platforms=['tpu'])(
    jax.ShapeDtypeStruct((1, 2, 2, 1), np.uint8)
  )
  about = {'format': 1, 'class_names': ['a'], 'image_shape': [2, 2, 1], 'jax': '0.0.1'}
  contents = _archive(about, bytes(elsewhere.serialize()))
  _refuse(tmp_path / 'elsewhere.stablehlo', contents, r'elsewhere.stablehlo was written with jax 0\.0\.1')
