"""Which example belongs to which split.

Official splits are kept. A split that a set lacks is carved out of train: first test, then validation, so that a
different `config.data.validation` never moves an example into or out of test. If the official test has no labels, as in
competitions, the official validation is what results are reported on: it is the test split then.
"""

import hashlib
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np

from cnn_jax import UsageError

PROMOTED = 'the official validation split is the test split, because the official test has no labels'  # for provenance


def by_class(
  official: Mapping[str, np.ndarray], labels: np.ndarray, config_data: Any
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Completes the official splits of a set; a missing one takes the same share of each class of train.

  Args:
    official: indices of the examples of `train` and of the other splits that the set has. Some sets publish a split
      without its labels, which are -1 then; such a split counts as missing. Validation replaces such a test.
    labels: int32 (N,) of all examples.
    config_data: gives the shares `test` and `validation`, and `split_seed`.

  Returns:
    Sorted indices of `train`, `validation` and `test`, and clauses about what was changed, for the provenance.
  """
  labelled = {split: indices for split, indices in official.items() if (labels[indices] >= 0).all()}
  train, carved, parts, rules = official['train'], [], {}, []
  if 'test' in official and 'test' not in labelled and 'validation' in labelled:
    labelled['test'] = labelled.pop('validation')
    rules.append(PROMOTED)
  for number, split in enumerate(('test', 'validation')):
    if split in labelled:
      parts[split] = labelled[split]
      continue
    seed = (config_data.split_seed, number)
    parts[split] = train[_stratified(labels[train], config_data[split], seed)]
    train = np.setdiff1d(train, parts[split])
    carved.append(split)
  if carved:
    rules.append(f'{" and ".join(carved)} carved out of train by class with split_seed {config_data.split_seed}')
  return {'train': train, 'validation': parts['validation'], 'test': parts['test']}, rules


def by_path(paths: Sequence[str], labels: np.ndarray, shares: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
  """Assigns files to splits: of each class those whose paths have the smallest hashes.

  A split gets its share of each class, rounded, and at least one file; but a file of each class stays in train. If a
  file comes or goes, at most one other file of its class leaves or joins a split, because the hashes of the others do
  not change.

  Args:
    paths: of the files, relative to the folder.
    labels: int32 (N,), their classes.
    shares: the share of each split to carve out, of what the splits before it leave over. No share of a split depends
      on the splits after it.
    seed: `config.data.split_seed`.

  Returns:
    Sorted indices of the files of `train` and of each of `shares`.
  """
  hashes = np.fromiter((_hash(seed, path) for path in paths), np.uint64, len(paths))
  order = np.lexsort((hashes, labels))
  parts: dict[str, list[np.ndarray]] = {split: [] for split in ('train', *shares)}
  for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
    for split, share in shares.items():
      count = min(max(round(share * len(members)), share > 0), max(len(members) - 1, 0))
      parts[split].append(members[:count])
      members = members[count:]
    parts['train'].append(members)
  return {split: np.sort(np.concatenate(chosen)) for split, chosen in parts.items()}


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


def _hash(seed: int, path: str) -> int:
  """A number below 2^64 that depends on the seed and the path alone."""
  return int.from_bytes(hashlib.sha256(f'{seed}:{path}'.encode('utf-8', 'surrogateescape')).digest()[:8], 'big')
