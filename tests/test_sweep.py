"""Sweeps: the same trials again, exactly as many as asked for, whatever is killed, on SQLite and on PostgreSQL."""

import csv
import glob
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from cnn_jax import UsageError
from cnn_jax.config import default_config
from experiments.sweeps import results, worker
from experiments.sweeps.space import Space, make_pruner, make_sampler
from experiments.sweeps.trials import Lost, Trials, open_storage, open_study, storage_errors
from tests.conftest import ROOT, run_command

pytestmark = pytest.mark.filterwarnings('ignore::optuna.exceptions.ExperimentalWarning')

CONFIG = """
from cnn_jax.config import default_config

def get_config(arg=None):
  config = default_config()
  config.data.source = 'bundled'
  config.data.name = 'digits'
  config.data.test = 0.2
  config.batch_size = 64
  config.epochs = 2
  config.model.features = (4,)
  config.schedule.name = 'constant'
  config.log.tensorboard = False
  return config
"""
# The split is not part of the compiled program, so only the first trial has to compile.
SPACE = """
def suggest(trial, config):
  config.data.split_seed = trial.suggest_int('split_seed', 0, 999)
"""
MIXED = """
GRID = {'learning_rate': (0.01, 0.1)}

def suggest(trial, config):
  config.optimizer.learning_rate = trial.suggest_float('learning_rate', 1e-3, 1.0, log=True)
  config.model.dropout = trial.suggest_float('dropout', 0.0, 0.3, step=0.1)
  config.model.norm = trial.suggest_categorical('norm', ('batch', 'none'))
  config.augment.shift = trial.suggest_int('shift', 0, 2)
"""


def make_space(tmp_path, text, config=None):
  (tmp_path / 'space.py').write_text(text)
  return Space(tmp_path / 'space.py', config or default_config())


# Spaces.


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (SPACE.replace('config.data.split_seed', 'config.data.split_sed'), 'space.py, line 3: AttributeError.*split_seed'),
    (SPACE.replace('split_seed =', 'split_seed = "a" +'), 'line 3: TypeError'),
    (SPACE.replace('config.data.split_seed', 'config.epochs'), 'config.epochs is 0'),
    (SPACE.replace('0, 999', '9, 3'), 'line 3: ValueError'),
    (SPACE.replace('trial.suggest_int', 'trial.sugest_int'), 'line 3: AttributeError'),
    (SPACE.replace('config.data.split_seed', 'config.model.pool'), 'line 3: TypeError.*pool'),
    (SPACE.replace('suggest(trial', 'sugest(trial'), 'no function suggest'),
    ('def suggest(trial, config):\n  config.epochs = 3', 'suggests nothing'),
    ("def suggest(trial, config):\n  trial.suggest_int('a', 0, 3)", 'the same config'),
    ('def suggest(trial, config)\n  pass', 'line 1: SyntaxError'),
    ('import no_such_module', 'ModuleNotFoundError'),
  ],
)
def test_a_mistake_in_a_space_is_found_before_the_first_trial(tmp_path, text, message):
  with pytest.raises(UsageError, match=message):
    make_space(tmp_path, text)


def test_a_space_leaves_the_config_as_it_was(tmp_path):
  config = default_config()
  before = config.to_dict()
  space = make_space(tmp_path, MIXED, config)
  assert config.to_dict() == before
  made = space.config_of(optuna.trial.FixedTrial({'learning_rate': 0.5, 'dropout': 0.1, 'norm': 'none', 'shift': 2}))
  assert (made.optimizer.learning_rate, made.model.norm, made.augment.shift) == (0.5, 'none', 2)


def test_the_spaces_of_the_project():
  spaces = {path.stem: Space(path, default_config()) for path in (ROOT / 'experiments' / 'spaces').glob('*.py')}
  assert len(spaces['learning_rate'].grid(0)) == 45
  assert len(spaces['learning_rate_batch_size'].grid(0)) == 28
  assert len(spaces['regularization'].distributions) == 5


def draw(space, sampler, seed, indices):
  """Parameters of trials that are made in this order, with nothing kept in between but the study."""
  storage = optuna.storages.InMemoryStorage()
  optuna.create_study(storage=storage, study_name='s', direction='maximize')
  drawn = {}
  for i in indices:
    study = optuna.load_study(storage=storage, study_name='s', sampler=make_sampler(sampler, space, seed, i))
    trial = study.ask()
    space.config_of(trial)
    drawn[i] = trial.params
    study.tell(trial, 0.1 * i)
  return drawn


