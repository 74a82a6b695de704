"""Encoded images to uint8 arrays: in threads, with a decoded copy in the cache, or lazily if a set is too large."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cnn_jax import UsageError, command
from cnn_jax.data import cache, images, jpeg, twins
from cnn_jax.data.decoded import Decoded
from cnn_jax.data.index import Index
from cnn_jax.data.lazy import LazyImages, fits, read_ahead, refuse
from cnn_jax.progress import Counter

MIN_CACHED_SECONDS = 0.5  # a set that decodes faster is not worth the disk space of a copy
_CHUNK = 64  # images that a thread decodes before it reports progress
_SAMPLE = 256  # images of a set that is not kept in memory from which its channels and levels are determined

Read = Callable[[np.ndarray], Iterator[tuple[Any, int, str]]]


def decode(
  config_data: Any,
  *,
  location: str,
  fingerprint: str,
  runs: Sequence[np.ndarray],
  read: Read,
  labels: np.ndarray | None = None,
  order: np.ndarray | None = None,
  compare: bool = False,
) -> Decoded:
  """Decodes a whole set, or reads the decoded copy that an earlier call left in the user's cache.

  Args:
    config_data: the section `config.data`; `image_size`, `channels`, `resize` and `bit_depth` apply to each image.
    location: identifies the set, for messages too. The copy is found by it and by the settings that change the pixels.
    fingerprint: identifies the state of the set's files, listed in `order`; a copy with another one is stale.
    runs: the indices 0..N-1, grouped so that one call of `read` can serve neighbours within a group.
    read: yields (encoded image or path, label, name for messages) for each index; it is called in threads.
    labels: int32 (N,), if they are known already; then those of `read` are ignored, and none are cached.
    order: the indices in an order that does not depend on how the set is split, so that all splits share one copy.
    compare: whether to find pictures that occur twice.

  Raises:
    UsageError: images cannot be read, or, if `on_bad_image` is 'skip', none of a class can; or two sizes meet and
      `image_size` is 0.
  """
  count = sum(map(len, runs))
  order = np.arange(count) if order is None else order
  settings = [jpeg.decoder(), *(config_data[name] for name in ('image_size', 'channels', 'resize', 'bit_depth'))]
  copy = cache.Copy(location, [*settings, compare, labels is None], fingerprint, order)
  decoded = _restore(copy, order, labels)
  if decoded is None:
    loader = _Loader(config_data, read, runs, location)
    work = _Work(loader, read, [run[i : i + _CHUNK] for run in runs for i in range(0, len(run), _CHUNK)], count, labels)
    pixels = count * loader.first[..., 0].nbytes
    if not fits(pixels * (loader.channels or 3), config_data):
      known = _read_labels(work, Index(location, ['labels'], fingerprint)) if labels is None else labels
      seen, every = dataclasses.replace(work, labels=known), config_data.on_bad_image == 'skip'
      looks = cache.Copy(location, ['looks', *settings, every], fingerprint, order)
      decoded = _obtain(looks, order, seen, functools.partial(_look, seen, every), lazy=True)
    if decoded is None or fits(pixels * decoded.images.shape[3], config_data):
      decoded = _obtain(copy, order, work, functools.partial(_decode_now, work, compare))
  if decoded.bad and config_data.on_bad_image == 'error':
    raise refuse({decoded.names[index]: reason for index, reason in decoded.bad.items()}, count, location)
  for label in np.unique(decoded.labels[list(decoded.bad)]) if decoded.bad else ():
    if (members := np.flatnonzero(decoded.labels == label)).size and all(index in decoded.bad for index in members):
      name = decoded.names[members[0]]
      raise UsageError(
        f'none of the {len(members)} images of a class can be read, such as {name}, which {decoded.bad[members[0]]}; '
        'add some, or remove the class.'
      )
  return decoded


def fingerprint(facts: Iterable[Any]) -> str:
  """A hash of facts about files, such as their names and stamps, by their `repr`."""
  digest = hashlib.sha256()
  for fact in facts:
    digest.update(repr(fact).encode())
  return digest.hexdigest()


def stamp(status: os.stat_result) -> tuple[int, int, int, int]:
  """Size in bytes, times of modification and of change in nanoseconds, and inode: one differs if the file does.

  Exchanging two files of equal size and time changes the inodes, and copying over a file the time of change.
  """
  return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class _Loader:
  """Loads single images of a set with its settings, and checks that all have the size of the first."""

  def __init__(self, config_data: Any, read: Read, runs: Sequence[np.ndarray], location: str):
    self.channels, self.bit_depth, self.location = config_data.channels, config_data.bit_depth, location
    self._size, self._resize = config_data.image_size, config_data.resize
    bad: dict[str, str] = {}
    with images.attributed_warnings():
      for index in itertools.chain.from_iterable(runs):
        file, _, self._first_name = next(read(np.array([index])))
        try:
          self.first = self._load(file, self._first_name, self.channels, self.bit_depth or 16).pixels
          return
        except images.UnreadableError as error:
          bad[self._first_name] = error.reason
    raise refuse(bad, len(bad), location)

  def load(self, file: Any, name: str, channels: int, bit_depth: int) -> images.Picture:
    """Loads an image with 1 or 3 channels, or, if 0, as it is. A colour image refutes an assumption that all are grey.

    Raises:
      UsageError: the image cannot be read, or its size is not that of the first.
      _NotGreyError: `channels` is 1, the setting is 0, and the image is in colour.
    """
    assumed = channels == 1 and self.channels == 0
    picture = self._load(file, name, 0 if assumed else channels, bit_depth)
    height, width, found = picture.pixels.shape
    if (height, width) != self.first.shape[:2]:
      raise UsageError(
        f'{name} has {height}x{width} pixels but {self._first_name} has {self.first.shape[0]}x{self.first.shape[1]}; '
        'set config.data.image_size to resize all images to one size.'
      )
    if assumed and found != channels:
      raise _NotGreyError(name)
    return picture

  def _load(self, file: Any, name: str, channels: int, bit_depth: int) -> images.Picture:
    return images.read_image(
      file, size=self._size, channels=channels, resize=self._resize, name=name, bit_depth=bit_depth
    )


@dataclasses.dataclass(frozen=True)
class _Work:
  loader: _Loader
  read: Read
  chunks: Sequence[np.ndarray]
  count: int
  labels: np.ndarray | None  # if they are known already


class _Noted:
  """What is noticed about images while they are decoded, by index."""

  def __init__(self, work: _Work):
    self._work = work
    self.labels = np.zeros(work.count, np.int32) if work.labels is None else work.labels
    self.cut, self.bits = np.full(work.count, np.nan, np.float32), np.zeros(work.count, np.uint8)
    self.bad: dict[int, str] = {}
    self.remarks: dict[int, str] = {}
    self.names: dict[int, str] = {}

  def load(self, chunk: np.ndarray, channels: int, bit_depth: int) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yields index and pixels of each image; None if it cannot be read."""
    work = self._work
    for index, (file, label, name) in zip(chunk.tolist(), work.read(chunk), strict=True):
      if work.labels is None:
        self.labels[index] = label
      try:
        picture = work.loader.load(file, name, channels, bit_depth)
      except images.UnreadableError as error:
        self.bad[index], self.names[index] = error.reason, name
        yield index, None
        continue
      self.cut[index], self.bits[index] = picture.cut, picture.bits
      if picture.remarks:
        self.remarks[index], self.names[index] = ' '.join(picture.remarks[0].split()).rstrip('.'), name
      yield index, picture.pixels

  def describe(self, made: Any, bit_depth: int, twice: Any = None) -> Decoded:
    """The decoded set with the images `made`."""
    cut = self.cut[~np.isnan(self.cut)]
    mean = float(cut.mean()) if len(cut) else 0.0
    bad, remarks = (dict(sorted(values.items())) for values in (self.bad, self.remarks))
    return Decoded(made, self.labels, bad, remarks, self.names, mean, bit_depth, twice)


