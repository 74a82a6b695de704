"""A prepared set of TensorFlow Datasets, read from its files: the description and the records.

TFDS itself builds Python objects from the description of a set, and imports the classes that `features.json` names. Here
the description is JSON and text that anybody may have written: nothing that it names is imported, and only the image
and the label are looked for. Other features, of whatever class, are passed over.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cnn_jax import UsageError, files
from cnn_jax.data import MAX_CLASSES, MAX_NAME
from cnn_jax.data.opened import Opened

_FEATURES = 'tensorflow_datasets.core.features.'
_DICT = _FEATURES + 'features_dict.FeaturesDict'
_IMAGE = _FEATURES + 'image_feature.Image'
_LABEL = _FEATURES + 'class_label_feature.ClassLabel'
_TEMPLATE = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
_MAX_SHARDS = 100_000
_MAX_RECORDS = 2**40
_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'  # what array_record advises for random access


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of `take` records."""

  filename: str
  take: int


@dataclasses.dataclass(frozen=True)
class Prepared:
  """The description of a prepared set.

  Attributes:
    name: NAME[/CONFIG]/VERSION.
    image, label: the names of the two features.
    class_names: the classes; a label is an index into them, or -1 if it is unknown.
    shards: the files of each split, in the order of the description.
    files: what the description was read from, and the shards.
  """

  name: str
  image: str
  label: str
  class_names: tuple[str, ...]
  shards: dict[str, tuple[Shard, ...]]
  files: tuple[pathlib.Path, ...]

  def size(self, split: str) -> int:
    """The number of examples of a split."""
    return sum(shard.take for shard in self.shards[split])


def describe(directory: pathlib.Path) -> Prepared:
  """Reads the description of a prepared set of images with one label each.

  Args:
    directory: of one version of the set, with dataset_info.json, features.json and the shards.

  Raises:
    UsageError: a file is missing, damaged or not regular; the records are not ArrayRecord; or this is no such set.
  """
  info = _read_object(directory / 'dataset_info.json')
  kind = _text(_get(info, 'fileFormat', 'tfrecord'), 'fileFormat', directory)
  if kind != 'array_record':
    raise UsageError(
      f"{directory} is prepared as {kind}, which only TensorFlow reads; prepare it with file_format='array_record'."
    )
  parts = [_text(_get(info, field, ''), field, directory) for field in ('name', 'configName', 'version')]
  if not all(re.fullmatch(r'[\w.+-]*', part) for part in parts) or not parts[0]:
    raise _damaged(directory / 'dataset_info.json', 'its name, configName or version is not a plain name')
  name = '/'.join(part for part in parts if part)
  image, label, count = _find_features(name, directory, _supervised(info))
  names_file = directory / f'{label.replace("/", ".")}.labels.txt'
  class_names = _class_names(names_file, count)
  shards = {split: files for split, files in _splits(info, parts[0], directory)}
  used = [directory / 'dataset_info.json', directory / 'features.json', *([names_file] if names_file.exists() else [])]
  used += [pathlib.Path(shard.filename) for part in shards.values() for shard in part]
  return Prepared(name, image, label, class_names, shards, tuple(used))


class Records:
  """The records of a split, read at random; it may be used in threads, and in other processes after pickling.

  Args:
    prepared: the set.
    split: one that has examples.
  """

  def __init__(self, prepared: Prepared, split: str):
    self._prepared, self._split = prepared, split
    self._ends = np.cumsum([shard.take for shard in prepared.shards[split]])
    self._files = Opened(functools.partial(_open, prepared.shards[split]))

  def read(self, indices: Sequence[int]) -> Iterator[tuple[bytes, int]]:
    """Yields (encoded image, label) for each of some indices.

    Raises:
      UsageError: a record is damaged, or a package is missing.
    """
    for shard, group in itertools.groupby(indices, lambda index: int(np.searchsorted(self._ends, index, side='right'))):
      members = list(group)
      first = int(self._ends[shard]) - self._prepared.shards[self._split][shard].take
      try:
        records = self._files.get(shard).read([index - first for index in members])
      except UsageError:
        raise
      except Exception as error:  # whatever array_record's C++ code raises for a damaged file
        raise UsageError(
          f'the records {members[0]} to {members[-1]} of the split {self._split!r} of {self._prepared.name} cannot be '
          f'read ({" ".join(str(error).split())[:200]}); prepare the set again.'
        ) from error
      for index, record in zip(members, records, strict=True):
        yield self._parse(index, record)

  def _parse(self, index: int, record: bytes) -> tuple[bytes, int]:
    from tensorflow_datasets.proto import tf_example_pb2

    prepared = self._prepared
    try:
      features = tf_example_pb2.Example.FromString(record).features.feature
      (image,) = features[prepared.image].bytes_list.value
      (label,) = features[prepared.label].int64_list.value
      if not -1 <= label < len(prepared.class_names):
        raise ValueError(f'its label is {label}')
    except Exception as error:  # protobuf's own type of error does not derive from one of Python's
      raise UsageError(
        f'{prepared.name} {self._split}[{index}] does not hold one {prepared.image!r} and one label of '
        f'{len(prepared.class_names)} classes in {prepared.label!r} ({error}); prepare the set again.'
      ) from error
    return image, label


