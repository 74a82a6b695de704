"""Folders as people have them: recognised, or refused in one line; no class and no image appears or vanishes silently."""

import json
import os
import subprocess

import numpy as np
import pytest

import cnn_jax
from cnn_jax import config as config_lib
from cnn_jax.data import load_dataset
from tests import datasets
from tests.faults import tools
from tests.faults.tools import call_command, folder_arguments, one_line, read_json, write_photographs

pytestmark = pytest.mark.usefixtures('offline', 'cache_elsewhere')


@pytest.fixture
def cache_elsewhere(offline, monkeypatch, tmp_path_factory):
  """The cache is not in the folder of the test, which is a data set here."""
  del offline
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))


def train(directory, workdir, **fields):
  done = call_command(
    'cnn_jax.main', *folder_arguments(directory, workdir, epochs=1, schedule__warmup_epochs=0, **fields)
  )
  assert done.returncode == 0, done.stderr
  return read_json(workdir / 'result.json'), done


def refused(directory, tmp_path, **fields):
  """The line that refuses to train on a folder."""
  return one_line(call_command('cnn_jax.main', *folder_arguments(directory, tmp_path / 'run', **fields)))


def load(directory, **fields):
  return load_dataset(datasets.settings('folder', dir=str(directory), image_size=8, **fields))


# Names of splits ----------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize(
  'names', ['Train Test', 'training testing', 'TRAIN TEST', 'training_set test_set', 'train eval']
)
def test_split_names_in_any_spelling_are_not_classes(tmp_path, names):
  first, second = names.split()
  write_photographs(tmp_path / 'pets' / first, count=9)
  write_photographs(tmp_path / 'pets' / second, count=3, seed=1)
  result, done = train(tmp_path / 'pets', tmp_path / 'run')
  lines = [line.split() for line in done.stdout.splitlines()]
  assert ['dog', '8', '1', '3'] in lines
  assert ['all', '16', '2', '6'] in lines
  assert (result['num_train'], result['num_validation'], result['num_test']) == (16, 2, 6)
  assert cnn_jax.load(tmp_path / 'run').class_names == ('cat', 'dog')


@pytest.mark.parametrize(
  ('names', 'reason'),
  [
    (('train', 'training'), 'both the train split'),
    (('train', 'val', 'valid'), 'both the validation split'),
    (('my_train', 'my_test'), 'resembles a split'),
    (('Trainingsdaten', 'Testdaten'), 'resembles a split'),
    (('fold1', 'fold2'), 'either level could be the classes'),
    (('train', 'final'), 'its name is not that of a split'),
    (('test', 'val'), 'no train directory'),
  ],
)
def test_what_may_be_a_split_but_is_not_named_like_one_is_refused(tmp_path, names, reason):
  for name in names:
    write_photographs(tmp_path / 'pets' / name, count=2)
  assert reason in refused(tmp_path / 'pets', tmp_path)


def test_classes_called_train_stay_classes(tmp_path):
  assert load(write_photographs(tmp_path, ('train', 'car', 'dog'), 5)).class_names == ('car', 'dog', 'train')


def test_a_flat_test_directory_is_for_predict_and_never_used_in_training(tmp_path):
  write_photographs(tmp_path / 'train', count=10)
  write_photographs(tmp_path, ('test',), 4, seed=1)
  dataset = load(tmp_path)
  assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [16, 2, 2]
  assert 'images without labels, for python -m cnn_jax.predict' in dataset.notes[0]


# Classes and images that appear or vanish ---------------------------------------------------------


def test_directories_of_other_programs_are_not_classes(tmp_path):
  write_photographs(tmp_path, count=5)
  for name in (
    '__MACOSX/cat/._1.png',
    '@eaDir/cat/1.png',
    'lost+found/#12',
    'runs/x/config.json',
    '.ipynb_checkpoints/1.png',
  ):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
  dataset = load(tmp_path)
  assert dataset.class_names == ('cat', 'dog')
  assert all(name in ' '.join(dataset.notes) for name in ('__MACOSX', '@eaDir', 'lost+found', 'runs'))


