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
from cnn_jax.data import BUNDLED, Dataset, decode, splits

_DOWNLOAD_HOST = 'https://storage.googleapis.com'  # TFDS contacts it first, for any set
_INSTALL = "pip install 'cnn_jax[tfds]'"


def load(config_data: Any) -> Dataset:
  """Loads the TFDS set `config.data.name`, prepared first if that is possible; see `cnn_jax.data.load_dataset`."""
  directory = _find_prepared(config_data) or _prepare(config_data)
  tfds = _import_tfds()
  # The builder's own code is not needed, and some of it imports TensorFlow.
  builder = tfds.builder_from_directory(directory)
  info = builder.info
  sizes = _sizes(directory, info)
  image_name, label_name = _find_features(tfds, info)
  decoded, labels = _decode(config_data, directory, tfds, builder, sizes, image_name, label_name)
  official = _ranges(sizes)
  if (labels[official['train']] < 0).any():
    raise UsageError(f"the 'train' split of {directory} has no labels; choose another set.")
  parts, carved = splits.by_class(official, labels, config_data)
  splits.check(parts, info.full_name, config_data)
  counts = '/'.join(str(len(indices)) for indices in parts.values())
  seed = config_data.split_seed
  rule = f'; {" and ".join(carved)} carved out of train by class with split_seed {seed}' if carved else ''
  return Dataset(
    name=info.full_name,
    provenance=f'TFDS {info.full_name}; {counts} images{rule}.',
    class_names=_class_names(info.features[label_name]),
    **{split: decode.select(decoded, labels, indices) for split, indices in parts.items()},
  )


def find_obstacle(config_data: Any) -> str:
  """Returns why a set can neither be read nor prepared here, as a clause, or '' if it can.

  The answer takes less than 5 s. Without a network, TFDS itself would retry for minutes.
  """
  if _find_prepared(config_data):
    return ''
  obstacle = _why_not_prepare()
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


def _sizes(directory: pathlib.Path, info: Any) -> dict[str, int]:
  """The number of examples of each official split, of those of train, validation and test that have any."""
  if info.file_format.value != 'array_record':
    raise UsageError(
      f'{directory} is prepared as {info.file_format.value}, which only TensorFlow reads; '
      "prepare it with file_format='array_record'."
    )
  sizes = {split: int(info.splits[split].num_examples) for split in info.splits}
  if not sizes.get('train'):
    raise UsageError(f"{directory} has no 'train' split but {', '.join(sizes) or 'none'}; choose another set.")
  return {split: sizes[split] for split in ('train', 'validation', 'test') if sizes.get(split)}


def _ranges(sizes: dict[str, int]) -> dict[str, np.ndarray]:
  """The indices of each split if all examples are numbered one split after another."""
  ends = np.cumsum(list(sizes.values()))
  return {split: np.arange(end - size, end) for (split, size), end in zip(sizes.items(), ends, strict=True)}


def _find_features(tfds: Any, info: Any) -> tuple[str, str]:
  """Returns the names of the image and the label among the features, preferring those of the supervised pair."""
  features = info.features
  names = [name for name in (info.supervised_keys or ()) if isinstance(name, str) and name in features]
  names += [name for name in features if name not in names]
  image = [name for name in names if isinstance(features[name], tfds.features.Image)]
  label = [name for name in names if isinstance(features[name], tfds.features.ClassLabel)]
  if not image or not label or features[image[0]].np_dtype not in (np.uint8, np.uint16):
    raise UsageError(
      f'{info.full_name} is not an image-classification set: its features are {", ".join(features)}; choose another.'
    )
  return image[0], label[0]


def _decode(
  config_data: Any,
  directory: pathlib.Path,
  tfds: Any,
  builder: Any,
  sizes: dict[str, int],
  image_name: str,
  label_name: str,
) -> tuple[np.ndarray | decode.LazyImages, np.ndarray]:
  """Decodes all splits, one after another; see `decode.decode`."""
  info = builder.info
  skip = {name: tfds.decode.SkipDecoding() for name, f in info.features.items() if isinstance(f, tfds.features.Image)}
  names, ends = list(sizes), np.cumsum(list(sizes.values()))
  readers = [builder.as_data_source(split=split, decoders=skip) for split in names]

  def read(indices: np.ndarray) -> Iterator[tuple[io.BytesIO, int, str]]:
    number = int(np.searchsorted(ends, indices[0], side='right'))
    offsets = [int(index - ends[number]) + sizes[names[number]] for index in indices]
    for record, offset in zip(readers[number].__getitems__(offsets), offsets, strict=True):
      yield io.BytesIO(record[image_name]), record[label_name], f'{info.full_name} {names[number]}[{offset}]'

  return decode.decode(
    config_data,
    location=str(directory.resolve()),
    fingerprint=decode.fingerprint((file.name, *decode.stamp(file.stat())) for file in sorted(directory.iterdir())),
    runs=list(_ranges(sizes).values()),
    read=read,
  )


def _class_names(feature: Any) -> tuple[str, ...]:
  return tuple(feature.int2str(i) for i in range(feature.num_classes))


def _data_dir(config_data: Any) -> pathlib.Path:
  directory = config_data.dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return pathlib.Path(directory).expanduser()


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
  prepared = []
  # The second pattern finds sets with several configurations if the name gives none.
  for file in (*root.glob('*/dataset_info.json'), *root.glob('*/*/dataset_info.json')):
    numbers = file.parent.name.split('.')
    if len(numbers) == 3 and all(n.isdigit() for n in numbers) and version in ('', file.parent.name):
      prepared.append((tuple(map(int, numbers)), file.parent))
  configs = {directory.parent for _, directory in prepared}
  if len(configs) > 1:
    names = ', '.join(sorted(directory.relative_to(root.parent).as_posix() for directory in configs))
    raise UsageError(
      f'config.data.name is {config_data.name!r}, but several configurations are prepared: {names}; choose one.'
    )
  return max(prepared)[1] if prepared else None


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
  prepared = _find_prepared(config_data)
  if status or prepared is None:
    raise UsageError(f'TFDS could not prepare {name!r} in {directory}; resolve the error printed above and try again.')
  return prepared


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
