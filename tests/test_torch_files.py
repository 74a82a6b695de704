"""PyTorch's weight files: both formats, any strides; hostile and damaged files are refused and nothing of them runs."""

import collections
import contextlib
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from cnn_jax import UsageError, torch_files
from tests.torch_writer import Tensor, write_archive, write_legacy

WRITERS = pytest.mark.parametrize('write', [write_archive, write_legacy])


def _state():
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(4, 3, 5)).astype(np.float32)
  return {
    'conv.weight': kernel,
    'conv.transposed': kernel.transpose(2, 0, 1),
    'bn.count': np.array(7, np.int64),
    'bn.mean': rng.normal(size=6).astype(np.float16),
    'fc.weight': rng.normal(size=(2, 3)),
  }


def _wrap(state):
  return collections.OrderedDict((name, Tensor(array)) for name, array in state.items())


@WRITERS
def test_tensors_are_read_with_their_strides(tmp_path, write):
  state = _state()
  read = torch_files.read(write(tmp_path / 'w.pth', _wrap(state)))
  assert list(read) == list(state)
  for name, array in state.items():
    np.testing.assert_array_equal(read[name], array)
    assert read[name].dtype == array.dtype


def test_an_offset_into_a_storage(tmp_path):
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  read = torch_files.read(write_archive(tmp_path / 'w.pth', {'x': Tensor(array, offset=5)}))
  np.testing.assert_array_equal(read['x'], array)


@WRITERS
@pytest.mark.parametrize('wrapper', ['state_dict', 'model', 'state_dict_ema'])
def test_weights_below_the_name_that_training_scripts_use(tmp_path, write, wrapper):
  state = {'module.x': Tensor(np.ones(3, np.float32))}
  read = torch_files.read(write(tmp_path / 'w.pth', {wrapper: state, 'epoch': 3}))
  assert list(read) == ['x']


class _Hostile:
  def __init__(self, *call):
    self._call = call

  def __reduce__(self):
    return self._call


@WRITERS
@pytest.mark.parametrize(
  ('function', 'name'),
  [(os.system, 'posix.system'), (eval, '__builtin__.eval'), (getattr, '__builtin__.getattr'), (np.load, 'numpy.load')],
)
def test_a_pickle_that_would_run_something_is_refused_by_name(tmp_path, write, function, name):
  canary = tmp_path / 'canary'
  state = {'x': Tensor(np.ones(3, np.float32)), 'y': _Hostile(function, (f'touch {canary}',))}
  path = write(tmp_path / 'w.pth', state)
  with pytest.raises(UsageError, match=f'names {name}, which is not part of a dict of tensors; nothing of it was run'):
    torch_files.read(path)
  assert not canary.exists()


def test_a_plain_pickle_is_not_run_either(tmp_path):
  canary = tmp_path / 'canary'
  path = tmp_path / 'w.pth'
  path.write_bytes(pickle.dumps(_Hostile(os.system, (f'touch {canary}',))))
  with pytest.raises(UsageError, match=r'names posix\.system'):
    torch_files.read(path)
  assert not canary.exists()


def _archive(path, pickled):
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
    archive.writestr('weights/data.pkl', pickled)
  return path


_CALL = b"(S'touch %s'\ntR."


