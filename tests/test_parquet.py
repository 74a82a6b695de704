"""Labels in a Parquet file: types of columns, and one line for each file that cannot be used."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from cnn_jax import UsageError
from cnn_jax.data import load_dataset
from tests.datasets import png, settings

pytestmark = pytest.mark.usefixtures('offline')

SPLITS = ('train', 'validation', 'test')


def _table(root, columns, **options):
  pyarrow.parquet.write_table(pyarrow.table(columns), root / 'labels.parquet', **options)
  return load_dataset(settings('folder', table=str(root / 'labels.parquet'), validation=0.5, test=0.5))


@pytest.fixture
def pictures(tmp_path):
  for i in range(24):
    (tmp_path / f'{i}.png').write_bytes(png(i))
  return tmp_path


@pytest.mark.parametrize(
  ('labels', 'classes'),
  [
    ([(0, 2, 10)[i % 3] for i in range(24)], ('0', '10', '2')),
    (np.arange(24, dtype=np.uint8) % 3, ('0', '1', '2')),
    ([None if i > 20 else float(i % 3) for i in range(24)], ('0', '1', '2')),
    (pyarrow.array([f'class {i % 2} ' for i in range(24)]).dictionary_encode(), ('class 0', 'class 1')),
    (pyarrow.array([f'{i % 2}' for i in range(24)], pyarrow.large_string()), ('0', '1')),
    ([i % 2 == 0 for i in range(24)], ('False', 'True')),
  ],
)
def test_a_parquet_table_holds_names_or_numbers(pictures, labels, classes):
  split = ['test' if label is None else 'train' for label in (labels if isinstance(labels, list) else [0] * 24)]
  columns = {'image_id': list(range(24)), 'Label': labels, 'extra': [[1]] * 24} | (
    {'split': split} if 'test' in split else {}
  )
  dataset = _table(pictures, columns)
  assert dataset.class_names == classes
  assert any("labels.parquet that are not used: 'extra'." in note for note in dataset.notes)
  assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 24 - split.count('test')


def test_integers_in_csv_and_parquet_are_the_same_classes(pictures):
  labels = [(0, 2, 10)[i % 3] for i in range(24)]
  one = _table(pictures, {'path': [f'{i}.png' for i in range(24)], 'label': labels})
  (pictures / 'labels.csv').write_text('path,label\n' + '\n'.join(f'{i}.png,{label}' for i, label in enumerate(labels)))
  two = load_dataset(settings('folder', table=str(pictures / 'labels.csv'), validation=0.5, test=0.5))
  assert one.class_names == two.class_names
  for split in SPLITS:
    assert getattr(one, split).names == getattr(two, split).names
    assert getattr(one, split).labels.tolist() == getattr(two, split).labels.tolist()


PATHS = [f'{i}.png' for i in range(24)]


@pytest.mark.parametrize(
  ('columns', 'reason'),
  [
    ({'x': PATHS, 'label': PATHS}, r"no column for the path in its header \('x', 'label'\)"),
    ({'path': PATHS, 'Path': PATHS, 'label': PATHS}, "columns 'path' and 'Path', either of which"),
    ({'path': PATHS, 'label': ['a', 'b'] * 12, 'is_test': [True, False] * 12}, "column 'is_test', which may state the spl"),
    ({'image': [{'bytes': b'', 'path': 'x'}] * 24, 'label': PATHS}, "holds struct<.*> in its column 'image'; write text"),
    ({'path': PATHS, 'label': [[1]] * 24}, "holds list<.*> in its column 'label'"),
    ({'path': [b'x'] * 24, 'label': PATHS}, "holds binary in its column 'path'"),
    ({'path': PATHS, 'label': [0.5] * 24}, 'has 0.5 in row 1; write text or whole numbers'),
    ({'path': PATHS, 'label': [None] * 24}, 'column|no label|holds null'),
    ({'path': PATHS, 'label': ['a', 'b', None] * 8}, '8 rows of .* have no label: row 3, row 6'),
    ({'path': PATHS, 'label': ['a', 'b', 'nan'] * 8}, r"8 rows of .* have no label: row 3 \('nan'\), row 6"),
    ({'path': [*PATHS[:-1], 'no.png'], 'label': ['a', 'b'] * 12}, r"do not exist below .*: 'no.png' \(row 24\)"),
    ({'path': [*PATHS[:-1], None], 'label': ['a', 'b'] * 12}, 'no file name in row 24'),
    ({'path': ['x' * 2**18] * 24, 'label': PATHS}, 'more than 131,072 characters in row 1'),
    ({'path': PATHS[:1], 'label': ['a']}, 'has 1 classes'),
  ],
)  # fmt: skip
def test_each_unusable_parquet_table_is_one_clear_error(pictures, columns, reason):
  with pytest.raises(UsageError, match=reason) as error:
    _table(pictures, columns)
  assert '\n' not in str(error.value) and len(str(error.value)) < 1000


def _outcome(path):
  """The error of a table, or ''."""
  try:
    load_dataset(settings('folder', table=str(path)))
  except UsageError as error:
    return str(error)
  return ''


def test_a_damaged_parquet_file_is_one_line(pictures):
  path = pictures / 'labels.parquet'
  dataset = _table(pictures, {'path': PATHS, 'label': ['a', 'b'] * 12})
  whole, outcomes, rng = path.read_bytes(), [], np.random.default_rng(0)
  for start in (0, 4, *range(10, len(whole), len(whole) // 30)):
    damaged = bytearray(whole)
    damaged[start : start + 3] = rng.bytes(3)
    for contents_now in (bytes(damaged), whole[:start]):
      path.write_bytes(contents_now)
      outcomes.append(_outcome(path))
  assert all('\n' not in text and len(text) < 1000 for text in outcomes)
  assert any('is not a readable Parquet file' in text for text in outcomes)
  path.write_bytes(whole)
  assert load_dataset(settings('folder', table=str(path))).class_names == dataset.class_names
  path.rename(pictures / 'labels.dat')  # the first bytes tell
  assert load_dataset(settings('folder', table=str(pictures / 'labels.dat'))).class_names == dataset.class_names
  with pytest.raises(UsageError, match=r'cannot read .*: No such file.*; give a CSV or Parquet file'):
    load_dataset(settings('folder', table=str(path)))