@pytest.mark.faults
def test_a_run_in_the_folder_of_its_images_can_be_started_and_repeated(tmp_path, monkeypatch):
  monkeypatch.chdir(write_photographs(tmp_path, count=9))
  arguments = folder_arguments('.', epochs=1, schedule__warmup_epochs=0)
  arguments[0] = f'--config={tools.ROOT / "configs/image_folder.py"}'
  for workdir in ('runs/a', 'runs/b', '.', '.'):
    done = call_command('cnn_jax.main', *arguments, f'--workdir={workdir}')
    assert done.returncode == 0, done.stderr
  assert cnn_jax.load('runs/b').class_names == ('cat', 'dog')


@pytest.mark.parametrize(
  ('file', 'reason'), [('', 'ant'), ('a.xml', r'ant but files of other kinds (1 .xml)'), ('a.cr2', '1 .cr2')]
)
def test_an_empty_class_is_refused_with_what_it_holds(tmp_path, file, reason):
  write_photographs(tmp_path / 'pets', count=5)
  (tmp_path / 'pets' / 'ant').mkdir()
  if file:
    (tmp_path / 'pets' / 'ant' / file).touch()
  assert reason in refused(tmp_path / 'pets', tmp_path)


@pytest.mark.parametrize('names', [('cat', 'Cat'), ('cat', 'cat '), ('caf\u00e9', 'cafe\u0301'), ('Straße', 'STRASSE')])
def test_classes_that_look_alike_are_refused_with_the_difference_visible(tmp_path, names):
  line = refused(write_photographs(tmp_path / 'pets', names, 2), tmp_path)
  assert all(ascii(name) in line.encode().decode('unicode_escape') or ascii(name) in line for name in names)
  assert 'look alike' in line


def test_files_passed_over_are_counted_by_suffix(tmp_path):
  write_photographs(tmp_path, count=5)
  for name in ('1.heic', '2.HEIC', '3.nef', 'x.xml'):
    (tmp_path / 'cat' / name).touch()
  assert '2 .heic, 1 .nef, 1 .xml' in load(tmp_path).notes[0]


def test_linked_directories_are_followed_and_never_listed_twice(tmp_path):
  write_photographs(tmp_path / 'pets', count=5)
  write_photographs(tmp_path / 'elsewhere', ('more',), 4, seed=1)
  (tmp_path / 'pets' / 'cat' / 'more').symlink_to(tmp_path / 'elsewhere' / 'more')
  (tmp_path / 'pets' / 'cat' / 'up').symlink_to('..')
  dataset = load(tmp_path / 'pets')
  assert len(datasets.set_of_names(dataset)) == 14
  assert 'cat/up' in dataset.notes[-1]
  (tmp_path / 'pets' / 'hund').symlink_to('dog')
  assert 'are the same directory' in refused(tmp_path / 'pets', tmp_path)


# Splits -------------------------------------------------------------------------------------------


def test_every_class_of_ten_images_is_in_every_split(tmp_path):
  for name in range(100):
    for i in range(10):
      datasets.write(tmp_path / f'{name:02}' / f'{i}.png', (name + i) % 256)
  dataset = load(tmp_path)
  for split, count in ((dataset.train, 8), (dataset.validation, 1), (dataset.test, 1)):
    assert np.bincount(split.labels, minlength=100).tolist() == [count] * 100


def test_unequal_classes_are_noted_and_all_in_every_split(tmp_path):
  write_photographs(tmp_path, ('many',), 490, (8, 8))
  write_photographs(tmp_path, ('few',), 10, (8, 8), seed=1)
  dataset = load(tmp_path)
  assert np.bincount(dataset.validation.labels).min() >= 1
  assert np.bincount(dataset.test.labels).min() >= 1
  assert '397 training images of many, 8 of few' in ' '.join(dataset.notes)


