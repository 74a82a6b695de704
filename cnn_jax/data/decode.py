"""Encoded images to uint8 arrays: in threads, with a decoded copy in the cache, or lazily if a set is too large."""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL

from cnn_jax import UsageError, files
from cnn_jax.data import Split, images
from cnn_jax.progress import Counter

MAX_DECODED_BYTES = 8 * 2**30
MIN_CACHED_SECONDS = 0.5  # a set that decodes faster is not worth the disk space of a copy
_CHUNK = 256  # images that a thread decodes before it reports progress
_GROUP = 16  # items that a thread reads at a time; for fewer, handing them over takes longer than reading them
_CACHE_VERSION = 1

Read = Callable[[np.ndarray], Iterator[tuple[Any, int, str | None]]]


def decode(
  config_data: Any, *, location: str, fingerprint: str, runs: Sequence[np.ndarray], read: Read
) -> tuple['np.ndarray | LazyImages', np.ndarray]:
  """Decodes a whole set, or reads the decoded copy that an earlier call left in the user's cache.

  Args:
    config_data: the section `config.data`; `image_size`, `channels` and `resize` apply to each image.
    location: identifies the set. The cached copy is found by it and by the settings that change the pixels.
    fingerprint: identifies the state of the set's files; a copy with another fingerprint is stale.
    runs: the indices 0..N-1, grouped so that one call of `read` can serve neighbours within a group.
    read: yields (encoded image or path, label, name for messages) for each index; it is called in threads.

  Returns:
    Images, uint8 (N, H, W, C), or `LazyImages` of that shape if they exceed `MAX_DECODED_BYTES`; labels, int32 (N,).

  Raises:
    UsageError: an image cannot be read, or two sizes meet and `image_size` is 0.
  """
  count = sum(map(len, runs))
  cache = _cache_file(config_data, location)
  cached = _read_cache(cache, fingerprint, count)
  if cached:
    return cached
  start = time.monotonic()
  loader = _Loader(config_data, read, runs[0][:1])
  chunks = [run[i : i + _CHUNK] for run in runs for i in range(0, len(run), _CHUNK)]
  if count * loader.first.nbytes > MAX_DECODED_BYTES:
    return _decode_lazily(loader, read, chunks, count)
  decoded, labels = _decode_now(loader, read, chunks, count)
  if time.monotonic() - start > MIN_CACHED_SECONDS:
    _write_cache(cache, fingerprint, decoded, labels)
  return decoded, labels


def select(
  decoded: 'np.ndarray | LazyImages', labels: np.ndarray, indices: np.ndarray, names: Sequence[str] | None = None
) -> Split:
  """Makes a split from some examples of a decoded set.

  Args:
    decoded, labels: the whole set, from `decode`.
    indices: sorted indices of the examples. Adjacent ones become a view, others a copy; lazy images stay lazy.
    names: of the examples of the split.
  """
  if isinstance(decoded, LazyImages):
    return Split(decoded.part(indices), labels[indices], names)
  if len(indices) and len(indices) == indices[-1] - indices[0] + 1:
    return Split(decoded[indices[0] : indices[-1] + 1], labels[indices], names)
  return Split(decoded[indices], labels[indices], names)


class LazyImages:
  """Images that are decoded, in threads, when they are indexed; see `RandomAccessImages`.

  Args:
    decode_one: maps an index to an image, uint8 (H, W, C); it is called in threads.
    indices: the images to hold.
    shape: (H, W, C).
  """

  dtype = np.dtype(np.uint8)

  def __init__(self, decode_one: Callable[[int], np.ndarray], indices: np.ndarray, shape: tuple[int, ...]):
    self._decode_one, self._indices = decode_one, indices
    self.shape: tuple[int, ...] = (len(indices), *shape)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: Any) -> np.ndarray:
    chosen = self._indices[index]
    if np.ndim(chosen) == 0:
      return self._decode_one(chosen)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
      decoded = list(pool.map(self._decode_one, chosen))
    return np.stack(decoded) if decoded else np.zeros((0, *self.shape[1:]), np.uint8)

  def part(self, indices: np.ndarray) -> 'LazyImages':
    """Returns the images at some indices, still lazy."""
    return LazyImages(self._decode_one, self._indices[indices], self.shape[1:])


def read_ahead(
  items: Iterable[Any], read: Callable[[Any], Any], ahead: int, group: int = _GROUP
) -> Generator[Any, None, None]:
  """Yields `read(item)` for each item, in order, while threads read the next items.

  Pillow decodes without holding Python's lock, and the network computes without holding it.

  Args:
    items: consumed only as far as needed.
    read: called in threads; its exceptions are raised here.
    ahead: roughly how many items may be read before the consumer asks for them.
    group: items that a thread reads at a time.
  """
  items = iter(items)
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  try:
    while True:
      while len(waiting) <= ahead // group and (chunk := list(itertools.islice(items, group))):
        waiting.append(pool.submit(lambda chunk: [read(item) for item in chunk], chunk))
      if not waiting:
        return
      yield from waiting.popleft().result()
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def fingerprint(facts: Iterable[Any]) -> str:
  """A hash of facts about files, such as their names and stamps, by their `repr`."""
  digest = hashlib.sha256()
  for fact in facts:
    digest.update(repr(fact).encode())
  return digest.hexdigest()