@pytest.mark.parametrize(('pickled', 'message'), [
  (b'cbuiltins\neval\n' + _CALL, r'names builtins\.eval'),
  (b'\x80\x04\x8c\x08builtins\x8c\x04eval\x93' + _CALL, r'names builtins\.eval'),  # STACK_GLOBAL
  (b"(S'touch %s'\niposix\nsystem\n.", r'names posix\.system'),  # INST
  (b"(cposix\nsystem\nS'touch %s'\no.", r'names posix\.system'),  # OBJ
  (b'\x80\x02cposix\nsystem\n)\x81.', r'names posix\.system'),  # NEWOBJ
  (b'\x80\x04cposix\nsystem\n)}\x92.', r'names posix\.system'),  # NEWOBJ_EX
  (b'\x80\x02\x82\x01' + _CALL, 'unregistered extension code 1'),  # EXT1
  (b'ccollections\nOrderedDict.update\n)R.', r'names collections\.OrderedDict\.update'),
  (b'ctorch\nFloatStorage.__class__\n)R.', r'names torch\.FloatStorage\.__class__'),
  (b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}S"__globals__"\n}s\x86b.', 'is not a whole'),  # BUILD
  (b"ctorch\nFloatStorage\n(S'x'\ntR.", 'is not a whole'),
  (b'}r\xff\xff\xff\x7f.', 'under a number that is too large'),  # room for 2^32 values
  (b'}p4000000000\n.', 'under a number that is too large'),
  (b'\x80\x04\x8d' + 8 * b'\x7f' + b'.', 'is not a whole'),  # a string of 2^63 bytes
  (b'}q\x00(S"x"\nh\x00u.', 'holds no dict of tensors|is not a whole'),  # a dict that holds itself
  (b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQI0\n(I9\nt(I0\nttR.", 'holds no dict|is not a whole'),
  (100_000 * b'(' + b'.', 'is not a whole'),
])  # fmt: skip
def test_no_opcode_runs_anything_or_takes_the_memory(tmp_path, pickled, message):
  canary = tmp_path / 'canary'
  if b'%s' in pickled:
    pickled = pickled % str(canary).encode()
  path = tmp_path / 'w.pth'
  for write in (_archive, pathlib.Path.write_bytes):
    write(path, pickled)
    with pytest.raises(UsageError, match=message) as caught:
      torch_files.read(path)
    assert len(str(caught.value)) < 500
  assert not canary.exists()


def test_dicts_that_hold_each_other_twice_are_not_unfolded(tmp_path):
  state = {'x': 0}
  for _ in range(60):
    state = {'a': state, 'b': state}
  with pytest.raises(UsageError, match='holds no dict of tensors'):
    torch_files.read(_archive(tmp_path / 'w.pth', pickle.dumps({'state_dict': state})))


def test_a_pickle_of_too_many_instructions_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(torch_files, '_MAX_OPCODES', 1000)
  with pytest.raises(UsageError, match='a pickle is too long'):
    torch_files.read(_archive(tmp_path / 'w.pth', b'}' + 1000 * b'N0' + b'.'))


@pytest.mark.parametrize(('shape', 'strides'), [((3000, 3000), (1, 1)), ((3000, 3000), (0, 0)), ((-1, 2), (1, 1))])
def test_a_tensor_cannot_be_larger_than_its_storage(tmp_path, shape, strides):
  array = np.ones(6000, np.float32)
  shown = _Faked(array, array)
  shown.shape, shown.strides = shape, tuple(4 * stride for stride in strides)
  with pytest.raises(UsageError, match=r'repeats its numbers|beyond its storage'):
    torch_files.read(write_archive(tmp_path / 'w.pth', {'x': Tensor(shown)}))


@pytest.mark.faults
@WRITERS
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path, write):
  whole = write(tmp_path / 'w.pth', _wrap(_state())).read_bytes()
  path = tmp_path / 'cut.pth'
  for length in range(len(whole)):
    path.write_bytes(whole[:length])
    with pytest.raises(UsageError, match=r'cut\.pth'):
      torch_files.read(path)


@pytest.mark.faults
@WRITERS
def test_altered_files_are_read_or_refused(tmp_path, write):
  whole = write(tmp_path / 'w.pth', _wrap(_state())).read_bytes()
  rng = np.random.default_rng(0)
  path = tmp_path / 'damaged.pth'
  for _ in range(3000):
    damaged = bytearray(whole)
    if rng.random() < 0.5:
      damaged = damaged[: rng.integers(len(damaged))]
    else:
      for place in rng.integers(len(damaged), size=3):
        damaged[place] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    with contextlib.suppress(UsageError):  # a flipped bit of a number is not noticed
      torch_files.read(path)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
  array = np.ones((2, 3), np.float32)
  grown = np.lib.stride_tricks.as_strided(array, (2, 2000), array.strides)
  with pytest.raises(UsageError, match='beyond its storage'):
    torch_files.read(write_archive(tmp_path / 'w.pth', {'x': Tensor(_Faked(grown, array))}))


class _Faked:
  """An array with the shape of one and the memory of another."""

  def __init__(self, shown, base):
    self.shape, self.strides, self.itemsize, self.dtype = shown.shape, shown.strides, shown.itemsize, shown.dtype
    self.base, self.size = base, base.size


def test_a_compressed_member_is_refused(tmp_path):
  path = write_archive(tmp_path / 'w.pth', {'x': Tensor(np.ones(3, np.float32))})
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  with pytest.raises(UsageError, match='is compressed'):
    torch_files.read(path)


@pytest.mark.parametrize('state', [{}, {'epoch': 3}, {'state_dict': {}}])
def test_a_file_without_tensors_is_refused(tmp_path, state):
  with pytest.raises(UsageError, match='holds no dict of tensors'):
    torch_files.read(write_archive(tmp_path / 'w.pth', state))


@pytest.mark.parametrize('make', [lambda p: None, lambda p: p.mkdir(), os.mkfifo, lambda p: p.write_bytes(b'')])
def test_what_is_no_such_file_is_one_line(tmp_path, make):
  path = tmp_path / 'w.pth'
  make(path)
  with pytest.raises(UsageError, match=r'w\.pth'):
    torch_files.read(path)
