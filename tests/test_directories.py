"""The index of a large folder: what it saves, when it is stale, and that it changes no result."""

import os
import shutil
import time

import numpy as np
import pytest

from cnn_jax import UsageError, files
from cnn_jax.data import decode, directories, identity, layout, listing, load_dataset
from tests.datasets import settings, write

pytestmark = pytest.mark.usefixtures('offline', 'no_waiting')


@pytest.fixture
def pets(tmp_path, tmp_path_factory, monkeypatch):
  """A folder with nested, hidden, foreign and oddly named entries, that counts as large and as unchanged for long."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
  monkeypatch.setattr(directories, 'MIN_FILES', 10)
  monkeypatch.setattr(directories, '_RECENT_SECONDS', 0.0)
  root = tmp_path / 'pets'
  for split, count in (('train', 12), ('val', 3)):
    for label, name in enumerate(('cat', 'cat big', 'dog')):
      for i in range(count):
        write(root / split / name / f'{i}.png', 10 * label + i)
  write(root / 'train' / 'dog' / 'deep' / 'er' / 'x.png')
  write(root / 'train' / 'cat' / os.fsdecode(b'caf\xe9.png'))
  for name in ('train/cat/__pycache__/1.png', 'val/.hidden/1.png', 'notes/x.txt', 'train/dog/raw.cr2', 'top.png'):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b'x')
  (root / 'train' / 'dog' / 'up').symlink_to('..')
  time.sleep(0.02)  # longer than a tick of the clock of the file system
  return root


@pytest.fixture
def scanned(monkeypatch):
  """The directories that were listed, and not recalled."""
  found, scan = [], listing.scan
  monkeypatch.setattr(listing, 'scan', lambda path, passed: found.append(os.path.basename(path)) or scan(path, passed))
  return found


def load(root, **fields):
  return load_dataset(settings('folder', dir=str(root), **{'image_size': 4, 'resident': 'never'} | fields))


def facts(dataset):
  parts = [getattr(dataset, split) for split in layout.SPLITS]
  return (
    [(list(part.names), part.labels.tolist(), part.sizes.tolist()) for part in parts],
    (dataset.notes, dataset.provenance, dataset.class_names, dataset.skipped),
    identity.identify(dataset),
    [np.asarray(part.images).tolist() for part in parts],
  )


def plainly(root, **fields):
  """The facts without an index."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(directories, 'MIN_FILES', 10**6)
    patch.setattr(directories.Directories, '_recall', lambda _: {})
    return facts(load(root, **fields))


def test_the_second_start_lists_no_directory_and_finds_the_same(pets, scanned):
  first = facts(load(pets))
  assert len(scanned) == 12
  scanned.clear()
  assert facts(load(pets)) == first
  assert scanned == ['dog']  # it holds a link to a directory, which may lead elsewhere by now
  assert first == plainly(pets)
  assert 'up' in str(first[1]) and '__pycache__' in str(first[1]) and '1 .cr2' in str(first[1])


def _add(root):
  write(root / 'train' / 'cat' / 'new.png', 200)


def _remove(root):
  (root / 'train' / 'cat' / '3.png').unlink()


def _rename(root):
  (root / 'val' / 'cat' / '0.png').rename(root / 'val' / 'cat' / 'zero.png')


def _replace(root):
  write(root / 'other.png', 200, size=(30, 30))
  (root / 'other.png').rename(root / 'train' / 'cat' / '3.png')


def _exchange(root):
  for one, other in (('1', 'x'), ('2', '1'), ('x', '2')):
    (root / f'train/cat/{one}.png').rename(root / f'train/cat/{other}.png')


def _add_class(root):
  shutil.copytree(root / 'train' / 'dog' / 'deep', root / 'train' / 'fox')


def _remove_deep(root):
  shutil.rmtree(root / 'train' / 'dog' / 'deep' / 'er')


def _rename_split(root):
  (root / 'val').rename(root / 'test')


def _add_junk(root):
  (root / 'train' / 'cat big' / '@eaDir').mkdir()
  (root / 'train' / 'cat big' / 'x.heic').touch()


@pytest.mark.parametrize(
  'change', [_add, _remove, _rename, _replace, _exchange, _add_class, _remove_deep, _rename_split, _add_junk]
)
def test_what_has_changed_is_listed_anew(pets, scanned, change):
  facts(load(pets))
  change(pets)
  time.sleep(0.02)
  scanned.clear()
  found = facts(load(pets))
  assert 'dog' in scanned and len(scanned) < 8
  assert found == plainly(pets)
  assert facts(load(pets)) == found


