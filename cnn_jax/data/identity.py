"""What makes two data sets the same, wherever they lie: a fingerprint, and what differs if it is another one."""

import collections
import csv
import hashlib
import io
import itertools
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np

from cnn_jax import UsageError, files
from cnn_jax.data import Dataset, Split
from cnn_jax.data.lazy import LazyImages

LISTING = 'data.csv'  # in the workdir: the files of the data set
_SPLITS = ('train', 'validation', 'test')
_PIECE = 256  # images that are read at a time
_SHOWN = 3  # differences, and files of each, in a message
_MAX_LISTING_BYTES = 2**30
_COLUMNS = ('path', 'label', 'split', 'bytes')


def identify(dataset: Dataset) -> dict[str, Any]:
  """Computes the identity of a data set.

  It depends on the class names, the image shape, and each split: on the names and sizes of the files of each class, or,
  if the images are not files, on the labels in their order. It does not depend on the place of the files.

  Args:
    dataset: from `load_dataset`.

  Returns:
    JSON values: `class_names`; `image_shape`, [height, width, channels]; `splits`, for each split a list of
    [count, digest] per class; `sha256` over these. Beside them `pixels`, for each split a digest per class of about
    64 pixels of each image, and the `decoder`: decoders may differ in the last bit, so that pixels are only compared if
    it is the same. `pixels` is empty if the images are decoded when they are needed.
  """
  identity: dict[str, Any] = {
    'class_names': list(dataset.class_names),
    'image_shape': [int(side) for side in dataset.train.images.shape[1:]],
    'splits': {name: _classes(getattr(dataset, name), len(dataset.class_names)) for name in _SPLITS},
  }
  sha256 = hashlib.sha256(repr(sorted(identity.items())).encode(errors='replace')).hexdigest()
  parts = {name: getattr(dataset, name) for name in _SPLITS}
  resident = not any(isinstance(part.images, LazyImages) for part in parts.values())
  pixels = {name: _pixels(part, len(dataset.class_names)) for name, part in parts.items()} if resident else {}
  return identity | {'sha256': sha256, 'pixels': pixels, 'decoder': _decoder()}


def check(recorded: Mapping[str, Any], dataset: Dataset, workdir: str | os.PathLike) -> None:
  """Checks that a data set is the one that a run was trained on.

  Args:
    recorded: the notes of the run's checkpoint. A run of version 0.1 has no identity there; then the name of the set,
      the classes and the shape are compared.
    dataset: what is there now.
    workdir: of the run.

  Raises:
    UsageError: names the classes or files that differ.
  """
  if isinstance(identity := recorded.get('data'), Mapping):
    differences = find_differences(identity, dataset, os.path.join(workdir, LISTING))
  else:
    differences = '; '.join(_differing_classes(recorded, {'class_names': list(dataset.class_names)}))
    if not differences and recorded.get('dataset') != dataset.name:
      differences = f'it is "{dataset.name}", then "{recorded.get("dataset")}"'
    if not differences and dataset.train.names is not None and 'carved out of train' in dataset.provenance:
      # Its test split would hold images that it was trained on.
      differences = 'version 0.1 carved other files out of train'
  if differences:
    raise UsageError(
      f'the data set is not the one that the run in {workdir} was trained on: {differences[:1000]}; restore the data, '
      'say where they are, or train a new run with another --workdir.'
    )


def find_differences(recorded: Mapping[str, Any], dataset: Dataset, listing: str | os.PathLike) -> str:
  """Describes how a data set differs from a recorded one.

  Args:
    recorded: an identity that `identify` returned once; anything, if somebody else wrote it.
    dataset: what is there now.
    listing: the data.csv that was written then; it may be missing.

  Returns:
    A clause that names the first classes or files, or '' if the identities are equal.
  """
  now = identify(dataset)
  same_decoder = recorded.get('decoder') == now['decoder']
  if recorded.get('sha256') == now['sha256']:
    return '; '.join(_differing_pixels(recorded, now)) if same_decoder else ''
  found = [*_differing_classes(recorded, now)]
  if recorded.get('image_shape') != now['image_shape']:
    found.append(f'the images have the shape {now["image_shape"]}, then {recorded.get("image_shape")}')
  if not found:
    then = _read_listing(listing)
    for split in _SPLITS:
      part, old = getattr(dataset, split), recorded.get('splits')
      before = old.get(split) if isinstance(old, Mapping) else None
      found += _differing_files(split, before, now['splits'][split], part, dataset.class_names, then)
  found = found or ['its identity was recorded in another form']
  return '; '.join(found[:_SHOWN]) + (f'; and {len(found) - _SHOWN} more' if len(found) > _SHOWN else '')


def write_record(workdir: str | os.PathLike, dataset: Dataset, identified: Mapping[str, Any]) -> None:
  """Writes what is known about a data set: data.json and, if the images are files, data.csv.

  data.json holds the name, the provenance, the identity, the notes and the files that were left out. data.csv names
  each file with its label, split and size in bytes; its columns are those of `config.data.table`.

  Args:
    workdir: locked by this process.
    dataset: that the run trains on.
    identified: its identity, from `identify`.

  Raises:
    UsageError: a file cannot be written.
  """
  about = {name: getattr(dataset, name) for name in ('name', 'provenance', 'notes', 'skipped')}
  try:
    text = json.dumps(files.plain(about | {'identity': identified}), indent=2, sort_keys=True)
    files.write_atomically(os.path.join(workdir, 'data.json'), text + '\n')
    if dataset.train.names is not None:
      with files.open_atomically(os.path.join(workdir, LISTING)) as stream:
        _write_rows(stream, dataset)
  except OSError as error:
    raise UsageError(f'cannot write to {workdir}: {error.strerror}; correct that or use another --workdir.') from error


