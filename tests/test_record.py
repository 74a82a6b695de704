"""The record of a run: one owner, one config, and files that are whole."""

import json
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import cnn_jax
from cnn_jax import UsageError, environment, record, workdirs
from cnn_jax import config as config_lib
from tests.helpers import largest_file

# --- the lock


# What `workdirs.lock` does, in a process that starts faster because it does not import the project.
OWNER = """
import fcntl, os, sys, time
file = open(sys.argv[1], 'w')
fcntl.flock(file, fcntl.LOCK_EX)
print(os.getpid(), file=file, flush=True)
print('held', flush=True)
time.sleep(60)
"""


def test_a_workdir_has_one_owner_until_that_process_dies(tmp_path):
  workdir = tmp_path / 'runs' / 'a'
  with workdirs.lock(workdir):
    assert (workdir / '.lock').read_text() == f'{os.getpid()}\n'
  arguments = [sys.executable, '-c', OWNER, str(workdir / '.lock')]
  with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as owner:
    try:
      assert owner.stdout.readline() == 'held\n'
      with pytest.raises(UsageError, match=f'{workdir} is in use by process {owner.pid}'), workdirs.lock(workdir):
        pass
      owner.send_signal(signal.SIGKILL)
      owner.wait(timeout=30)
      with workdirs.lock(workdir):
        assert (workdir / '.lock').read_text() == f'{os.getpid()}\n'
    finally:
      owner.kill()


def test_the_lock_ends_with_its_context(tmp_path):
  with workdirs.lock(tmp_path), pytest.raises(UsageError, match='in use by process'), workdirs.lock(tmp_path):
    pass
  with pytest.raises(ZeroDivisionError), workdirs.lock(tmp_path):
    raise ZeroDivisionError
  with workdirs.lock(tmp_path):
    pass


@pytest.mark.parametrize('owner', ['', 'x', '9' * 50, '\udcff', '1\n2'])
def test_an_unreadable_owner_is_another_process(tmp_path, owner):
  with workdirs.lock(tmp_path):
    (tmp_path / '.lock').write_text(owner, errors='surrogateescape')
    with pytest.raises(UsageError, match='is in use by another process'), workdirs.lock(tmp_path):
      pass


def test_a_planted_lock_is_refused_and_its_target_unharmed(tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('precious')
  for plant, message in (
    (lambda path: path.symlink_to(victim), r'\.lock is a link; remove it'),
    (os.mkfifo, r'\.lock is not a regular file; remove it'),
    (os.mkdir, 'cannot write to .*: Is a directory'),
  ):
    workdir = tmp_path / plant.__name__
    workdir.mkdir()
    plant(workdir / '.lock')
    with pytest.raises(UsageError, match=message), workdirs.lock(workdir):
      pass
  assert victim.read_text() == 'precious'


def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  for workdir in (tmp_path / 'file', tmp_path / 'file' / 'below', '/proc/none'):
    with pytest.raises(UsageError, match=f'cannot write to {workdir}: .*--workdir'), workdirs.lock(workdir):
      pass


# --- config.json


def changed(**fields):
  config = config_lib.default_config()
  config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return config


def test_a_config_comes_back_as_it_was(tmp_path):
  config = changed(model__features=(8, 16), optimizer__learning_rate=0.1 + 0.2, data__dir='å')
  record.write_config(tmp_path, config)
  loaded = record.load_config(tmp_path)
  assert loaded.to_dict() == config.to_dict()
  assert isinstance(loaded.model.features, tuple)
  with pytest.raises(AttributeError, match='Key "new" does not exist'):  # it is locked
    loaded.model.new = 1


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('epochs', 11, 'config.epochs is 11, but the run in .* was started with 12'),
    ('model__features', (32, 64), r'config.model.features is \[32, 64\], but .* \[32, 64, 128\]'),
    ('data__split_seed', 1, 'config.data.split_seed is 1, but .* was started with 0'),
  ],
)
def test_resuming_with_another_config_names_the_field(tmp_path, field, value, message):
  record.write_config(tmp_path, config_lib.default_config())
  with pytest.raises(UsageError, match=f'{message}; use another --workdir'):
    record.check_config(tmp_path, changed(**{field: value}))