@pytest.mark.parametrize('sampler', ['random', 'grid', 'qmc'])
def test_parameters_depend_on_seed_and_number_alone(tmp_path, sampler):
  space = make_space(tmp_path, MIXED)
  forwards = draw(space, sampler, 3, range(16))
  assert forwards == draw(space, sampler, 3, reversed(range(16)))
  assert forwards != draw(space, sampler, 4, range(16))
  assert len({json.dumps(params) for params in forwards.values()}) > 12


def test_a_grid_has_each_point_once(tmp_path):
  space = make_space(tmp_path, MIXED)
  points = space.grid(0)
  assert len(points) == 2 * 4 * 2 * 3
  assert len({json.dumps(point) for point in points}) == len(points)
  assert {point['dropout'] for point in points} == {0.0, 0.1, 0.2, 0.3}
  assert {point['learning_rate'] for point in points} == {0.01, 0.1}
  assert points != space.grid(1)
  for text, message in (
    (MIXED.replace('GRID', 'GRIT'), 'needs values of learning_rate'),
    (MIXED.replace("GRID = {'learn", "GRID = {'yearn"), 'yearning_rate'),
    (MIXED.replace('(0.01, 0.1)', '(0.01, 10.0)'), '10.0 of GRID'),
  ):
    with pytest.raises(UsageError, match=message):
      make_space(tmp_path, text).grid(0)


def test_a_sobol_sequence_fills_the_space_evenly(tmp_path):
  space = make_space(tmp_path, MIXED)
  points = [space.sobol(0, i) for i in range(32)]
  assert sum(point['learning_rate'] < 10**-1.5 for point in points) == 16
  assert sum(point['norm'] == 'batch' for point in points) == 16
  assert {point['shift'] for point in points} == {0, 1, 2}
  assert sorted({point['dropout'] for point in points}) == [0.0, 0.1, 0.2, 0.3]


def test_the_model_based_samplers_suggest(tmp_path):
  space = make_space(tmp_path, MIXED)
  for sampler in ('tpe', 'cmaes') if _importable('cmaes') else ('tpe',):
    assert len(draw(space, sampler, 0, range(12))) == 12


# Storages.


@pytest.fixture(scope='module')
def postgres():
  """The URL of a private server, as an ordinary user, on a free port of this machine."""
  found = sorted(glob.glob('/usr/lib/postgresql/*/bin/initdb')) or [shutil.which('initdb')]
  if found[-1] is None:
    pytest.skip('there is no PostgreSQL server on this machine: no initdb in the PATH or in /usr/lib/postgresql')
  if not any(map(_importable, ('psycopg', 'psycopg2'))):
    pytest.skip('there is no driver for PostgreSQL: neither psycopg nor psycopg2 is installed')
  binaries = pathlib.Path(found[-1]).parent
  directory = tempfile.mkdtemp(prefix='cnn_jax_postgres_')
  user = {}
  if os.getuid() == 0:  # whom it refuses
    user = {'user': 'nobody', 'group': 'nogroup', 'extra_groups': []}
    shutil.chown(directory, 'nobody', 'nogroup')
  port = _free_port()
  subprocess.run(
    [binaries / 'initdb', '-D', f'{directory}/data', '-A', 'trust', '-U', 'sweep', '--no-sync', '-E', 'UTF8'],
    check=True, capture_output=True, timeout=120, cwd=directory, **user,
  )  # fmt: skip
  server = subprocess.Popen(
    [
      binaries / 'postgres', '-D', f'{directory}/data', '-p', str(port), '-c', 'listen_addresses=127.0.0.1',
      '-c', 'unix_socket_directories=', '-c', 'fsync=off',
    ],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=directory, **user,
  )  # fmt: skip
  url = f'postgresql://sweep@127.0.0.1:{port}/postgres'
  try:
    # It listens before it lets anyone in.
    ready = [binaries / 'pg_isready', '-q', '-h', '127.0.0.1', '-p', str(port)]
    _wait(lambda: subprocess.run(ready, check=False).returncode == 0, 60)
    yield url
  finally:
    server.send_signal(signal.SIGINT)  # without waiting for clients
    server.wait(30)
    shutil.rmtree(directory, ignore_errors=True)


