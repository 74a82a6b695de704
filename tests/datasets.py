"""Small data sets on disk for tests, and settings that load them."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from cnn_jax.config import default_config


def settings(source, **fields):
  """The section `config.data` with some fields set."""
  config = default_config().data
  config.source = source
  for name, value in fields.items():
    config[name] = value
  return config


def write(path, level=0, size=(4, 4), mode='L'):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, level if mode == 'L' else (level, 0, 0)).save(path)


def make_folder(root, splits=('train', 'test'), count=30):
  """Writes an image folder. Image i of class c in split s has the level 100 s + 50 c + i."""
  for s, split in enumerate(splits):
    for c, name in enumerate(('cat', 'dog')):
      for i in range(count):
        write(root / split / name / f'{i:02}.png', 100 * s + 50 * c + i)
  return root


def make_noisy_folder(root, count, size, spread):
  """Writes `count` noisy RGB pictures per split of two classes, `night` and `day`, whose mean levels differ."""
  rng = np.random.default_rng(0)
  for split in ('train', 'test'):
    for level, name in ((60, 'night'), (190, 'day')):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = np.clip(rng.normal(level, spread, (*size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / split / name / f'{i}.png')


def make_tar(path, members, **fields):
  """Writes a tar file. `members` are pairs of a name or a `TarInfo` and bytes; `fields` are those of `tarfile.open`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w', **fields) as archive:
    for name, data in members:
      member = tarfile.TarInfo(name) if isinstance(name, str) else name
      if member.isreg():
        member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return path


def png(level=0, size=(4, 4), mode='L'):
  """A PNG file of one level."""
  stream = io.BytesIO()
  Image.new(mode, size, level if mode == 'L' else (level, 0, 0)).save(stream, 'PNG')
  return stream.getvalue()


def contents(split):
  """The set of (pixels, label) of a split, without its order."""
  return {(image.tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True)}


def set_of_names(dataset):
  """The names of all images, over all splits."""
  return {*dataset.train.names, *dataset.validation.names, *dataset.test.names}


def _field(number, payload):
  def varint(value):
    more = value >> 7
    return bytes([value & 127 | (128 if more else 0)]) + (varint(more) if more else b'')

  return varint(number << 3 | 2) + varint(len(payload)) + payload


def _example(image, label):
  """A serialised tf.train.Example. A label of -1 is encoded as protobuf does it."""
  number = label % 2**64
  digits = []
  while number > 127:
    digits.append(number & 127 | 128)
    number >>= 7
  label = _field(3, _field(1, bytes([*digits, number])))
  entries = [_field(1, _field(1, b'image') + _field(2, _field(1, _field(1, image))))]
  entries += [_field(1, _field(1, b'label') + _field(2, label))]
  return _field(1, b''.join(entries))


def make_tfds(root, splits, name='toy', size=4, images=None):
  """Writes a prepared TFDS set.

  `splits` maps a split to its labels; image i of split s has the level 60 s + i, or is `images[split][i]`.
  """
  from array_record.python import array_record_module

  directory = root / name / '1.0.0'
  directory.mkdir(parents=True)
  for s, (split, labels) in enumerate(splits.items()):
    file = directory / f'{name}-{split}.array_record-00000-of-00001'
    writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1')
    for i, label in enumerate(labels):
      writer.write(_example(images[split][i] if images else png(60 * s + i, (size, size)), label))
    writer.close()
  feature = 'tensorflow_datasets.core.features.'
  shape = {'dimensions': [str(size), str(size), '1']}
  features = {
    'image': {
      'image': {'dtype': 'uint8', 'shape': shape},
      'pythonClassName': feature + 'image_feature.Image',
    },
    'label': {'classLabel': {'numClasses': '2'}, 'pythonClassName': feature + 'class_label_feature.ClassLabel'},
  }
  python_class = feature + 'features_dict.FeaturesDict'
  (directory / 'features.json').write_text(
    json.dumps({'featuresDict': {'features': features}, 'pythonClassName': python_class})
  )
  (directory / 'label.labels.txt').write_text('cat\ndog\n')
  info = {
    'name': name,
    'version': '1.0.0',
    'fileFormat': 'array_record',
    'splits': [
      {
        'name': split,
        'shardLengths': [str(len(labels))],
        'numBytes': '1',
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
      }
      for split, labels in splits.items()
    ],
  }
  (directory / 'dataset_info.json').write_text(json.dumps(info))
  return root