def test_more_epochs_continue_a_constant_schedule_alone(tmp_path):
  record.write_config(tmp_path, changed())
  with pytest.raises(UsageError, match="its schedule 'one_cycle' ends there; .* --config.init_from="):
    record.check_config(tmp_path, changed(epochs=13))
  record.write_config(tmp_path, changed(schedule__name='constant'))
  record.check_config(tmp_path, changed(schedule__name='constant', epochs=13))
  with pytest.raises(UsageError, match='config.epochs is 11, but'):
    record.check_config(tmp_path, changed(schedule__name='constant', epochs=11))


def test_what_is_recorded_and_kept_may_change(tmp_path):
  record.check_config(tmp_path, changed())  # nothing is there yet
  record.write_config(tmp_path, changed())
  record.check_config(tmp_path, changed())
  record.check_config(tmp_path, changed(log__every_steps=3, checkpoint__keep=5))


def test_a_field_newer_than_the_run_had_its_default(tmp_path):
  values = changed().to_dict()
  del values['seeds'], values['augment']['cutmix']
  record.write_json(tmp_path / 'config.json', values)
  record.check_config(tmp_path, changed())
  with pytest.raises(UsageError, match='config.seeds is 2, but the run in .* was started with 1'):
    record.check_config(tmp_path, changed(seeds=2))


def test_a_config_file_that_is_wrong_is_named(tmp_path):
  with pytest.raises(UsageError, match=r'config.json is missing; give the --workdir of a run'):
    record.load_config(tmp_path)
  file = tmp_path / 'config.json'
  for text, message in (
    ('{"epochs": 12', 'is not JSON'),
    ('[]', 'does not hold a JSON object'),
    ('{"epoch": 12}', 'config.epoch is not a field; did you mean config.epochs'),
    ('{"model": {"head": 3}}', 'config.model.head is 3'),
    ('{"model": 3}', 'config.model is 3'),
    ('{"model": {"a.b": 3}}', 'a.b'),
    ('{"epochs": "many"}', "config.epochs is 'many'"),
  ):
    file.write_text(text)
    for read in (record.load_config, lambda workdir: record.check_config(workdir, changed())):
      with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path)
      assert str(file) in str(caught.value)
      assert '\n' not in str(caught.value)
  file.write_text('{"epochs": 5}')  # a run from before the other fields were there
  assert record.load_config(tmp_path).to_dict() == changed(epochs=5).to_dict()


def test_a_field_of_a_later_version_names_that_version(tmp_path):
  record.write_json(tmp_path / 'config.json', changed().to_dict() | {'hologram': True})
  record.write_environment(tmp_path)
  environment = json.loads((tmp_path / 'environment.json').read_text())
  environment['versions']['cnn_jax'] = '7.0'
  record.write_json(tmp_path / 'environment.json', environment)
  expected = f'config.hologram is not a field; .*Version 7.0 of cnn_jax wrote this workdir; this is version {cnn_jax.__version__}'
  for read in (record.load_config, lambda workdir: record.check_config(workdir, changed())):
    with pytest.raises(UsageError, match=expected):
      read(tmp_path)
  for damage in ('{', '{}', '{"versions": 3}', '{"versions": {"cnn_jax": 7}}'):  # then the version is unknown
    (tmp_path / 'environment.json').write_text(damage)
    with pytest.raises(UsageError, match='config.hologram is not a field') as caught:
      record.load_config(tmp_path)
    assert 'wrote this workdir' not in str(caught.value)


def test_the_workdir_of_several_seeds_names_those_of_each(tmp_path):
  record.write_config(tmp_path, changed(seed=3, seeds=2))
  with pytest.raises(UsageError, match='holds the runs of 2 seeds; give one of .*seed_00003 to seed_00004 instead'):
    record.load_config(tmp_path)


# --- environment.json and result.json


