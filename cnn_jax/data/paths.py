"""The files of a set in a few arrays: a million paths without an object for each."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_PIECE = 2**16  # paths that are handled at a time


class Paths(Sequence[str]):
  """Paths, or other names, which become strings when they are indexed.

  Args:
    encoded: uint8 (bytes,), the names as UTF-8. Bytes of file names that are not UTF-8 are kept.
    starts, ends: int (N,), where each name lies.
    errors: what bytes that are not UTF-8 become; see `str.encode`.
  """

  def __init__(self, encoded: np.ndarray, starts: np.ndarray, ends: np.ndarray, errors: str = 'surrogateescape'):
    self.encoded, self.starts, self.ends, self._errors = encoded, starts, ends, errors

  def __len__(self) -> int:
    return len(self.starts)

  def __getitem__(self, index: Any) -> Any:
    """A string for an integer, and `Paths` for a slice or an array of integers."""
    starts, ends = self.starts[index], self.ends[index]
    if np.ndim(starts):
      return Paths(self.encoded, starts, ends, self._errors)
    return self.encoded[starts:ends].tobytes().decode('utf-8', self._errors)

  def __iter__(self) -> Iterator[str]:
    for piece, bounds in self._pieces():
      if piece.isascii():
        whole = piece.decode('ascii')
        yield from (whole[start:end] for start, end in bounds)
      else:
        yield from (piece[start:end].decode('utf-8', self._errors) for start, end in bounds)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

  __hash__ = None  # type: ignore[assignment]

  def text(self) -> 'Paths':
    """The same names as `listing.text` makes them."""
    return Paths(self.encoded, self.starts, self.ends, 'backslashreplace')

  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all names one after another, uint8, and where each ends, int64 (N,)."""
    ends = np.cumsum(self.ends - self.starts, dtype=np.int64)
    if len(self) and (self.starts[1:] == self.ends[:-1]).all():
      return self.encoded[self.starts[0] : self.ends[-1]], ends
    joined = b''.join(piece[start:end] for piece, bounds in self._pieces() for start, end in bounds)
    return np.frombuffer(joined, np.uint8), ends

  def order(self) -> np.ndarray:
    """The indices of the names, int64 (N,), sorted by name."""
    if all(itertools.starmap(str.__le__, itertools.pairwise(self))):  # the usual case, in which no list is needed
      return np.arange(len(self))
    names = list(self)
    return np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)

  def _pieces(self) -> Iterator[tuple[bytes, Iterator[tuple[int, int]]]]:
    """Bytes, and where some names begin and end in them."""
    for first in range(0, len(self), _PIECE):
      starts, ends = self.starts[first : first + _PIECE], self.ends[first : first + _PIECE]
      low, high, lengths = starts.min(), ends.max(), ends - starts
      if high - low > 4 * lengths.sum(dtype=np.int64):  # they are far apart
        piece = b''.join(self.encoded[start:end].tobytes() for start, end in zip(starts, ends, strict=True))
        ends = np.cumsum(lengths, dtype=np.int64)
        starts, low = ends - lengths, 0
      else:
        piece = self.encoded[low:high].tobytes()
      yield piece, zip((starts - low).tolist(), (ends - low).tolist(), strict=True)


def pack(names: Sequence[str]) -> Paths:
  """Makes `Paths` of strings."""
  encoded = ''.join(names).encode('utf-8', 'surrogateescape')
  ascii_only = encoded.isascii()
  lengths = (len(name if ascii_only else name.encode('utf-8', 'surrogateescape')) for name in names)
  return from_arrays(np.frombuffer(encoded, np.uint8), np.cumsum(np.fromiter(lengths, np.int64, len(names))))


def from_arrays(encoded: np.ndarray, ends: np.ndarray) -> Paths:
  """Makes `Paths` of what `Paths.arrays` returned."""
  bounds = np.zeros(len(ends) + 1, np.uint32 if len(encoded) < 2**32 else np.int64)
  bounds[1:] = ends
  return Paths(encoded, bounds[:-1], bounds[1:])


def join_paths(parts: Sequence[Paths]) -> Paths:
  """Joins paths; if they lie in the same bytes, these are not copied."""
  if all(part.encoded is parts[0].encoded for part in parts):
    starts = np.concatenate([part.starts for part in parts])
    return Paths(parts[0].encoded, starts, np.concatenate([part.ends for part in parts]))
  pairs = [part.arrays() for part in parts]
  offsets = np.cumsum([0, *(len(encoded) for encoded, _ in pairs)])
  ends = [ends + offset for (_, ends), offset in zip(pairs, offsets[:-1], strict=True)]
  return from_arrays(np.concatenate([encoded for encoded, _ in pairs]), np.concatenate(ends))


@dataclasses.dataclass(frozen=True)
class Files:
  """Files of a set.

  Attributes:
    paths: relative to the folder.
    stamps: int64 (N, 4), from `decode.stamp`.
    labels: int32 (N,); 0 as long as they are not known.
  """

  paths: Paths
  stamps: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.paths)

  @property
  def sizes(self) -> np.ndarray:
    """int64 (N,), in bytes."""
    return self.stamps[:, 0]

  def part(self, index: Any) -> 'Files':
    """The files at some indices, an array or a slice."""
    return Files(self.paths[index], self.stamps[index], self.labels[index])

  def labelled(self, label: int) -> 'Files':
    """The files with one label for all."""
    return dataclasses.replace(self, labels=np.full(len(self), label, np.int32))

  def fingerprint(self) -> str:
    """A hash of the paths and stamps, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for array in (*self.paths.arrays(), self.stamps):
      digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def make(paths: Sequence[str], stamps: Sequence[tuple[int, ...]], labels: Sequence[int] | None = None) -> Files:
  """Makes `Files` of the facts about each; the labels are 0 if they are None."""
  return Files(
    pack(paths),
    np.array(stamps, np.int64).reshape(len(paths), 4),
    np.zeros(len(paths), np.int32) if labels is None else np.array(labels, np.int32),
  )


def join(parts: Sequence[Files]) -> Files:
  """Joins files of one folder."""
  if not parts:
    return make([], [])
  if len(parts) == 1:
    return parts[0]
  return Files(
    join_paths([part.paths for part in parts]),
    np.concatenate([part.stamps for part in parts]),
    np.concatenate([part.labels for part in parts]),
  )
