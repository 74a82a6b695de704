"""Writes PyTorch weight files without PyTorch, for tests: both formats, with any strides, and hostile ones."""

import collections
import io
import pickle
import struct
import sys
import types
import zipfile

import numpy as np

NAMES = {'float32': 'FloatStorage', 'float64': 'DoubleStorage', 'float16': 'HalfStorage', 'int64': 'LongStorage'}


class Tensor:
  """A tensor of a file: an array, stored as it lies in memory, so that its strides are kept."""

  def __init__(self, array, offset=0):
    self.array, self.offset = array, offset


def write_archive(path, state, **members):
  """Writes the ZIP format of PyTorch 1.6 and later."""
  pickled, storages = _pickle(state)
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
    archive.writestr('weights/data.pkl', pickled)
    for key, data in storages.items():
      archive.writestr(f'weights/data/{key}', data)
    for name, data in members.items():
      archive.writestr(f'weights/{name}', data)
  return path


def write_legacy(path, state):
  """Writes the format before PyTorch 1.6."""
  pickled, storages = _pickle(state)
  with open(path, 'wb') as file:
    for value in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True, 'protocol_version': 1001}):
      pickle.dump(value, file, protocol=2)
    file.write(pickled)
    pickle.dump(list(storages), file, protocol=2)
    for key, data in storages.items():
      file.write(struct.pack('<q', len(data) // _item_size(state, key)) + data)
  return path


def _tensors(state):
  for value in state.values():
    if isinstance(value, Tensor):
      yield value
    elif isinstance(value, dict):
      yield from _tensors(value)


def _item_size(state, key):
  return list(_tensors(state))[int(key)].array.itemsize


def _pickle(state):
  """The pickle of a state as PyTorch makes it, and the storages: the bytes below each tensor, by key."""
  modules = {name: types.ModuleType(name) for name in ('torch', 'torch._utils')}
  rebuild = types.FunctionType((lambda *_: None).__code__, {}, '_rebuild_tensor_v2')
  rebuild.__module__, rebuild.__qualname__ = 'torch._utils', '_rebuild_tensor_v2'
  modules['torch._utils']._rebuild_tensor_v2 = rebuild
  kinds = {}
  for name in NAMES.values():
    kinds[name] = type(name, (), {'__module__': 'torch'})
    setattr(modules['torch'], name, kinds[name])
  storages, keys = {}, {}
  for i, tensor in enumerate(_tensors(state)):
    base = tensor.array if tensor.array.base is None else tensor.array.base
    storages[str(i)] = bytes(tensor.offset * base.itemsize) + np.ascontiguousarray(base).tobytes()
    keys[id(tensor)] = str(i)

  class Storage:
    def __init__(self, tensor):
      self.tensor = tensor

  class Pickler(pickle.Pickler):
    def reducer_override(self, value):
      if not isinstance(value, Tensor):
        return NotImplemented
      strides = tuple(stride // value.array.itemsize for stride in value.array.strides)
      arguments = (Storage(value), value.offset, value.array.shape, strides, False, collections.OrderedDict())
      return rebuild, arguments

    def persistent_id(self, value):
      if isinstance(value, Storage):
        array = value.tensor.array
        return ('storage', kinds[NAMES[str(array.dtype)]], keys[id(value.tensor)], 'cpu', array.size)
      return None

  saved = {name: sys.modules.get(name) for name in modules}
  sys.modules.update(modules)
  try:
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(state)
    return file.getvalue(), storages
  finally:
    for name, module in saved.items():
      if module is None:
        del sys.modules[name]
      else:
        sys.modules[name] = module