def _importable(name):
  try:
    __import__(name)
  except ImportError:
    return False
  return True


def _free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _wait(condition, seconds):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.1)


@pytest.fixture(params=['sqlite', 'postgresql'])
def url(request, tmp_path):
  """Of an empty database, or one that earlier tests left, with a name for a study that is new there."""
  if request.param == 'sqlite':
    return f'sqlite:///{tmp_path}/study.db', 's'
  return request.getfixturevalue('postgres'), str(tmp_path)


def open_trials(url, runs=('a', 'b', 'c'), plan=None, alone=False):
  storage = open_storage(url[0], 1)
  return Trials(storage, open_study(storage, url[1], plan or {'x': 1}), runs, alone=alone)


def states(url):
  """How many finished trials each run has, and how many trials there are in each state."""
  storage = open_storage(url[0], 1)
  trials = storage.get_all_trials(storage.get_study_id_from_name(url[1]))
  finished = [t.user_attrs['run'] for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
  return sorted(finished), {state.name: sum(t.state == state for t in trials) for state in TrialState}


def test_each_run_is_finished_once_by_many_who_want_them(url):
  runs = [f'run {i}' for i in range(12)]
  open_trials(url, runs)
  errors = []

  def work():
    try:
      trials = open_trials(url, runs)
      while claimed := trials.claim():
        trial = trials.open(claimed[1], optuna.samplers.RandomSampler(), optuna.pruners.NopPruner())
        trials.finish(trial, 0.5, {})
    except Exception as error:
      errors.append(error)

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
  assert not errors
  finished, counts = states(url)
  assert finished == sorted(runs)
  assert counts['RUNNING'] == counts['WAITING'] == counts['FAIL'] == 0


@pytest.mark.parametrize('kind', ['sqlite', 'postgresql'])
def test_many_may_find_an_empty_database_at_once(request, tmp_path, kind):
  url = f'sqlite:///{tmp_path}/new.db'
  if kind == 'postgresql':
    server = request.getfixturevalue('postgres')
    engine = open_storage(server, 1).engine
    with engine.connect().execution_options(isolation_level='AUTOCOMMIT') as connection:
      connection.execute(sqlalchemy.text('CREATE DATABASE new'))
    url = server.replace('/postgres', '/new')
  barrier, errors = threading.Barrier(4), []

  def work():
    barrier.wait()
    try:
      open_trials((url, 's'), ['a', 'b'])
    except Exception as error:
      errors.append(error)

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert not errors
  assert states((url, 's'))[1]['WAITING'] >= 2


def test_a_trial_nobody_hears_of_goes_to_another(url):
  gone, other = open_trials(url), open_trials(url)
  run, trial_id = gone.claim()
  trial = gone.open(trial_id, optuna.samplers.RandomSampler(), make_pruner('none', 1))
  parameter = trial.suggest_float('p', 0, 1)
  gone.suggested(trial)
  gone.report(trial, 1, 0.25)
  assert other.claim()[0] == 'b'
  assert other.beat([]) == []
  assert gone.beat([trial_id]) == []  # alive
  with other._storage.engine.begin() as connection:
    connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'"))
  other.beat([])
  again, other_id = other.claim()
  assert again == run
  retried = other.open(other_id, optuna.samplers.RandomSampler(), make_pruner('none', 1))
  assert retried.suggest_float('p', 0, 1) == parameter
  assert gone.beat([trial_id]) == [trial_id]  # it was too late, and is told
  with pytest.raises(Lost):
    gone.finish(trial, 0.9, {})
  other.finish(retried, 0.5, {})
  assert other.finished()['a'].value == 0.5
  assert other.finished()['a'].intermediate_values == {1: 0.25}
  assert gone.claim()[0] == 'b'  # of which nobody has heard either
  assert gone.claim()[0] == 'c'


def test_two_trials_of_a_run_are_not_both_used(url):
  first, second = open_trials(url), open_trials(url)
  second._add('b', None)  # as when both find a run without a trial at the same time
  second._add('b', None)
  assert [first.claim()[0], second.claim()[0], first.claim()[0]] == ['a', 'b', 'c']
  assert second.claim() is None
  first.tidy()
  assert states(url)[1] == {'RUNNING': 3, 'COMPLETE': 0, 'PRUNED': 0, 'FAIL': 2, 'WAITING': 0}


def test_a_run_whose_trial_failed_is_taken_even_if_nobody_renewed_it(url):
  """Whoever fails a trial may die before he can do anything else."""
  trials = open_trials(url)
  _, trial_id = trials.claim()
  trials._storage.set_trial_state_values(trial_id, TrialState.FAIL)
  assert open_trials(url).claim()[0] == 'a'


def test_one_who_is_alone_takes_what_is_left_running(tmp_path):
  url = f'sqlite:///{tmp_path}/study.db', 's'
  open_trials(url).claim()
  assert open_trials(url, alone=True).claim()[0] == 'a'


def test_more_trials_can_be_asked_for(url):
  trials = open_trials(url, ['a'])
  trials.claim()
  assert open_trials(url, ['a', 'b']).claim()[0] == 'b'


def test_a_study_that_changed_is_one_line(url):
  open_trials(url, plan={'config.epochs': 3, '--sampler': 'tpe'})
  with pytest.raises(UsageError, match='config.epochs is 4, but the study .* began with 3; .*--study'):
    open_trials(url, plan={'config.epochs': 4, '--sampler': 'tpe'})
  with pytest.raises(UsageError, match='--sampler is missing'):
    open_trials(url, plan={'config.epochs': 3})


def test_the_plan_of_a_space_notes_ranges_and_what_is_made_of_them(tmp_path):
  plan = make_space(tmp_path, SPACE).plan()
  assert plan == make_space(tmp_path, '# another comment\n' + SPACE).plan()
  assert plan != make_space(tmp_path, SPACE.replace('999', '998')).plan()
  assert plan != make_space(tmp_path, SPACE + '  config.epochs = 3\n').plan()


@pytest.mark.parametrize(
  ('url', 'message'),
  [
    ('postgresql://sweep:secret@127.0.0.1:PORT/postgres', r'sweep:\*\*\*@127.0.0.1.*refused'),
    ('sqlite:////nowhere/at/all/study.db', 'unable to open'),
    ('nonsense', 'nonsense.*Could not parse'),
    ('oracle+cx_oracle://a/b', 'no driver'),
  ],
)
def test_a_storage_that_is_not_there_is_one_line_at_once(url, message):
  if url.startswith('postgresql') and not any(map(_importable, ('psycopg', 'psycopg2'))):
    pytest.skip('there is no driver for PostgreSQL: neither psycopg nor psycopg2 is installed')
  started = time.monotonic()
  with pytest.raises(UsageError, match=message) as caught:
    open_storage(url.replace('PORT', str(_free_port())), 1)
  assert 'secret' not in str(caught.value)
  assert '\n' not in str(caught.value)
  assert time.monotonic() - started < 8


def test_a_storage_that_goes_away_is_one_line(postgres, tmp_path):
  trials = open_trials((postgres, str(tmp_path)))
  with trials._storage.engine.begin() as connection:
    connection.execute(sqlalchemy.text('SET statement_timeout = 1'))
    with pytest.raises(UsageError, match='cannot use the storage'), storage_errors(postgres):
      connection.execute(sqlalchemy.text('SELECT pg_sleep(5)'))


# Workers.


def test_workers_share_the_machine(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(5)), raising=False)
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  assert [share.cores for share in worker.shares(2)] == [(0, 1), (2, 3, 4)]
  assert [share.gpus for share in worker.shares(2)] == [None, None]
  assert [share.cores for share in worker.shares(6)] == [(0,), (1,), (2,), (3,), (4,), (0,)]
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,7')
  assert [share.gpus for share in worker.shares(2)] == [('4',), ('7',)]
  assert all(share.alone_on_gpu for share in worker.shares(2))
  assert [share.gpus for share in worker.shares(3)] == [('4',), ('7',), ('4',)]
  assert not any(share.alone_on_gpu for share in worker.shares(3))
  assert worker.shares(1) == [worker.Share(None, None, True)]