def test_the_environment_says_what_ran_and_keeps_earlier_starts(tmp_path):
  record.write_environment(tmp_path)
  first = json.loads((tmp_path / 'environment.json').read_text())
  assert first['runs'] == []
  assert {'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'pillow', 'python', 'cnn_jax'} == set(
    first['versions']
  )
  assert first['versions']['numpy'] == np.__version__
  assert first['command'] == shlex.join(sys.orig_argv)
  assert first['num_devices'] >= 1
  assert first['git'] is None or re.fullmatch('[0-9a-f]{40}', first['git']['commit'])
  record.write_environment(tmp_path)
  record.write_environment(tmp_path)
  third = json.loads((tmp_path / 'environment.json').read_text())
  del first['runs']
  assert len(third['runs']) == 2
  assert third['runs'][0] == first
  assert 'runs' not in third['runs'][1]


def git_of(workdir):
  record.write_environment(workdir)
  return json.loads((workdir / 'environment.json').read_text())['git']


def test_without_git_the_environment_has_none(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert git_of(tmp_path) is None


def test_git_is_that_of_the_code_and_dirty_if_the_code_has_changed(tmp_path, monkeypatch):
  def git(*arguments):
    subprocess.run(['git', '-c', 'user.name=x', '-c', 'user.email=x', *arguments], cwd=tmp_path, check=True)

  package = tmp_path / 'cnn_jax'
  package.mkdir()
  (package / '__init__.py').write_text('')
  git('init', '--quiet')
  git('add', '.')
  git('commit', '--quiet', '--message=x')
  monkeypatch.setattr(cnn_jax, '__file__', str(package / '__init__.py'))
  (tmp_path / 'runs').mkdir()
  assert git_of(tmp_path / 'runs')['dirty'] is False  # the run's own files are no change of the code
  (package / 'new.py').write_text('')
  assert git_of(tmp_path / 'runs')['dirty'] is True
  inside = tmp_path / 'site' / 'cnn_jax'
  inside.mkdir(parents=True)
  monkeypatch.setattr(cnn_jax, '__file__', str(inside / '__init__.py'))
  assert git_of(tmp_path / 'runs') is None  # another project's checkout


def test_a_system_without_proc_has_pythons_word_for_its_processor(monkeypatch):
  real = pathlib.Path.read_text

  def read_text(path, **arguments):
    if str(path) == '/proc/cpuinfo':
      raise FileNotFoundError
    return real(path, **arguments)

  monkeypatch.setattr(pathlib.Path, 'read_text', read_text)
  monkeypatch.setattr(platform, 'processor', lambda: 'arm')
  assert environment.describe()['cpu'] == 'arm'


def test_a_password_is_not_recorded(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'orig_argv', ['python', '--storage=postgresql://me:se:cret/x@host:5432/db', 'a@b', 'c d'])
  record.write_environment(tmp_path)
  command = json.loads((tmp_path / 'environment.json').read_text())['command']
  assert command == "python '--storage=postgresql://me:***@host:5432/db' a@b 'c d'"


def test_damaged_earlier_starts_are_dropped(tmp_path):
  (tmp_path / 'environment.json').write_text('{"runs": 3, "command": "x"}')
  record.write_environment(tmp_path)
  assert json.loads((tmp_path / 'environment.json').read_text())['runs'] == [{'command': 'x'}]


def test_a_result_is_plain_json(tmp_path):
  assert record.read_result(tmp_path) is None
  result = {
    'accuracy': np.float32(0.1), 'loss': float('nan'), 'steps': jnp.int32(7), 'classes': ('a', 'b'),
    'counts': np.arange(3), 'complete': np.True_, 'by_class': {0: float('inf')},
  }  # fmt: skip
  record.write_result(tmp_path, result)
  assert record.read_result(tmp_path) == {
    'accuracy': float(np.float32(0.1)), 'loss': None, 'steps': 7, 'classes': ['a', 'b'],
    'counts': [0, 1, 2], 'complete': True, 'by_class': {'0': None},
  }  # fmt: skip


def test_a_full_disk_is_one_line_and_leaves_the_old_result(tmp_path):
  record.write_result(tmp_path, {'a': 1})
  with largest_file(1000), pytest.raises(UsageError, match=r'cannot write to .*result.json: File too large'):
    record.write_result(tmp_path, {'a': list(range(1000))})
  assert record.read_result(tmp_path) == {'a': 1}
