"""The same images through all sources that read files: the same pixels and labels, in memory and read on demand."""

import concurrent.futures
import functools

import cloudpickle
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from cnn_jax.data import decode, load_dataset, opened, prepared, workers
from tests.datasets import contents, make_tar, make_tfds, png, settings

pytestmark = pytest.mark.usefixtures('offline')

SPLITS = ('train', 'validation', 'test')
CLASSES = ('cat', 'dog')
MODES = {'grey': lambda i: 'L', 'rgb': lambda i: 'RGB', 'mixed': lambda i: ('L', 'RGB')[i % 3 == 1]}


def _images(mode):
  """For each split (name, class, PNG) of 12 images."""
  return {
    split: [(f'{i:02}', i % 2, png(70 * s + 5 * i, mode=MODES[mode](i))) for i in range(12)]
    for s, split in enumerate(SPLITS)
  }


def _folder(root, images):
  for split, members in images.items():
    for name, label, data in members:
      path = root / split / CLASSES[label] / f'{name}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
  return settings('folder', dir=str(root))


def _rows(images):
  return [
    {'path': f'{split}/{CLASSES[label]}/{name}.png', 'label': CLASSES[label], 'split': split}
    for split, members in images.items()
    for name, label, _ in members
  ]


def _csv(root, images):
  config_data = _folder(root, images)
  lines = ['path,label,split', *(','.join(row.values()) for row in _rows(images))]
  (root / 'labels.csv').write_text('\n'.join(lines))
  config_data.table = str(root / 'labels.csv')
  return config_data


def _parquet(root, images):
  config_data = _folder(root, images)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_rows(images)), root / 'labels.parquet')
  config_data.table = str(root / 'labels.parquet')
  return config_data


def _tar(root, images):
  for split, members in images.items():
    for number in range(2):
      some = members[6 * number : 6 * number + 6]
      both = [((f'{name}.png', data), (f'{name}.cls', str(label).encode())) for name, label, data in some]
      make_tar(root / f'{split}-{number}.tar', [member for pair in both for member in pair])
  (root / 'classes.txt').write_text('\n'.join(CLASSES))
  return settings('tar', dir=str(root))


def _tar_of_folders(root, images):
  for split, members in images.items():
    make_tar(root / f'{split}.tar', [(f'{CLASSES[label]}/{name}.png', data) for name, label, data in members])
  return settings('tar', dir=str(root))


def _tfds(root, images):
  labels = {split: [label for _, label, _ in members] for split, members in images.items()}
  data = {split: [data for _, _, data in members] for split, members in images.items()}
  return settings('tfds', name='toy', dir=str(make_tfds(root, labels, images=data)))


SOURCES = {
  'folder': _folder,
  'csv': _csv,
  'parquet': _parquet,
  'tar': _tar,
  'tar of folders': _tar_of_folders,
  'tfds': _tfds,
}


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize(
  ('mode', 'channels'), [('grey', 0), ('grey', 3), ('rgb', 0), ('rgb', 1), ('mixed', 0), ('mixed', 1)]
)
def test_all_sources_give_the_same(tmp_path, mode, channels, source):
  images = _images(mode)
  config_data = SOURCES[source](tmp_path / 'set', images)
  config_data.channels = channels
  whole = load_dataset(config_data)
  config_data.resident = 'never'
  lazy = load_dataset(config_data)
  channels = channels or (1 if mode == 'grey' else 3)
  assert whole.class_names == lazy.class_names == CLASSES
  for s, split in enumerate(SPLITS):
    expected = set()
    for i, (_, label, _) in enumerate(images[split]):
      level = 70 * s + 5 * i
      pixel = [level] if channels == 1 else [level] * 3
      if MODES[mode](i) == 'RGB':
        pixel = [level, 0, 0] if channels == 3 else [round(0.299 * level)]
      expected.add((np.full((4, 4, channels), pixel, np.uint8).tobytes(), label))
    assert contents(getattr(whole, split)) == expected
    part = getattr(lazy, split)
    assert isinstance(part.images, decode.LazyImages)
    copy = cloudpickle.loads(cloudpickle.dumps(part.images))  # as it travels to the processes that read
    np.testing.assert_array_equal(copy.read(np.arange(12)), getattr(whole, split).images)
    np.testing.assert_array_equal(part.images[:], getattr(whole, split).images)
    np.testing.assert_array_equal(part.labels, getattr(whole, split).labels)


