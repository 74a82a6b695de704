"""The splits of a set of image files: decoded, without files that cannot be read, checked for pictures that occur twice."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from cnn_jax.data import decode, listing, twins
from cnn_jax.data.decoded import Decoded


class File(Protocol):
  """A file of a set: `path` relative to the folder, `label`, and `stamp` from `decode.stamp`."""

  @property
  def path(self) -> str: ...
  @property
  def label(self) -> int: ...
  @property
  def stamp(self) -> tuple[int, ...]: ...


def load(
  root: str | os.PathLike,
  parts: Mapping[str, Sequence[File]],
  class_names: tuple[str, ...],
  config_data: Any,
) -> dict[str, Any]:
  """Decodes the files of all splits.

  Args:
    root: the folder.
    parts: the files of train, validation and test.
    class_names: of the labels.
    config_data: the section `config.data`.

  Returns:
    The fields `train`, `validation`, `test`, `notes`, `skipped` and `bit_depth` of `Dataset`.

  Raises:
    UsageError: as `decode.decode`.
  """
  listed = [file for part in parts.values() for file in part]
  order = np.array(sorted(range(len(listed)), key=lambda index: listed[index].path), np.int64)

  def read(indices: np.ndarray) -> Iterator[tuple[str, int, str]]:
    for index in indices:
      file = listed[index]
      yield os.path.join(root, file.path), file.label, listing.text(file.path)

  decoded = decode.decode(
    config_data,
    location=listing.text(os.path.realpath(root)) + (f' of {config_data.table}' if config_data.table else ''),
    fingerprint=decode.fingerprint((listed[index].path, *listed[index].stamp) for index in order),
    runs=[np.arange(len(listed))],
    read=read,
    labels=np.array([file.label for file in listed], np.int32),
    order=order,
    compare=True,
  )
  ends = np.cumsum([len(part) for part in parts.values()])
  splits = {
    name: decoded.select(np.arange(end - len(part), end), tuple(file.path for file in part))
    for (name, part), end in zip(parts.items(), ends, strict=True)
  }
  return {
    **splits,
    'notes': (*decoded.notes(config_data), *_describe_twins(decoded, parts, class_names)),
    'skipped': decoded.skipped(),
    'bit_depth': decoded.bit_depth,
  }


def _describe_twins(decoded: Decoded, parts: Mapping[str, Sequence[File]], class_names: tuple[str, ...]) -> list[str]:
  if decoded.twins is None:
    return ['The set is too large for memory, so it was not searched for pictures that occur twice.']
  if not decoded.twins[0]:
    return []
  return twins.describe(
    {name: [(listing.text(file.path), file.label) for file in part] for name, part in parts.items()},
    *decoded.twins,
    class_names,
  )
