"""WebDataset: images and labels in tar files, which are read where they are; see `webdataset.py`.

The split is in the name of a tar file or of a directory above it, in any usual spelling (`layout.split_of`). Splits that
do not exist are carved out of train, of each class, by a hash of each name (`splits.by_path`).
"""

import dataclasses
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cnn_jax import UsageError, files
from cnn_jax.command import printable
from cnn_jax.data import (
  MAX_CLASSES,
  MAX_NAME,
  Dataset,
  decode,
  fileset,
  layout,
  listing,
  members,
  overview,
  splits,
  webdataset,
)
from cnn_jax.data.index import Index
from cnn_jax.data.webdataset import Shard

_CLASS_FILES = ('classes.txt', 'classnames.txt')
_COMPRESSED = re.compile(r'\.(?:tar\.\w+|tgz|tbz2?|txz|tzst)$', re.IGNORECASE)
_RESEMBLES = re.compile(r'train|test|val$|valid|eval|holdout')


def load(config_data: Any) -> Dataset:
  """Loads the tar files below `config.data.dir`; see `cnn_jax.data.load_dataset`."""
  root = os.path.expanduser(config_data.dir)
  if not os.path.isdir(root):
    raise UsageError(
      f"config.data.dir is {config_data.dir!r}, which is not a directory; with config.data.source='tar' give the "
      'directory of the tar files.'
    )
  shards = _find_shards(root)
  declared = _read_class_names(root)
  facts = ((shard.name, *shard.stamp) for shard in shards)
  fingerprint = decode.fingerprint([*facts, declared])
  # The number is that of the rules by which labels are read.
  index = Index(listing.text(os.path.realpath(root)), ['tar', 2], fingerprint)
  found = webdataset.restore(index)
  problems: list[listing.File] = []
  if found is None:
    found, problems = webdataset.find(root, shards, declared, skip=config_data.on_bad_image == 'skip')
    if not problems:
      webdataset.keep(index, found)
  parts, rule = _split(root, shards, found, config_data, complete=declared is None)
  dataset = _decode(root, shards, found, parts, fingerprint, config_data)
  counts = '/'.join(str(len(part)) for part in parts.values())
  dataset = dataclasses.replace(
    dataset, provenance=listing.text(f'tar files of {os.path.realpath(root)}; {counts} images{rule}.')
  )
  notes = tuple(map(printable, (*found.notes, *overview.notes(dataset))))
  skipped = tuple((listing.text(os.path.relpath(file.path, root)), file.problem) for file in problems)
  return dataclasses.replace(dataset, notes=dataset.notes + notes, skipped=skipped + dataset.skipped)


def _find_shards(root: str) -> list[Shard]:
  """The tar files below a directory, sorted by name, and their splits."""

  def refuse(error: OSError) -> None:
    raise UsageError(f'{error.filename} cannot be listed: {error.strerror}; correct that or remove it.')

  found, seen = [], set(listing.surroundings(root))
  for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
    identified = {name: listing.identify(os.path.join(folder, name)) for name in sorted(folders)}
    folders[:] = [
      name
      for name, identity in identified.items()
      if name[0] != '.' and name.lower() not in listing.JUNK and identity not in seen
    ]
    seen |= set(identified.values())
    for name in names:
      path = os.path.join(folder, name)
      if name[0] != '.' and _COMPRESSED.search(name):
        raise UsageError(
          f'{path} is compressed; decompress it: members of a compressed tar file cannot be read at random.'
        )
      if name[0] != '.' and name.lower().endswith('.tar'):
        file = listing.look(path) or listing.File(path, problem='is a link to something that does not exist')
        if file.problem:
          raise UsageError(f'{path} {file.problem}; correct that or remove it.')
        relative = os.path.relpath(path, root)
        found.append(Shard(relative, path, file.stamp, _split_of(relative, path)))
  if not found:
    raise UsageError(f'{root} has no tar file; give the directory of the tar files as config.data.dir.')
  found.sort()
  of_split = {shard.split: shard.path for shard in found}
  if '' in of_split and len(of_split) > 1:
    named = next(shard for shard in found if shard.split)
    raise UsageError(
      f'{named.path} is of the {named.split} split by its name, and the name of {of_split[""]} states none; name all tar '
      'files by their splits, as train-000.tar, or none.'
    )
  if '' not in of_split and 'train' not in of_split:
    raise UsageError(f'{root} has tar files of the split {found[0].split}, but none of train; add them.')
  return found


def _split_of(name: str, path: str) -> str:
  """The split that the words of a relative path state; '' if there is none."""
  words = re.split(r'[\W\d_]+', os.path.splitext(name)[0])
  stated = {split for word in words if (split := layout.split_of(word))}
  if len(stated) > 1:
    raise UsageError(f'{path} may be of the split {" or ".join(sorted(stated))} by its name; rename it.')
  unclear = [word for word in words if not layout.split_of(word) and _RESEMBLES.search(word.casefold())]
  if unclear and not stated:
    raise UsageError(
      f'{path} may be of a split by its name ({unclear[0]!r}); set the name of the split apart, as in train-000.tar, or '
      'rename it.'
    )
  return next(iter(stated), '')


