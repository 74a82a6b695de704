"""Folders of image files: one folder per class, below one folder per split or not; or a table of files and labels.

Either DIR/CLASS/*, or DIR/train/CLASS/* and, if they exist, DIR/validation and DIR/test, in any usual spelling
(`layout.py`), or what `config.data.table` lists (`table.py`). Splits that do not exist are carved out of train, of each
class, by a hash of each path (`splits.by_path`).
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cnn_jax import UsageError
from cnn_jax.command import printable
from cnn_jax.data import Dataset, Split, fileset, layout, listing, overview, splits, table


class _File(NamedTuple):
  path: str  # relative to the folder
  label: int
  stamp: tuple[int, ...]
  size: int


def load(config_data: Any) -> Dataset:
  """Loads the image folder `config.data.dir`, or the table `config.data.table`; see `cnn_jax.data.load_dataset`."""
  root = _root(config_data)
  skip = config_data.get('on_bad_image') == 'skip'
  if config_data.table:
    found = table.read(os.path.expanduser(config_data.table), str(root), skip=skip)
  else:
    found = layout.read(str(root), skip=skip)
  parts, carved = _carve(root, found, config_data)
  counts = '/'.join(str(len(part)) for part in parts.values())
  seed = config_data.split_seed
  rule = f'; {" and ".join(carved)} carved out of train by class and a hash of the path, split_seed {seed}'
  listed = f'images of {os.path.basename(config_data.table)} in' if config_data.table else 'image folder'
  made = fileset.load(root, parts, found.class_names, config_data)
  sizes = {file.path: file.size for part in parts.values() for file in part}
  dataset = Dataset(
    name=listing.text(f'folder {root.name or root}'),
    provenance=listing.text(f'{listed} {root.resolve()}; {counts} images{rule if carved else ""}.'),
    class_names=found.class_names,
    **made | {split: _describe(made[split], sizes) for split in layout.SPLITS},
  )
  skipped = tuple((listing.text(file.path), file.problem) for file in found.problems)
  notes = tuple(printable(note) for note in (*found.notes, *overview.notes(dataset)))
  return dataclasses.replace(dataset, notes=dataset.notes + notes, skipped=skipped + dataset.skipped)


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


def _carve(root: pathlib.Path, found: layout.Layout, config_data: Any) -> tuple[dict[str, list[_File]], list[str]]:
  """Completes the splits.

  Returns:
    The files of each split, and the splits that were carved out of train.
  """
  prefix = os.path.join(root, '')
  parts = {
    split: [_File(file.path.removeprefix(prefix), label, file.stamp, file.size) for label, file in part]
    for split, part in found.parts.items()
  }
  train = parts['train']
  shares = {split: config_data[split] for split in ('test', 'validation') if split not in parts}
  labels = np.array([file.label for file in train], np.int32)
  chosen = splits.by_path([file.path for file in train], labels, shares, config_data.split_seed)
  parts |= {split: [train[i] for i in indices] for split, indices in chosen.items()}
  parts = {split: parts[split] for split in layout.SPLITS}
  remedy = f'it has {len(train)} images to split; add images, or change config.data.validation or config.data.test'
  splits.check(parts, str(root), config_data, remedy)
  return parts, list(shares)


def _describe(split: Split, sizes: Mapping[str, int]) -> Split:
  """Adds the sizes of the files, and makes their names printable."""
  names = split.names or ()
  return dataclasses.replace(
    split, names=tuple(map(listing.text, names)), sizes=np.array([sizes[name] for name in names], np.int64)
  )
