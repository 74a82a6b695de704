"""Image folders: layouts, splits by path, and one clear error for each unusable folder."""

import itertools
import subprocess

import numpy as np
import pytest

from cnn_jax import UsageError
from cnn_jax.data import layout, load_dataset
from cnn_jax.data.layout import SPLITS
from tests.datasets import make_folder, set_of_names, settings, write

pytestmark = pytest.mark.usefixtures('offline')


def build(root, entries):
  """Makes what each entry names: DIR/ a directory, DIR/* two images, a -> b a link, others files of small images."""
  numbers = itertools.count()
  for entry in entries:
    name, arrow, target = entry.partition(' -> ')
    path = root / name
    if arrow:
      path.symlink_to(target)
    elif name.endswith('/'):
      path.mkdir(parents=True)
    elif name.endswith('*'):
      for i in range(2):
        write(path.parent / f'{i}.png', next(numbers))
    elif name.endswith(('.png', '.jpg')):
      write(path, next(numbers))
    else:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text('x')


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


def test_a_validation_directory_leaves_train_whole(tmp_path):
  dataset = load_dataset(settings('folder', dir=str(make_folder(tmp_path, ('train', 'validation', 'test'), 3))))
  assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [6, 6, 6]
  assert all(name.startswith('validation/') for name in dataset.validation.names)


def test_one_level_is_split_by_class_and_path_wherever_it_lies(tmp_path):
  make_folder(tmp_path / 'some', ('.',), 50)
  one = load_dataset(settings('folder', dir=str(tmp_path / 'some')))
  for split, count in ((one.train, 41), (one.validation, 4), (one.test, 5)):
    assert np.bincount(split.labels).tolist() == [count, count]
  (tmp_path / 'some').rename(tmp_path / 'moved')
  moved = load_dataset(settings('folder', dir=str(tmp_path / 'moved')))
  assert [getattr(moved, split).names for split in SPLITS] == [getattr(one, split).names for split in SPLITS]
  other = load_dataset(settings('folder', dir=str(tmp_path / 'moved'), split_seed=1))
  assert set(other.test.names) != set(one.test.names)
  fewer = load_dataset(settings('folder', dir=str(tmp_path / 'moved'), validation=0.3))
  assert fewer.test.names == one.test.names


def test_each_image_has_its_name_and_size(tmp_path):
  make_folder(tmp_path, count=5)
  dataset = load_dataset(settings('folder', dir=str(tmp_path)))
  for split in (dataset.train, dataset.validation, dataset.test):
    assert split.sizes.tolist() == [(tmp_path / name).stat().st_size for name in split.names]


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
  with pytest.raises(UsageError, match='1 of 41 images .*broken.png is a text file; replace or remove them'):
    load_dataset(settings('folder', dir=str(tmp_path)))


def test_hidden_files_other_files_and_loops_are_not_used(tmp_path):
  make_folder(tmp_path, count=10)
  (tmp_path / 'train' / 'cat' / '.hidden.png').write_bytes(b'no')
  (tmp_path / 'train' / 'cat' / 'notes.txt').write_bytes(b'no')
  (tmp_path / 'train' / '.git').mkdir()
  (tmp_path / 'train' / 'cat' / 'loop').symlink_to(tmp_path)
  write(tmp_path / 'train' / 'dog' / 'deeper' / 'z.png')
  dataset = load_dataset(settings('folder', dir=str(tmp_path)))
  assert len(set_of_names(dataset)) == 41
  assert 'train/dog/deeper/z.png' in set_of_names(dataset)
  files, links = dataset.notes
  assert files.endswith(': 1 .txt.')
  assert 'train/cat/loop' in links


# Each has the classes a and b unless another set is given; `*` stands for two images.
ACCEPTED = {
  'any case': ['Train/a/*', 'Train/b/*', 'Test/a/*', 'Test/b/*'],
  'capitals': ['TRAIN/a/*', 'TRAIN/b/*', 'TEST/a/*', 'TEST/b/*'],
  'ing': ['training/a/*', 'training/b/*', 'testing/a/*', 'testing/b/*'],
  'sets': ['training_set/a/*', 'training_set/b/*', 'test_set/a/*', 'test_set/b/*'],
  'words': ['Train Images/a/*', 'Train Images/b/*', 'Test-Images/a/*', 'Test-Images/b/*'],
  'years': ['train2017/a/*', 'train2017/b/*', 'test2017/a/*', 'test2017/b/*'],
  'twice': ['training_set/training_set/a/*', 'training_set/training_set/b/*', 'test_set/test_set/a/*'],
  'eval': ['train/a/*', 'train/b/*', 'eval/a/*', 'eval/b/*'],
  'deeper': ['a/images/*', 'b/images/*'],
  'other directories': ['train/a/*', 'train/b/*', 'test/a/*', 'annotations/x.xml'],
  'left over': ['a/*', 'b/*', '__MACOSX/a/._0.png', '@eaDir/a/*', 'lost+found/', 'runs/x/config.json', 'Thumbs.db'],
  'unlabelled test': ['train/a/*', 'train/b/*', 'test/*'],
}


