"""Paths, names, users and systems as people have them."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from cnn_jax import UsageError, command, files, workdirs
from tests.faults.tools import DIGITS, ROOT, call_command, folder_arguments, one_line, read_json, write_photographs
from tests.helpers import append_points, open_recorder
from tests.test_sinks import EVERY_POINT, read_events

COMMANDS = {
  'cnn_jax.main': (*DIGITS, '--workdir={}'),
  'cnn_jax.evaluate': ('--workdir={}',),
  'cnn_jax.predict': ('--workdir={}', 'x.png'),
  'cnn_jax.report': ('--workdir={}',),
  'cnn_jax.export': ('--workdir={}', '--output=x'),
  'cnn_jax.sweep.__main__': (
    '--config=configs/digits.py', '--space=experiments/spaces/learning_rate.py', '--trials=1', '--workdir={}',
  ),
}  # fmt: skip


@pytest.mark.parametrize(
  'place', ['gs://bucket/run', 's3://bucket/run', 'https://host/run', 'FILE:///tmp/run', '~nobody-here/x']
)
@pytest.mark.parametrize('name', COMMANDS)
def test_a_workdir_elsewhere_is_refused_in_one_line(tmp_path, monkeypatch, name, place):
  monkeypatch.chdir(tmp_path)
  arguments = [argument.replace('configs/', f'{ROOT}/configs/') for argument in COMMANDS[name]]
  arguments = [argument.replace('experiments/', f'{ROOT}/experiments/') for argument in arguments]
  line = one_line(call_command(name, *(argument.replace('{}', place) for argument in arguments)))
  assert place in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'arguments',
  [
    ('cnn_jax.report', '--workdir=x', '--output=s3://bucket/report.html'),
    ('cnn_jax.export', '--workdir=x', '--output=gs://bucket/m'),
    ('cnn_jax.evaluate', '--workdir=x', '--data_dir=gs://bucket/pictures'),
    ('cnn_jax.predict', '--workdir=x', 'http://host/cat.jpg'),
    ('cnn_jax.main', '--config=configs/digits.py', '--workdir=hdfs://host/run'),
    ('cnn_jax.main', '--config=configs/digits.py', '--config.init_from=gs://bucket/run'),
    ('cnn_jax.main', '--config=configs/image_folder.py', '--config.data.dir=gs://bucket/pictures'),
    ('cnn_jax.sweep.__main__', '--config=configs/digits.py', '--space=https://host/space.py', '--trials=1'),
  ],
)
def test_any_other_path_elsewhere_is_refused_in_one_line(arguments):
  assert 'is not a path on this machine; copy or mount it' in one_line(call_command(*arguments))


def test_a_tilde_is_the_home_directory_in_every_command(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  for name in ('cnn_jax.evaluate', 'cnn_jax.predict', 'cnn_jax.report'):
    line = one_line(call_command(name, *(argument.replace('{}', '~/no run') for argument in COMMANDS[name])))
    assert str(tmp_path / 'no run') in line
  assert files.local_path('~/x') == str(tmp_path / 'x')
  (tmp_path / '~odd').mkdir()
  assert files.local_path('~odd') == '~odd'  # a folder that is there
  for path in ('./~x', 'a:b/c', 'C:/x', 'x/gs:/y'):
    assert files.local_path(path) == path
  assert not (tmp_path / '~').exists()


@pytest.fixture
def frozen(monkeypatch):
  """A clock that stands still."""
  strftime = time.strftime
  monkeypatch.setattr(time, 'strftime', lambda form, when=None: strftime(form, when or time.gmtime(0)))


def test_runs_of_the_same_second_have_workdirs_of_their_own(tmp_path, frozen):
  made = [workdirs.new_workdir(tmp_path / 'digits') for _ in range(3)]
  assert [pathlib.Path(path).name for path in made] == [f'digits-19700101-000000{end}' for end in ('', '-2', '-3')]
  (tmp_path / 'file').touch()
  with pytest.raises(UsageError, match='cannot write to'):
    workdirs.new_workdir(tmp_path / 'file' / 'digits')


@pytest.mark.faults
def test_two_runs_without_a_workdir_in_the_same_second(tmp_path, monkeypatch, frozen):
  monkeypatch.chdir(tmp_path)
  arguments = [argument.replace('=configs/', f'={ROOT}/configs/') for argument in DIGITS]
  for _ in range(2):
    done = call_command('cnn_jax.main', *arguments, '--config.epochs=2')
    assert done.returncode == 0, done.stderr
  assert len(list(tmp_path.glob('runs/digits-*/result.json'))) == 2


def test_a_config_file_may_have_blanks_in_its_name_and_follow_a_blank(tmp_path):
  file = tmp_path / 'my config.py'
  file.write_text((ROOT / 'configs' / 'digits.py').read_text())
  line = one_line(call_command('cnn_jax.main', '--config', file, '--config.epochs', '0'))
  assert 'config.epochs is 0; it must be greater than zero' in line


def test_tensorboard_hides_what_a_run_logged_before_its_first_checkpoint(tmp_path):
  for steps in (range(1, 7), range(1, 9)):  # killed after the sixth step, and started again at the first
    with open_recorder(tmp_path, 0, tensorboard=True) as recorder:
      append_points(recorder, steps)
  shown = []
  for file in sorted(tmp_path.glob('events.out.tfevents.*')):
    for event in read_events(file):
      if event.HasField('session_log'):
        shown = [scalar for scalar in shown if scalar[1] < event.step]
      shown += [(value.tag, event.step) for value in event.summary.value]
  assert sorted(shown) == EVERY_POINT


WITHOUT_HOME = """
import importlib, json, os, pwd, sys
if os.geteuid() == 0:
  os.setresuid(12345, 0, 0)  # a user who is in no table, and still root for files
