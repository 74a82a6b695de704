"""Labels in a CSV file: which columns, which files, and one line for each table that cannot be used."""

import os

import pytest

from cnn_jax import UsageError
from cnn_jax.data import load_dataset, table
from tests.datasets import set_of_names, settings, write

pytestmark = pytest.mark.usefixtures('offline')

NAMES = [f'{i:02}.png' for i in range(12)]


@pytest.fixture
def pictures(tmp_path):
  for i, name in enumerate(NAMES):
    write(tmp_path / 'pictures' / name, 20 * i)
  return tmp_path / 'pictures'


def _write(path, rows, delimiter=',', encoding='utf-8', header='path,label'):
  lines = [header, *(','.join(row) for row in rows)]
  path.write_bytes('\n'.join(lines).replace(',', delimiter).encode(encoding))
  return path


def _rows(names=NAMES, classes=('cat', 'dog')):
  return [(name, classes[i % len(classes)]) for i, name in enumerate(names)]


def _load(path, directory='', **fields):
  return load_dataset(settings('folder', table=str(path), dir=str(directory), **fields))


def test_a_table_gives_the_classes_and_splits_are_carved_of_each(tmp_path, pictures):
  dataset = _load(_write(tmp_path / 'labels.csv', _rows()), pictures)
  assert dataset.class_names == ('cat', 'dog')
  assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [8, 2, 2]
  for split in (dataset.train, dataset.validation, dataset.test):
    for image, label, name in zip(split.images, split.labels, split.names, strict=True):
      number = NAMES.index(name)
      assert label == number % 2
      assert image[0, 0, 0] == 20 * number
  assert 'images of labels.csv in' in dataset.provenance


def test_paths_are_relative_to_the_table_unless_a_folder_is_given(pictures):
  assert set_of_names(_load(_write(pictures / 'labels.csv', _rows()))) == set(NAMES)
  rows = [(f'pictures/{name}', label) for name, label in _rows()]
  assert len(set_of_names(_load(_write(pictures.parent / 'labels.csv', rows)))) == 12


