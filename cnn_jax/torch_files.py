"""PyTorch's weight files without PyTorch, and without running anything that they hold.

A `.pth` file is a pickle of a dict of tensors, and a pickle may name any Python function to be called. Here it may name
only the few that rebuild dicts and tensors; any other name is refused. Two formats are read: the ZIP archive of PyTorch
1.6 and later (`NAME/data.pkl` and one member per storage), and the format before: five pickles one after another, then
for each storage an 8-byte count and its raw data.
"""

import collections
import functools
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from cnn_jax import UsageError, files

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE_BYTES = 2**26
_MAX_OPCODES = 2_000_000  # of a pickle; a tensor takes about 50
_MAX_COPIES = 4  # times the size of the file: tensors may share storages
_DTYPES = {
  'FloatStorage': np.dtype('<f4'),
  'DoubleStorage': np.dtype('<f8'),
  'HalfStorage': np.dtype('<f2'),
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'LongStorage': np.dtype('<i8'),
  'IntStorage': np.dtype('<i4'),
  'ShortStorage': np.dtype('<i2'),
  'CharStorage': np.dtype('i1'),
  'ByteStorage': np.dtype('u1'),
  'BoolStorage': np.dtype('?'),
}
# Training scripts save the weights below one of these names, beside the optimizer's state.
_WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the tensors of a `.pth` file.

  Args:
    path: the file; a dict of tensors, or such a dict below `state_dict`, `model`, `state_dict_ema` or `model_ema`.

  Returns:
    The tensors by name, in PyTorch's layout; bfloat16 as `ml_dtypes.bfloat16`.

  Raises:
    UsageError: the file cannot be read, is damaged, names something that is not allowed, or holds no dict of tensors.
  """
  try:
    with files.open_regular(path) as file:
      tensors = _read_archive(file) if zipfile.is_zipfile(file) else _read_legacy(file)
  except OSError as error:
    raise UsageError(f'{path} cannot be read: {error.strerror or error}.') from error
  except _ForbiddenError as error:
    raise UsageError(
      f'{path} names {error}, which is not part of a dict of tensors; nothing of it was run. Save the weights alone, '
      'as .safetensors or by torch.save(model.state_dict(), ...).'
    ) from error
  # On damaged bytes the unpickler raises nearly any exception.
  except Exception as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise UsageError(f'{path} is not a whole PyTorch file ({reason}); get it again.') from error
  if not tensors:
    raise UsageError(f'{path} holds no dict of tensors; save model.state_dict().')
  return {name.removeprefix('module.'): value for name, value in tensors.items()}


class _ForbiddenError(Exception):
  """A pickle names something that is not on the list; the message is the name."""


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  size: int


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
  """Builds dicts, lists, numbers, strings and `_Tensor`s; nothing else. `storages` are those that it has met, by key."""

  def __init__(self, file: IO[bytes]):
    _check_opcodes(file)
    super().__init__(file)
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ('collections', 'OrderedDict'):
      return collections.OrderedDict
    # New functions each time, so that a pickle cannot change those of the next.
    if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
      return lambda storage, offset, shape, strides, *_: _Tensor(storage, int(offset), tuple(shape), tuple(strides))
    if (module, name) == ('torch._utils', '_rebuild_parameter'):
      return lambda tensor, *_: tensor
    if module == 'torch' and name in _DTYPES:
      return name  # a string, which cannot be called
    raise _ForbiddenError(f'{module}.{name}'[:100])

  def persistent_load(self, pid: Any) -> Any:
    kind, storage, key, _, size = pid[:5]
    if kind != 'storage' or storage not in _DTYPES:
      raise ValueError('an unknown persistent id')
    found = _Storage(str(key), _DTYPES[storage], int(size))
    if self.storages.setdefault(found.key, found) != found:
      raise ValueError('a storage is there with two types')
    return found


def _check_opcodes(file: IO[bytes]) -> None:
  """Checks a pickle for what would take any amount of memory or time; leaves the file where it was.

  Python makes room for every number below the largest one under which a pickle keeps a value.
  """
  start = file.tell()
  for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
    if count > _MAX_OPCODES:
      raise ValueError('a pickle is too long')
    if opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT') and not 0 <= int(argument or 0) <= count:
      raise ValueError('a pickle keeps a value under a number that is too large')
  file.seek(start)


def _read_archive(file: io.BufferedReader) -> dict[str, np.ndarray]:
  with zipfile.ZipFile(file) as archive:
    members = {member.filename.partition('/')[2]: member for member in archive.infolist()}
    for member in members.values():
      if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f'{member.filename} is compressed')
    if members['data.pkl'].file_size > _MAX_PICKLE_BYTES:
      raise ValueError('data.pkl is too large')
    if 'byteorder' in members and archive.read(members['byteorder']) != b'little':
      raise ValueError('its byte order is not little-endian')
    loaded = _Unpickler(io.BytesIO(archive.read(members['data.pkl']))).load()
    storage = functools.cache(lambda key: archive.read(members[f'data/{key}']))
    return _fill(loaded, storage, _size(file))


def _read_legacy(file: io.BufferedReader) -> dict[str, np.ndarray]:
  file.seek(0)
  if _Unpickler(file).load() != _LEGACY_MAGIC:
    raise ValueError('it does not begin as one')
  _Unpickler(file).load()  # the version of the protocol
  if not _Unpickler(file).load().get('little_endian', True):
    raise ValueError('its byte order is not little-endian')
  unpickler = _Unpickler(file)
  loaded = unpickler.load()
  data = {}
  for key in _Unpickler(file).load():
    wanted = unpickler.storages[key]
    (count,) = struct.unpack('<q', file.read(8))
    num_bytes = count * wanted.dtype.itemsize
    if not 0 <= num_bytes <= _size(file):
      raise ValueError('a storage is larger than the file')
    data[key] = file.read(num_bytes)
  return _fill(loaded, data.__getitem__, _size(file))


def _size(file: io.BufferedReader) -> int:
  return os.fstat(file.fileno()).st_size


def _fill(loaded: Any, storage: Callable[[str], bytes], size: int) -> dict[str, np.ndarray]:
  """The arrays of a dict of tensors, which may lie below one of `_WRAPPERS`, from their storages; see `_MAX_COPIES`."""
  for name in _WRAPPERS:
    if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
      loaded = loaded[name]
  arrays, total = {}, 0
  for name, tensor in loaded.items() if isinstance(loaded, dict) else ():
    if isinstance(tensor, _Tensor):
      arrays[str(name)] = array = _array(tensor, storage(tensor.storage.key))
      total += array.nbytes
    if total > _MAX_COPIES * size:
      raise ValueError('its tensors are larger than the file')
  return arrays


def _array(tensor: _Tensor, data: bytes) -> np.ndarray:
  """The numbers of a tensor, a view with an offset and strides into a storage."""
  dtype, shape, strides = tensor.storage.dtype, tensor.shape, tensor.strides
  flat = np.frombuffer(data, dtype)
  integers = all(type(number) is int and number >= 0 for number in (*shape, *strides, tensor.offset))
  last = tensor.offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
  if not integers or (0 not in shape and last >= len(flat)):
    raise ValueError('a tensor reaches beyond its storage')
  if 0 in shape:
    return np.zeros(shape, dtype)
  if math.prod(shape) > len(flat):
    raise ValueError('a tensor repeats its numbers')
  view = np.lib.stride_tricks.as_strided(
    flat[tensor.offset :], shape, [stride * dtype.itemsize for stride in strides], writeable=False
  )
  return view.copy()
