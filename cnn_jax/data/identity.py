"""What makes two data sets the same, wherever they lie: a fingerprint, and what differs if it is another one."""

import csv
import hashlib
import io
import itertools
import json
import os
import platform
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from cnn_jax import UsageError, files
from cnn_jax.data import Dataset, Split, jpeg
from cnn_jax.data.lazy import LazyImages
from cnn_jax.data.paths import Paths

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
    it is the same. `pixels` is empty if the images are decoded when they are needed. It is computed once for a data set.
  """
  if 'sha256' not in dataset.identity:
    dataset.identity.update(_identify(dataset))
  return dict(dataset.identity)


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
    differing = list(_differing_members(recorded.get('splits'), now['splits']))
    names = dataset.class_names
    then = _read_listing(listing, {(split, names[label]) for split, label, _ in differing})
    for split, label, count in differing:
      part, name = getattr(dataset, split), names[label]
      clause = f'{split} has {now["splits"][split][label][0]} images of {name!r}, then {count}'
      found.append(clause + _differing_files(then.get((split, name)), _sizes(part, label)))
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


def _identify(dataset: Dataset) -> dict[str, Any]:
  parts = {name: getattr(dataset, name) for name in _SPLITS}
  num_classes = len(dataset.class_names)
  identity: dict[str, Any] = {
    'class_names': list(dataset.class_names),
    'image_shape': [int(side) for side in dataset.train.images.shape[1:]],
    # The source of a large set may know them.
    'splits': dataset.identity.get('splits') or {name: _classes(part, num_classes) for name, part in parts.items()},
  }
  sha256 = hashlib.sha256(repr(sorted(identity.items())).encode(errors='replace')).hexdigest()
  resident = not any(isinstance(part.images, LazyImages) for part in parts.values())
  pixels = {name: _pixels(part, num_classes) for name, part in parts.items()} if resident else {}
  return identity | {'sha256': sha256, 'pixels': pixels, 'decoder': _decoder()}


def _write_rows(stream: IO[bytes], dataset: Dataset) -> None:
  # Names of files need not be UTF-8.
  text = io.TextIOWrapper(stream, encoding='utf-8', errors='surrogateescape', newline='')
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(_COLUMNS)
  for split in _SPLITS:
    part = getattr(dataset, split)
    names = map(dataset.class_names.__getitem__, part.labels.tolist())
    sizes = itertools.repeat(0) if part.sizes is None else part.sizes.tolist()
    writer.writerows(zip(part.names or (), names, itertools.repeat(split), sizes))
  text.flush()
  text.detach()


def _classes(split: Split, num_classes: int) -> list[list[Any]]:
  """[count, digest] of each class of a split."""
  counts = np.bincount(split.labels, minlength=num_classes).tolist()
  if split.names is None:
    order = np.argsort(split.labels, kind='stable').astype('<i8')
    parts = np.split(order, np.cumsum(counts)[:-1])
    return [[count, _digest([part.tobytes()])] for count, part in zip(counts, parts, strict=True)]
  digests = []
  sizes = split.sizes if split.sizes is not None else np.zeros(len(split), np.int64)
  order = np.argsort(split.labels, kind='stable')
  for members in np.split(order, np.cumsum(counts)[:-1]):
    names = split.names[members] if isinstance(split.names, Paths) else [split.names[index] for index in members]
    facts = [
      f'{path}\0{size}\n'.encode('utf-8', 'surrogateescape')
      for path, size in zip(names, sizes[members].tolist(), strict=True)
    ]
    digests.append(_digest(sorted(facts)))
  return [[count, digest] for count, digest in zip(counts, digests, strict=True)]


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
  return f'{jpeg.decoder()}, {platform.machine()}'


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


def _differing_members(recorded: Any, now: Mapping[str, list[list[Any]]]) -> Iterator[tuple[str, int, Any]]:
  """Split, label and recorded number of images of each class of a split that has others now."""
  for split in _SPLITS:
    before = recorded.get(split) if isinstance(recorded, Mapping) else None
    for label, after in enumerate(now[split]):
      earlier = before[label] if isinstance(before, list) and label < len(before) else None
      if earlier != after:
        yield split, label, earlier[0] if isinstance(earlier, list) and earlier else 'an unknown number'


def _differing_files(old: Mapping[str, int] | None, new: Mapping[str, int]) -> str:
  """The first files that differ, by the sizes of both; '' if the recorded ones are not known."""
  if not old:
    return ''
  names = [f'new: {path}' for path in new if path not in old]
  names += [f'missing: {path}' for path in old if path not in new]
  names += [f'other size: {path}' for path in old if path in new and old[path] != new[path]]
  return f' ({", ".join(names[:_SHOWN])}{", ..." if len(names) > _SHOWN else ""})' if names else ''


def _sizes(split: Split, label: int) -> dict[str, int]:
  """The sizes of the files of a class, by name."""
  members = np.flatnonzero(split.labels == label)
  if split.names is None:
    return {}
  sizes = np.zeros(len(split), np.int64) if split.sizes is None else split.sizes
  return {split.names[index]: int(sizes[index]) for index in members.tolist()}


def _read_listing(
  file: str | os.PathLike, wanted: Collection[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, int]]:
  """The files and sizes of some classes of splits in a listing; none if it is unusable, since it only explains."""
  found: dict[tuple[str, str], dict[str, int]] = {}
  try:
    with files.open_regular(file) as stream:
      if os.fstat(stream.fileno()).st_size > _MAX_LISTING_BYTES:
        return {}
      rows = csv.reader(io.TextIOWrapper(stream, encoding='utf-8', errors='surrogateescape', newline=''))
      header = next(rows, [])
      path, label, split, size = (header.index(name) for name in _COLUMNS)
      for row in rows:
        if row and (row[split], row[label]) in wanted:
          found.setdefault((row[split], row[label]), {})[row[path]] = int(row[size])
    return found
  except (OSError, csv.Error, IndexError, ValueError):
    return {}