@pytest.mark.faults
@pytest.mark.parametrize('source', ['csv', 'tar', 'tfds'])
def test_processes_read_the_same(tmp_path, source):
  config_data = SOURCES[source](tmp_path / 'set', _images('mixed'))
  config_data.resident, config_data.channels = 'never', 3
  images = load_dataset(config_data).train.images
  groups = [np.array([i, 11 - i]) for i in range(6)]
  found = list(workers.read(functools.partial(_read_group, images, groups), range(6), threads=2, ahead=4, workers=2))
  np.testing.assert_array_equal(found, [images[group] for group in groups])


def _read_group(images, groups, number):
  return images.read(groups[number])


def test_labels_of_a_large_tfds_set_are_read_once(tmp_path, monkeypatch):
  labels = {'train': [0, 1] * 40, 'test': [1, 0, 0]}
  config_data = settings('tfds', name='toy', dir=str(make_tfds(tmp_path / 'tfds', labels)), resident='never')
  read, numbers = prepared.Records.read, []
  monkeypatch.setattr(prepared.Records, 'read', lambda self, indices: (numbers.extend(indices), read(self, indices))[1])
  monkeypatch.setattr(decode, '_SAMPLE', 1)
  first = load_dataset(config_data)
  assert len(numbers) == 85  # all, the first to find the size, and a sample to find the colour
  numbers.clear()
  again = load_dataset(config_data)
  assert len(numbers) == 2
  for split in SPLITS:
    np.testing.assert_array_equal(getattr(again, split).labels, getattr(first, split).labels)
  (index,) = (tmp_path / 'cache' / 'cnn_jax').glob('index-*')
  index.write_bytes(index.read_bytes()[:-40])  # damaged: it counts as missing
  load_dataset(config_data)
  assert len(numbers) == 87
  make_tfds(tmp_path / 'more', labels | {'train': [1, 0] * 40})
  shard = 'toy/1.0.0/toy-train.array_record-00000-of-00001'
  (tmp_path / 'more' / shard).replace(tmp_path / 'tfds' / shard)
  assert load_dataset(config_data).train.labels[:2].tolist() != first.train.labels[:2].tolist()


def test_records_are_read_in_threads_and_few_files_are_open(tmp_path, monkeypatch):
  monkeypatch.setattr(opened, 'MAX_OPEN', 1)
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1] * 20, 'test': [0, 1]})
  found = prepared.describe(root / 'toy' / '1.0.0')
  records = prepared.Records(found, 'train')
  expected = list(records.read(range(40)))
  order = np.random.default_rng(0).integers(0, 40, 400).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(lambda i: next(records.read([i])), order)) == [expected[i] for i in order]
  assert list(cloudpickle.loads(cloudpickle.dumps(records)).read([39, 0])) == [expected[39], expected[0]]


@pytest.mark.parametrize('source', ['folder', 'csv', 'tar', 'tar of folders', 'tfds'])
@pytest.mark.parametrize('with_validation', [True, False])
def test_the_official_validation_replaces_a_test_without_labels(tmp_path, source, with_validation):
  images = _images('grey')
  if not with_validation:
    del images['validation']
  whole = images | {'test': [(name, -1, data) for name, _, data in images['test']]}
  root = tmp_path / 'set'
  if source == 'tfds':
    config_data = _tfds(root, whole)
  else:
    config_data = SOURCES[source](root, {split: part for split, part in images.items() if split != 'test'})
    config_data.dir = str(root)
  if source == 'folder':
    (root / 'test').mkdir()
    for name, _, data in whole['test']:
      (root / 'test' / f'{name}.png').write_bytes(data)
  elif source == 'csv':
    with open(root / 'labels.csv', 'a') as table:
      table.writelines(f'\n{name}.png,,test' for name, _, _ in whole['test'])
  elif source.startswith('tar'):
    make_tar(root / 'test.tar', [(f'{name}.png', data) for name, _, data in whole['test']])
  config_data.validation = config_data.test = 0.2
  dataset = load_dataset(config_data)
  sizes = [len(getattr(dataset, split)) for split in SPLITS]
  assert ('the official validation split is the test split' in dataset.provenance) == with_validation
  if with_validation:
    assert sizes == [10, 2, 12]
    assert sorted(dataset.test.images[:, 0, 0, 0].tolist()) == list(range(70, 130, 5))
    assert '; validation carved out of train by class' in dataset.provenance
  else:
    assert sizes == [8, 2, 2]
    assert '; test and validation carved out of train by class' in dataset.provenance
