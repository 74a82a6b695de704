"""Sweeps: trials that cannot be trained, repeats, workers and storages that die or fall silent, odd workdirs."""

import contextlib
import csv
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest

from cnn_jax import UsageError
from cnn_jax.sweep import storage
from tests.faults.tools import ROOT, one_line, wait_for
from tests.helpers import call_command
from tests.sweep_helpers import (
  SPACE,
  call_sweep_with_threads,
  open_trials,
  start_sweep,
  workers_of,
  write_files,
)

pytestmark = [
  pytest.mark.faults,
  pytest.mark.filterwarnings('ignore::optuna.exceptions.ExperimentalWarning'),
]
GRID = ('--sampler=grid', '--pruner=none', '--seeds=0', '--trials=99')


def rows_of(workdir):
  return {row['trial']: row for row in csv.DictReader((workdir / 'results.csv').read_text().splitlines())}


def last_line(done):
  """The error of a command whose workers are threads, and whose tracebacks belong to their logs."""
  assert done.returncode == 2, done.stderr
  *_, line = done.stderr.splitlines()
  assert line.startswith('error: ')
  return line


def space_of(*cases):
  """A space file with one categorical parameter, whose values are statements that change the config."""
  return f"def suggest(trial, config):\n  exec(trial.suggest_categorical('case', {cases!r}))\n"


# A trial's own failure.

IMPOSSIBLE = {
  'config.batch_size = 2048': 'infeasible: config.batch_size is 2048 but there are 1295 training images',
  'config.augment.shift = 8': 'infeasible: config.augment.shift is 8 but images are 8x8',
  'config.model.features = (4,) * 5': 'infeasible: the network of config.model needs images of at least 16 pixels',
  "config.schedule.name = 'cosine'": 'infeasible: config.schedule.warmup_epochs is 2.0 of 1 epochs',
  'config.data.validation = 0.0': 'infeasible: there is no validation split',
  'config.data.validation = 1e-9': 'infeasible: Digits, 1,797 images bundled with scikit-learn leaves the validation',
  'config.seed = 2**32': 'infeasible: config.seed is 4294967296',
  'config.optimizer.learning_rate = 1e30': 'diverged: ',
}


def test_what_a_trial_cannot_do_is_its_outcome(tmp_path, monkeypatch):
  space = space_of('config.batch_size = 64', *IMPOSSIBLE, 'config.batch_size = 32')
  done = call_sweep_with_threads(monkeypatch, *write_files(tmp_path, space), *GRID, f'--workdir={tmp_path}/w')
  assert done.returncode == 0, done.stderr
  rows = rows_of(tmp_path / 'w')
  assert len(rows) == len(IMPOSSIBLE) + 2
  found = {row['case']: f'{row["state"]}: {row["reason"]}' for row in rows.values()}
  for case, reason in IMPOSSIBLE.items():
    assert found[case].startswith(reason)
  assert '10 trials: 2 complete, 1 diverged, 7 infeasible.' in done.stdout


def test_an_exception_of_the_training_is_the_outcome_of_its_trial(tmp_path, monkeypatch):
  from cnn_jax import train

  make_plan = train.make_plan

  def broken(config, *arguments, **options):
    if config.batch_size == 32:
      raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nand much more')
    if config.batch_size == 16:
      raise UsageError('the run of config.init_from has another network')
    return make_plan(config, *arguments, **options)

  monkeypatch.setattr(train, 'make_plan', broken)
  space = space_of(*(f'config.batch_size = {size}' for size in (64, 32, 16, 128)))
  done = call_sweep_with_threads(monkeypatch, *write_files(tmp_path, space), *GRID, f'--workdir={tmp_path}/w')
  assert done.returncode == 0, done.stderr
  reasons = [row['reason'] for row in rows_of(tmp_path / 'w').values() if row['state'] == 'failed']
  assert sorted(reasons) == [
    'RuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes',
    'the run of config.init_from has another network',
  ]


@pytest.mark.parametrize(
  ('error', 'message'),
  [
    (OSError(28, 'No space left on device', 'metrics.jsonl'), 'No space left on device'),
    (PermissionError(13, 'Permission denied', 'x'), 'Permission denied'),
  ],
)
def test_a_fault_of_the_machine_ends_the_sweep(tmp_path, monkeypatch, error, message):
  from cnn_jax import train

  def broken(*_, **__):
    raise error

  monkeypatch.setattr(train, 'make_plan', broken)
  done = call_sweep_with_threads(
    monkeypatch, *write_files(tmp_path), '--trials=2', '--seeds=0', f'--workdir={tmp_path}/w'
  )
  assert message in last_line(done)


