"""The command: its record, the same table whatever is killed or stopped, and mistakes in one line."""

import csv
import json
import os
import pathlib
import re
import runpy
import signal
import sys
import threading

import pytest

from tests.sweep_helpers import (
  SPACE,
  call_sweep,
  call_sweep_with_threads,
  free_port,
  postgres_server,
  start_sweep,
  states,
  wait,
  wait_for,
  workers_of,
  write_files,
)

pytestmark = pytest.mark.filterwarnings('ignore::optuna.exceptions.ExperimentalWarning')

RUNS = ['trial_00000', 'trial_00001']
RANDOM = ('--trials=2', '--sampler=random', '--pruner=none')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  return tmp_path_factory.mktemp('sweep')


@pytest.fixture(scope='module')
def options(files):
  return [*write_files(files), *RANDOM]


@pytest.fixture(scope='module')
def complete(files, options):
  """A sweep that was not interrupted: its workdir and its output."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    done = call_sweep_with_threads(monkeypatch, *options, '--seeds=1', f'--workdir={files / "complete"}', plots=True)
  assert done.returncode == 0, done.stderr
  return files / 'complete', done.stdout


def read_table(workdir):
  return list(csv.DictReader((workdir / 'results.csv').read_text().splitlines()))


def test_a_sweep_leaves_its_record(complete):
  workdir, output = complete
  rows = read_table(workdir)
  assert [row['state'] for row in rows] == ['complete'] * 2
  accuracies = [float(row['validation_accuracy']) for row in rows]
  assert accuracies == sorted(accuracies, reverse=True)
  for row in rows:
    run = workdir / row['trial']
    result = json.loads((run / 'result.json').read_text())
    assert result['validation_accuracy'] == float(row['validation_accuracy'])
    assert not [name for name in result if name.startswith('test_')]
    assert json.loads((run / 'config.json').read_text())['data']['split_seed'] == int(row['split_seed'])
  for label in (rows[0]['trial'], 'default'):
    run = workdir / f'{label}_seed_1'  # the seed of the trials is 0
    assert json.loads((run / 'config.json').read_text())['seed'] == 1
    assert json.loads((run / 'result.json').read_text())['test_accuracy'] > 0
  baseline = json.loads((workdir / 'default_seed_0' / 'result.json').read_text())
  assert 'test_accuracy' not in baseline
  text = (workdir / 'results.md').read_text()
  assert f'the unchanged config {100 * baseline["validation_accuracy"]:.2f} % on validation' in text
  assert '| default | ' in text and 'scikit-learn' in text and 'jax' in text
  for name in ('history', 'importances', 'parallel_coordinates', 'slices'):
    assert f'({name}.png)' in text
    assert (workdir / f'{name}.png').stat().st_size > 5000
  assert '2 of 2 done' in output
  assert 'default: ' in output


@pytest.fixture
def late():
  """Signals that arrive when no command handles them, which would end the tests."""
  received = []
  before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
  yield received
  signal.signal(signal.SIGTERM, before)


def test_a_killed_worker_is_replaced_and_a_stopped_sweep_continues_to_the_same_table(
  files, options, complete, late, monkeypatch
):
  """The sweep runs in this process, its workers in processes of their own."""
  workdir, own = files / 'stopped', os.getpid()
  url = f'sqlite:///{workdir}/study.db', 'tiny-space'

  def kill_and_stop():
    wait(lambda: (workdir / 'trial_00000' / 'config.json').exists(), 120)
    os.kill(workers_of(own)[0], signal.SIGKILL)
    wait_for(own, url, done=1, running=1)
    os.kill(own, signal.SIGTERM)

  killer = threading.Thread(target=kill_and_stop)
  killer.start()
  done = call_sweep(*options, '--seeds=0', f'--workdir={workdir}')
  killer.join()
  assert done.returncode == 143, done.stderr
  assert not late
  assert 'trial_00000: its worker ended by signal 9; another worker continues it' in done.stdout
  assert 'the same command continues from there' in done.stderr
  assert states(url)[1]['RUNNING'] == 0
  assert [row['trial'] for row in read_table(workdir)] == ['trial_00000']

  done = call_sweep_with_threads(monkeypatch, *options, '--seeds=0', f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  finished, counts = states(url)
  assert finished == RUNS
  assert (counts['COMPLETE'], counts['RUNNING'], counts['WAITING']) == (2, 0, 0)
  assert (workdir / 'results.csv').read_bytes() == (complete[0] / 'results.csv').read_bytes()


def test_two_machines_of_which_one_is_killed_give_the_same_table(files, options, complete, monkeypatch):
  with postgres_server() as postgres:
    url = postgres, 'two machines'
    secret = postgres.replace('sweep@', 'sweep:secret@')  # the server trusts everybody
    shared = [*options, f'--storage={secret}', '--study=two machines', '--seeds=0', '--heartbeat=1']
    first = start_sweep(*shared, f'--workdir={files / "first"}')
    orphans = []

    def kill():
      wait_for(first.pid, url, done=0, running=2)
      orphans.extend(workers_of(first.pid))
      first.kill()

    wait_for(first.pid, url, done=0, running=1)
    killer = threading.Thread(target=kill)
    killer.start()
    second = call_sweep_with_threads(monkeypatch, *shared, f'--workdir={files / "second"}')
    killer.join()
    first.communicate()
    assert second.returncode == 0, second.stderr
    finished, counts = states(url)
    assert finished == RUNS
    assert (counts['COMPLETE'], counts['RUNNING'], counts['WAITING']) == (2, 0, 0)
    assert orphans
    wait(lambda: not any(pathlib.Path(f'/proc/{pid}/cmdline').exists() for pid in orphans), 10)
    again = call_sweep_with_threads(monkeypatch, *shared, f'--workdir={files / "first"}')
  assert again.returncode == 0, again.stderr
  assert 'trial_00000:' not in again.stdout  # nothing is left but to write the tables
  for machine in ('first', 'second'):
    assert (files / machine / 'results.csv').read_bytes() == (complete[0] / 'results.csv').read_bytes()

  assert 'sweep:***@127.0.0.1' in (files / 'first' / 'results.md').read_text()
  written = [path.read_bytes() for path in (files / 'first').rglob('*') if path.is_file()]
  assert not any(b'secret' in contents for contents in written)
  assert 'secret' not in second.stdout + second.stderr


def test_an_impossible_combination_is_an_outcome_of_its_trial(tmp_path, monkeypatch):
  space = "def suggest(trial, config):\n  config.batch_size = trial.suggest_categorical('size', (64, 2048))\n"
  done = call_sweep_with_threads(
    monkeypatch, *write_files(tmp_path, space), '--trials=9', '--sampler=grid', '--pruner=none', '--seeds=1',
    '--config.batch_size=2048', f'--workdir={tmp_path}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'The grid has 2 different points' in done.stdout
  good, bad = read_table(tmp_path)
  reason = 'config.batch_size is 2048 but there are 1295 training images; make it at most 1295.'
  assert (good['state'], good['size'], good['reason']) == ('complete', '64', '')
  assert (bad['state'], bad['size'], bad['reason']) == ('infeasible', '2048', reason)
  assert f': infeasible: {reason}' in done.stdout
  assert not (tmp_path / bad['trial'] / 'config.json').exists()
  text = (tmp_path / 'results.md').read_text()
  assert reason in text
  # So is the unchanged config here, with which the best trial is compared.
  assert 'the unchanged config nothing (infeasible)' in text
  assert '| default | - | - | - | 0, 1 infeasible |' in text


@pytest.mark.parametrize(
  ('field', 'status', 'message'),
  [
    ('batch_size', 2, 'all 1 trials are infeasible; the first one: config.batch_size is'),
    ('optimizer.learning_rate', 3, 'none of the 1 trials completed; see'),
  ],
)
def test_a_sweep_of_which_no_trial_completes_fails(tmp_path, monkeypatch, field, status, message):
  value = {'batch_size': 'int("size", 2000, 2001)', 'optimizer.learning_rate': 'float("rate", 1e30, 1e31)'}[field]
  space = write_files(tmp_path, f'def suggest(trial, config):\n  config.{field} = trial.suggest_{value}\n')
  done = call_sweep_with_threads(monkeypatch, *space, *RANDOM, '--trials=1', f'--workdir={tmp_path}')
  assert done.returncode == status
  assert done.stderr.startswith(f'error: {message}')
  assert len(done.stderr.splitlines()) == 1
  assert read_table(tmp_path)[0]['state'] == {2: 'infeasible', 3: 'diverged'}[status]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda files: (SPACE.replace('split_seed =', 'split_sed ='), []), 'space.py, line 3: AttributeError'),
    (lambda files: (SPACE.replace('999', '99'), [f'--workdir={files / "complete"}']), 'the space of split_seed is'),
    (
      lambda files: (SPACE, [f'--storage=postgresql://a:secret@127.0.0.1:{free_port()}/b']),
      'cannot use the storage|no driver',
    ),
    (lambda files: (SPACE, ['--config.epochs=none']), 'epochs'),
    (lambda files: (SPACE, ['--config.seeds=3']), 'config.seeds is 3, but a trial has one seed'),
    (lambda files: (SPACE, ['--config=']), 'which experiment'),
    (lambda files: (SPACE, ['--sampler=best']), '--sampler'),
    (lambda files: (SPACE, ['--trials=0']), '--trials is 0'),
    (lambda files: (SPACE, ['--workers=9999']), '--workers is 9999, but this machine has'),
    (lambda files: (SPACE, ['--storag=postgresql://a:secret@b/c']), r'a:\*\*\*@b/c'),
  ],
)
def test_a_mistake_is_one_line_and_status_2(files, complete, tmp_path, change, message):
  space, more = change(files)
  done = call_sweep(*write_files(tmp_path, space), *RANDOM, f'--workdir={tmp_path / "run"}', *more)
  assert done.returncode == 2, done.stderr
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert re.search(message, done.stderr)
  assert 'secret' not in done.stderr
  assert not (tmp_path / 'run' / 'trial_00000').exists()


def test_a_missing_package_is_one_line_that_names_the_extra(options, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'cmaes', None)
  done = call_sweep(*options, '--sampler=cmaes')
  assert done.returncode == 2
  assert "--sampler=cmaes needs the package cmaes; pip install '.[sweep]'" in done.stderr
  for name in [name for name in sys.modules if name.startswith('cnn_jax.sweep')]:
    monkeypatch.delitem(sys.modules, name)  # so that they are imported again
  monkeypatch.setitem(sys.modules, 'optuna', None)
  monkeypatch.setattr(sys, 'argv', ['sweep', *options])
  with pytest.raises(SystemExit) as stopped:
    runpy.run_module('cnn_jax.sweep', run_name='__main__')
  assert stopped.value.code == 2
  assert capsys.readouterr().err == "error: python -m cnn_jax.sweep needs the package optuna; pip install '.[sweep]'.\n"