def test_a_new_file_moves_hardly_any_other(tmp_path):
  write_photographs(tmp_path, count=50, size=(8, 8))
  before = load(tmp_path)
  write_photographs(tmp_path / 'cat', ('new',), 1, (8, 8), seed=2)
  after = load(tmp_path)
  place = {name: split for split in ('train', 'validation', 'test') for name in getattr(before, split).names}
  moved = [name for name, split in place.items() if name not in getattr(after, split).names]
  assert len(moved) <= 2


# Labels in files ----------------------------------------------------------------------------------


def test_labels_of_a_competition_are_read_from_its_table(tmp_path):
  write_photographs(tmp_path, ('train',), 12)
  rows = [f'{i:03},{"cat" if i % 2 else "dog"}' for i in range(12)]
  (tmp_path / 'train.csv').write_text('\ufeffid,breed\r\n' + '\r\n'.join(rows))
  line = refused(tmp_path, tmp_path)
  assert 'train.csv gives the labels, use it: --config.data.table=' in line
  dataset = load(tmp_path / 'train', table=str(tmp_path / 'train.csv'))
  assert dataset.class_names == ('cat', 'dog')
  assert len(datasets.set_of_names(dataset)) == 12


def test_labels_in_file_names_are_refused_with_the_command_that_makes_a_table(tmp_path):
  write_photographs(tmp_path / 'pets', count=3, suffix='.jpg')
  for path in (tmp_path / 'pets').glob('*/*.jpg'):
    path.rename(tmp_path / 'pets' / f'{path.parent.name}.{path.name}')
  for name in ('cat', 'dog'):
    (tmp_path / 'pets' / name).rmdir()
  line = refused(tmp_path / 'pets', tmp_path)
  subprocess.run(line.partition('make a table: ')[2].partition(', then')[0], shell=True, cwd=tmp_path, check=True)
  assert load(tmp_path / 'pets', table=str(tmp_path / 'labels.csv')).class_names == ('cat', 'dog')


# Small sets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(('count', 'batch'), [(6, 4), (30, 4), (160, 16), (1023, 64), (1024, 128), (50_000, 128)])
def test_the_defaults_of_folders_fit_any_number_of_images(count, batch):
  config = config_lib.load(str(tools.ROOT / 'configs/image_folder.py'))
  config_lib.check_data(config, count, 2, (32, 32, 3))
  adapted, lines = config_lib.adapt(config, count)
  assert adapted.batch_size == batch
  assert len(lines) == (batch < 128)
  epochs = config_lib.num_epochs(adapted, count)
  assert adapted.schedule.warmup_epochs <= max(2, epochs / 10)
  assert config_lib.adapt(adapted, count) == (adapted, [])
  assert config_lib.steps_per_epoch(config, count) == config_lib.steps_per_epoch(adapted, count)


@pytest.mark.faults
def test_five_images_of_each_class_train_with_the_batch_of_the_defaults(tmp_path):
  write_photographs(tmp_path / 'pets', count=5)
  arguments = [x for x in folder_arguments(tmp_path / 'pets', tmp_path / 'run') if 'batch_size' not in x]
  done = call_command('cnn_jax.main', *arguments, '--config.min_steps=60', '--config.seeds=2')
  assert done.returncode == 0, done.stderr
  assert 'Adapted to 6 training images: batches of 4 instead of 128' in done.stdout
  result = read_json(tmp_path / 'run' / 'result.json')
  assert (result['num_train'], result['batch_size'], result['steps']) == (6, 4, 60)
  assert read_json(tmp_path / 'run' / 'config.json')['batch_size'] == 128
  again = call_command('cnn_jax.main', *arguments, '--config.min_steps=60', '--config.seeds=2')
  assert 'is complete' in again.stdout
  assert call_command('cnn_jax.report', f'--workdir={tmp_path / "run" / "seed_00000"}').returncode == 0
  assert 'there are 6 training images' in refused(
    tmp_path / 'pets', tmp_path / 'other', adapt_to_data=False, batch_size=100
  )