def test_problems_and_what_is_no_layout_are_reported_with_an_index_too(pets, scanned):
  load(pets)
  (pets / 'train' / 'cat big' / 'lost.png').symlink_to('nowhere')
  scanned.clear()
  for _ in range(2):
    with pytest.raises(UsageError, match='lost.png is a link to something that does not exist'):
      load(pets)
  assert scanned.count('cat big') == 2
  assert 'lost.png' in str(facts(load(pets, on_bad_image='skip'))[1])
  assert facts(load(pets, on_bad_image='skip')) == plainly(pets, on_bad_image='skip')
  (pets / 'train' / 'cat big' / 'lost.png').unlink()
  (pets / 'val' / 'cow').mkdir()
  with pytest.raises(UsageError, match="has a class 'cow' that"):
    load(pets)


@pytest.mark.parametrize('same_size', [False, True])
def test_a_file_that_changed_in_place_is_noticed_when_it_is_read(pets, monkeypatch, same_size):
  load(pets)
  changed = pets / 'train' / 'cat' / '3.png'
  contents = changed.read_bytes()
  changed.write_bytes(contents if same_size else contents + b'x')
  os.utime(changed, (1, 1) if same_size else None)
  with monkeypatch.context() as patch:
    patch.setattr(directories, '_SAMPLED', 0)
    patch.setattr(decode, '_SAMPLE', 1)
    dataset = load(pets)
    (split,) = (split for split in (dataset.train, dataset.test) if 'train/cat/3.png' in list(split.names))
    with pytest.raises(UsageError, match=r'^train/cat/3.png has changed since .*pets was listed; start the command'):
      np.asarray(split.images)
    assert facts(load(pets)) == plainly(pets)


def test_many_files_that_changed_in_place_are_noticed_at_the_start(pets, scanned):
  load(pets)
  for path in pets.rglob('*.png'):
    os.utime(path, (1, 1))
  scanned.clear()
  assert facts(load(pets)) == plainly(pets)
  assert scanned[:12].count('cat') == 2


def test_a_damaged_index_is_made_again(pets, scanned):
  load(pets)
  for path in files.cache_dir().glob('index-*'):
    path.write_bytes(path.read_bytes()[:-9])
  scanned.clear()
  assert facts(load(pets)) == plainly(pets)
  scanned.clear()
  load(pets)
  assert scanned == ['dog']


def test_other_settings_split_the_same_index_otherwise(pets, scanned):
  load(pets)
  for fields in ({'test': 0.3}, {'split_seed': 5}, {}):
    for _ in range(2):
      scanned.clear()
      found = facts(load(pets, **fields))
      assert scanned == ['dog']
    assert found == plainly(pets, **fields)


def test_a_table_that_gives_other_labels_is_not_mixed_up(pets, tmp_path):
  found = []
  for swap in (False, True):
    rows = [
      f'train/{name}/{i}.png,{"dog" if swap and i == 1 else "cat" if swap and i == 2 else name}'
      for name in ('cat', 'dog')
      for i in range(12)
    ]
    (tmp_path / 'labels.csv').write_text('\n'.join(['path,label', *rows]))
    found.append(facts(load(pets, table=str(tmp_path / 'labels.csv'))))
    assert found[-1] == plainly(pets, table=str(tmp_path / 'labels.csv'))
  assert found[0][2]['splits'] != found[1][2]['splits']


def test_small_sets_recent_changes_and_sets_that_fit_into_memory_have_no_index(pets, monkeypatch):
  load(pets, resident='auto')
  load(pets, resident='always')
  assert not list(files.cache_dir().glob('index-*'))[1:]  # that of the splits
  with monkeypatch.context() as patch:
    patch.setattr(directories, '_RECENT_SECONDS', 60.0)
    assert directories.Directories(str(pets), settings('folder', resident='never')).confirmation() is None
    load(pets)
  assert not list(files.cache_dir().glob('index-*'))[1:]
  with monkeypatch.context() as patch:
    patch.setattr(directories, 'MIN_FILES', 1000)
    load(pets)
  assert not list(files.cache_dir().glob('index-*'))[1:]
  load(pets)
  assert list(files.cache_dir().glob('index-*'))[1:]


def test_the_index_of_another_place_is_not_used(pets, tmp_path, scanned):
  load(pets)
  moved = pets.rename(tmp_path / 'moved')
  scanned.clear()
  assert facts(load(moved)) == plainly(moved)
  assert len(scanned) >= 12
