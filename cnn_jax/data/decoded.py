"""A decoded set, its splits, and what was noticed while it was decoded."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cnn_jax import UsageError
from cnn_jax.data import Split, images
from cnn_jax.data.cache import Rows
from cnn_jax.data.lazy import LazyImages, shorten

MIN_CUT = 0.1  # the share of the pictures that cropping must remove to be worth a note
_MAX_EXAMPLES = 5  # files that a note names


@dataclasses.dataclass(frozen=True)
class Decoded:
  """A decoded set.

  Attributes:
    images: uint8 (N, H, W, C); `cache.Rows` of that shape if they exceed `cache.RESIDENT_BYTES`, and `LazyImages` if
      they are not kept in memory; see `lazy.fits`.
    labels: int32 (N,).
    bad: why images could not be read, by index; `select` leaves these out.
    remarks: oddities that did not prevent reading, by index.
    names: of the images in `bad` and `remarks`, by index.
    cut: the mean share of the area of the images that cropping removed.
    bit_depth: the bits that the levels of 16-bit files use; 0 if there are none, or if that is not known yet.
    twins: from `twins.find`, pictures that occur twice; None if they were not looked for.
  """

  images: 'np.ndarray | LazyImages | Rows'
  labels: np.ndarray
  bad: Mapping[int, str] = dataclasses.field(default_factory=dict)
  remarks: Mapping[int, str] = dataclasses.field(default_factory=dict)
  names: Mapping[int, str] = dataclasses.field(default_factory=dict)
  cut: float = 0.0
  bit_depth: int = 0
  twins: tuple[list[list[int]], list[int]] | None = None

  def select(self, indices: np.ndarray, names: Sequence[str] | None = None, sizes: np.ndarray | None = None) -> Split:
    """Makes a split from some examples, without those that could not be read.

    Args:
      indices: sorted indices of the examples. Adjacent ones become a view, others a copy; lazy images stay lazy.
      names, sizes: of the examples of the split; see `Split`.

    Raises:
      UsageError: none of the images can be read.
    """
    if self.bad and len(indices):
      good = np.array([index not in self.bad for index in indices.tolist()])
      if not good.any():
        index = int(indices[0])
        raise UsageError(
          f'none of the {len(indices)} images of a split can be read, such as {self.names[index]}, which '
          f'{self.bad[index]}; add some, or remove the split.'
        )
      names = names and tuple(itertools.compress(names, good))
      indices, sizes = indices[good], None if sizes is None else sizes[good]
    labels = self.labels[indices]
    if isinstance(self.images, LazyImages | Rows):
      return Split(self.images.part(indices), labels, names, sizes)
    if len(indices) and len(indices) == indices[-1] - indices[0] + 1:
      return Split(self.images[indices[0] : indices[-1] + 1], labels, names, sizes)
    return Split(self.images[indices], labels, names, sizes)

  def notes(self, config_data: Any) -> list[str]:
    """What the user should know about the images of a set, a line each; for `Dataset.notes`."""
    notes = []
    if self.bad:
      listed = _examples(f'{self.names[index]} {reason}' for index, reason in self.bad.items())
      notes.append(f'Images that cannot be read and are left out: {len(self.bad):,} ({listed}).')
    short = [self.names[index] for index, remark in self.remarks.items() if remark == images.TRUNCATED]
    if short:
      notes.append(
        f'JPEG files that lack their last bytes, and are read as far as they go: {len(short):,} ({_examples(short)}).'
      )
    odd = {index: remark for index, remark in self.remarks.items() if remark != images.TRUNCATED}
    if odd:
      listed = _examples(f'{self.names[index]}: {remark}' for index, remark in odd.items())
      notes.append(f'Images with damaged extra data, which is ignored: {len(odd):,} ({listed}).')
    if 0 < self.bit_depth < 16 and not config_data.bit_depth:
      notes.append(
        f'The 16-bit images hold levels of {self.bit_depth} bits, of which the highest is read as white; '
        'set config.data.bit_depth=16 if they are dark on purpose.'
      )
    if self.cut > MIN_CUT:
      notes.append(
        f'Cropping to the shape of the input cuts off {100 * self.cut:.0f} % of the area of the images on average; '
        'set config.data.resize to pad or stretch to keep all of it.'
      )
    return notes

  def skipped(self) -> tuple[tuple[str, str], ...]:
    """The images that were left out, for `Dataset.skipped`."""
    return tuple((self.names[index], reason) for index, reason in sorted(self.bad.items()))


def _examples(items: Iterable[str]) -> str:
  listed = list(map(shorten, items))
  more = f', and {len(listed) - _MAX_EXAMPLES:,} more' if len(listed) > _MAX_EXAMPLES else ''
  return ', '.join(listed[:_MAX_EXAMPLES]) + more