def _read_class_names(root: str) -> list[str] | None:
  """The names that a file of classes lists, a line each; None if there is no such file."""
  paths = [os.path.join(root, name) for name in _CLASS_FILES if os.path.lexists(os.path.join(root, name))]
  if not paths:
    return None
  if len(paths) > 1:
    raise UsageError(f'{paths[0]} and {paths[1]} may both name the classes; remove one.')
  try:
    lines = files.read_limited(paths[0]).decode('utf-8-sig').splitlines()
  except OSError as error:
    raise UsageError(f'cannot read {paths[0]}: {error.strerror}; make it a readable file.') from error
  except UnicodeDecodeError:
    raise UsageError(f'{paths[0]} is not UTF-8; save it in that encoding.') from None
  names = [line.strip() for line in lines if line.strip()]
  if (
    not 2 <= len(names) <= MAX_CLASSES
    or len(set(names)) < len(names)
    or max(map(len, names)) > MAX_NAME
    or '\0' in ''.join(names)
  ):
    raise UsageError(f'{paths[0]} must hold the names of two or more classes, a line each, none twice; correct it.')
  layout.check_names(names, f'{paths[0]} has the classes')
  return names


def _split(
  root: str,
  shards: Sequence[Shard],
  found: webdataset.Listing,
  config_data: Any,
  *,
  complete: bool,
) -> tuple[dict[str, np.ndarray], str]:
  """Completes the splits. If `complete`, each class must be in train, because no file names the classes.

  Returns:
    Sorted indices of the images of each split, and a clause about how they were chosen.
  """
  of_shard = np.array([layout.SPLITS.index(shard.split or 'train') for shard in shards])
  number = of_shard[found.shards]
  parts = {split: np.flatnonzero(number == place) for place, split in enumerate(layout.SPLITS) if place in of_shard}
  rules = []
  if 'test' in parts and len(parts['test']) and (found.labels[parts['test']] < 0).all():
    unlabelled = parts.pop('test')
    found.notes.append(f'{len(unlabelled):,} images of the test split have no label; they are not used.')
    if 'validation' in parts:
      parts['test'] = parts.pop('validation')
      rules.append(splits.PROMOTED)
  for indices in parts.values():
    lacking = found.names[indices[found.labels[indices] < 0]].text()
    if len(lacking):
      raise UsageError(
        f'{len(lacking):,} images of {root} have no label, such as {lacking[0]}; add a member KEY.cls with its class for '
        'each, or put them into a directory of their class.'
      )
  trained = np.unique(found.labels[parts['train']])
  absent = np.setdiff1d(found.labels[np.concatenate(list(parts.values()))], trained)
  if complete and len(absent):
    raise UsageError(f'{root} has no training image of the class {found.class_names[absent[0]]!r}; add one.')
  shares = {split: config_data[split] for split in ('test', 'validation') if split not in parts}
  train = parts['train']
  chosen = splits.by_path(found.names[train], found.labels[train], shares, config_data.split_seed)
  parts |= {split: train[places] for split, places in chosen.items()}
  parts = {split: parts[split] for split in layout.SPLITS}
  remedy = f'it has {len(train)} images to split; add images, or change config.data.validation or config.data.test'
  splits.check(parts, root, config_data, remedy)
  if shares:
    rules.append(
      f'{" and ".join(shares)} carved out of train by class and a hash of the name, split_seed {config_data.split_seed}'
    )
  return parts, ''.join(f'; {rule}' for rule in rules)


def _decode(
  root: str,
  shards: Sequence[Shard],
  found: webdataset.Listing,
  parts: Mapping[str, np.ndarray],
  fingerprint: str,
  config_data: Any,
) -> Dataset:
  """Decodes the images of all splits, one split after another, so that each is a view of the whole."""
  listed = np.concatenate(list(parts.values()))
  names = found.names[listed].text()
  reader = members.Reader([shard.path for shard in shards], [shard.stamp for shard in shards])
  shard_of, offsets, sizes, labels = (
    values[listed] for values in (found.shards, found.offsets, found.sizes, found.labels)
  )

  def read(indices: np.ndarray) -> Iterator[tuple[io.BytesIO, int, str]]:
    for i in indices:
      contents = reader.read(int(shard_of[i]), int(offsets[i]), int(sizes[i]))
      yield io.BytesIO(contents), int(labels[i]), names[i]

  decoded = decode.decode(
    config_data,
    location=listing.text(f'the tar files of {os.path.realpath(root)}'),
    fingerprint=fingerprint,
    runs=[np.arange(len(listed))],
    read=read,
    labels=labels,
    order=np.argsort(listed),
    compare=True,
  )
  ends = np.cumsum([len(part) for part in parts.values()]).tolist()
  spans = {split: slice(end - len(part), end) for (split, part), end in zip(parts.items(), ends, strict=True)}
  made = {
    split: decoded.select(np.arange(span.start, span.stop), names[span], sizes[span]) for split, span in spans.items()
  }
  named = {split: (names[span], labels[span]) for split, span in spans.items()}
  return Dataset(
    name=listing.text(f'tar {os.path.basename(os.path.realpath(root))}'),
    provenance='',
    class_names=found.class_names,
    notes=(*decoded.notes(config_data), *fileset.describe_twins(decoded, named, found.class_names)),
    skipped=decoded.skipped(),
    bit_depth=decoded.bit_depth,
    **made,
  )