def test_missing_data_end_the_sweep(tmp_path, monkeypatch):
  options = write_files(tmp_path, space_of('config.batch_size = 64', 'config.batch_size = 32'))
  done = call_sweep_with_threads(
    monkeypatch, *options, *GRID, '--config.data.source=folder', f'--config.data.dir={tmp_path}/none',
    f'--workdir={tmp_path}/w',
  )  # fmt: skip
  assert f'{tmp_path}/none' in last_line(done)
  assert not (tmp_path / 'w' / 'results.csv').exists()


def test_a_full_disk_ends_the_sweep_in_one_line_and_it_continues(tmp_path, monkeypatch):
  if os.getuid():
    pytest.skip('only root can mount a small disk')
  disk = tmp_path / 'disk'
  disk.mkdir()
  subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk], check=True)
  try:
    filler = disk / 'filler'
    options = [*write_files(tmp_path), '--trials=2', '--sampler=random', '--seeds=0', f'--workdir={disk}/w']
    call_sweep_with_threads(monkeypatch, *options, '--trials=1')
    with contextlib.suppress(OSError), filler.open('wb') as file:
      while True:
        file.write(bytes(4096))
        file.flush()
    done = call_sweep_with_threads(monkeypatch, *options)
    assert 'o space left' in last_line(done) or 'disk is full' in last_line(done)
    filler.unlink()
    done = call_sweep_with_threads(monkeypatch, *options)
    assert done.returncode == 0, done.stderr
    assert [row['state'] for row in rows_of(disk / 'w').values()] == ['complete'] * 2
  finally:
    subprocess.run(['umount', '-l', disk], check=True)


def test_a_sweep_without_validation_ends_before_its_first_trial(tmp_path, monkeypatch):
  for space, override in (
    (SPACE, 0.0),
    (space_of('config.data.validation = 0.0', 'config.data.validation = 0.0; config.seed = 1'), 0.1),
  ):
    options = [*write_files(tmp_path, space), '--trials=3', f'--config.data.validation={override}']
    line = last_line(call_sweep_with_threads(monkeypatch, *options, f'--workdir={tmp_path}/w'))
    assert 'there is no validation split to compare trials on; raise config.data.validation' in line
    assert not (tmp_path / 'w').exists()
  options = [*write_files(tmp_path), '--trials=2', '--config.data.validation=1e-9']
  line = last_line(call_sweep_with_threads(monkeypatch, *options, f'--workdir={tmp_path}/w'))
  assert 'leaves the validation split empty' in line


# Repeats.

SMALL = "def suggest(trial, config):\n  config.data.split_seed = trial.suggest_int('s', 0, 2)\n"
ROUNDED = "def suggest(trial, config):\n  config.data.split_seed = int(trial.suggest_float('s', 0, 2.999))\n"
CONDITIONAL = """
def suggest(trial, config):
  config.data.split_seed = trial.suggest_categorical('s', (0, 1, 2))
  if config.data.split_seed == 9:
    config.epochs = trial.suggest_int('epochs', 1, 3)
"""


@pytest.mark.parametrize(
  ('space', 'sampler'),
  [(SMALL, 'tpe'), (SMALL, 'random'), (SMALL, 'qmc'), (SMALL, 'cmaes'), (ROUNDED, 'random'), (CONDITIONAL, 'tpe')],
)
def test_each_configuration_is_trained_once(tmp_path, monkeypatch, space, sampler):
  options = [*write_files(tmp_path, space), f'--sampler={sampler}', '--pruner=none', '--seeds=0']
  options += [f'--workdir={tmp_path}/w']
  done = call_sweep_with_threads(monkeypatch, *options, '--trials=2')
  assert done.returncode == 0, done.stderr
  done = call_sweep_with_threads(monkeypatch, *options, '--trials=5')
  assert done.returncode == 0, done.stderr
  assert 'The space has no further configuration: 3 trials instead of 5.' in done.stdout
  assert '3 trials: 3 complete. ' in done.stdout
  assert 'repeated an earlier trial and' in done.stdout
  assert 'repeated an earlier trial and' in (tmp_path / 'w' / 'results.md').read_text()
  assert sorted(int(float(row['s'])) for row in rows_of(tmp_path / 'w').values()) == [0, 1, 2]
  again = call_sweep_with_threads(monkeypatch, *options, '--trials=5')
  assert again.returncode == 0, again.stderr
  assert 'trial_00000:' not in again.stdout