@pytest.mark.parametrize('files', ACCEPTED.values(), ids=list(ACCEPTED))
def test_a_usual_layout_is_recognised(tmp_path, files):
  build(tmp_path, files)
  found = layout.read(str(tmp_path))
  assert found.class_names == ('a', 'b')
  classes = {
    (split, label): count
    for split, part in found.parts.items()
    for label, count in zip(*map(np.ndarray.tolist, np.unique(part.labels, return_counts=True)), strict=True)
  }
  used = [file for file in files if file.endswith('*') and '@' not in file and file != 'test/*']
  assert classes == {
    ('test' if file.casefold().startswith(('test', 'eval')) else 'train', int('/b/' in f'/{file}')): 2 for file in used
  }


def test_what_a_layout_leaves_out_is_noted(tmp_path):
  build(tmp_path, [*ACCEPTED['unlabelled test'], 'labels/x.xml', 'cover.png', 'train/a/raw.CR2'])
  notes = ' '.join(layout.read(str(tmp_path)).notes)
  assert 'test holds 2 images without labels, for python -m cnn_jax.predict' in notes
  assert 'labels holds no image; it is not used' in notes
  assert 'in no class directory and are not used: 1, such as' in notes
  assert '1 .cr2' in notes
  assert '1 .xml' in notes


def test_a_class_may_be_called_train(tmp_path):
  build(tmp_path / 'one', ['train/*', 'car/*', 'dog/*'])
  assert layout.read(str(tmp_path / 'one')).class_names == ('car', 'dog', 'train')
  build(tmp_path / 'two', ['train/train/*', 'train/car/*', 'val/train/*', 'val/car/*'])
  found = layout.read(str(tmp_path / 'two'))
  assert found.class_names == ('car', 'train')
  assert set(found.parts) == {'train', 'validation'}


REFUSED = {
  'two of a split': (['train/a/*', 'train/b/*', 'Train/a/*'], 'both the train split'),
  'two validations': (['train/a/*', 'train/b/*', 'val/a/*', 'valid/a/*'], 'both the validation split'),
  'no train': (['val/a/*', 'val/b/*'], 'no train directory; add'),
  'a third name': (['train/a/*', 'train/b/*', 'holdout/a/*'], 'holdout holds images, but its name'),
  'a class beside': (['train/a/*', 'train/b/*', 'c/*'], 'c holds images, but its name'),
  'other words': (['my_train/a/*', 'my_train/b/*', 'my_test/a/*'], 'my_test resembles a split'),
  'camels': (['myTrain/a/*', 'myTrain/b/*', 'other/a/*'], 'myTrain resembles a split'),
  'another language': (['lernen/a/*', 'lernen/b/*', 'prüfen/a/*', 'prüfen/b/*'], 'hold the same directories a, b'),
  'splits below classes': (['a/train/*', 'a/test/*', 'b/train/*', 'b/test/*'], 'a/test is a split below a class'),
  'test beside classes': (['a/*', 'b/*', 'test/*'], "test has the name of a split but lies beside the class 'a'"),
  'train in two ways': (['train/x/*', 'train/*', 'a/*', 'b/*'], 'a holds images, but its name'),
  'images beside classes': (['train/a/*', 'train/b/*', 'train/x.png'], "1 image in none of them, such as 'x.png'"),
  'no classes': (['train/*', 'test/*'], 'train holds 2 images and no class directories; make a directory'),
  'names': (['cat.0.jpg', 'cat.1.jpg', 'dog.0.jpg', 'dog.1.jpg'], r"as in 'cat.0.jpg', make a table: \(echo"),
  'table beside': (['train/*', 'labels.csv'], r'if .*labels.csv gives the labels, use it: --config.data.table='),
  'one above': (['data/train/a/*', 'data/train/b/*'], 'give that directory as config.data.dir=.*/data'),
  'empty': (['a/*', 'b/*', 'ant/'], 'a class directory contains no image: .*/ant; add images'),
  'xml': (['a/*', 'b/*', 'annotations/1.xml'], r'annotations but files of other kinds \(1 .xml\)'),
  'empty in test': (['train/a/*', 'train/b/*', 'test/a/*', 'test/b/'], 'contains no image: .*test/b'),
  'case': (['cat/*', 'Cat/*'], "classes 'Cat' and 'cat', which look alike"),
  'blank': (['cat/*', 'cat /*'], "classes 'cat' and 'cat ', which look alike"),
  'unicode': (['caf\u00e9/*', 'cafe\u0301/*'], r"'cafe\\u0301' and 'caf\\xe9', which look alike"),
  'case in test': (['train/cat/*', 'train/b/*', 'test/Cat/*'], "class 'Cat' that .* lacks; rename it to 'cat'"),
  'link to a class': (['a/*', 'b/*', 'c -> b'], 'c and .*/b are the same directory'),
  'link to a split': (['train/a/*', 'train/b/*', 'test -> train'], 'are the same directory'),
  'link to nothing': (['a/*', 'b/*', 'c -> nowhere'], 'c is a link to something that does not exist'),
  'link to itself': (['a/*', 'b/*', 'c -> c'], 'c cannot be read: Too many levels'),
}


