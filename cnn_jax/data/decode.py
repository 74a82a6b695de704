"""Encoded images to uint8 arrays: in threads, with a decoded copy in the cache, or lazily if a set is too large."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL

from cnn_jax import UsageError, command
from cnn_jax.data import cache, images, twins
from cnn_jax.data.decoded import Decoded
from cnn_jax.data.lazy import LazyImages, read_ahead, refuse
from cnn_jax.progress import Counter

MAX_DECODED_BYTES = 8 * 2**30
MIN_CACHED_SECONDS = 0.5  # a set that decodes faster is not worth the disk space of a copy
_CHUNK = 64  # images that a thread decodes before it reports progress

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
  settings = (config_data.image_size, config_data.channels, config_data.resize, config_data.bit_depth)
  copy = cache.Copy(location, [PIL.__version__, *settings, compare, labels is None], fingerprint, order)
  decoded = _restore(copy, order, labels)
  if decoded is None:
    loader = _Loader(config_data, read, runs, location)
    work = _Work(loader, read, [run[i : i + _CHUNK] for run in runs for i in range(0, len(run), _CHUNK)], count)
    if count * loader.first.nbytes > MAX_DECODED_BYTES:
      decoded = _decode_lazily(work, labels, config_data.on_bad_image)
    else:
      decoded = _decode_once(work, copy, order, labels, compare)
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
    """Loads an image with 1 or 3 channels. If grey is an assumption about the set, a colour image refutes it.

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
    if found != channels:
      raise _NotGreyError
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


def _decode_lazily(work: _Work, labels: np.ndarray | None, on_bad_image: str) -> Decoded:
  """Reads the labels alone. Images are RGB if `channels` is 0: looking for colour would decode the whole set.

  Bad images are found when they are needed; to leave them out, they must be found now.
  """
  loader = work.loader
  channels = loader.channels or 3
  if labels is None:
    labels = np.empty(work.count, np.int32)
    for chunk in work.chunks:
      labels[chunk] = [label for _, label, _ in work.read(chunk)]

  def decode_one(index: int) -> np.ndarray:
    file, _, name = next(work.read(np.array([index])))
    return loader.load(file, name, channels, loader.bit_depth).pixels

  bad: dict[int, str] = {}
  names: dict[int, str] = {}

  def check(chunk: np.ndarray) -> int:
    for index, (file, _, name) in zip(chunk.tolist(), work.read(chunk), strict=True):
      try:
        loader.load(file, name, channels, loader.bit_depth)
      except images.UnreadableError as error:
        bad[index], names[index] = error.reason, name
    return len(chunk)

  if on_bad_image == 'skip':
    _run(work, check, 'images checked')
  lazy = LazyImages(decode_one, np.arange(work.count), (*loader.first.shape[:2], channels), loader.location)
  return Decoded(lazy, labels, dict(sorted(bad.items())), {}, names, bit_depth=loader.bit_depth)


def _decode_once(work: _Work, copy: cache.Copy, order: np.ndarray, labels: np.ndarray | None, compare: bool) -> Decoded:
  """Decodes all images and leaves a copy, unless another process is doing that."""
  with copy.lock() as lock:
    decoded = _restore(copy, order, labels) if lock.waited else None
    if decoded is None:
      start = time.monotonic()
      decoded = _decode_now(work, labels, compare, lock.touch)
      if time.monotonic() - start > MIN_CACHED_SECONDS:
        _keep(copy, order, decoded, labels is None)
        if getattr(decoded.images, 'nbytes', 0) > cache.RESIDENT_BYTES:  # they are read from the copy, as in later runs
          decoded = _restore(copy, order, labels) or decoded
          command.return_freed_memory()
  return decoded


def _decode_now(work: _Work, labels: np.ndarray | None, compare: bool, touch: Callable[[], None]) -> Decoded:
  """Decodes all images. If `channels` is 0 and the first one is grey, all are assumed to be until one is not."""
  try:
    return _decode_as(work.loader.first.shape[2], work, labels, compare, touch)
  except _NotGreyError:
    return _decode_as(3, work, labels, compare, touch)


