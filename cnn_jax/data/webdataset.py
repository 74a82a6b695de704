"""Which images a set of tar files holds, and their classes, by the conventions of WebDataset.

The members of a tar file with the same key, the name up to the first dot of its last part, belong together: KEY.jpg is
the image, and KEY.cls, KEY.json or KEY.txt holds its class. If no image has a label, its directory is its class.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cnn_jax import UsageError
from cnn_jax.data import MAX_CLASSES, MAX_NAME, labels, layout, listing, members, paths
from cnn_jax.data.images import IMAGE_EXTENSIONS
from cnn_jax.data.index import Index
from cnn_jax.data.lazy import read_ahead
from cnn_jax.data.paths import Paths
from cnn_jax.progress import Counter

_SUFFIXES = frozenset(IMAGE_EXTENSIONS)
_LABELS = ('.cls', '.json', '.txt')  # the first that an image has counts
_FIELDS = ('label', 'class', 'cls')  # of a JSON object, likewise
_MAX_BYTES = 2**30  # of an image, which is read whole
_TOO_LARGE = f'has more than {_MAX_BYTES:,} bytes'
_COLUMNS = ('shards', 'offsets', 'sizes', 'labels')  # of a listing
_AHEAD = 16  # tar files that are listed at a time, at most


class Shard(NamedTuple):
  """A tar file: its name relative to the folder, its path, `decode.stamp` and its split, '' if it names none."""

  name: str
  path: str
  stamp: tuple[int, ...]
  split: str


@dataclasses.dataclass
class Listing:
  """The images of all tar files.

  Attributes:
    names: TAR/MEMBER, both as they are called.
    shards: int32 (N,), the number of the tar file.
    offsets, sizes: int64 (N,), of the data in it.
    labels: int32 (N,); -1 if the image has none.
    class_names: of the labels.
    notes: a line about each kind of thing that is not used.
  """

  names: Paths
  shards: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  notes: list[str]


def find(
  root: str, shards: Sequence[Shard], declared: list[str] | None, *, skip: bool
) -> tuple[Listing, list[listing.File]]:
  """Lists the images of all tar files and finds their classes.

  Args:
    root: the folder.
    shards: its tar files.
    declared: the names of the classes, if there is a file of them; a label may be an index into them.
    skip: whether images that cannot be used are left out; otherwise they are an error.

  Returns:
    The listing, and the members that cannot be used.

  Raises:
    UsageError: a tar file cannot be used, there is no image, or labels contradict each other.
  """
  images: list[_Image] = []
  numbers, problems, passed = [], [], listing.Passed()
  list_one = functools.partial(_list_one, frozenset(declared or ()))
  counter = Counter('images found in tar files')
  with contextlib.closing(read_ahead(shards, list_one, _AHEAD, group=1)) as all_found:
    for number, found in enumerate(all_found):
      images += found.images
      numbers += [number] * len(found.images)
      problems += found.problems
      passed.add(found.passed)
      counter.show(len(images))
  counter.clear()
  listing.check(problems, root, skip=skip)
  if not images:
    kinds = passed.kinds()
    raise UsageError(f'the tar files of {root} hold no image{f" but {kinds}" if kinds else ""}; give others.')
  labelled = any(image.label for image in images)
  if labelled:  # an image such as KEY.mask.png is another field of KEY
    passed.suffixes.update('.' + image.name.rpartition('/')[2].partition('.')[2] for image in images if not image.plain)
    kept = [place for place, image in enumerate(images) if image.plain]
    images, numbers = [images[place] for place in kept], [numbers[place] for place in kept]
  names = [image.name for image in images]
  shard_of = np.array(numbers, np.int32)
  if labelled or any(image.meant for image in images):
    _check_labels(shards, images, numbers)
  values = [image.label for image in images] if labelled else _directories(root, shards, names, shard_of)
  if not any(values):
    _check_labels(shards, images, numbers)
  class_names, label_of = _classes(root, set(values) - {''}, declared)
  full = [f'{shards[number].name}/{name}' for number, name in zip(numbers, names, strict=True)]
  listed = Listing(
    paths.pack(full),
    shard_of,
    np.array([image.offset for image in images], np.int64),
    np.array([image.size for image in images], np.int64),
    np.array([label_of.get(value, -1) for value in values], np.int32),
    class_names,
    passed.notes(),
  )
  return listed, problems


def keep(index: Index, found: Listing) -> None:
  """Keeps a listing in the cache."""
  lists = {'names': found.names, 'class_names': paths.pack(found.class_names), 'notes': paths.pack(found.notes)}
  packed = {name: items.arrays() for name, items in lists.items()}
  index.write(
    **{name: encoded for name, (encoded, _) in packed.items()},
    **{f'{name}_ends': ends for name, (_, ends) in packed.items()},
    **{name: getattr(found, name) for name in _COLUMNS},
  )


def restore(index: Index) -> Listing | None:
  """Returns the listing that `keep` left in the cache; None if there is none."""
  arrays = index.read()
  if arrays is None:
    return None
  names, class_names, notes = (
    paths.from_arrays(arrays[name], arrays[f'{name}_ends']) for name in ('names', 'class_names', 'notes')
  )
  columns = {name: arrays[name] for name in _COLUMNS}
  return Listing(names, class_names=tuple(class_names), notes=list(notes), **columns)


class _Label(NamedTuple):
  """What a member states: a class, '' if none; why it cannot be used; whether it can only be meant as a label."""

  value: str = ''
  flaw: str = ''
  meant: bool = False


class _Image(NamedTuple):
  """An image of a tar file: its member, its label, whether its key is plain, and, without a label, what prevents it."""

  name: str
  offset: int
  size: int
  label: str
  plain: bool
  flaw: str
  meant: bool


@dataclasses.dataclass
class _Found:
  """What one tar file holds."""

  images: list[_Image] = dataclasses.field(default_factory=list)
  problems: list[listing.File] = dataclasses.field(default_factory=list)
  passed: listing.Passed = dataclasses.field(default_factory=listing.Passed)


def _list_one(declared: frozenset[str], shard: Shard) -> _Found:
  """Lists the images and labels of one tar file."""
  found, seen = _Found(), set()
  stated: dict[str, dict[str, _Label]] = {}
  images: list[tuple[members.Member, str, bool]] = []
  keys: dict[str, str] = {}

  def is_label(name: str) -> bool:
    return _key(name)[1] in _LABELS

  for member in members.scan(shard.path, is_label):
    if any(map(_is_hidden, member.name.split('/'))):
      continue
    key, kind = _key(member.name)
    suffix = os.path.splitext(member.name)[1].lower()
    if kind not in _LABELS and suffix not in _SUFFIXES:
      found.passed.suffixes[suffix] += 1
      continue
    if member.name in seen:
      raise UsageError(f'{shard.path} holds {member.name!r} twice; write it again with each name once.')
    seen.add(member.name)
    if kind in _LABELS:
      label = _parse_label(kind, member, declared)
      stated.setdefault(key, {})[kind] = label._replace(flaw=label.flaw and f'{member.name} {label.flaw}')
    elif problem := member.problem or (_TOO_LARGE if member.size > _MAX_BYTES else ''):
      found.problems.append(listing.File(f'{shard.path}/{member.name}', problem=problem))
    else:
      images.append((member, key, kind in _SUFFIXES))
  with_image = {key for _, key, plain in images if plain}
  found.passed.suffixes.update(kind for key, kinds in stated.items() if key not in with_image for kind in kinds)
  for member, key, plain in images:
    of_key = [stated[key][kind] for kind in _LABELS if kind in stated[key]] if plain and key in stated else []
    label = next((label for label in of_key if label.value), None) or next((x for x in of_key if x.flaw), _Label())
    if label.value and (other := keys.setdefault(key, member.name)) != member.name:
      raise UsageError(f'{shard.path} holds two images of one key, {other!r} and {member.name!r}; remove one.')
    found.images.append(_Image(member.name, member.offset, member.size, label.value, plain, label.flaw, label.meant))
  return found


def _is_hidden(part: str) -> bool:
  return (part.startswith('.') and part != '..') or part.lower() in listing.JUNK


def _key(name: str) -> tuple[str, str]:
  """'a/b.c.JPG' -> ('a/b', '.c.jpg')."""
  folder, slash, last = name.rpartition('/')
  stem, dot, rest = last.partition('.')
  return folder + slash + stem, (dot + rest).lower()


def _parse_label(kind: str, member: members.Member, declared: frozenset[str]) -> _Label:
  """The class that a member states, a number or a name. Text may be a caption, and JSON may describe anything else."""
  meant = kind == '.cls'
  if member.problem or member.size > members.MAX_CONTENTS:
    return _Label(flaw=member.problem or f'has more than {members.MAX_CONTENTS:,} bytes', meant=meant)
  try:
    value = member.contents.decode().strip()
    if kind == '.json':
      parsed = json.loads(value)
      found = [parsed.get(field) for field in _FIELDS] if isinstance(parsed, dict) else []
      if all(item is None for item in found):
        return _Label(flaw='holds no object with label, class or cls')
      meant = True
      usable = [item for item in found if type(item) in (int, str)]
      if not usable:
        other = next(item for item in found if item is not None)
        return _Label(flaw=f'holds {json.dumps(other)[:40]} as its label', meant=True)
      value = str(usable[0]).strip()
  except (ValueError, RecursionError):
    return _Label(flaw='is not readable JSON' if kind == '.json' else 'is not UTF-8', meant=meant)
  if value in declared:
    return _Label(value)
  if not value:
    return _Label(flaw='is empty', meant=meant)
  if len(value) > MAX_NAME or not value.isprintable():
    return _Label(flaw=f'holds more than a line of up to {MAX_NAME:,} characters', meant=meant)
  if labels.is_missing(value) or re.fullmatch('-[0-9]+', value):
    return _Label(flaw=f'holds {value[:40]}', meant=True)
  return _Label(value)


def _check_labels(shards: Sequence[Shard], images: Sequence[_Image], numbers: Sequence[int]) -> None:
  """Checks that no label is unusable. All those of a test split may be, as -1 is where labels are not published."""
  tested = any(image.label for image, number in zip(images, numbers, strict=True) if shards[number].split == 'test')
  flaws = [
    f'{shards[number].path}/{image.flaw}'
    for image, number in zip(images, numbers, strict=True)
    if image.flaw and (tested or shards[number].split != 'test')
  ]
  if flaws:
    raise UsageError(
      f'{listing.count(len(flaws), "label")} cannot be used: {listing.shorten(flaws, 1)}; a label is a name or a whole '
      'number from 0, in KEY.cls, in KEY.txt or as label, class or cls of an object in KEY.json.'
    )


def _directories(root: str, shards: Sequence[Shard], names: list[str], shard_of: np.ndarray) -> list[str]:
  """The class of each image by its directory: the first that not all images share, and that is no split."""
  folders = [name.split('/')[:-1] for name in names]
  by_split: dict[str, list[int]] = {}
  for place, number in enumerate(shard_of.tolist()):
    by_split.setdefault(shards[number].split, []).append(place)
  for split, places in by_split.items():
    if split != 'test' or any(folders[place] for place in places):
      depth = _depth([folders[place] for place in places], split)
      for place in places:
        folders[place] = folders[place][depth:]
  values = [folder[0] if folder else '' for folder in folders]
  found = set(values) - {''}
  if found and all(map(layout.split_of, found)):
    raise UsageError(
      f'the tar files of {root} hold directories that are named as splits: {listing.shorten(sorted(found))}; make a tar '
      "file for each split, or unpack them and use config.data.source='folder'."
    )
  return values


def _depth(folders: Sequence[Sequence[str]], split: str) -> int:
  """How many directories lie above those of the classes."""
  depth = 0
  while all(len(folder) > depth + 1 for folder in folders):
    shared = {folder[depth] for folder in folders}
    if len(shared) > 1:
      break
    depth += 1
    if split and layout.split_of(*shared) == split:
      break
  return depth


def _classes(root: str, values: set[str], declared: list[str] | None) -> tuple[tuple[str, ...], dict[str, int]]:
  """The names of the classes, and the label of each value that images have."""
  numbers = {value: int(value) for value in values if re.fullmatch('[0-9]{1,9}', value)}
  if declared is None:
    if values and len(numbers) == len(values):
      order = sorted(set(numbers.values()))
      label_of = {value: order.index(number) for value, number in numbers.items()}
      names = tuple(map(str, order))
    else:
      order_of_names = sorted(values)
      names = layout.check_names(order_of_names, f'{root} has the classes')
      label_of = {value: label for label, value in enumerate(order_of_names)}
    if not 2 <= len(names) <= MAX_CLASSES:
      raise UsageError(
        f'the tar files of {root} have {len(names):,} classes{f" ({names[0][:40]!r})" if len(names) == 1 else ""}; they '
        f'need from 2 to {MAX_CLASSES:,}, in members KEY.cls or as directories of the images.'
      )
    return names, label_of
  place = {name: label for label, name in enumerate(declared)}
  counted = numbers if len(numbers) == len(values) and max(numbers.values(), default=0) < len(declared) else None
  named = {value: place[value] for value in values} if values <= place.keys() else None
  if counted is not None and named is not None and counted != named:
    raise UsageError(
      f'the labels of {root} may be indices into its file of classes or names in it, such as {min(values)!r}; use names '
      'that are no numbers.'
    )
  label_of_value = named if counted is None else counted
  if label_of_value is None:
    unknown = min(values - place.keys())
    raise UsageError(
      f'{root} has the class {unknown!r}, which its file of {len(declared):,} classes lacks; correct one of them.'
    )
  return tuple(declared), label_of_value
