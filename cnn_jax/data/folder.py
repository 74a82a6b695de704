"""Folders of image files: one folder per class, below one folder per split or not.

Either DIR/CLASS/*, or DIR/train/CLASS/* and, if they exist, DIR/validation and DIR/test. Splits that do not exist
are carved out of train by a hash of each path (`splits.by_path`).
"""

import os
import pathlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cnn_jax import UsageError, files
from cnn_jax.data import Dataset, decode, splits
from cnn_jax.data.images import IMAGE_EXTENSIONS

_SPLITS = ('train', 'validation', 'test')


class _File(NamedTuple):
  path: str  # relative to the folder
  label: int
  stamp: tuple[int, int]


def load(config_data: Any) -> Dataset:
  """Loads the image folder `config.data.dir`; see `cnn_jax.data.load_dataset`."""
  if not config_data.dir:
    raise UsageError("config.data.dir is empty; with config.data.source='folder' it must be the image folder.")
  root = pathlib.Path(config_data.dir).expanduser()
  if not root.is_dir():
    raise UsageError(f'config.data.dir is {str(root)!r}, which is not a directory; give the image folder.')
  nested = (root / 'train').is_dir()
  class_names = _list_classes(root, nested)
  if nested:
    parts, shares = _list_nested(root, class_names, config_data)
    rule = f'{" and ".join(shares)} carved out of train' if shares else ''
  else:
    parts, shares = _list_flat(root, class_names, config_data)
    rule = 'validation and test carved out'
  parts = _carve(root, parts, shares, class_names, config_data)
  counts = '/'.join(str(len(part)) for part in parts.values())
  rule = f'; {rule} by a hash of the path with split_seed {config_data.split_seed}' if rule else ''
  return Dataset(
    name=f'folder {root.name or root}',
    provenance=f'image folder {root.resolve()}; {counts} images{rule}.',
    class_names=class_names,
    **_decode(root, parts, config_data),
  )


def _list_classes(root: pathlib.Path, nested: bool) -> tuple[str, ...]:
  directory = root / 'train' if nested else root
  class_names = _directories(directory)
  if len(class_names) < 2:
    found = f'only the directory {class_names[0]!r}' if class_names else 'no directory'
    raise UsageError(f'{directory} has {found}; it needs one directory of images for each of at least two classes.')
  if not nested and {'test', 'validation'} & set(class_names):
    raise UsageError(f'{root} has a test or validation directory but no train directory; add {root / "train"}.')
  return tuple(class_names)


def _list_flat(
  root: pathlib.Path, class_names: Sequence[str], config_data: Any
) -> tuple[dict[str, list[_File]], dict[str, float]]:
  """Lists DIR/CLASS/*.

  Returns:
    The files of each split that has its own directory, all others being in train; and the shares of the splits that
    are to be carved out of train.
  """
  shares = {'test': config_data.test, 'validation': config_data.validation}
  return {'train': _list_split(root, '', class_names)}, shares


def _list_nested(
  root: pathlib.Path, class_names: Sequence[str], config_data: Any
) -> tuple[dict[str, list[_File]], dict[str, float]]:
  """Lists DIR/train/CLASS/*, and the same below validation and test if they exist; returns as `_list_flat`."""
  for wrong in ('val', 'valid', 'dev'):
    if (root / wrong).is_dir():
      raise UsageError(f'{root / wrong} is not a split; name it {root / "validation"}.')
  parts = {'train': _list_split(root, 'train', class_names)}
  shares = {}
  for split in ('test', 'validation'):
    directory = root / split
    if not directory.is_dir():
      shares[split] = config_data[split]
      continue
    extra = sorted(set(_directories(directory)) - set(class_names))
    if extra:
      raise UsageError(f'{directory} has a class {extra[0]!r} that {root / "train"} lacks; add it there or remove it.')
    parts[split] = _list_split(root, split, class_names)
    if not parts[split]:
      raise UsageError(f'{directory} contains no image{_describe_others(directory)}; add some or remove it.')
  return parts, shares


def _carve(
  root: pathlib.Path,
  parts: Mapping[str, list[_File]],
  shares: Mapping[str, float],
  class_names: Sequence[str],
  config_data: Any,
) -> dict[str, list[_File]]:
  """Moves shares of the files of train to the splits that have no directory of their own."""
  listed = parts['train']
  if not listed:
    directory = root / 'train' if (root / 'train').is_dir() else root
    raise UsageError(
      f'{directory} contains no image{_describe_others(directory)}; put images into {directory / class_names[0]} and '
      'the other class directories.'
    )
  carved: dict[str, list[_File]] = {split: [] if split in ('train', *shares) else parts[split] for split in _SPLITS}
  chosen = splits.by_path((file.path for file in listed), shares, config_data.split_seed)
  for file, split in zip(listed, chosen, strict=True):
    carved[split].append(file)
  remedy = (
    f'it has {len(listed)} images to split; add images, or change config.data.validation, config.data.test or '
    'config.data.split_seed'
  )
  splits.check(carved, str(root), config_data, remedy)
  return carved


def _decode(root: pathlib.Path, parts: Mapping[str, list[_File]], config_data: Any) -> dict[str, Any]:
  """Decodes the files and returns the splits by name."""
  listed = [file for part in parts.values() for file in part]

  def read(indices: np.ndarray) -> Iterator[tuple[str, int, None]]:
    for index in indices:
      yield os.path.join(root, listed[index].path), listed[index].label, None

  decoded, labels = decode.decode(
    config_data,
    location=str(root.resolve()),
    fingerprint=decode.fingerprint((file.path, *file.stamp) for file in listed),
    runs=[np.arange(len(listed))],
    read=read,
  )
  ends = np.cumsum([len(part) for part in parts.values()])
  return {
    split: decode.select(decoded, labels, np.arange(end - len(part), end), tuple(file.path for file in part))
    for (split, part), end in zip(parts.items(), ends, strict=True)
  }


def _directories(directory: pathlib.Path) -> list[str]:
  return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith('.'))


def _list_split(root: pathlib.Path, split: str, class_names: Sequence[str]) -> list[_File]:
  """Lists the images of each class, sorted by path, below the directory of a split; '' stands for DIR/CLASS/*."""
  listed = []
  for label, name in enumerate(class_names):
    top = '/'.join(filter(None, (split, name)))
    directory = os.path.join(root, top)
    if os.path.isdir(directory):
      for path, stamp in _list_images(directory):
        listed.append(_File(path[len(directory) - len(top) :], label, stamp))
  return listed


def _list_images(directory: str) -> Iterator[tuple[str, tuple[int, int]]]:
  """Yields path and stamp of each image, sorted by path."""
  for path in sorted(files.walk(directory, IMAGE_EXTENSIONS)):
    try:
      status = os.stat(path)
      if stat.S_ISDIR(status.st_mode):  # it contains no image, or it cannot be listed
        os.listdir(path)
        continue
    except FileNotFoundError:
      raise UsageError(f'{path} is a link to a file that does not exist; remove it.') from None
    except OSError as error:
      raise UsageError(f'{path} cannot be read: {error.strerror}; change its permissions or remove it.') from None
    yield path, decode.stamp(status)


def _describe_others(directory: pathlib.Path) -> str:
  """Names the kinds of files in a directory without images, for an error message."""
  suffixes = {pathlib.Path(path).suffix for path in files.walk(str(directory), ('',)) if path != str(directory)}
  return f' but files ending in {", ".join(sorted(s or "no suffix" for s in suffixes)[:5])}' if suffixes else ''