def _open(shards: Sequence[Shard], number: int) -> Any:
  try:
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401
  except ImportError as error:
    raise UsageError(f'a prepared TFDS set cannot be read ({error}); install the packages of cnn_jax again.') from None
  shard = shards[number]
  reader = array_record_module.ArrayRecordReader(shard.filename, options=_OPTIONS, file_reader_buffer_size=2**15)
  if reader.num_records() < shard.take:
    raise UsageError(f'{shard.filename} is not a file of {shard.take:,} records; prepare the set again.')
  return reader


def _find_features(name: str, directory: pathlib.Path, preferred: Sequence[str]) -> tuple[str, str, int]:
  """The names of the image and of the label, those of the supervised pair first, and the number of classes (or 0)."""
  features = _features(directory / 'features.json')
  order = [feature for feature in preferred if feature in features]
  order += [feature for feature in features if feature not in order]
  images = [f for f in order if features[f][0] == _IMAGE and _get(features[f][1], 'dtype') in ('uint8', 'uint16')]
  labels = [f for f in order if features[f][0] == _LABEL]
  if not images or not labels:
    found = ', '.join(order[:10]) + (', ...' if len(order) > 10 else '')
    raise UsageError(f'{name} is not an image-classification set: its features are {found}; choose another.')
  content = features[labels[0]][1]
  return images[0], labels[0], _whole(_get(content, 'numClasses') or 0, MAX_CLASSES, directory / 'features.json')


def _features(path: pathlib.Path) -> dict[str, tuple[str, Mapping[str, Any]]]:
  """The features at the top: name of the class and content. TFDS has written two forms; the older one has 'type'."""
  top = _read_object(path)
  old = 'type' in top
  kind = top.get('type') if old else _get(top, 'pythonClassName')
  content = top.get('content') if old else _get(_get(top, 'featuresDict') or {}, 'features')
  if old and isinstance(content, Mapping) and top.get('proto_cls'):
    old, content = False, _get(content, 'features')
  if kind != _DICT or not isinstance(content, Mapping):
    raise _damaged(path, 'it does not describe a FeaturesDict of TFDS')
  features = {}
  for name, feature in content.items():
    if not isinstance(feature, Mapping) or not name or len(name) > MAX_NAME:
      raise _damaged(path, 'a feature is not an object with a name')
    if 'type' in feature:
      found = (feature['type'], feature.get('content'))
    else:
      kind = _get(feature, 'pythonClassName')
      found = (kind, _get(feature, 'image' if kind == _IMAGE else 'classLabel'))
    features[name] = (found[0], found[1] if isinstance(found[1], Mapping) else {})
  return features


def _class_names(path: pathlib.Path, count: int) -> tuple[str, ...]:
  """The names of the classes, a line each; their numbers if there is no such file."""
  try:
    contents = files.read_limited(path)
  except FileNotFoundError:
    contents = None
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}; make it a readable file.') from error
  if contents is None:
    names = [str(number) for number in range(count)]
  else:
    try:
      names = [line.strip() for line in contents.decode().split('\n') if line.strip()]
    except UnicodeDecodeError as error:
      raise _damaged(path, 'it is not UTF-8') from error
  if len(set(names)) != len(names) or not names or (count and count != len(names)):
    raise _damaged(path, f'it must hold {count or "one or more"} different names of classes')
  return tuple(names)