# Names, links, pipes ------------------------------------------------------------------------------


@pytest.mark.faults
def test_names_that_are_not_utf8_are_used_by_every_command(tmp_path):
  pets = write_photographs(tmp_path / 'pets', ('cat', 'chien'), 9)
  os.rename(os.fsencode(pets / 'chien'), os.fsencode(pets) + b'/ch\xeen')
  os.rename(os.fsencode(pets / 'cat/000.png'), os.fsencode(pets) + b'/cat/caf\xe9.png')
  pets = pets.rename(os.fsdecode(os.fsencode(tmp_path) + b'/p\xe9ts'))
  _, done = train(pets, tmp_path / 'run', log__report=True, log__tensorboard=True)
  assert 'p\\xe9ts' in done.stdout.encode('utf-8').decode()
  workdir = f'--workdir={tmp_path / "run"}'
  for command in (['predict', pets], ['evaluate', f'--data_dir={pets}'], ['report']):
    ended = tools.run_command(f'cnn_jax.{command[0]}', workdir, *command[1:])
    assert ended.returncode == 0, (command, ended.stderr)
  found = call_command('cnn_jax.predict', workdir, pets, '--json')
  assert {os.fsencode(json.loads(line)['file']) for line in found.stdout.splitlines()} == {
    os.fsencode(path) for path in pets.glob('*/*')
  }
  assert 'ch\\xeen' in (tmp_path / 'run' / 'report.html').read_text()


def _fifo(path):
  os.mkfifo(path)


def _self_link(path):
  path.symlink_to(path.name)


def _broken_link(path):
  path.symlink_to('nowhere')


def _device(path):
  path.symlink_to('/dev/zero')


@pytest.mark.parametrize('make', [_fifo, _self_link, _broken_link, _device])
@pytest.mark.parametrize('command', ['main', 'predict', 'evaluate'])
def test_what_is_no_file_is_named_and_never_opened(tmp_path, digits_run, make, command):
  write_photographs(tmp_path / 'pets', ('3', '5'), 2)
  make(tmp_path / 'pets' / '3' / 'x.jpg')
  if command == 'main':
    assert '3/x.jpg' in refused(tmp_path / 'pets', tmp_path)
    return
  folder = tmp_path / 'pets' if command == 'predict' else f'--data_dir={tmp_path / "pets"}'
  done = call_command(f'cnn_jax.{command}', f'--workdir={digits_run}', folder)
  line = one_line(done)
  assert 'error: 1 of 5' in line
  assert 'x.jpg' in done.stdout + done.stderr


@pytest.mark.parametrize('command', ['main', 'predict', 'evaluate'])
def test_a_directory_that_cannot_be_listed_is_one_line(tmp_path, digits_run, monkeypatch, command):
  write_photographs(tmp_path / 'pets', ('3', '5', '7'), 2)
  real = {name: getattr(os, name) for name in ('scandir', 'listdir')}

  def refuse(name, path='.'):
    if str(path).endswith('pets/5'):
      raise PermissionError(13, 'Permission denied', path)
    return real[name](path)

  for name in real:  # root may list everything, so permissions alone do not test this
    monkeypatch.setattr(os, name, lambda path='.', name=name: refuse(name, path))
  if command == 'main':
    assert 'pets/5 cannot be listed: Permission denied' in refused(tmp_path / 'pets', tmp_path)
    return
  folder = tmp_path / 'pets' if command == 'predict' else f'--data_dir={tmp_path / "pets"}'
  done = call_command(f'cnn_jax.{command}', f'--workdir={digits_run}', folder)
  one_line(done)
  assert 'cannot be listed: Permission denied' in done.stdout + done.stderr