# The command.


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp('sweep')
  (directory / 'tiny.py').write_text(CONFIG)
  (directory / 'space.py').write_text(SPACE)
  return directory


def arguments(files, workdir, *more, trials=3):
  return [
    'experiments.sweep', f'--config={files / "tiny.py"}', f'--space={files / "space.py"}', f'--workdir={workdir}',
    f'--trials={trials}', '--sampler=random', '--pruner=none', *more,
  ]  # fmt: skip


def start(*command):
  return subprocess.Popen(
    [sys.executable, '-m', *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    start_new_session=True,
  )  # fmt: skip


def workers_of(process):
  pids = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
  return [int(pid) for pid in pids if b'spawn_main' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()]


def wait_for(process, url, done, running=1):
  """Waits until so many trials are done and so many more have begun to train."""

  def reached():
    assert process.poll() is None, process.communicate()
    if 'sqlite' in url[0] and not pathlib.Path(url[0].removeprefix('sqlite:///')).exists():
      return False
    try:
      found = states(url)
    except KeyError:  # no study yet
      return False
    return len(found[0]) >= done and found[1]['RUNNING'] >= running and bool(workers_of(process))

  _wait(reached, 120)


@pytest.fixture(scope='module')
def complete(files):
  """A sweep that nothing happened to."""
  done = run_command(*arguments(files, files / 'complete', '--seeds=1'), timeout=240)
  assert done.returncode == 0, done.stderr
  return files / 'complete', done.stdout


def test_a_sweep_leaves_its_record(complete):
  workdir, output = complete
  rows = list(csv.DictReader((workdir / 'results.csv').open()))
  assert [row['state'] for row in rows] == ['complete'] * 3
  accuracies = [float(row['validation_accuracy']) for row in rows]
  assert accuracies == sorted(accuracies, reverse=True)
  for row in rows:
    run = workdir / row['trial']
    result = json.loads((run / 'result.json').read_text())
    assert result['validation_accuracy'] == float(row['validation_accuracy'])
    assert not [name for name in result if name.startswith('test_')]
    assert json.loads((run / 'config.json').read_text())['data']['split_seed'] == int(row['split_seed'])
  for label in (rows[0]['trial'], 'default'):
    run = workdir / f'{label}_seed_1'  # the trials' was 0
    assert json.loads((run / 'config.json').read_text())['seed'] == 1
    assert json.loads((run / 'result.json').read_text())['test_accuracy'] > 0
  beside = json.loads((workdir / 'default_seed_0' / 'result.json').read_text())
  assert 'test_accuracy' not in beside
  text = (workdir / 'results.md').read_text()
  assert f'the config as it was {100 * beside["validation_accuracy"]:.2f} %' in text
  assert '| default | ' in text and 'scikit-learn' in text and 'jax' in text
  for name in ('history', 'importances', 'parallel_coordinates', 'slices'):
    assert f'({name}.png)' in text
    assert (workdir / f'{name}.png').stat().st_size > 5000
  assert '3 of 3 done' in output
  assert 'default: ' in output


def test_a_sweep_killed_and_started_again_gives_the_same_table(files, complete):
  workdir = files / 'killed'
  url = f'sqlite:///{workdir}/study.db', 'tiny-space'
  command = arguments(files, workdir, '--seeds=0')
  process = start(*command)
  wait_for(process, url, done=1)
  os.kill(workers_of(process)[0], signal.SIGKILL)
  wait_for(process, url, done=2)
  orphans = workers_of(process)
  process.kill()
  output, _ = process.communicate(timeout=30)
  assert 'ended by signal 9; another one goes on with it' in output
  _wait(lambda: not any(pathlib.Path(f'/proc/{pid}/cmdline').exists() for pid in orphans), 10)

  process = start(*command)  # and this one is asked to stop
  wait_for(process, url, done=2)
  process.terminate()
  _, errors = process.communicate(timeout=90)
  assert process.returncode == 143, errors
  assert 'the same command goes on' in errors
  assert states(url)[1]['RUNNING'] == 0

  done = run_command(*command, timeout=240)
  assert done.returncode == 0, done.stderr
  finished, counts = states(url)
  assert finished == [f'trial_{i:05}' for i in range(3)]
  assert (counts['COMPLETE'], counts['RUNNING'], counts['WAITING']) == (3, 0, 0)
  assert (workdir / 'results.csv').read_bytes() == (complete[0] / 'results.csv').read_bytes()


def test_two_machines_of_which_one_dies(files, complete, postgres):
  url = postgres, 'two machines'
  commands = [
    arguments(files, files / f'machine_{i}', '--seeds=0', f'--storage={postgres}', '--study=two machines', '--heartbeat=1', trials=4)
    for i in range(2)
  ]  # fmt: skip
  processes = [start(*command) for command in commands]
  try:
    wait_for(processes[0], url, done=1, running=2)
    os.killpg(processes[0].pid, signal.SIGKILL)
    processes[0].communicate(timeout=30)
    _, errors = processes[1].communicate(timeout=200)
    assert processes[1].returncode == 0, errors
  finally:
    for process in processes:
      process.kill()
  finished, counts = states(url)
  assert finished == [f'trial_{i:05}' for i in range(4)]
  assert (counts['COMPLETE'], counts['RUNNING'], counts['WAITING']) == (4, 0, 0)
  done = run_command(*commands[0])  # there is nothing left to do but its tables
  assert done.returncode == 0, done.stderr
  tables = [(files / f'machine_{i}' / 'results.csv').read_bytes() for i in range(2)]
  assert tables[0] == tables[1]
  rows = [dict(row) for row in csv.DictReader((complete[0] / 'results.csv').open())]
  again = {row['trial']: row for row in csv.DictReader((files / 'machine_0' / 'results.csv').open())}
  assert rows == [again[row['trial']] for row in rows]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda files: (SPACE.replace('split_seed =', 'split_sed ='), []), 'space.py, line 3: AttributeError'),
    (lambda files: (SPACE.replace('999', '99'), [f'--workdir={files / "complete"}']), 'the space of split_seed is'),
    (
      lambda files: (SPACE, [f'--storage=postgresql://a@127.0.0.1:{_free_port()}/b']),
      'cannot use the storage|no driver',
    ),
    (lambda files: (SPACE, ['--config.epochs=none']), 'epochs'),
    (lambda files: (SPACE, ['--sampler=best']), '--sampler'),
    (lambda files: (SPACE, ['--trials=0']), '--trials is 0'),
  ],
)
def test_a_mistake_is_one_line_and_status_2(files, complete, tmp_path, change, message):
  text, more = change(files)
  (tmp_path / 'space.py').write_text(text)
  command = [*arguments(files, tmp_path / 'run'), f'--space={tmp_path / "space.py"}', *more]
  done = run_command(*command, timeout=60)
  assert done.returncode == 2, done.stderr
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert re.search(message, done.stderr)
  assert not (tmp_path / 'run' / 'trial_00000').exists()