@pytest.mark.parametrize('delimiter', [',', ';', '\t', '|'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
def test_usual_forms_of_csv_are_read(pictures, delimiter, encoding):
  rows = [(name, f' "{label}"') for name, label in _rows(classes=('chât', 'dog'))]
  dataset = _load(_write(pictures / 'x.csv', rows, delimiter, encoding, 'Image Path,Class Name'))
  assert dataset.class_names == ('chât', 'dog')


@pytest.mark.parametrize(
  'header', ['id,label', 'filename,class', 'image_id,target', 'filepaths,labels', 'Image,Category', 'id,breed']
)
def test_usual_names_of_columns_are_known_and_suffixes_may_be_missing(pictures, header):
  rows = [(name.removesuffix('.png'), label) for name, label in _rows()]
  dataset = _load(_write(pictures / 'train.csv', rows, header=header))
  assert set_of_names(dataset) == set(NAMES)


def test_an_id_may_lie_in_a_directory_and_a_path_may_be_from_windows(tmp_path, pictures):
  rows = [(name.removesuffix('.png'), label) for name, label in _rows()]
  dataset = _load(_write(tmp_path / 'train.csv', rows))
  assert set_of_names(dataset) == {f'pictures/{name}' for name in NAMES}
  rows = [(f'pictures\\{name}', label) for name, label in _rows()]
  assert len(set_of_names(_load(_write(tmp_path / 'train.csv', rows)))) == 12


def test_a_column_may_give_the_splits(pictures):
  words = ['Training', 'train', 'TEST', 'val']
  rows = [(name, label, words[i // 2 % 4]) for i, (name, label) in enumerate(_rows())]
  dataset = _load(_write(pictures / 'x.csv', rows, header='file,label,set'))
  assert dataset.test.names == ('04.png', '05.png')
  assert dataset.validation.names == ('06.png', '07.png')
  assert len(dataset.train) == 8
  assert 'carved' not in dataset.provenance


def test_rows_that_are_not_used_are_noted(pictures):
  rows = [(name, label, 'train') for name, label in _rows()[:10]]
  rows += [rows[0], ('10.png', '', 'test'), ('11.png', '', 'test')]
  dataset = _load(_write(pictures / 'x.csv', rows, header='path,label,split'))
  assert len(set_of_names(dataset)) == 10
  assert any('2 rows' in note and 'have no label; they are not used' in note for note in dataset.notes)
  assert any('1 rows' in note and 'repeat an earlier row' in note for note in dataset.notes)


@pytest.mark.parametrize('cell', ['', 'nan', 'NaN', 'None', 'null', 'NA', '<NA>', '#N/A'])
def test_a_cell_without_a_value_is_no_class(pictures, cell):
  rows = [(*row, 'train' if i < 10 else 'test') for i, row in enumerate(_rows())]
  rows[11] = ('11.png', cell, 'test')
  rows[10] = ('10.png', cell, 'test')
  dataset = _load(_write(pictures / 'x.csv', rows, header='path,label,split'))
  assert dataset.class_names == ('cat', 'dog')
  assert any('2 rows' in note and 'have no label' in note for note in dataset.notes)


@pytest.mark.parametrize(
  'classes',
  [('none', 'some'), ('1', '10'), ('1.1', '1.10'), ('1.5', '1'), ('-1', '1'), ('0', '1.0'), ('nano', 'Nancy')],
)
def test_names_that_only_resemble_numbers_or_empty_cells_are_classes(pictures, classes):
  assert _load(_write(pictures / 'x.csv', _rows(classes=classes))).class_names == tuple(sorted(classes))


@pytest.mark.parametrize(
  'name',
  ['is_test', 'is_valid', 'isvalid', 'is_validation', 'is_train', 'isTrain', 'Is Training Image', 'test', 'Valid', 'dev',
   'train_or_test', 'in_test_set', 'fold', 'kfold', 'Fold_1', 'cv', 'cv_fold', 'data_split', 'split 2', 'trainTestSplit'],
)  # fmt: skip
def test_a_column_that_may_state_the_split_is_refused_unless_another_does(pictures, name):
  rows = [(*row, str(i % 6 == 0)) for i, row in enumerate(_rows())]
  with pytest.raises(UsageError, match=f"has the column '{name}', which may state the split; name it split and write"):
    _load(_write(pictures / 'x.csv', rows, header=f'path,label,{name}'))
  rows = [(*row, ('train', 'train', 'test', 'test')[i % 4]) for i, row in enumerate(rows)]
  dataset = _load(_write(pictures / 'x.csv', rows, header=f'path,label,{name},split'))
  assert len(dataset.test) == 6
  assert f"Columns of {pictures / 'x.csv'} that are not used: '{name}'." in dataset.notes


def test_other_columns_are_named_in_one_note(pictures):
  names = ['width', 'test_date', 'scaffold', 'train_id', 'latest', 'validated', 'tested', 'phase', 'class 2', '']
  names += ['z', 'y']
  rows = [(*row, *'abcdefghijkl') for row in _rows()]
  dataset = _load(_write(pictures / 'x.csv', rows, header='path,label,' + ','.join(names)))
  (note,) = [note for note in dataset.notes if 'Columns' in note]
  assert note.endswith(f'not used: {", ".join(map(repr, names[:10]))} and 2 more.')
  assert not any('Columns' in note for note in _load(_write(pictures / 'x.csv', _rows())).notes)


@pytest.mark.parametrize(
  ('rows', 'header', 'reason'),
  [
    (_rows(), 'picture,', "no column for the label in its header"),
    (_rows(), '00.png,cat', "no column for the path in its header"),
    (_rows(), 'file,path,label', "columns 'file' and 'path', either of which may be the path"),
    ([*_rows(), ('no.png', 'cat')], 'path,label', r"1 rows .* do not exist below .*: 'no.png' \(line 14\); correct"),
    ([*_rows(), ('00.png', 'dog')], 'path,label', r"1 rows .* contradict .*: '00.png' \(line 2 and line 14\); give"),
    ([*_rows(), ('./00.png', 'dog')], 'path,label', r'contradict an earlier row'),
    ([*_rows(), ('00.png', '')], 'path,label', r'1 rows of .* have no label: line 14'),
    ([*_rows(), ('00.png', 'nan')], 'path,label', r"1 rows .* have no label: line 14 \('nan'\); give .* or rename the cl"),
    (_rows(classes=('cat', 'dog', 'NULL')), 'path,label', r"4 rows .* have no label: line 4 \('NULL'\), line 7"),
    (_rows(classes=('1', '1.0')), 'path,label', "classes '1' and '1.0', which look alike"),
    (_rows(classes=('cat', '7', '007')), 'path,label', "classes '007' and '7', which look alike"),
    ([(*row, 'prod') for row in _rows()], 'path,label,split', r"12 rows .* unknown split: 'prod' \(line 2\)"),
    ([(*row, 'train' if i else '') for i, row in enumerate(_rows())], 'path,label,split', 'have no split: line 2'),
    ([(*row, 'test' if i % 2 else 'train') for i, row in enumerate(_rows())], 'path,label,split', "class 'dog'"),
    ([*_rows(), ('11.png',)], 'path,label', 'has 1 columns in line 14'),
    (_rows(classes=('cat', 'Cat')), 'path,label', "classes 'Cat' and 'cat', which look alike"),
    (_rows(classes=('cat',)), 'path,label', 'has 1 classes; it needs at least two'),
    ([('', 'cat')], 'path,label', 'no file name in line 2'),
    ([], 'path,label', 'has 0 classes'),
    ([('00.png', '"' + 'x' * 200_000)], 'path,label', 'is not a CSV file'),
    ([('/dev/zero', 'cat'), *_rows()], 'path,label', '/dev/zero is a device, not a file'),
    ([('pipe.png', 'cat'), *_rows()], 'path,label', 'pipe.png is a pipe, not a file'),
  ],
)  # fmt: skip
def test_each_unusable_table_is_one_clear_error(pictures, rows, header, reason):
  os.mkfifo(pictures / 'pipe.png')
  with pytest.raises(UsageError, match=reason) as error:
    _load(_write(pictures / 'x.csv', rows, header=header))
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 1000


def test_a_name_that_two_files_fit_is_refused(tmp_path, pictures):
  write(tmp_path / 'pictures' / 'more' / '00.png')
  rows = [(f'{name}', label) for name, label in _rows()]
  assert len(_load(_write(pictures / 'x.csv', rows)).train) == 8  # the path itself comes first
  with pytest.raises(UsageError, match=r"'00.png' in line 2, which .*00.png and .*00.png fit; give the path with its"):
    _load(_write(tmp_path / 'x.csv', rows))


@pytest.mark.parametrize(
  ('contents', 'reason'),
  [
    (b'', 'no column for the path'),
    (b'\xff\xfep\x00a\x00', 'is not UTF-8'),
    (b'path,label\n00.png,caf\xe9\n', r'is not UTF-8 \(line 2\)'),
    (b'path,label\n00.png,c\x00t\n', 'is not a CSV file'),
    (b'\x89PNG\r\n\x1a\n', 'is not UTF-8'),
  ],
)
def test_a_file_that_is_no_table_is_refused(pictures, contents, reason):
  (pictures / 'x.csv').write_bytes(contents)
  with pytest.raises(UsageError, match=reason):
    _load(pictures / 'x.csv')


def test_a_table_that_cannot_be_opened_is_refused(pictures, monkeypatch):
  os.mkfifo(pictures / 'pipe.csv')
  for name in ('missing.csv', 'pipe.csv', ''):
    with pytest.raises(UsageError, match=r'cannot read .*; give a CSV or Parquet file'):
      table.read(str(pictures / name), str(pictures))
  _write(pictures / 'x.csv', _rows())
  monkeypatch.setattr(table, '_MAX_BYTES', 10)
  with pytest.raises(UsageError, match='more than 10 bytes'):
    _load(pictures / 'x.csv')


def test_a_table_for_another_source_is_refused(pictures):
  with pytest.raises(UsageError, match=r"config.data.table is set, but config.data.source is 'bundled'"):
    load_dataset(settings('bundled', table=str(_write(pictures / 'x.csv', _rows()))))
