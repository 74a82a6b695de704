"""Images that are decoded when they are needed, in threads that read ahead."""

import collections
import concurrent.futures
import contextlib
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import numpy as np

from cnn_jax import UsageError
from cnn_jax.data import images
from cnn_jax.progress import Counter

MAX_LISTED = 20  # bad files that an error names
_AHEAD = 256  # images that may be decoded before their place in the array is reported as done
_GROUP = 16  # items that a thread reads at a time; for fewer, handing them over takes longer than reading them


def fits(num_bytes: int, config_data: Any) -> bool:
  """Whether decoded images are kept in memory, by `config.data.resident` and `config.data.megabytes`.

  Args:
    num_bytes: that they take.
    config_data: the section `config.data`.
  """
  return config_data.resident == 'always' or (
    config_data.resident == 'auto' and num_bytes <= 1_000_000 * config_data.megabytes
  )


class LazyImages:
  """Images that are decoded, in threads, when they are indexed; see `RandomAccessImages`.

  Args:
    decode_one: maps an index to an image, uint8 (H, W, C); it is called in threads.
    indices: the images to hold.
    shape: (H, W, C).
    location: of the set, for messages.
  """

  dtype = np.dtype(np.uint8)

  def __init__(
    self,
    decode_one: Callable[[int], np.ndarray],
    indices: np.ndarray,
    shape: tuple[int, ...],
    location: str = 'the set',
  ):
    self._decode_one, self._indices, self._location = decode_one, indices, location
    self.shape: tuple[int, ...] = (len(indices), *shape)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: Any) -> np.ndarray:
    chosen = self._indices[index]
    return self._decode_one(chosen) if np.ndim(chosen) == 0 else self._decode(chosen)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """Decodes all images into one array, which is all the memory that this takes, and shows the progress."""
    return self._decode(self._indices, Counter('images decoded', len(self))).astype(dtype or np.uint8, copy=False)

  def read(self, indices: np.ndarray) -> np.ndarray:
    """Decodes some images one after another, in the thread that calls; for callers that have threads of their own."""
    decoded = np.empty((len(indices), *self.shape[1:]), np.uint8)
    bad = {}
    for place, index in enumerate(self._indices[indices]):
      try:
        decoded[place] = self._decode_one(index)
      except images.UnreadableError as error:
        bad[error.name] = error.reason
    if bad:
      raise refuse(bad, len(self), self._location)
    return decoded

  def part(self, indices: np.ndarray) -> 'LazyImages':
    """Returns the images at some indices, still lazy."""
    return LazyImages(self._decode_one, self._indices[indices], self.shape[1:], self._location)

  def _decode(self, chosen: np.ndarray, counter: Counter | None = None) -> np.ndarray:
    decoded = np.empty((len(chosen), *self.shape[1:]), np.uint8)
    bad: dict[str, str] = {}

    def decode_into(place: int) -> int:
      try:
        decoded[place] = self._decode_one(chosen[place])
      except images.UnreadableError as error:
        bad[error.name] = error.reason
      return place

    with (
      images.attributed_warnings(),
      contextlib.closing(read_ahead(range(len(chosen)), decode_into, _AHEAD)) as places,
    ):
      for place in places:
        if counter:
          counter.show(place + 1)
    if counter:
      counter.clear()
    if bad:
      raise refuse(bad, len(chosen), self._location)
    return decoded


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


def refuse(bad: Mapping[str, str], count: int, location: str) -> UsageError:
  """The error about images that cannot be read.

  Args:
    bad: their names and, as the predicate of a sentence, the reasons.
    count: of all images.
    location: of the set.
  """
  listed = '; '.join(f'{name} {shorten(reason)}' for name, reason in itertools.islice(bad.items(), MAX_LISTED))
  more = f'; and {len(bad) - MAX_LISTED:,} more' if len(bad) > MAX_LISTED else ''
  return UsageError(
    f'{len(bad):,} of {count:,} images in {location} cannot be used: {listed}{more}; replace or remove them, or set '
    'config.data.on_bad_image=skip to leave them out.'
  )


def shorten(text: str, most: int = 120) -> str:
  """Cuts a text to a number of characters."""
  return text if len(text) <= most else f'{text[: most - 3]}...'
