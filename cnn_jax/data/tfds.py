"""Sets of TensorFlow Datasets. Reading a prepared set needs no TensorFlow; preparing one runs it in another process."""

import difflib
import importlib.util
import io
import os
import pathlib
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np

from cnn_jax import UsageError
from cnn_jax.data import BUNDLED, Dataset, decode, prepared, splits
from cnn_jax.data.decoded import Decoded

_DOWNLOAD_HOST = 'https://storage.googleapis.com'  # TFDS contacts it first, for any set
_INSTALL = "pip install 'cnn_jax[tfds]'"
_READ_ONLY = 'a command that reads a run does not prepare sets'


def load(config_data: Any, prepare: bool = True) -> Dataset:
  """Loads the TFDS set `config.data.name`; see `cnn_jax.data.load_dataset`. Nothing of the set is executed."""
  directory = _find_prepared(config_data)
  if directory is None and not prepare:
    raise UsageError(f'{_not_prepared(config_data, _READ_ONLY)}; set TFDS_DATA_DIR to the directory that holds it.')
  directory = directory or _prepare(config_data)
  found = prepared.describe(directory)
  sizes = {str(split): found.size(split) for split in ('train', 'validation', 'test') if split in found.shards}
  if 'train' not in sizes:
    raise UsageError(f"{directory} has no 'train' split but {', '.join(found.shards) or 'none'}; choose another set.")
  decoded = _decode(config_data, directory, found, sizes)
  labels = decoded.labels
  official = _ranges(sizes)
  if (labels[official['train']] < 0).any():
    raise UsageError(f"the 'train' split of {directory} has no labels; choose another set.")
  parts, rules = splits.by_class(official, labels, config_data)
  splits.check(parts, found.name, config_data)
  counts = '/'.join(str(len(indices)) for indices in parts.values())
  return Dataset(
    name=found.name,
    provenance=f'TFDS {found.name}; {counts} images{"".join(f"; {rule}" for rule in rules)}.',
    class_names=found.class_names,
    train=decoded.select(parts['train']),
    validation=decoded.select(parts['validation']),
    test=decoded.select(parts['test']),
    notes=tuple(decoded.notes(config_data)),
    skipped=decoded.skipped(),
    bit_depth=decoded.bit_depth,
  )


def find_obstacle(config_data: Any, prepare: bool = True) -> str:
  """Returns why a set can neither be read nor prepared here, as a clause, or '' if it can.

  The answer takes less than 5 s. Without a network, TFDS itself would retry for minutes.

  Args:
    config_data: the section `config.data`.
    prepare: whether the set may be prepared.
  """
  if _find_prepared(config_data):
    return ''
  obstacle = _why_not_prepare() if prepare else _READ_ONLY
  return _not_prepared(config_data, obstacle) if obstacle else ''


def network_is_up(url: str = _DOWNLOAD_HOST, timeout: float = 2.0) -> bool:
  """Whether a host answers a request, through the proxy if one is set.

  Args:
    url: of the host; by default that from which TFDS downloads.
    timeout: seconds to wait for the answer.
  """
  answers = []

  def ask() -> None:
    try:
      urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=timeout).close()
      answers.append(True)
    except urllib.error.HTTPError:
      answers.append(True)  # an error status is an answer
    except (OSError, ValueError):
      pass

  # In a thread, because the lookup of a host name has no timeout.
  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(timeout + 0.5)
  return bool(answers)


def _ranges(sizes: dict[str, int]) -> dict[str, np.ndarray]:
  """The indices of each split if all examples are numbered one split after another."""
  ends = np.cumsum(list(sizes.values()))
  return {split: np.arange(end - size, end) for (split, size), end in zip(sizes.items(), ends, strict=True)}


def _decode(config_data: Any, directory: pathlib.Path, found: prepared.Prepared, sizes: dict[str, int]) -> Decoded:
  """Decodes all splits, one after another; see `decode.decode`."""
  names, ends = list(sizes), np.cumsum(list(sizes.values()))
  records = [prepared.Records(found, split) for split in names]

  def read(indices: np.ndarray) -> Iterator[tuple[io.BytesIO, int, str]]:
    number = int(np.searchsorted(ends, indices[0], side='right'))
    offsets = [int(index - ends[number]) + sizes[names[number]] for index in indices]
    for (image, label), offset in zip(records[number].read(offsets), offsets, strict=True):
      yield io.BytesIO(image), label, f'{found.name} {names[number]}[{offset}]'

  return decode.decode(
    config_data,
    location=str(directory.resolve()),
    fingerprint=decode.fingerprint((str(file), *decode.stamp(file.stat())) for file in found.files),
    runs=list(_ranges(sizes).values()),
    read=read,
  )