else:
  def getpwuid(uid):
    raise KeyError(f'getpwuid(): uid not found: {uid}')
  pwd.getpwuid = getpwuid
from cnn_jax import command
for module, *arguments in json.loads(sys.argv[1]):
  module = module.replace('sweep', 'sweep.__main__')
  print(module.split('.')[1], command.call(importlib.import_module(module).main, arguments), flush=True)
"""


def run_without_home(*commands, **environment):
  """Runs commands, in one process, as a user who is not in the table of users and has no home directory."""
  hidden = ('HOME', 'XDG_CACHE_HOME', 'LOGNAME', 'USER', 'LNAME', 'USERNAME', 'MPLCONFIGDIR')
  return subprocess.run(
    [sys.executable, '-c', WITHOUT_HOME, json.dumps([[str(part) for part in parts] for parts in commands])],
    cwd=ROOT,
    env={name: value for name, value in os.environ.items() if name not in hidden} | environment,
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )


@pytest.mark.faults
def test_a_user_without_a_home_directory(tmp_path):
  pictures = write_photographs(tmp_path / 'pictures')
  run = tmp_path / 'run'
  done = run_without_home(
    ('cnn_jax.main', *DIGITS, '--config.log.tensorboard=True', '--config.log.report=True', f'--workdir={run}'),
    ('cnn_jax.evaluate', f'--workdir={run}'),
    ('cnn_jax.predict', f'--workdir={run}', pictures / 'cat' / '000.png'),
    ('cnn_jax.report', f'--workdir={run}'),
    ('cnn_jax.export', f'--workdir={run}', f'--output={tmp_path}/model.stablehlo'),
    ('cnn_jax.main', *folder_arguments(pictures, tmp_path / 'f')),
    ('cnn_jax.main', *DIGITS, '--workdir=~/run'),
  )
  ends = [line for line in done.stdout.splitlines() if re.fullmatch(r'\w+ \d+', line)]
  assert [int(line.split()[1]) for line in ends] == [0, 0, 0, 0, 0, 0, 2], done.stderr
  assert 'Traceback' not in done.stderr
  (home,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert 'there is no such user or home directory; give the full path' in home


@pytest.mark.faults
def test_a_user_without_a_home_directory_trains_on_a_folder_and_sweeps(tmp_path):
  pictures = write_photographs(tmp_path / 'pictures')
  done = run_without_home(
    ('cnn_jax.main', *folder_arguments(pictures, tmp_path / 'f')),
    (
      'cnn_jax.sweep', '--config=configs/digits.py', '--config.epochs=2', '--config.schedule.name=constant',
      '--space=experiments/spaces/learning_rate.py', '--trials=1', '--seeds=0', f'--workdir={tmp_path}/s',
    ),
    XDG_CACHE_HOME=str(tmp_path / 'cache'),
  )  # fmt: skip
  assert 'main 0\n' in done.stdout, done.stderr
  assert 'sweep 0\n' in done.stdout, done.stderr
  assert 'Traceback' not in done.stderr


WINDOWS = """
import runpy, signal, sys
import jax  # which runs there

class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'):
      raise ModuleNotFoundError(f'No module named {name!r}')

sys.meta_path.insert(0, Blocked())
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'):
  sys.modules.pop(name, None)
for name in ('SIGHUP', 'SIGKILL', 'SIGSTOP'):
  delattr(signal, name)
sys.platform = 'win32'
for module in sys.argv[1:]:
  sys.argv[1:] = ['--help']
  try:
    runpy.run_module(module, run_name='__main__', alter_sys=True)
  except SystemExit as end:
    print(module, end.code)
"""


@pytest.mark.faults
def test_windows_is_refused_in_one_line():
  names = [name.removesuffix('.__main__') for name in COMMANDS]
  done = subprocess.run(
    [sys.executable, '-c', WINDOWS, *names], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
  )
  assert done.stdout.splitlines() == [f'{name} 2' for name in names], done.stderr
  assert done.stderr == f'error: {command.SYSTEMS}\n' * len(names)


def test_windows_is_refused_by_the_functions_too(tmp_path, monkeypatch):
  monkeypatch.setattr(workdirs, 'fcntl', None)
  with pytest.raises(UsageError, match='Linux and macOS'), workdirs.lock(tmp_path):
    pass


@pytest.mark.faults
def test_the_workdir_of_a_run_is_no_change_of_the_code(tmp_path):
  """A clone whose only change is the folder of its own run."""
  clone = tmp_path / 'clone'
  git = ['git', '-c', 'user.name=x', '-c', 'user.email=x@x', '-C', clone]
  (clone / 'configs').mkdir(parents=True)
  for name in ('cnn_jax', 'configs'):
    subprocess.run(['cp', '-r', ROOT / name, clone], check=True)
  subprocess.run([*git[:1], 'init', '-q', clone], check=True)
  (clone / '.gitignore').write_text('__pycache__\n')
  subprocess.run([*git, 'add', '.'], check=True)
  subprocess.run([*git, 'commit', '-qm', 'x'], check=True)
  for _ in range(2):  # the second one finds the folder of the first
    done = subprocess.run(
      [sys.executable, '-m', 'cnn_jax.main', *DIGITS, '--config.epochs=2', '--workdir=my_runs/digits'], cwd=clone,
      env=os.environ | {'PYTHONPATH': str(clone)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
  assert read_json(clone / 'my_runs' / 'digits' / 'environment.json')['git']['dirty'] is False
