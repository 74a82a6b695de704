"""Weights of other libraries: their files, and our variables in them by name."""

import contextlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from cnn_jax import UsageError, files, models, torch_files

_MAX_BYTES = 2**32  # of a file without PyTorch's pickles
_SHOWN = 3  # differences in a message
_MAX_NAME = 60  # characters of a name from a file
_SAFETENSORS_DTYPES = {
  'F64': np.dtype('<f8'),
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I64': np.dtype('<i8'),
  'I32': np.dtype('<i4'),
  'I16': np.dtype('<i2'),
  'I8': np.dtype('i1'),
  'U8': np.dtype('u1'),
  'BOOL': np.dtype('?'),
}


def is_file(name: str) -> bool:
  """Whether the name of a place is that of a file of weights, and not that of a workdir."""
  return os.path.splitext(name)[1] in _READERS and not os.path.isdir(name)


def check_file(path: str | os.PathLike) -> None:
  """Checks that there is a file, without reading it.

  Raises:
    UsageError: it cannot be opened, or is a pipe, a device or a folder.
  """
  with _opened(path):
    pass


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the arrays of a file that anybody may have written. Nothing in it is executed.

  Args:
    path: a `.safetensors` or `.npz` file, or PyTorch's `.pth`, `.pt` or `.bin`; see `torch_files.read`.

  Returns:
    The arrays by name, as the file has them.

  Raises:
    UsageError: the file cannot be read, is damaged, or is of no such kind.
  """
  reader = _READERS.get(os.path.splitext(path)[1])
  if reader is None:
    raise UsageError(f'{path} has a suffix of no known kind of weights; the kinds: {", ".join(_READERS)}.')
  return reader(path)


def convert(tensors: Mapping[str, np.ndarray], config_model: Any, expected: Any, place: str) -> dict[str, Any]:
  """Finds the variables of a network in the arrays of a file, under the names that other libraries use.

  The names are those of the table of `foreign_names` that most of the arrays are in.

  Args:
    tensors: from `read`.
    config_model: the section `config.model` of the network.
    expected: `{'params', 'batch_stats'}` of the network, as shapes or arrays. The number of classes may be another
      one, and the first kernel may have another number of channels.
    place: of the arrays, for messages.

  Returns:
    `{'params', 'batch_stats'}`, float32 arrays, with the classes and the channels of the file. Without a `head` if the
    file has none.

  Raises:
    UsageError: lists what is missing, left over, or has another shape; or the numbers are not finite.
  """
  tables = models.foreign_names(config_model)
  if not tables:
    raise UsageError(
      f'other libraries have no network like {config_model.name!r} of config.model, so {place} cannot be its weights; '
      'give the workdir of a run, or set --config.model.name.'
    )
  library, table = max(tables.items(), key=lambda item: len(item[1].keys() & tensors.keys()))
  wanted = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
  found: dict[str, Any] = {'params': {}, 'batch_stats': {}}
  problems = []
  for name, (path, order) in table.items():
    if name not in tensors:
      problems += [f'{name} is missing'] if path[1] != 'head' else []
      continue
    array = _reorder(tensors[name], order)
    if array is None or not _fits(array.shape, wanted[path].shape, path):
      problems.append(f'{name} is {tensors[name].shape} there and {_original(wanted[path].shape, order)} here')
      continue
    array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
      raise UsageError(f'{name[:_MAX_NAME]} in {place} holds numbers that are not finite; get other weights.')
    inner = found
    for part in path[:-1]:
      inner = inner.setdefault(part, {})
    inner[path[-1]] = array
  left = [name for name in tensors if name not in table and not name.endswith('num_batches_tracked')]
  problems += [f'{name[:_MAX_NAME]} is left over' for name in left]
  if problems:
    more = f'; and {len(problems) - _SHOWN:,} more' if len(problems) > _SHOWN else ''
    raise UsageError(
      f'{place} does not fit the network of config.model by the names of {library}: '
      f'{"; ".join(problems[:_SHOWN])}{more}; set --config.model.* to the network of the weights.'
    )
  return found


def _reorder(tensor: np.ndarray, order: tuple[int, ...]) -> np.ndarray | None:
  """A tensor with its axes in another order, without trailing axes of length one; None if it has other axes."""
  if tensor.ndim < len(order) or tensor.size != np.prod(tensor.shape[: len(order)], dtype=np.int64):
    return None
  return tensor.reshape(tensor.shape[: len(order)]).transpose(order)


def _original(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that a tensor must have so that it has the wanted one when its axes are in the other order."""
  return tuple(shape[order.index(axis)] for axis in range(len(order))) if len(shape) == len(order) else shape


def _fits(there: tuple[int, ...], here: tuple[int, ...], path: tuple[str, ...]) -> bool:
  if path[1] == 'head':
    return there[:-1] == here[:-1]
  if len(there) == 4 and {there[2], here[2]} == {1, 3}:  # a first kernel, for grey or for RGB
    there, here = (*there[:2], *there[3:]), (*here[:2], *here[3:])
  return there == here


def _read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  import safetensors

  data = _read_bytes(path)
  try:
    loaded = safetensors.deserialize(data)
    return {
      name: np.frombuffer(view['data'], _SAFETENSORS_DTYPES[view['dtype']]).reshape(view['shape'])
      for name, view in loaded
    }
  except Exception as error:  # of its own class, which is not public
    reason = ' '.join(str(error).split())[:200]
    raise UsageError(f'{path} is not a whole .safetensors file ({reason}); get it again.') from error


def _read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
  data = _read_bytes(path)
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      # A member of a few bytes may stand for any number of zeros.
      if sum(member.file_size for member in archive.infolist()) > min(_MAX_BYTES, 100 * len(data)):
        raise ValueError('its members are too large')
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
      return {name: _number_array(arrays[name]) for name in arrays.files}
  # On damaged bytes NumPy raises nearly any exception.
  except Exception as error:
    reason = ' '.join(str(error).split())[:200]
    raise UsageError(f'{path} is not a whole .npz file of numbers ({reason}); get it again.') from error


def _number_array(array: np.ndarray) -> np.ndarray:
  if array.dtype.kind not in 'fiub':
    raise ValueError(f'an array is of type {array.dtype}')
  return array


def _read_bytes(path: str | os.PathLike) -> bytes:
  with _opened(path):
    return files.read_limited(path, _MAX_BYTES)


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[None]:
  try:
    with files.open_regular(path):
      yield
  except OSError as error:
    raise UsageError(f'{path} cannot be read: {error.strerror or error}.') from error


_READERS: dict[str, Callable[[str | os.PathLike], dict[str, np.ndarray]]] = {
  '.safetensors': _read_safetensors,
  '.npz': _read_npz,
  '.pth': torch_files.read,
  '.pt': torch_files.read,
  '.bin': torch_files.read,
}