@pytest.mark.parametrize(('files', 'reason'), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_layout_or_could_be_two_is_refused(tmp_path, files, reason):
  build(tmp_path, files)
  with pytest.raises(UsageError, match=reason) as error:
    load_dataset(settings('folder', dir=str(tmp_path)))
  assert '\n' not in str(error.value)


def test_the_table_that_a_refusal_proposes_works(tmp_path):
  build(tmp_path / 'pets', [f'{name}.{i}.jpg' for name in ('cat', 'dog') for i in range(4)])
  with pytest.raises(UsageError) as error:
    layout.read(str(tmp_path / 'pets'))
  made = str(error.value).partition('make a table: ')[2].partition(', then')[0]
  subprocess.run(made, shell=True, cwd=tmp_path, check=True)
  dataset = load_dataset(settings('folder', dir=str(tmp_path / 'pets'), table=str(tmp_path / 'labels.csv')))
  assert dataset.class_names == ('cat', 'dog')
  assert len(set_of_names(dataset)) == 8


def test_the_directories_of_a_run_in_the_folder_are_no_classes(tmp_path):
  build(tmp_path, ['a/*', 'b/*', '.lock', 'checkpoints/8/manifest.json', 'plugins/'])
  (tmp_path / 'plugins').rmdir()
  found = layout.read(str(tmp_path))
  assert found.class_names == ('a', 'b')
  assert 'checkpoints' in found.notes[-1]


@pytest.mark.parametrize(
  ('files', 'reason'),
  [
    ([], 'no directory'),
    (['train/cat/a.png', 'test/cat/a.png'], "only the directory 'cat'"),
    (['train/cat/a.txt', 'train/dog/a.txt'], r'train contains no image but files of other kinds \(2 .txt\)'),
    (['cat/a.txt', 'dog/a.txt'], r'no image: .*cat but files of other kinds \(1 .txt\), .*dog'),
    (['train/cat/a.png', 'train/dog/a.png', 'test/cow/a.png'], "'cow'"),
    (['train/cat/a.png', 'train/dog/a.png', 'test/cat/a.txt'], r'test contains no image but files of other'),
    (['cat/a.png', 'dog/.hide'], 'contains no image: .*/dog; add images'),
    (['cat/a.png', 'dog/a.png'], 'leaves the validation split empty; it has 2 images to split'),
  ],
)
def test_each_unusable_folder_is_one_clear_error(tmp_path, files, reason):
  build(tmp_path, files)
  with pytest.raises(UsageError, match=reason) as error:
    load_dataset(settings('folder', dir=str(tmp_path)))
  assert '\n' not in str(error.value)


def test_a_missing_folder_is_an_error():
  with pytest.raises(UsageError, match='config.data.dir is empty'):
    load_dataset(settings('folder'))
  with pytest.raises(UsageError, match='/nowhere.* not a directory'):
    load_dataset(settings('folder', dir='/nowhere'))
