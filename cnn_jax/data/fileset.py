"""The splits of a set of image files: decoded, without files that cannot be read, checked for pictures that occur twice."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cnn_jax.data import decode, listing, twins
from cnn_jax.data.decoded import Decoded
from cnn_jax.data.paths import Files


def load(
  root: str | os.PathLike,
  files: Files,
  parts: Mapping[str, np.ndarray],
  class_names: tuple[str, ...],
  config_data: Any,
  confirm: Callable[[str, np.ndarray], None] | None = None,
) -> dict[str, Any]:
  """Decodes the files of all splits.

  Args:
    root: the folder.
    files: all, with their labels, sorted by path.
    parts: the indices of the files of train, validation and test.
    class_names: of the labels.
    config_data: the section `config.data`.
    confirm: called with the path and the stamp of each file before it is read; it raises if the file is another one.

  Returns:
    The fields `train`, `validation`, `test`, `notes`, `skipped` and `bit_depth` of `Dataset`.

  Raises:
    UsageError: as `decode.decode`.
  """
  chosen = np.concatenate(list(parts.values()))
  places = np.empty(len(files), np.int64)
  places[chosen] = np.arange(len(chosen))
  names, labels, sizes = files.paths[chosen], files.labels[chosen], files.sizes[chosen]
  stamps = files.stamps[chosen, :2] if confirm is not None else None

  def read(indices: np.ndarray) -> Iterator[tuple[str, int, str]]:
    for index in indices:
      path = names[index]
      if confirm is not None and stamps is not None:
        confirm(path, stamps[index])
      yield os.path.join(root, path), labels[index], listing.text(path)

  decoded = decode.decode(
    config_data,
    location=listing.text(os.path.realpath(root)) + (f' of {config_data.table}' if config_data.table else ''),
    fingerprint=files.fingerprint(),
    runs=[np.arange(len(chosen))],
    read=read,
    labels=labels,
    order=places,
    compare=True,
  )
  ends = np.cumsum([len(part) for part in parts.values()])
  spans = {name: slice(end - len(part), end) for (name, part), end in zip(parts.items(), ends, strict=True)}
  splits = {
    name: decoded.select(np.arange(span.start, span.stop), names[span].text(), sizes[span])
    for name, span in spans.items()
  }
  labelled = {name: (names[span].text(), labels[span]) for name, span in spans.items()}
  return {
    **splits,
    'notes': (*decoded.notes(config_data), *describe_twins(decoded, labelled, class_names)),
    'skipped': decoded.skipped(),
    'bit_depth': decoded.bit_depth,
  }


def describe_twins(
  decoded: Decoded, parts: Mapping[str, tuple[Sequence[str], np.ndarray]], class_names: tuple[str, ...]
) -> list[str]:
  """Describes the pictures that occur twice, for `Dataset.notes`.

  Args:
    decoded: one split after another.
    parts: names and labels of the images of each split.
    class_names: of the labels.
  """
  if decoded.twins is None:
    return ['The set is too large for memory, so it was not searched for pictures that occur twice.']
  if not decoded.twins[0]:
    return []
  return twins.describe(
    {name: list(zip(names, labels.tolist(), strict=True)) for name, (names, labels) in parts.items()},
    *decoded.twins,
    class_names,
  )
