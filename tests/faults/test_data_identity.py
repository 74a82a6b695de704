"""A run refuses data, and a config, that are not those it was trained on; it follows the data to another place."""

import json
import os
import pathlib
import shutil

import pytest

from tests.faults.tools import call_command, folder_arguments, one_line, read_json, write_photographs

# Ends before the last epoch, as a run that was stopped does: one more checkpoint is missing.
FIELDS = {'epochs': 4}


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """A folder {train,test}/{a_cat,b_dog} and a run on it that has two of its four epochs."""
  place = tmp_path_factory.mktemp('identity')
  write_photographs(place / 'pets/train', ('a_cat', 'b_dog'), 16, suffix='.bmp')
  write_photographs(place / 'pets/test', ('a_cat', 'b_dog'), 4, seed=1, suffix='.bmp')
  done = call_command('cnn_jax.main', *folder_arguments(place / 'pets', place / 'run', **FIELDS))
  assert done.returncode == 0, done.stderr
  last = max(int(path.name) for path in (place / 'run/checkpoints').iterdir())
  shutil.rmtree(place / f'run/checkpoints/{last}')
  for name in ('result.json', 'report.html'):
    (place / 'run' / name).unlink(missing_ok=True)
  return place


@pytest.fixture
def place(stopped, tmp_path):
  """A copy of the folder and the run, at another place."""
  shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
  config = read_json(tmp_path / 'run/config.json')
  config['data']['dir'] = str(tmp_path / 'pets')
  (tmp_path / 'run/config.json').write_text(json.dumps(config))
  return tmp_path


def _resume(place, folder='pets', **fields):
  return call_command('cnn_jax.main', *folder_arguments(place / folder, place / 'run', **(FIELDS | fields)))


def _read(place, command, *more):
  return call_command(f'cnn_jax.{command}', f'--workdir={place / "run"}', *more)


def _rename_class(place):
  for split in ('train', 'test'):
    (place / 'pets' / split / 'a_cat').rename(place / 'pets' / split / 'z_cat')


def _add_class(place):
  for split in ('train', 'test'):
    shutil.copytree(place / 'pets' / split / 'a_cat', place / 'pets' / split / 'c_cow')


def _add_picture(place):
  shutil.copy(place / 'pets/train/a_cat/000.bmp', place / 'pets/train/a_cat/new.bmp')


def _replace_picture(place):
  (place / 'pets/train/b_dog/003.bmp').write_bytes((place / 'pets/train/a_cat/000.bmp').read_bytes() + b'\0')


def _replace_by_a_file_of_the_same_size(place):
  one, other = place / 'pets/train/a_cat/000.bmp', place / 'pets/train/b_dog/000.bmp'
  assert one.stat().st_size == other.stat().st_size
  shutil.copy(one, other)


def _exchange_two_files_of_the_same_size(place):
  one, other = place / 'pets/train/a_cat/001.bmp', place / 'pets/train/b_dog/001.bmp'
  times = one.stat().st_mtime_ns
  one.rename(place / 'third')
  other.rename(one)
  (place / 'third').rename(other)
  for path in (one, other):
    os.utime(path, ns=(times, times))


def _move_between_classes(place):
  (place / 'pets/test/a_cat/001.bmp').rename(place / 'pets/test/b_dog/moved.bmp')


def _move_between_splits(place):
  (place / 'pets/test/a_cat/001.bmp').rename(place / 'pets/train/a_cat/moved.bmp')


CHANGES = {
  _rename_class: 'z_cat',
  _add_class: 'c_cow',
  _add_picture: 'new.bmp',
  _replace_picture: '003.bmp',
  _replace_by_a_file_of_the_same_size: 'b_dog',
  _exchange_two_files_of_the_same_size: 'a_cat',
  _move_between_classes: 'moved.bmp',
  _move_between_splits: 'moved.bmp',
}


# Two kinds are tried in every run of the tests: classes, and contents without a sign in the listing.
_QUICK = (_rename_class, _exchange_two_files_of_the_same_size)