def _read_labels(work: _Work, index: Index) -> np.ndarray:
  """Reads the labels of all records, int32 (N,), and keeps them in the cache: that takes a pass over the whole set."""
  if (kept := index.read()) is not None:
    return kept['labels']
  labels = np.empty(work.count, np.int32)

  def read(chunk: np.ndarray) -> int:
    labels[chunk] = [label for _, label, _ in work.read(chunk)]
    return len(chunk)

  _run(work.chunks, read, 'labels read')
  index.write(labels=labels)
  return labels


def _look(work: _Work, every: bool, touch: Callable[[], None]) -> Decoded:
  """Looks at a sample of a set that is not kept in memory, or at every image, so that bad ones can be left out.

  If `channels` is 0, the set is grey if all images that are looked at are.
  """
  loader, noted = work.loader, _Noted(work)
  found = {loader.first.shape[2]}

  def look(chunk: np.ndarray) -> int:
    for _, pixels in noted.load(chunk, loader.channels, loader.bit_depth or 16):
      if pixels is not None:
        found.add(pixels.shape[2])
      touch()
    return len(chunk)

  _run(work.chunks if every else _sample(work.chunks), look, f'images {"checked" if every else "looked at"}')
  if not every:
    noted.remarks.clear()  # the notes count them
  bit_depth = loader.bit_depth or int(noted.bits.max(initial=0))
  return noted.describe(_make_lazy(work, loader.channels or max(found), bit_depth), bit_depth)