def _splits(info: Mapping[str, Any], name: str, directory: pathlib.Path) -> Iterator[tuple[str, tuple[Shard, ...]]]:
  """The splits that have examples, and their files."""
  path = directory / 'dataset_info.json'
  splits = info.get('splits')
  for split in splits if isinstance(splits, list) else []:
    lengths = _get(split, 'shardLengths') if isinstance(split, Mapping) else None
    title = _text(split.get('name'), 'name of a split', directory) if isinstance(split, Mapping) else ''
    if not isinstance(lengths, list) or len(lengths) > _MAX_SHARDS or not re.fullmatch(r'[\w.+-]+', title):
      raise _damaged(path, 'a split has no name or no list of shardLengths')
    counts = [_whole(length, _MAX_RECORDS, path) for length in lengths]
    template = _text(_get(split, 'filepathTemplate') or _TEMPLATE, 'filepathTemplate', directory)
    shards = tuple(
      _shard(directory, _file_name(template, name, title, number, len(counts), path), count)
      for number, count in enumerate(counts)
      if count
    )
    if shards:
      yield title, shards


def _file_name(template: str, name: str, split: str, number: int, count: int, path: pathlib.Path) -> str:
  """The name of a shard. `str.format` would let a template read attributes and pad to any width."""
  digits = max(5, len(str(count)))
  index, total = f'{number:0{digits}}', f'{count:0{digits}}'
  values = {
    'DATASET': name,
    'SPLIT': split,
    'FILEFORMAT': 'array_record',
    'SHARD_INDEX': index,
    'NUM_SHARDS': total,
    'SHARD_X_OF_Y': f'{index}-of-{total}',
  }
  made = re.sub(r'\{(\w+)\}', lambda match: values.get(match[1], '{'), template)
  if re.search(r'[{}\0]', made) or os.path.isabs(made) or '..' in pathlib.PurePath(made).parts:
    raise _damaged(path, 'a filepathTemplate leads out of the directory or has unknown parts')
  return made


def _shard(directory: pathlib.Path, name: str, count: int) -> Shard:
  """A shard, after a check that it is a file in which so many records find room."""
  path = (directory / name).absolute()
  try:
    status = path.stat()
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}; prepare the set again.') from error
  if not stat.S_ISREG(status.st_mode) or count > status.st_size:
    raise UsageError(f'{path} is not a file of {count:,} records; prepare the set again.')
  return Shard(str(path), count)


def _supervised(info: Mapping[str, Any]) -> list[str]:
  """The names of the supervised pair of features, if the set has one."""
  keys = _get(info, 'supervisedKeys')
  if not isinstance(keys, Mapping):
    return []
  pair = keys.get('tuple')
  items = pair.get('items') if isinstance(pair, Mapping) else None
  found = [_get(item, 'featureKey') for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []
  return [name for name in (keys.get('input'), keys.get('output'), *found) if isinstance(name, str)]


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  value = files.read_json(path, advice='prepare the set again')
  if value is None:
    raise UsageError(f'{path} is missing; prepare the set again.')
  return value


def _get(value: Any, field: str, default: Any = None) -> Any:
  """A field of a protobuf message as JSON, which may have either of two names: 'numClasses' or 'num_classes'."""
  if not isinstance(value, Mapping):
    return default
  return value.get(field, value.get(re.sub('([A-Z])', lambda match: '_' + match[1].lower(), field), default))


def _text(value: Any, field: str, directory: pathlib.Path) -> str:
  if not isinstance(value, str) or len(value) > MAX_NAME:
    raise _damaged(directory / 'dataset_info.json', f'{field} is not a string of at most {MAX_NAME:,} characters')
  return value


def _whole(value: Any, largest: int, path: pathlib.Path) -> int:
  """A number that protobuf has written as a number or as a string."""
  if isinstance(value, str) and re.fullmatch(r'[0-9]{1,18}', value):
    value = int(value)
  if type(value) is not int or not 0 <= value <= largest:
    raise _damaged(path, f'a number in it is not whole and from 0 to {largest:,}')
  return value


def _damaged(path: pathlib.Path, reason: str) -> UsageError:
  return UsageError(f'{path} is damaged: {reason}; prepare the set again.')