def _write_rows(stream: IO[bytes], dataset: Dataset) -> None:
  # Names of files need not be UTF-8.
  text = io.TextIOWrapper(stream, encoding='utf-8', errors='surrogateescape', newline='')
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(_COLUMNS)
  for split in _SPLITS:
    part = getattr(dataset, split)
    for path, label, size in _files(part):
      writer.writerow((path, dataset.class_names[label], split, size))
  text.flush()
  text.detach()


def _files(split: Split) -> Iterator[tuple[str, int, int]]:
  sizes = split.sizes if split.sizes is not None else itertools.repeat(0)
  return zip(split.names or (), split.labels.tolist(), (int(size) for size in sizes), strict=False)


def _classes(split: Split, num_classes: int) -> list[list[Any]]:
  """[count, digest] of each class of a split."""
  counts = np.bincount(split.labels, minlength=num_classes).tolist()
  if split.names is None:
    order = np.argsort(split.labels, kind='stable').astype('<i8')
    parts = np.split(order, np.cumsum(counts)[:-1])
    return [[count, _digest([part.tobytes()])] for count, part in zip(counts, parts, strict=True)]
  facts: list[list[bytes]] = [[] for _ in range(num_classes)]
  for path, label, size in _files(split):
    facts[label].append(b'%s\0%d\n' % (os.fsencode(path), size))
  return [[count, _digest(sorted(of_class))] for count, of_class in zip(counts, facts, strict=True)]


def _pixels(split: Split, num_classes: int) -> list[str]:
  """A digest per class of a grid of about 8 x 8 pixels of each image."""
  height, width = split.images.shape[1:3]
  pieces = (split.images[start : start + _PIECE] for start in range(0, max(1, len(split)), _PIECE))
  grid = np.concatenate([piece[:, :: max(1, height // 8), :: max(1, width // 8)] for piece in pieces])
  order = range(len(split)) if split.names is None else sorted(range(len(split)), key=split.names.__getitem__)
  by_class = np.asarray(order, np.int64)[np.argsort(split.labels[order], kind='stable')] if len(split) else order
  ends = np.cumsum(np.bincount(split.labels, minlength=num_classes))
  return [_digest([grid[part].tobytes()]) for part in np.split(np.asarray(by_class, np.int64), ends[:-1])]


def _decoder() -> str:
  from PIL import Image, features

  return f'pillow {Image.__version__}, libjpeg {features.version("jpg")}, {platform.machine()}'


def _digest(facts: Iterable[bytes]) -> str:
  digest = hashlib.sha256()
  for fact in facts:
    digest.update(fact)
  return digest.hexdigest()[:16]


def _differing_classes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
  before = recorded.get('class_names')
  before = [str(name) for name in before] if isinstance(before, list | tuple) else []
  after = now['class_names']
  yield from (f'class {name!r} is new' for name in after if name not in before)
  yield from (f'class {name!r} is missing' for name in before if name not in after)
  if before != after and sorted(before) == sorted(after):
    yield 'the classes have another order'


def _differing_pixels(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
  before = recorded.get('pixels')
  if not isinstance(before, Mapping) or not before or not now['pixels']:
    return
  for split in _SPLITS:
    then = before.get(split)
    changed = [
      name
      for name, old, new in zip(
        now['class_names'], then if isinstance(then, list) else (), now['pixels'][split], strict=False
      )
      if old != new
    ]
    if changed:
      yield f'the pixels of {split} images of {", ".join(map(repr, changed[:_SHOWN]))} have changed'


class _File(NamedTuple):
  split: str
  label: str
  path: str


def _differing_files(
  split: str,
  before: Any,
  now: list[list[Any]],
  part: Split,
  class_names: tuple[str, ...],
  listing: Mapping[_File, int],
) -> Iterator[str]:
  """A clause for each class of a split that has other files."""
  sizes: dict[int, dict[_File, int]] = collections.defaultdict(dict)
  for path, label, size in _files(part):
    sizes[label][_File(split, class_names[label], path)] = size
  then: dict[str, dict[_File, int]] = collections.defaultdict(dict)
  for file, size in listing.items():
    if file.split == split:
      then[file.label][file] = size
  for label, (name, after) in enumerate(zip(class_names, now, strict=True)):
    earlier = before[label] if isinstance(before, list) and label < len(before) else None
    if earlier == after:
      continue
    count = earlier[0] if isinstance(earlier, list) and earlier else 'an unknown number'
    clause = f'{split} has {after[0]} images of {name!r}, then {count}'
    if then[name]:
      old, new = then[name], sizes[label]
      names = [f'new: {file.path}' for file in new if file not in old]
      names += [f'missing: {file.path}' for file in old if file not in new]
      names += [f'other size: {file.path}' for file in old if file in new and old[file] != new[file]]
      clause += f' ({", ".join(names[:_SHOWN])}{", ..." if len(names) > _SHOWN else ""})' if names else ''
    yield clause


def _read_listing(file: str | os.PathLike) -> dict[_File, int]:
  """The sizes of the files that a listing names; empty if it is missing or unusable, since it only explains."""
  try:
    with files.open_regular(file) as stream:
      if os.fstat(stream.fileno()).st_size > _MAX_LISTING_BYTES:
        return {}
      rows = csv.DictReader(io.TextIOWrapper(stream, encoding='utf-8', errors='surrogateescape', newline=''))
      return {_File(row['split'], row['label'], row['path']): int(row['bytes']) for row in rows}
  except (OSError, csv.Error, KeyError, TypeError, ValueError):
    return {}