def _sample(chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
  """About `_SAMPLE` indices at equal distances, each array of them within a chunk."""

  def spread(items: Any, count: int) -> list[Any]:
    return [items[place] for place in np.unique(np.linspace(0, len(items) - 1, count).astype(int))]

  chosen = spread(chunks, _SAMPLE)
  return [np.array(spread(chunk, -(-_SAMPLE // len(chosen)))) for chunk in chosen]


def _make_lazy(work: _Work, channels: int, bit_depth: int) -> LazyImages:
  loader, read = work.loader, work.read

  def decode_one(index: int) -> np.ndarray:
    file, _, name = next(read(np.array([index])))
    try:
      return loader.load(file, name, channels, bit_depth).pixels
    except _NotGreyError:
      raise UsageError(
        f'{name} is in colour, but all images of {loader.location} that were looked at are grey; set '
        'config.data.channels=3.'
      ) from None

  return LazyImages(decode_one, np.arange(work.count), (*loader.first.shape[:2], channels), loader.location)


def _obtain(
  copy: cache.Copy, order: np.ndarray, work: _Work, make: Callable[[Callable[[], None]], Decoded], lazy: bool = False
) -> Decoded:
  """Reads what is in the cache, or makes it and leaves it there, unless another process is doing that."""
  restore = functools.partial(_restore, copy, order, work.labels, work if lazy else None)
  if (decoded := restore()) is not None:
    return decoded
  with copy.lock() as lock:
    decoded = restore() if lock.waited else None
    if decoded is None:
      start = time.monotonic()
      decoded = make(lock.touch)
      if time.monotonic() - start > MIN_CACHED_SECONDS:
        _keep(copy, order, decoded, work.labels is None)
        if getattr(decoded.images, 'nbytes', 0) > cache.RESIDENT_BYTES:  # they are read from the copy, as in later runs
          decoded = restore() or decoded
          command.return_freed_memory()
  return decoded


def _decode_now(work: _Work, compare: bool, touch: Callable[[], None]) -> Decoded:
  """Decodes all images. If `channels` is 0 and the first one is grey, all are assumed to be until one is not."""
  try:
    return _decode_as(work.loader.first.shape[2], work, compare, touch)
  except _NotGreyError:
    return _decode_as(3, work, compare, touch)


def _decode_as(channels: int, work: _Work, compare: bool, touch: Callable[[], None]) -> Decoded:
  """Decodes all images in threads and shows the progress."""
  loader, noted = work.loader, _Noted(work)
  decoded = np.empty((work.count, *loader.first.shape[:2], channels), np.uint8)
  signatures = np.zeros((work.count, twins.width(channels)), np.uint8) if compare else None
  bit_depth = loader.bit_depth or 16

  def decode_chunk(chunk: np.ndarray) -> int:
    for index, pixels in noted.load(chunk, channels, bit_depth):
      decoded[index] = 0 if pixels is None else pixels
      touch()
    if signatures is not None and len(chunk):
      signatures[chunk] = twins.sign(decoded[chunk])
    return len(chunk)

  _run(work.chunks, decode_chunk, 'images decoded')
  highest = int(noted.bits.max(initial=0))
  if 0 < highest < bit_depth and not loader.bit_depth:
    # The levels of the set use fewer bits than its files have. Only now that is known.
    bit_depth = highest
    deep = [chunk[noted.bits[chunk] > 0] for chunk in work.chunks]
    _run([chunk for chunk in deep if len(chunk)], decode_chunk, 'images scaled')
  twice = None if signatures is None else twins.find(decoded, signatures)
  return noted.describe(decoded, loader.bit_depth or (bit_depth if highest else 0), twice)


def _run(chunks: Sequence[np.ndarray], function: Callable[[np.ndarray], int], what: str) -> None:
  """Calls a function of chunks in threads and shows how many images are done."""
  counter, done = Counter(what, sum(map(len, chunks))), 0
  with (
    images.attributed_warnings(),
    contextlib.closing(read_ahead(chunks, function, len(chunks), group=1)) as counts,
  ):
    try:
      for number in counts:
        done += number
        counter.show(done)
    finally:
      counter.clear()


class _NotGreyError(Exception):
  """A set that is assumed to be grey contains a colour image."""


def _keep(copy: cache.Copy, order: np.ndarray, decoded: Decoded, with_labels: bool) -> None:
  """Leaves a decoded set in the cache, by place instead of index."""
  place = {int(index): place for place, index in enumerate(order)}
  noted = {'bad': decoded.bad, 'remarks': decoded.remarks, 'names': decoded.names}
  facts = {name: [[place[index], text] for index, text in values.items()] for name, values in noted.items()}
  arrays = {'images': decoded.images, 'labels': decoded.labels if with_labels else None}
  twice = None
  if decoded.twins is not None:
    groups, near = decoded.twins
    twice = [[[place[index] for index in group] for group in groups], [place[index] for index in near]]
  seen = {'cut': decoded.cut, 'bit_depth': decoded.bit_depth, 'channels': decoded.images.shape[3]}
  copy.write(
    {**facts, **seen, 'twins': twice},
    {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)},
  )


def _restore(
  copy: cache.Copy, order: np.ndarray, labels: np.ndarray | None, work: _Work | None = None
) -> Decoded | None:
  """What is in the cache, or None. `work` decodes the images if they are not there."""
  found = copy.read()
  if found is None:
    return None
  facts, arrays = found
  noted = [{int(order[place]): text for place, text in facts[name]} for name in ('bad', 'remarks', 'names')]
  bad, remarks = (dict(sorted(values.items())) for values in noted[:2])
  kept = arrays['labels'] if labels is None else labels
  made = arrays['images'] if work is None else _make_lazy(work, facts['channels'], facts['bit_depth'])
  twice = None
  if facts['twins'] is not None:
    groups, near = facts['twins']
    twice = [sorted(order[group].tolist()) for group in groups], [int(order[place]) for place in near]
  return Decoded(made, kept, bad, remarks, noted[2], facts['cut'], facts['bit_depth'], twice)
