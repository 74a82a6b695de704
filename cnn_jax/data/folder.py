"""Folders of image files: one folder per class, below one folder per split or not; or a table of files and labels.

Either DIR/CLASS/*, or DIR/train/CLASS/* and, if they exist, DIR/validation and DIR/test, in any usual spelling
(`layout.py`), or what `config.data.table` lists (`table.py`). Splits that do not exist are carved out of train, of each
class, by a hash of each path (`splits.by_path`).
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnn_jax import UsageError, command
from cnn_jax.command import printable
from cnn_jax.data import Dataset, directories, fileset, identity, layout, listing, overview, paths, splits, table
from cnn_jax.data.index import Index


def load(config_data: Any) -> Dataset:
  """Loads the image folder `config.data.dir`, or the table `config.data.table`; see `cnn_jax.data.load_dataset`."""
  root = _root(config_data)
  skip, confirm = config_data.get('on_bad_image') == 'skip', None
  if config_data.table:
    found = table.read(os.path.expanduser(config_data.table), str(root), skip=skip)
  else:
    listed = directories.Directories(str(root), config_data)
    found = layout.read(str(root), skip=skip, listed=listed)
    confirm = listed.confirmation()
  shares = {split: config_data[split] for split in ('test', 'validation') if split not in found.parts}
  files, official = _by_path(found.parts)
  found.parts.clear()  # these are large
  index = Index(os.path.realpath(root), ['splits', config_data.split_seed, shares], _state(files, official))
  kept = index.read() if len(files) >= directories.MIN_FILES else None
  parts = _carve(files, official, shares, config_data, str(root), kept or {})
  counts = '/'.join(str(len(part)) for part in parts.values())
  seed = config_data.split_seed
  rule = f'; {" and ".join(shares)} carved out of train by class and a hash of the path, split_seed {seed}'
  promoted = f'; {splits.PROMOTED}' if found.promoted else ''
  images = f'images of {os.path.basename(config_data.table)} in' if config_data.table else 'image folder'
  made = fileset.load(root, files, parts, found.class_names, config_data, confirm)
  dataset = Dataset(
    name=listing.text(f'folder {root.name or root}'),
    provenance=listing.text(f'{images} {root.resolve()}; {counts} images{promoted}{rule if shares else ""}.'),
    class_names=found.class_names,
    **made,
  )
  skipped = tuple((listing.text(file.path), file.problem) for file in found.problems)
  notes = tuple(printable(note) for note in (*found.notes, *overview.notes(dataset)))
  dataset = dataclasses.replace(dataset, notes=dataset.notes + notes, skipped=skipped + dataset.skipped)
  if len(files) >= directories.MIN_FILES and not made['skipped']:
    if kept:
      dataset.identity['splits'] = json.loads(kept['digests'].tobytes())
    else:
      digests = json.dumps(identity.identify(dataset)['splits']).encode()
      index.write(digests=np.frombuffer(digests, np.uint8), **parts)
  if len(files) >= directories.MIN_FILES:
    command.return_freed_memory()
  return dataset


def _root(config_data: Any) -> pathlib.Path:
  """The folder that the paths of the images are relative to."""
  directory = config_data.dir or os.path.dirname(config_data.table) or ('.' if config_data.table else '')
  if not directory:
    raise UsageError(
      "config.data.dir is empty; with config.data.source='folder' it must be the image folder, unless config.data.table "
      'lists the images.'
    )
  root = os.path.expanduser(directory)
  if not os.path.isdir(root):
    raise UsageError(f'config.data.dir is {root!r}, which is not a directory; give the image folder.')
  return pathlib.Path(root)


def _state(files: paths.Files, official: Mapping[str, np.ndarray]) -> str:
  """Identifies what decides how the files are split."""
  digest = hashlib.sha256(files.fingerprint().encode())
  digest.update(files.labels)
  for split, indices in official.items():
    digest.update(split.encode())
    digest.update(indices)
  return digest.hexdigest()


def _by_path(found: Mapping[str, paths.Files]) -> tuple[paths.Files, dict[str, np.ndarray]]:
  """All files, sorted by path, and the indices of those of each split, sorted by class and path."""
  ordered = sorted(found, key=lambda split: found[split].paths[0])  # then they are usually sorted as they are
  files = paths.join([found[split] for split in ordered])
  owner = np.repeat(np.arange(len(ordered)), [len(found[split]) for split in ordered])
  order = files.paths.order()
  if (order[1:] < order[:-1]).any():
    files, owner = files.part(order), owner[order]
  parts = {}
  for number, split in enumerate(ordered):
    members = np.flatnonzero(owner == number)
    parts[split] = members[np.argsort(files.labels[members], kind='stable')]
  return files, parts


def _carve(
  files: paths.Files,
  official: Mapping[str, np.ndarray],
  shares: Mapping[str, float],
  config_data: Any,
  root: str,
  kept: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Completes the splits.

  Args:
    files: all.
    official: the indices of the files of train and of the other splits that the folder has.
    shares: of the other splits.
    config_data: the section `config.data`.
    root: the folder, for messages.
    kept: what this returned for the same files and shares, or nothing.

  Returns:
    The indices of the files of each split, sorted by class and path.
  """
  train = official['train']
  parts = {split: kept[split] for split in layout.SPLITS if split in kept}
  if not parts:
    chosen = splits.by_path(files.paths[train], files.labels[train], shares, config_data.split_seed)
    parts = {split: train[chosen[split]] if split in chosen else official[split] for split in layout.SPLITS}
  remedy = f'it has {len(train)} images to split; add images, or change config.data.validation or config.data.test'
  splits.check(parts, root, config_data, remedy)
  return parts
