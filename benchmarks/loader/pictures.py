"""Pictures of the size of ImageNet's, made on the fly, as a folder, as a tar file and as a prepared TFDS set."""

import io
import json
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 375, 500
_CLASSES = ('even', 'odd')
_QUALITY = 90  # of JPEG, with halved chroma as most cameras write it
_NOISE = 15.0  # standard deviation of the levels; it makes a file as large as that of a photograph
_FEATURES = 'tensorflow_datasets.core.features.'


def write(root: pathlib.Path, count: int) -> dict[str, dict[str, Any]]:
  """Writes a set of JPEG files in three forms.

  Args:
    root: a new folder.
    count: of training pictures; two more are the test split.

  Returns:
    For each form, the fields of `config.data` that differ from their defaults.
  """
  encoded = {'train': [_encode(number) for number in range(count)], 'test': [_encode(count + i) for i in range(2)]}
  for split, data in encoded.items():
    for path, contents in _files(split, data):
      (root / 'folder' / path).parent.mkdir(parents=True, exist_ok=True)
      (root / 'folder' / path).write_bytes(contents)
    _write_tar(root / 'tar' / f'{split}.tar', data)
  _write_records(root / 'tfds' / 'pictures' / '1.0.0', encoded)
  return {
    'folder': {'source': 'folder', 'dir': str(root / 'folder')},
    'tar': {'source': 'tar', 'dir': str(root / 'tar')},
    'ArrayRecord': {'source': 'tfds', 'name': 'pictures', 'dir': str(root / 'tfds')},
  }


def _encode(seed: int) -> bytes:
  """A JPEG of octaves of smooth random colours, and noise."""
  rng = np.random.default_rng(seed)
  levels = np.full((HEIGHT, WIDTH, 3), 128.0, np.float32)
  for octave in range(7):
    cells = 4 * 2**octave
    coarse = rng.normal(0, 60 / 1.6**octave, (cells * HEIGHT // WIDTH + 1, cells, 3)).astype(np.float32)
    coarse = 0.6 * coarse + 0.4 * coarse.mean(axis=2, keepdims=True)  # photographs have more luma than chroma
    for channel in range(3):
      smooth = Image.fromarray(coarse[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
      levels[..., channel] += np.asarray(smooth)
  levels += rng.normal(0, _NOISE, (HEIGHT, WIDTH, 1))
  stream = io.BytesIO()
  Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).save(stream, 'JPEG', quality=_QUALITY)
  return stream.getvalue()


def _files(split: str, data: list[bytes]) -> Iterator[tuple[str, bytes]]:
  for number, contents in enumerate(data):
    yield f'{split}/{_CLASSES[number % 2]}/{number:06}.jpg', contents


def _write_tar(path: pathlib.Path, data: list[bytes]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for name, contents in _files('', data):
      member = tarfile.TarInfo(name.lstrip('/'))
      member.size = len(contents)
      tar.addfile(member, io.BytesIO(contents))


def _write_records(directory: pathlib.Path, encoded: dict[str, list[bytes]]) -> None:
  """Writes a prepared set in the form of TFDS."""
  from array_record.python.array_record_module import ArrayRecordWriter
  from tensorflow_datasets.proto import tf_example_pb2

  directory.mkdir(parents=True)
  for split, data in encoded.items():
    writer = ArrayRecordWriter(str(directory / f'pictures-{split}.array_record-00000-of-00001'), 'group_size:1')
    for number, contents in enumerate(data):
      example = tf_example_pb2.Example()
      example.features.feature['image'].bytes_list.value.append(contents)
      example.features.feature['label'].int64_list.value.append(number % 2)
      writer.write(example.SerializeToString())
    writer.close()
  image = {'dtype': 'uint8', 'shape': {'dimensions': ['-1', '-1', '3']}, 'encodingFormat': 'jpeg'}
  features = {
    'image': {'pythonClassName': f'{_FEATURES}image_feature.Image', 'image': image},
    'label': {'pythonClassName': f'{_FEATURES}class_label_feature.ClassLabel', 'classLabel': {'numClasses': '2'}},
  }
  kind = f'{_FEATURES}features_dict.FeaturesDict'
  info = {
    'name': 'pictures',
    'version': '1.0.0',
    'fileFormat': 'array_record',
    'splits': [{'name': split, 'shardLengths': [str(len(data))]} for split, data in encoded.items()],
  }
  (directory / 'features.json').write_text(
    json.dumps({'pythonClassName': kind, 'featuresDict': {'features': features}})
  )
  (directory / 'label.labels.txt').write_text('\n'.join(_CLASSES))
  (directory / 'dataset_info.json').write_text(json.dumps(info))
