"""Storages: each run is finished once whichever process dies, on SQLite and on a real PostgreSQL server."""

import threading
import time

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from cnn_jax import UsageError, passwords
from cnn_jax.sweep.storage import file_url, open_storage, storage_errors
from cnn_jax.sweep.trials import Lost
from tests.sweep_helpers import free_port, importable, open_trials, postgres_server, sqlite_url, states

pytestmark = pytest.mark.filterwarnings('ignore::optuna.exceptions.ExperimentalWarning')


@pytest.fixture(scope='module')
def postgres():
  with postgres_server() as url:
    yield url


@pytest.fixture(params=['sqlite', 'postgresql'])
def url(request, tmp_path):
  """The URL of a database, which other tests may have used, and the name of a study that is new there."""
  if request.param == 'sqlite':
    return sqlite_url(tmp_path)
  return request.getfixturevalue('postgres'), str(tmp_path)


def open_trial(trials, trial_id):
  return trials.open(trial_id, optuna.samplers.RandomSampler(), optuna.pruners.NopPruner())


def in_threads(work):
  """Runs a function in three threads at once, and raises their first exception."""
  barrier, errors = threading.Barrier(3), []

  def run():
    barrier.wait()
    try:
      work()
    except Exception as error:
      errors.append(error)

  threads = [threading.Thread(target=run) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
  assert not errors


def test_each_run_is_finished_once_by_competing_processes(url):
  runs = [f'run {i}' for i in range(6)]
  open_trials(url, runs)

  def work():
    trials = open_trials(url, runs)
    while claimed := trials.claim():
      trials.finish(open_trial(trials, claimed[1]), 0.5, {})

  in_threads(work)
  finished, counts = states(url)
  assert finished == runs
  assert counts['RUNNING'] == counts['WAITING'] == counts['FAIL'] == 0


@pytest.mark.parametrize('kind', ['sqlite', 'postgresql'])
def test_several_processes_may_find_an_empty_database_at_once(request, tmp_path, kind):
  url = f'sqlite:///{tmp_path}/new.db'
  if kind == 'postgresql':
    server = request.getfixturevalue('postgres')
    engine = open_storage(server, 1).engine
    with engine.connect().execution_options(isolation_level='AUTOCOMMIT') as connection:
      connection.execute(sqlalchemy.text('CREATE DATABASE new'))
    url = server.replace('/postgres', '/new')
  in_threads(lambda: open_trials((url, 's'), ['a', 'b']))
  assert states((url, 's'))[1]['WAITING'] >= 2


def test_a_trial_that_misses_its_heartbeats_is_reassigned(url):
  slow, other = open_trials(url), open_trials(url)
  run, trial_id = slow.claim()
  trial = open_trial(slow, trial_id)
  parameter = trial.suggest_float('p', 0, 1)
  slow.suggested(trial)
  slow.report(trial, 1, 0.25)
  assert other.claim()[0] == 'b'
  assert other.beat([]) == []
  assert slow.beat([trial_id]) == []
  with open_storage(url[0], 1).engine.begin() as connection:
    connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'"))
  other.beat([])
  again, other_id = other.claim()
  assert again == run
  retried = open_trial(other, other_id)
  assert retried.suggest_float('p', 0, 1) == parameter
  assert slow.beat([trial_id]) == [trial_id]
  with pytest.raises(Lost):
    slow.finish(trial, 0.9, {})
  other.finish(retried, 0.5, {})
  assert other.finished()['a'].value == 0.5
  assert other.finished()['a'].intermediate_values == {1: 0.25}
  assert slow.claim()[0] == 'b'  # which missed its heartbeats as well
  assert slow.claim()[0] == 'c'


def test_of_two_trials_of_a_run_one_is_used(url):
  first, second = open_trials(url), open_trials(url)
  for _ in range(2):  # as if two processes had found the run without a trial at the same time
    second.study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs={'run': 'b'}))
  assert [first.claim()[0], second.claim()[0], first.claim()[0]] == ['a', 'b', 'c']
  assert second.claim() is None
  first.tidy()
  assert states(url)[1] == {'RUNNING': 3, 'COMPLETE': 0, 'PRUNED': 0, 'FAIL': 2, 'WAITING': 0}


def test_a_run_whose_trial_failed_is_claimed_although_nobody_added_another_trial(url):
  """The process that fails a trial may die before it can do anything else."""
  trials = open_trials(url)
  trials.release(trials.claim()[1])
  assert open_trials(url).claim()[0] == 'a'


