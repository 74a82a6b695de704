"""Pictures that occur twice in a set of files: the same pixels, or nearly the same after re-encoding or resizing.

The time is proportional to the set. Each picture has a signature: a checksum of some pixels, and a thumbnail. Equal
signatures are compared pixel by pixel. For near twins, thumbnails are hashed by the signs of random projections (Charikar
2002, "Similarity estimation techniques from rounding algorithms"), several times, and only pictures with an equal hash
are compared, at 32x32 pixels: without brightness, contrast and a smooth background, no pixel may differ by much. A drawing
of the same kind differs somewhere by much, a re-encoded photograph nowhere.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

_SIDE = 8  # pixels of a thumbnail
_SAMPLES = 32  # pixels per side from which a signature is computed, at least
_FLAT = 4.0  # standard deviation of levels, without a smooth background, below which a picture shows nothing
_TABLES, _NEIGHBOURS = 10, 2  # of hashes of 32 bits
_SIMILAR = 0.98  # correlation of thumbnails from which pictures are compared
_COMPARED_SIDE = 32
_MIN_CORRELATION, _MAX_DIFFERENCE = 0.97, 0.3  # of near twins; the difference as a share of the range of the levels
_CHUNK = 4096
_EXAMPLES = 3


def width(channels: int) -> int:
  """The number of bytes of a signature."""
  return 4 + channels * _SIDE**2


def sign(images: np.ndarray) -> np.ndarray:
  """Computes the signatures of pictures.

  Args:
    images: uint8 (n, H, W, C).

  Returns:
    uint8 (n, 4 + 64 C).
  """
  step = max(1, min(images.shape[1:3]) // _SAMPLES)
  samples = np.ascontiguousarray(images[:, ::step, ::step])
  checksums = np.array(list(map(zlib.crc32, samples)), '<u4')
  thumbnails = np.rint(_shrink(samples, _SIDE)).astype(np.uint8)
  return np.concatenate([checksums[:, None].view(np.uint8), thumbnails.reshape(len(images), -1)], axis=1)


def find(images: np.ndarray, signatures: np.ndarray) -> tuple[list[list[int]], list[int]]:
  """Finds pictures that occur twice.

  Args:
    images: uint8 (n, H, W, C).
    signatures: from `sign`, of each.

  Returns:
    Groups of indices of the same picture, sorted; and the indices of the pictures in them that equal no other, and are
    only nearly the same. Pictures of one colour are in no group.
  """
  channels = images.shape[3]
  thumbnails, groups = signatures[:, 4:], _Groups()
  by_pixel = thumbnails.reshape(len(thumbnails), -1, channels)
  coloured = np.flatnonzero((by_pixel != by_pixel[:, :1]).any(axis=(1, 2)))
  equal: set[int] = set()
  for first, second in _equal_neighbours(_digest(signatures[coloured])):
    one, other = int(coloured[first]), int(coloured[second])
    if np.array_equal(images[one], images[other]):
      groups.join(one, other)
      equal |= {one, other}
  # One picture stands for all that equal it.
  single = np.setdiff1d(coloured, [index for group in groups.members() for index in group[1:]], assume_unique=True)
  near: set[int] = set()
  pairs = _similar(thumbnails, single, channels)
  for start in range(0, len(pairs), _CHUNK // 8):
    some = pairs[start : start + _CHUNK // 8]
    for pair in some[_are_twins(images, some)].tolist():
      groups.join(*pair)
      near |= set(pair)
  return groups.members(), sorted(near - equal)


def describe(
  splits: Mapping[str, Sequence[tuple[str, int]]],
  groups: Sequence[Sequence[int]],
  near: Iterable[int],
  class_names: Sequence[str],
) -> list[str]:
  """Describes pictures that occur twice: in two splits, in two classes, and twice in one split.

  Args:
    splits: name and label of each picture of train, validation and test.
    groups, near: from `find`; the indices count the pictures of one split after the other.
    class_names: of the labels.

  Returns:
    Notes with numbers and examples.
  """
  if not groups:
    return []
  pictures = _Pictures(splits)
  members = [np.array(group) for group in groups]
  notes = [
    _describe_leak(pictures, members, set(near), one, other)
    for one, other in (('test', 'train'), ('validation', 'train'), ('test', 'validation'))
  ]
  notes.append(_describe_classes(pictures, members, class_names))
  for number, split in enumerate(pictures.parts):
    found = [inside for group in members if len(inside := group[pictures.part[group] == number]) > 1]
    if found:
      extra = sum(len(group) - 1 for group in found)
      examples = _join(f'{pictures.names[group[1]]} = {pictures.names[group[0]]}' for group in found)
      notes.append(f'{extra:,} of {len(splits[split]):,} {split} pictures occur there already, such as {examples}.')
  return [note for note in notes if note]


class _Pictures:
  """The pictures of all splits, one split after the other.

  Attributes:
    parts: the names of the splits.
    part, labels, names: of each picture.
  """

  def __init__(self, splits: Mapping[str, Sequence[tuple[str, int]]]):
    self.parts = list(splits)
    self.part = np.repeat(np.arange(len(splits)), [len(split) for split in splits.values()])
    self.names, labels = zip(*itertools.chain.from_iterable(splits.values()), strict=True)
    self.labels = np.array(labels)


class _Groups:
  """Disjoint sets of pictures; the smallest index stands for a set."""

  def __init__(self) -> None:
    self._above: dict[int, int] = {}  # of the pictures that were joined with another

  def find(self, index: int) -> int:
    while (above := self._above.get(index, index)) != index:
      index = above
    return index

  def join(self, one: int, other: int) -> None:
    one, other = sorted((self.find(one), self.find(other)))
    for index in (one, other):
      self._above.setdefault(index, index)
    self._above[other] = one

  def members(self) -> list[list[int]]:
    """The sets with more than one picture, each sorted."""
    groups: dict[int, list[int]] = {}
    for index in sorted(self._above):
      groups.setdefault(self.find(index), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def _shrink(images: np.ndarray, side: int) -> np.ndarray:
  """Averages images (n, H, W, C) over areas: float32 (n, side, side, C)."""
  rows, columns = (_averages(size, side) for size in images.shape[1:3])
  tall = np.tensordot(images.astype(np.float32), rows, ([1], [1]))  # (n, W, C, h)
  return np.tensordot(tall, columns, ([1], [1])).transpose(0, 2, 3, 1)


def _averages(size: int, parts: int) -> np.ndarray:
  """The weights, float32 (parts, size), of the pixels of a line in the averages of its equal parts."""
  edges = np.linspace(0, size, parts + 1)[:, None]
  covered = np.clip(edges - np.arange(size), 0, 1)  # of each pixel, the share before each edge
  return (np.diff(covered, axis=0) * parts / size).astype(np.float32)


def _pieces(array: np.ndarray, kind: type) -> Iterator[np.ndarray]:
  return (array[start : start + _CHUNK].astype(kind) for start in range(0, max(len(array), 1), _CHUNK))


def _digest(signatures: np.ndarray) -> np.ndarray:
  """A 64-bit hash of each row."""
  rng = np.random.Generator(np.random.PCG64(0))
  factors = rng.integers(1, 2**63, signatures.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
  return np.concatenate([(piece * factors).sum(axis=1, dtype=np.uint64) for piece in _pieces(signatures, np.uint64)])


def _equal_neighbours(keys: np.ndarray, distance: int = 1) -> np.ndarray:
  """Pairs of indices with equal keys, int64 (n, 2), that follow each other if sorted."""
  order = np.argsort(keys, kind='stable')
  same = np.flatnonzero(keys[order[distance:]] == keys[order[:-distance]])
  return np.stack([order[same], order[same + distance]], axis=1)


def _similar(thumbnails: np.ndarray, chosen: np.ndarray, channels: int) -> np.ndarray:
  """Pairs of the chosen pictures whose thumbnails are probably similar, int64 (n, 2), each once."""
  rng = np.random.Generator(np.random.PCG64(0))
  directions = rng.standard_normal((thumbnails.shape[1], _TABLES * 32), np.float32)
  hashes, lively = [np.zeros((0, _TABLES), np.uint32)], [np.zeros(0, np.int64)]
  for start in range(0, len(chosen), _CHUNK):
    places = chosen[start : start + _CHUNK]
    normal, spread = _normalize(thumbnails[places], channels)
    bits = np.packbits(normal[spread >= _FLAT] @ directions > 0, axis=1)
    hashes.append(bits.view(np.uint32))
    lively.append(places[spread >= _FLAT])
  keys, chosen = np.concatenate(hashes), np.concatenate(lively)
  count, codes = len(thumbnails), [np.zeros(0, np.int64)]
  for table in range(_TABLES):
    for distance in range(1, _NEIGHBOURS + 1):
      pair = chosen[_equal_neighbours(keys[:, table], distance)]
      codes.append(pair.min(axis=1) * count + pair.max(axis=1))
  pairs = np.stack(np.divmod(np.unique(np.concatenate(codes)), count), axis=1)
  kept = [np.zeros(0, bool)]
  for start in range(0, len(pairs), _CHUNK):
    (one, _), (other, _) = (_normalize(thumbnails[pairs[start : start + _CHUNK, side]], channels) for side in range(2))
    kept.append((one * other).sum(axis=1) >= _SIMILAR)
  return pairs[np.concatenate(kept)]


def _normalize(rows: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
  """Removes from square pictures what brightness, contrast, a wash of colour or a smooth background add.

  Args:
    rows: levels (n, pixels x channels).
    channels: 1 or 3.

  Returns:
    What is left of each channel without its best quadratic function of the place, scaled to norm 1: float32, the same
    shape; and its standard deviation in levels, float32 (n,).
  """
  pixels = rows.astype(np.float32).reshape(len(rows), -1, channels)
  smooth = _smooth(math.isqrt(pixels.shape[1]))
  # One matrix product for all channels; `einsum` would take ten times as long.
  flat = np.ascontiguousarray(pixels.transpose(0, 2, 1)).reshape(-1, len(smooth))
  left = (flat - (flat @ smooth) @ smooth.T).reshape(len(rows), -1)
  norms = np.linalg.norm(left, axis=1, keepdims=True)
  return left / np.maximum(norms, 1e-6), norms[:, 0] / math.sqrt(left.shape[1])


@functools.cache
def _smooth(side: int) -> np.ndarray:
  """An orthonormal basis of the quadratic functions of a place in a square, float32 (side^2, 6)."""
  y, x = np.indices((side, side)).reshape(2, -1) / max(side, 1) - 0.5
  return np.linalg.qr(np.stack([np.ones(side**2), x, y, x * x, x * y, y * y], axis=1))[0].astype(np.float32)


def _are_twins(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Whether the pictures of pairs, int64 (n, 2), are near twins, bool (n,)."""
  step = max(1, min(images.shape[1:3]) // (4 * _COMPARED_SIDE))
  side = min(_COMPARED_SIDE, *images.shape[1:3])  # enlarging would blur
  used, places = np.unique(pairs, return_inverse=True)
  levels = _shrink(np.stack([images[index, ::step, ::step] for index in used]), side).reshape(len(used), -1)
  normal, spread = _normalize(levels, images.shape[3])
  (one, other), extent = (normal[places.reshape(pairs.shape)[:, i]] for i in range(2)), np.ptp(normal, axis=1)
  extent, lively = (x[places.reshape(pairs.shape)].min(axis=1) for x in (extent, spread))
  near = np.abs(one - other).max(axis=1) <= _MAX_DIFFERENCE * extent
  return near & ((one * other).sum(axis=1) >= _MIN_CORRELATION) & (lively >= _FLAT)


def _describe_leak(pictures: _Pictures, members: list[np.ndarray], near: set[int], one: str, other: str) -> str:
  """The note about pictures of one split that are also in another; '' if there are none."""
  numbers = {name: number for number, name in enumerate(pictures.parts)}
  if not {one, other} <= numbers.keys():
    return ''
  leaked, examples = [], []
  for group in members:
    inside, outside = (group[pictures.part[group] == numbers[name]] for name in (one, other))
    if len(inside) and len(outside):
      leaked += inside.tolist()
      examples.append(f'{pictures.names[inside[0]]} = {pictures.names[outside[0]]}')
  if not leaked:
    return ''
  total, altered = int((pictures.part == numbers[one]).sum()), len(near & set(leaked))
  nearly = f', {altered:,} of them slightly altered' if altered else ''
  return (
    f'{len(leaked):,} of {total:,} {one} pictures are also in {other}{nearly}, such as {_join(examples)}: '
    f'the {one} accuracy is too high; remove them from one of the two.'
  )


def _describe_classes(pictures: _Pictures, members: list[np.ndarray], class_names: Sequence[str]) -> str:
  """The note about pictures with two labels; '' if there are none."""
  mixed = [group for group in members if len(np.unique(pictures.labels[group])) > 1]
  if not mixed:
    return ''
  examples = []
  for group in mixed[:_EXAMPLES]:
    first = group[0]
    other = group[pictures.labels[group] != pictures.labels[first]][0]
    labels = (class_names[pictures.labels[index]] for index in (first, other))
    examples.append(f'{pictures.names[first]} = {pictures.names[other]} ({" and ".join(labels)})')
  return f'{len(mixed):,} pictures are in two classes, such as {_join(examples)}; decide for one.'


def _join(examples: Iterable[str]) -> str:
  return ', '.join(itertools.islice(examples, _EXAMPLES))