def _decode_as(
  channels: int, work: _Work, given: np.ndarray | None, compare: bool, touch: Callable[[], None]
) -> Decoded:
  """Decodes all images in threads and shows the progress."""
  loader, count = work.loader, work.count
  decoded = np.empty((count, *loader.first.shape[:2], channels), np.uint8)
  labels = np.zeros(count, np.int32) if given is None else given
  cut, bits = np.zeros(count, np.float32), np.zeros(count, np.uint8)
  signatures = np.zeros((count, twins.width(channels)), np.uint8) if compare else None
  bad: dict[int, str] = {}
  remarks: dict[int, str] = {}
  names: dict[int, str] = {}
  bit_depth = loader.bit_depth or 16

  def decode_chunk(chunk: np.ndarray) -> int:
    for index, (file, label, name) in zip(chunk.tolist(), work.read(chunk), strict=True):
      if given is None:
        labels[index] = label
      try:
        picture = loader.load(file, name, channels, bit_depth)
      except images.UnreadableError as error:
        decoded[index] = 0
        bad[index], names[index] = error.reason, name
        continue
      decoded[index], cut[index], bits[index] = picture.pixels, picture.cut, picture.bits
      if picture.remarks:
        remarks[index], names[index] = ' '.join(picture.remarks[0].split()).rstrip('.'), name
      touch()
    if signatures is not None and len(chunk):
      signatures[chunk] = twins.sign(decoded[chunk])
    return len(chunk)

  _run(work, decode_chunk, 'images decoded')
  highest = int(bits.max(initial=0))
  if 0 < highest < bit_depth and not loader.bit_depth:
    # The levels of the set use fewer bits than its files have. Only now that is known.
    bit_depth = highest
    deep = [chunk[bits[chunk] > 0] for chunk in work.chunks]
    _run(dataclasses.replace(work, chunks=[chunk for chunk in deep if len(chunk)]), decode_chunk, 'images scaled')
  cut = np.delete(cut, list(bad)) if bad else cut
  return Decoded(
    decoded,
    labels,
    dict(sorted(bad.items())),
    dict(sorted(remarks.items())),
    names,
    float(cut.mean()) if len(cut) else 0.0,
    loader.bit_depth or (bit_depth if highest else 0),
    None if signatures is None else twins.find(decoded, signatures),
  )


def _run(work: _Work, function: Callable[[np.ndarray], int], what: str) -> None:
  """Calls a function of chunks in threads and shows how many images are done."""
  counter, done = Counter(what, sum(map(len, work.chunks))), 0
  with (
    images.attributed_warnings(),
    contextlib.closing(read_ahead(work.chunks, function, len(work.chunks), group=1)) as counts,
  ):
    try:
      for number in counts:
        done += number
        counter.show(done)
    finally:
      counter.clear()


class _NotGreyError(Exception):
  """A set whose first image is grey contains a colour image."""


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
  copy.write(
    {**facts, 'cut': decoded.cut, 'bit_depth': decoded.bit_depth, 'twins': twice},
    {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)},
  )


def _restore(copy: cache.Copy, order: np.ndarray, labels: np.ndarray | None) -> Decoded | None:
  found = copy.read()
  if found is None:
    return None
  facts, arrays = found
  noted = [{int(order[place]): text for place, text in facts[name]} for name in ('bad', 'remarks', 'names')]
  bad, remarks = (dict(sorted(values.items())) for values in noted[:2])
  kept = arrays['labels'] if labels is None else labels
  twice = None
  if facts['twins'] is not None:
    groups, near = facts['twins']
    twice = [sorted(order[group].tolist()) for group in groups], [int(order[place]) for place in near]
  return Decoded(arrays['images'], kept, bad, remarks, noted[2], facts['cut'], facts['bit_depth'], twice)
