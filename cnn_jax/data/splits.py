"""Which example belongs to which split.

Official splits are kept. A split that a set lacks is carved out of train: first test, then validation, so that a
different `config.data.validation` never moves an example into or out of test.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np

from cnn_jax import UsageError


def by_class(
  official: Mapping[str, np.ndarray], labels: np.ndarray, config_data: Any
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Completes the official splits of a set; a missing one takes the same share of each class of train.

  Args:
    official: indices of the examples of `train` and of the other splits that the set has. Some sets publish a split
      without its labels, which are -1 then; such a split counts as missing.
    labels: int32 (N,) of all examples.
    config_data: gives the shares `test` and `validation`, and `split_seed`.

  Returns:
    Sorted indices of `train`, `validation` and `test`, and the names of the splits that were carved out of train.
  """
  train, carved, parts = official['train'], [], {}
  for number, split in enumerate(('test', 'validation')):
    if split in official and (labels[official[split]] >= 0).all():
      parts[split] = official[split]
      continue
    seed = (config_data.split_seed, number)
    parts[split] = train[_stratified(labels[train], config_data[split], seed)]
    train = np.setdiff1d(train, parts[split])
    carved.append(split)
  return {'train': train, 'validation': parts['validation'], 'test': parts['test']}, carved


def by_path(paths: Iterable[str], shares: Mapping[str, float], seed: int) -> list[str]:
  """Assigns files to splits by a hash of their paths, so that a file stays in its split if others come and go.

  Args:
    paths: of the files, relative to the folder.
    shares: the share of each split to carve out, of what the splits before it leave over.
    seed: `config.data.split_seed`.

  Returns:
    The split of each file: one of `shares`, or 'train'.
  """
  edges, edge = {}, 0.0
  for split, share in shares.items():
    edge += (1 - edge) * share
    edges[split] = edge

  def assign(path: str) -> str:
    place = _hash(seed, path)
    return next((split for split, edge in edges.items() if place < edge), 'train')

  return [assign(path) for path in paths]


def check(
  parts: Mapping[str, Sized],
  name: str,
  config_data: Any,
  remedy: str = 'change config.data.validation or config.data.test',
) -> None:
  """Checks that no split is empty, except a validation split of share 0.

  Args:
    parts: the examples of each split.
    name: of the set, for the message.
    config_data: gives the share of validation.
    remedy: what the message asks for.

  Raises:
    UsageError: a split is empty.
  """
  for split, part in parts.items():
    if not len(part) and not (split == 'validation' and config_data.validation == 0):
      raise UsageError(f'{name} leaves the {split} split empty; {remedy}.')


def _stratified(labels: np.ndarray, share: float, seed: tuple[int, int]) -> np.ndarray:
  """Sorted indices of a random share of the examples, the same share of each class."""
  chosen = []
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((*seed, int(label)))))
    chosen.append(rng.permutation(members)[: round(share * len(members))])
  return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def _hash(seed: int, path: str) -> float:
  """A number in [0, 1) that depends on the seed and the path alone."""
  return int.from_bytes(hashlib.sha256(f'{seed}:{path}'.encode()).digest()[:8], 'big') / 2**64