def test_a_grid_has_each_configuration_once(tmp_path, monkeypatch):
  space = 'GRID = {"s": (0.1, 0.2, 1.5, 1.5)}\n' + ROUNDED
  done = call_sweep_with_threads(monkeypatch, *write_files(tmp_path, space), *GRID, f'--workdir={tmp_path}/w')
  assert 'The grid has 2 different points, so there are 2 trials.' in done.stdout
  assert len(rows_of(tmp_path / 'w')) == 2


# Workers and storages that fall silent.


def test_a_stopped_worker_is_replaced_and_the_sweep_completes(tmp_path):
  options = [*write_files(tmp_path), '--trials=2', '--sampler=random', '--pruner=none', '--seeds=0', '--deadline=3']
  sweep = start_sweep(*options, f'--workdir={tmp_path}/w')
  wait_for(lambda: (tmp_path / 'w' / 'trial_00000' / 'config.json').exists())
  stopped = workers_of(sweep.pid)
  os.kill(stopped[0], signal.SIGSTOP)
  output, errors = sweep.communicate(timeout=120)
  assert sweep.returncode == 0, errors
  assert 'trial_00000: its worker was silent for 3 s and was killed; another worker continues it' in output
  assert [row['state'] for row in rows_of(tmp_path / 'w').values()] == ['complete'] * 2
  assert not pathlib.Path(f'/proc/{stopped[0]}').exists()


def test_memory_that_a_trial_does_not_get_and_a_trial_whose_workers_are_killed(tmp_path):
  space = space_of('config.model.features = (1_000_000,)', 'config.batch_size = 64')
  limit = 8 << 30
  code = (
    f'import resource, runpy; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit})); '
    "runpy.run_module('cnn_jax.sweep', run_name='__main__', alter_sys=True)"
  )
  if 0 < resource.getrlimit(resource.RLIMIT_AS)[1] < limit:
    pytest.skip('less memory than the test limits')
  arguments = [*write_files(tmp_path, space), *GRID, f'--workdir={tmp_path}/w']
  done = subprocess.run(
    [sys.executable, '-c', code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
  )
  assert done.returncode == 0, done.stderr
  assert sorted(row['state'] for row in rows_of(tmp_path / 'w').values()) == ['complete', 'failed']
  assert 'emory' in next(row['reason'] for row in rows_of(tmp_path / 'w').values() if row['state'] == 'failed')


# Workdirs.


@pytest.mark.parametrize(
  'name', ['what?', 'a#b', '100%25', 'with blank ', 'Größe-模型-😀', "it's", 'a;b&c=d', 'x' * 200]
)
def test_the_name_of_a_workdir_may_hold_anything(tmp_path, name):
  url = storage.file_url(tmp_path / name / 'study.db')
  (tmp_path / name).mkdir()
  trials = open_trials((url, 's'), ['a'])
  assert trials.claim()[0] == 'a'
  assert [path.relative_to(tmp_path).parts for path in tmp_path.rglob('*') if path.is_file()] == [(name, 'study.db')]


def test_a_workdir_that_cannot_hold_a_sweep_is_one_line(tmp_path):
  options = [*write_files(tmp_path), '--trials=1', '--seeds=0']
  (tmp_path / 'file').touch()
  for workdir in (
    tmp_path / ('x' * 300),
    tmp_path / 'file' / 'w',
    '/proc/w',
    os.fsdecode(os.fsencode(tmp_path) + b'/\xff'),
  ):
    line = one_line(call_command('cnn_jax.sweep.__main__', *options, f'--workdir={workdir}'))
    assert 'workdir' in line or 'storage' in line


def test_a_read_only_disk_is_one_line(tmp_path):
  if os.getuid():
    pytest.skip('only root can mount a read-only disk')
  (tmp_path / 'disk').mkdir()
  subprocess.run(['mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', tmp_path / 'disk'], check=True)
  try:
    options = [*write_files(tmp_path), '--trials=1', '--seeds=0', f'--workdir={tmp_path}/disk/w']
    assert 'Read-only file system' in one_line(call_command('cnn_jax.sweep.__main__', *options))
  finally:
    subprocess.run(['umount', '-l', tmp_path / 'disk'], check=True)