def test_a_process_that_is_alone_claims_what_is_left_running(tmp_path):
  url = sqlite_url(tmp_path)
  open_trials(url).claim()
  assert open_trials(url, alone=True).claim()[0] == 'a'


def test_a_study_can_be_extended(url):
  trials = open_trials(url, ['a'])
  trials.claim()
  assert open_trials(url, ['a', 'b']).claim()[0] == 'b'


def test_a_study_with_another_plan_is_refused_in_one_line(url):
  open_trials(url, plan={'config.epochs': 3, '--sampler': 'tpe'})
  with pytest.raises(UsageError, match='config.epochs is 4, but the study .* began with 3; .*--study'):
    open_trials(url, plan={'config.epochs': 4, '--sampler': 'tpe'})
  with pytest.raises(UsageError, match='--sampler is missing'):
    open_trials(url, plan={'config.epochs': 3})


def test_a_study_whose_creator_died_before_it_wrote_the_plan_gets_one(tmp_path):
  url = sqlite_url(tmp_path)
  optuna.create_study(storage=open_storage(url[0], 1), study_name='s', direction='maximize')
  assert open_trials(url, plan={'x': 2}).study.user_attrs['plan'] == {'x': 2}


def test_the_path_of_a_file_may_hold_any_character(tmp_path):
  folder = tmp_path / 'what? a%20b {curly} &c=d'
  folder.mkdir()
  open_storage(file_url(folder / 'study.db'), 1)
  assert [path.name for path in tmp_path.rglob('*') if path.is_file()] == ['study.db']


@pytest.mark.parametrize(
  ('url', 'message'),
  [
    ('postgresql://sweep:secret@127.0.0.1:PORT/postgres', r'sweep:\*\*\*@127.0.0.1.*refused'),
    ('postgresql://127.0.0.1:PORT/postgres?user=sweep&password=secret', r'password=\*\*\*.*refused'),
    ('postgresql://sweep:secret@127.0.0.1:port/postgres', r'sweep:\*\*\*@127.0.0.1:port/postgres is not a URL'),
    ('postgres//sweep:secret@127.0.0.1/postgres', 'Could not parse'),
    ('sqlite:////nowhere/at/all/study.db', 'unable to open'),
    ('nonsense', 'nonsense.*Could not parse'),
    ('oracle+cx_oracle://a/b', 'no driver'),
  ],
)
def test_a_storage_that_is_not_there_is_one_line_at_once(url, message):
  if url.startswith('postgresql') and not any(map(importable, ('psycopg', 'psycopg2'))):
    pytest.skip('there is no driver for PostgreSQL: neither psycopg nor psycopg2 is installed')
  started = time.monotonic()
  with pytest.raises(UsageError, match=message) as caught:
    open_storage(url.replace('PORT', str(free_port())), 1)
  assert 'secret' not in str(caught.value)
  assert '\n' not in str(caught.value)
  assert time.monotonic() - started < 8


def test_a_storage_that_stops_answering_is_one_line(postgres):
  with open_storage(postgres, 1).engine.begin() as connection:
    connection.execute(sqlalchemy.text('SET statement_timeout = 1'))
    with pytest.raises(UsageError, match='cannot use the storage'), storage_errors(postgres):
      connection.execute(sqlalchemy.text('SELECT pg_sleep(5)'))


@pytest.mark.parametrize(
  ('text', 'masked'),
  [
    ('--storage=postgresql://a:secret@host:1/b', '--storage=postgresql://a:***@host:1/b'),
    ('postgresql+psycopg://a:sec:/?ret@host/b?x=1', 'postgresql+psycopg://a:***@host/b?x=1'),
    ('postgresql://a:sec@ret@host/b', 'postgresql://a:***@host/b'),
    ('the storage postgresql://a:secret word@host/b; start it', 'the storage postgresql://a:***@host/b; start it'),
    ('//a:secret@host/b', '//a:***@host/b'),
    ('postgresql://host/b?user=a&password=secret&x=1', 'postgresql://host/b?user=a&password=***&x=1'),
    ('postgresql://a@host:5433/b', 'postgresql://a@host:5433/b'),
    ('--config=configs/digits.py:small', '--config=configs/digits.py:small'),
    ('sqlite:////home/user@host/study.db', 'sqlite:////home/user@host/study.db'),
  ],
)
def test_passwords_are_masked(text, masked):
  assert passwords.mask(text) == masked