def _data_dir(config_data: Any) -> pathlib.Path:
  directory = config_data.dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return pathlib.Path(os.path.expanduser(directory))  # unlike Path.expanduser, this works for a user without a home


def _parse_name(name: str) -> tuple[str, str]:
  """'name/config:1.0.0' -> ('name/config', '1.0.0'); the version may be ''."""
  path, _, version = name.partition(':')
  return path, version


def _find_prepared(config_data: Any) -> pathlib.Path | None:
  """Returns the newest prepared version of the set, a directory NAME[/CONFIG]/VERSION, or None."""
  path, version = _parse_name(config_data.name)
  if not path or path.startswith(('/', '.')):
    raise UsageError(f'config.data.name is {config_data.name!r}; give the name of a TFDS set, such as mnist.')
  root = _data_dir(config_data) / path
  versions = []
  # The second pattern finds sets with several configurations if the name gives none.
  for file in (*root.glob('*/dataset_info.json'), *root.glob('*/*/dataset_info.json')):
    numbers = file.parent.name.split('.')
    if len(numbers) == 3 and all(n.isdigit() for n in numbers) and version in ('', file.parent.name):
      versions.append((tuple(map(int, numbers)), file.parent))
  configs = {directory.parent for _, directory in versions}
  if len(configs) > 1:
    names = ', '.join(sorted(directory.relative_to(root.parent).as_posix() for directory in configs))
    raise UsageError(
      f'config.data.name is {config_data.name!r}, but several configurations are prepared: {names}; choose one.'
    )
  return max(versions)[1] if versions else None


def _why_not_prepare() -> str:
  if importlib.util.find_spec('tensorflow') is None:
    return 'TensorFlow, which prepares TFDS sets, is not installed'
  return '' if network_is_up() else f'{_DOWNLOAD_HOST} cannot be reached'


def _not_prepared(config_data: Any, obstacle: str) -> str:
  return f'TFDS set {config_data.name!r} is not prepared in {_data_dir(config_data)}, and {obstacle}'


def _prepare(config_data: Any) -> pathlib.Path:
  """Downloads and prepares a set and returns its directory.

  Raises:
    UsageError: the name is unknown, TensorFlow or the network is missing, or the preparation failed.
  """
  name, directory = config_data.name, _data_dir(config_data)
  _check_name(name, directory)
  obstacle = _why_not_prepare()
  if obstacle:
    part = ', or set config.data.source=bundled for a part of it that is installed' if name in BUNDLED else ''
    raise UsageError(
      f'{_not_prepared(config_data, obstacle)}; run {_INSTALL} and the same command on a machine with a network, '
      f'then set TFDS_DATA_DIR to its data directory{part}.'
    )
  print(f'Preparing TFDS set {name} in {directory}.', file=sys.stderr, flush=True)
  code = (
    'import sys, tensorflow_datasets as tfds; '
    'tfds.builder(sys.argv[1], data_dir=sys.argv[2], file_format="array_record").download_and_prepare()'
  )
  # In another process, so that this one never holds TensorFlow's memory or its lock on a GPU.
  command = [sys.executable, '-c', code, name, str(directory)]
  status = subprocess.run(command, stdout=sys.stderr, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''}).returncode
  made = _find_prepared(config_data)
  if status or made is None:
    raise UsageError(f'TFDS could not prepare {name!r} in {directory}; resolve the error printed above and try again.')
  return made


def _check_name(name: str, directory: pathlib.Path) -> None:
  known = _import_tfds().list_builders(with_community_datasets=False)
  plain = _parse_name(name)[0].split('/')[0]
  if plain not in known:
    near = difflib.get_close_matches(plain, (*known, *BUNDLED), 1)
    hint = f'did you mean {near[0]}?' if near else 'see the catalogue of TFDS for the names.'
    raise UsageError(
      f'config.data.name is {name!r}, which is neither prepared in {directory} nor the name of a TFDS set; {hint}'
    )


def _import_tfds() -> Any:
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UsageError(f'tensorflow_datasets cannot be imported ({error}); run: {_INSTALL}.') from None
  return tfds