def stamp(status: os.stat_result) -> tuple[int, int]:
  """Size in bytes and time of modification in nanoseconds: they change if the file does."""
  return status.st_size, status.st_mtime_ns


class _Loader:
  """Loads single images of a set with its settings, and checks that all have the size of the first."""

  def __init__(self, config_data: Any, read: Read, first_index: np.ndarray):
    self.channels = config_data.channels
    self._size, self._resize = config_data.image_size, config_data.resize
    file, _, name = next(read(first_index))
    self.first = self._load(file, name, self.channels)
    self._first_name = name or file

  def load(self, file: Any, name: str | None, channels: int) -> np.ndarray:
    """Loads an image with 1 or 3 channels. If grey is an assumption about the set, a colour image refutes it.

    Raises:
      UsageError: the image cannot be read, or its size is not that of the first.
      _NotGreyError: `channels` is 1, the setting is 0, and the image is in colour.
    """
    assumed = channels == 1 and self.channels == 0
    image = self._load(file, name, 0 if assumed else channels)
    if image.shape[:2] != self.first.shape[:2]:
      raise UsageError(
        f'{name or file} has {image.shape[0]}x{image.shape[1]} pixels but {self._first_name} has '
        f'{self.first.shape[0]}x{self.first.shape[1]}; set config.data.image_size to resize all images to one size.'
      )
    if image.shape[2] != channels:
      raise _NotGreyError
    return image

  def _load(self, file: Any, name: str | None, channels: int) -> np.ndarray:
    return images.load_image(file, size=self._size, channels=channels, resize=self._resize, name=name)


def _decode_lazily(
  loader: _Loader, read: Read, chunks: Sequence[np.ndarray], count: int
) -> tuple[LazyImages, np.ndarray]:
  """Reads the labels alone. Images are RGB if `channels` is 0: looking for colour would decode the whole set."""
  channels = loader.channels or 3
  labels = np.empty(count, np.int32)
  for chunk in chunks:
    labels[chunk] = [label for _, label, _ in read(chunk)]

  def decode_one(index: int) -> np.ndarray:
    file, _, name = next(read(np.array([index])))
    return loader.load(file, name, channels)

  return LazyImages(decode_one, np.arange(count), (*loader.first.shape[:2], channels)), labels


def _decode_now(loader: _Loader, read: Read, chunks: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
  """Decodes all images. If `channels` is 0 and the first one is grey, all are assumed to be until one is not."""
  channels = loader.first.shape[2]
  try:
    return _decode_as(channels, loader, read, chunks, count)
  except _NotGreyError:
    return _decode_as(3, loader, read, chunks, count)


def _decode_as(
  channels: int, loader: _Loader, read: Read, chunks: Sequence[np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes all images in threads and shows the progress."""
  decoded = np.empty((count, *loader.first.shape[:2], channels), np.uint8)
  labels = np.empty(count, np.int32)

  def decode_chunk(chunk: np.ndarray) -> int:
    for index, (file, label, name) in zip(chunk, read(chunk), strict=True):
      decoded[index], labels[index] = loader.load(file, name, channels), label
    return len(chunk)

  counter, done = Counter('images decoded', count), 0
  with contextlib.closing(read_ahead(chunks, decode_chunk, len(chunks), group=1)) as counts:
    try:
      for number in counts:
        done += number
        counter.show(done)
    finally:
      counter.clear()
  return decoded, labels


class _NotGreyError(Exception):
  """A set whose first image is grey contains a colour image."""


def _cache_file(config_data: Any, location: str) -> pathlib.Path:
  settings = [PIL.__version__, location, config_data.image_size, config_data.channels, config_data.resize]
  key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
  return files.cache_dir() / f'decoded-v{_CACHE_VERSION}-{key}.npz'


def _read_cache(file: pathlib.Path, fingerprint: str, count: int) -> tuple[np.ndarray, np.ndarray] | None:
  """Reads the decoded copy; None if it is missing, stale or damaged. The zip format has checksums."""
  try:
    with open(file, 'rb') as stream, np.load(stream, allow_pickle=False) as arrays:
      if str(arrays['fingerprint']) != fingerprint:
        return None
      decoded, labels = arrays['images'], arrays['labels']
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None
  valid = decoded.dtype == np.uint8 and labels.dtype == np.int32 and decoded.ndim == 4
  return (decoded, labels) if valid and len(decoded) == len(labels) == count else None


def _write_cache(file: pathlib.Path, fingerprint: str, decoded: np.ndarray, labels: np.ndarray) -> None:
  with contextlib.suppress(OSError):  # a full disk, or a home that is read-only: the next run decodes again
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.open_atomically(file, private=True) as stream:
      np.savez(stream, fingerprint=np.array(fingerprint), images=decoded, labels=labels)