def test_mean_and_standard_deviation():
  assert results._mean_std([0.97, 0.98, 0.99], '%') == '98.00 ± 1.00 %'
  assert results._mean_std([0.97], '%') == '97.00 %'
  assert results._mean_std([0.1, 0.3], '') == '0.2000 ± 0.1414'


# The hooks that a sweep has in the training.


def test_a_run_pruned_by_its_callback_can_be_resumed(files, tmp_path):
  """What the callback raises ends the run cleanly; the run goes on as if it had been killed there."""
  from cnn_jax import main, record

  class Pruned(Exception):
    pass

  seen = []

  def prune_at(epoch_to_prune):
    def on_validation(epoch, metrics):
      seen.append((epoch, metrics['accuracy']))
      if epoch == epoch_to_prune:
        raise Pruned

    return on_validation

  names = {}
  exec(CONFIG, names)
  config = names['get_config']()
  config.epochs = 3
  handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  with pytest.raises(Pruned):
    main.train_and_evaluate(config, tmp_path / 'run', evaluate_test=False, on_validation=prune_at(2))
  assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
  assert record.read_result(tmp_path / 'run') is None
  result = main.train_and_evaluate(config, tmp_path / 'run', evaluate_test=False, on_validation=prune_at(0))
  assert [epoch for epoch, _ in seen] == [1, 2, 2, 3]
  assert seen[1] == seen[2]
  assert result['validation_accuracy'] == seen[-1][1]
  assert 'test_accuracy' not in result
  assert main.train_and_evaluate(config, tmp_path / 'run') == result  # it is complete
