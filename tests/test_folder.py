"""Image folders: layouts, splits by path, and one clear error for each unusable folder."""

import errno
import functools
import os
import shutil

import pytest

from cnn_jax import UsageError
from cnn_jax.data import load_dataset
from tests.datasets import make_folder, set_of_names, settings, write

pytestmark = pytest.mark.usefixtures('offline')


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


def test_hidden_files_other_files_and_loops_are_skipped(tmp_path):
  make_folder(tmp_path, count=10)
  (tmp_path / 'train' / 'cat' / '.hidden.png').write_bytes(b'no')
  (tmp_path / 'train' / 'cat' / 'notes.txt').write_bytes(b'no')
  (tmp_path / 'train' / '.git').mkdir()
  (tmp_path / 'train' / 'cat' / 'loop').symlink_to(tmp_path)
  write(tmp_path / 'train' / 'dog' / 'deeper' / 'z.PNG'.lower())
  dataset = load_dataset(settings('folder', dir=str(tmp_path)))
  assert len(set_of_names(dataset)) == 41
  assert 'train/dog/deeper/z.png' in set_of_names(dataset)


def test_a_link_to_a_missing_file_is_an_error(tmp_path):
  make_folder(tmp_path, count=2)
  (tmp_path / 'train' / 'cat' / 'lost.png').symlink_to(tmp_path / 'nowhere.png')
  with pytest.raises(UsageError, match='lost.png is a link to a file that does not exist; remove it'):
    load_dataset(settings('folder', dir=str(tmp_path)))


def test_a_directory_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
  make_folder(tmp_path, count=2)
  (tmp_path / 'train' / 'cat' / 'deeper').mkdir()
  scandir, listdir = os.scandir, os.listdir

  def refuse(real, path):
    if str(path).endswith('deeper'):
      raise PermissionError(errno.EACCES, 'Permission denied')
    return real(path)

  monkeypatch.setattr(os, 'scandir', functools.partial(refuse, scandir))
  monkeypatch.setattr(os, 'listdir', functools.partial(refuse, listdir))
  with pytest.raises(UsageError, match='deeper cannot be read: Permission denied'):
    load_dataset(settings('folder', dir=str(tmp_path)))


@pytest.mark.parametrize(
  ('files', 'reason'),
  [
    ([], 'no directory'),
    (['train/cat/a.png', 'test/cat/a.png'], "only the directory 'cat'"),
    (['train/cat/a.txt', 'train/dog/a.txt'], 'contains no image but files ending in .txt'),
    (['train/cat/a.png', 'train/dog/a.png', 'test/cow/a.png'], "'cow'"),
    (['train/cat/a.png', 'train/dog/a.png', 'test/cat/a.txt'], 'test contains no image'),
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


def test_a_missing_folder_is_an_error():
  with pytest.raises(UsageError, match='config.data.dir is empty'):
    load_dataset(settings('folder'))
  with pytest.raises(UsageError, match='/nowhere.* not a directory'):
    load_dataset(settings('folder', dir='/nowhere'))