@pytest.mark.parametrize(
  'change',
  [pytest.param(c, id=c.__name__.strip('_'), marks=() if c in _QUICK else pytest.mark.faults) for c in CHANGES],
)
def test_changed_data_are_refused_on_resume_and_by_reading_commands(place, change):
  change(place)
  before = {path: path.stat().st_mtime_ns for path in (place / 'run').rglob('*') if path.is_file()}
  for done in (
    _resume(place),
    _read(place, 'evaluate', '--split=test', f'--data_dir={place / "pets"}'),
    _read(place, 'report', f'--data_dir={place / "pets"}'),
  ):
    assert CHANGES[change] in one_line(done)
  after = {path: path.stat().st_mtime_ns for path in (place / 'run').rglob('*') if path.is_file()}
  changed = {path.name for path in {*before, *after} if before.get(path) != after.get(path)}
  assert changed <= {'.lock', 'config.json', 'environment.json'}  # these describe the start


def test_a_folder_that_moved_is_the_same_data(place):
  (place / 'pets').rename(place / 'elsewhere')
  done = _resume(place, 'elsewhere')
  assert done.returncode == 0, done.stderr
  assert 'Resuming at step' in done.stdout
  assert _read(place, 'evaluate', '--split=test').returncode == 0


@pytest.mark.faults
def test_reading_commands_take_the_new_place(place):
  (place / 'pets').rename(place / 'elsewhere')
  assert '--data_dir' in one_line(_read(place, 'evaluate', '--split=test'))
  assert '--data_dir' in one_line(_read(place, 'report'))
  for split in ('train', 'validation', 'test'):
    done = _read(place, 'evaluate', f'--split={split}', f'--data_dir={place / "elsewhere"}')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)['split'] == split
  assert _read(place, 'report', f'--data_dir={place / "elsewhere"}').returncode == 0


@pytest.mark.faults
def test_a_relative_path_from_another_directory_is_the_same_data(place, monkeypatch):
  monkeypatch.chdir(place)
  arguments = folder_arguments('pets', place / 'run', **FIELDS)
  config = f'--config={pathlib.Path(__file__).parents[2] / "configs/image_folder.py"}'
  done = call_command('cnn_jax.main', config, *arguments[1:])
  assert done.returncode == 0 and 'Resuming at step' in done.stdout, done.stderr


@pytest.mark.faults
def test_times_of_files_do_not_matter(place):
  for path in (place / 'pets').rglob('*.bmp'):
    os.utime(path, (1e9, 1e9))
  assert _resume(place).returncode == 0


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('model.norm', 'none'),
    pytest.param('model.activation', 'tanh', marks=pytest.mark.faults),
    pytest.param('data.resize', 'stretch', marks=pytest.mark.faults),
    pytest.param('data.split_seed', 3, marks=pytest.mark.faults),
  ],
)
def test_an_edited_config_is_refused(place, field, value):
  path = place / 'run/config.json'
  config = read_json(path)
  section, name = field.split('.')
  assert config[section][name] != value
  config[section][name] = value
  path.write_text(json.dumps(config))
  picture = place / 'pets/test/a_cat/000.bmp'
  for done in (
    _read(place, 'predict', picture),
    _read(place, 'evaluate', '--split=test'),
    _read(place, 'report'),
    _read(place, 'export', f'--output={place / "model.stablehlo"}'),
    _resume(place, **{field.replace('.', '__'): value}),
  ):
    assert field in one_line(done)
  assert not (place / 'model.stablehlo').exists()


def test_the_fingerprint_is_in_checkpoint_result_and_data_json(place):
  assert _resume(place).returncode == 0
  run = place / 'run'
  (info,) = {
    path.read_text() for path in [max((run / 'checkpoints').iterdir(), key=lambda p: int(p.name)) / 'info.json']
  }
  fingerprint = json.loads(info)['data']['sha256']
  assert len(fingerprint) == 64
  assert read_json(run / 'result.json')['data_sha256'] == fingerprint
  assert read_json(run / 'data.json')['identity']['sha256'] == fingerprint
