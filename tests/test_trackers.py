"""Experiment trackers get every point of a run once, however often it was interrupted, and never end it."""

import contextlib
import importlib.machinery
import json
import struct
import sys
import time
import types

import pytest

from cnn_jax import UsageError, record, sinks
from cnn_jax import config as config_lib
from tests.helpers import EVERY_POINT, append_points, open_recorder


class Fake:
  """Stands in for both libraries: what they were told, and how they fail."""

  def __init__(self):
    self.points, self.started, self.ended, self.failing = [], [], [], False
    self.experiments = {}

  def check(self):
    if self.failing:
      raise RuntimeError('the server is down\nTraceback')

  # wandb

  def init(self, **arguments):
    self.check()
    self.started.append(arguments)
    return types.SimpleNamespace(id=arguments['id'] or 'run-1', log=self.log, finish=self.finish)

  def log(self, values, step):
    self.check()
    self.points += [(tag, step) for tag in values]

  def finish(self, exit_code):
    self.check()
    self.ended.append(exit_code == 0)

  # mlflow

  def get_experiment_by_name(self, name):
    self.check()
    found = self.experiments.get(name)
    return types.SimpleNamespace(experiment_id=found) if found else None

  def create_experiment(self, name):
    self.experiments[name] = 'experiment-1'
    return 'experiment-1'

  def create_run(self, experiment_id, run_name):
    self.started.append({'id': None, 'config': {}, 'experiment': experiment_id, 'name': run_name})
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id='run-1'))

  def update_run(self, run_id, status):
    self.started.append({'id': run_id, 'status': status})

  def log_batch(self, run_id, metrics=(), params=()):
    self.check()
    assert run_id == 'run-1'
    assert len(params) <= 100
    self.started[-1].setdefault('config', {}).update((param.key, param.value) for param in params)
    self.points += [(metric.key, metric.step) for metric in metrics]

  def set_terminated(self, run_id, status):
    self.check()
    self.ended.append(status == 'FINISHED')


def module(name, **contents):
  made = types.ModuleType(name)
  made.__spec__ = importlib.machinery.ModuleSpec(name, None, origin='fake')
  vars(made).update(contents)
  return made


@pytest.fixture
def fake(monkeypatch):
  made = Fake()
  entities = module(
    'mlflow.entities',
    Param=lambda key, value: types.SimpleNamespace(key=key, value=value),
    Metric=lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step),
  )
  for stand_in in (
    module('wandb', init=made.init, Settings=dict), module('mlflow', MlflowClient=lambda: made), entities,
  ):  # fmt: skip
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
  for variable in ('WANDB_PROJECT', 'WANDB_NAME', 'MLFLOW_EXPERIMENT_NAME'):
    monkeypatch.delenv(variable, raising=False)
  return made


TRACKERS = pytest.mark.parametrize('name', config_lib.TRACKERS)


@TRACKERS
def test_a_tracker_gets_every_point_once_however_often_the_run_is_killed(tmp_path, fake, name):
  workdir = tmp_path / 'digits'
  workdir.mkdir()
  for step, steps in ((0, range(1, 7)), (4, range(5, 6)), (2, range(3, 9))):
    recorder = open_recorder(workdir, step, trackers=(name,)).__enter__()
    append_points(recorder, steps)
    recorder.sync()
    recorder._sinks[0].close(True)  # the others are not closed, as after SIGKILL
  assert sorted(fake.points) == EVERY_POINT
  assert [start['id'] for start in fake.started] == [None, 'run-1', 'run-1']
  assert fake.started[0]['name'] == 'digits'
  assert 'batch_size' in fake.started[0]['config']
  assert json.loads((workdir / 'trackers.json').read_text()) == {
    name: {'run_id': 'run-1', 'sent': {'train': 8, 'validation': 8}}
  }
  assert (workdir / 'metrics.jsonl').read_text().count('\n') == 12


def test_both_trackers_of_a_run_that_fails_show_that(tmp_path, fake):
  with contextlib.suppress(ZeroDivisionError), open_recorder(tmp_path, trackers=config_lib.TRACKERS) as recorder:
    append_points(recorder, range(1, 9))
    raise ZeroDivisionError
  assert fake.ended == [False, False]
  assert sorted(fake.points) == sorted(2 * EVERY_POINT)
  assert set(json.loads((tmp_path / 'trackers.json').read_text())) == {'wandb', 'mlflow'}
  with open_recorder(tmp_path, 8, trackers=config_lib.TRACKERS):
    pass
  assert fake.ended == [False, False, True, True]


@TRACKERS
def test_a_tracker_that_fails_later_does_not_end_the_run(tmp_path, fake, capsys, name):
  with open_recorder(tmp_path, trackers=(name,)) as recorder:
    append_points(recorder, range(1, 3))
    fake.failing = True
    append_points(recorder, range(3, 9))
    recorder.sync()
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'warning: {name} failed (the server is down); the run continues without it.')
  assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 12
  fake.failing = False
  with open_recorder(tmp_path, 4, trackers=(name,)) as recorder:
    append_points(recorder, range(5, 9))
  assert sorted(fake.points) == [point for point in EVERY_POINT if point[1] not in (3, 4)]


@TRACKERS
def test_a_tracker_that_does_not_start_is_one_line(tmp_path, fake, name):
  fake.failing = True
  with pytest.raises(
    UsageError, match=rf'^{name} could not start \(the server is down\); correct its settings.*trackers\.$'
  ):
    open_recorder(tmp_path, trackers=(name,)).__enter__()
  (tmp_path / 'trackers.json').write_text(json.dumps({name: {'run_id': 'gone', 'sent': {}}}))
  if name == 'mlflow':
    fake.update_run = lambda *_, **__: fake.check()
  with pytest.raises(UsageError, match=f'or remove {tmp_path}/trackers.json to start a new curve'):
    open_recorder(tmp_path, trackers=(name,)).__enter__()


@pytest.mark.parametrize('notes', ['3', '{}', '{"run_id": "a", "sent": {"train": "x"}}', '{"run_id": "a", "sent": []}'])
def test_damaged_notes_are_one_line(tmp_path, fake, notes):
  (tmp_path / 'trackers.json').write_text(f'{{"wandb": {notes}}}')
  with pytest.raises(UsageError, match=r'trackers.json is damaged; remove it, and wandb starts a new curve'):
    open_recorder(tmp_path, trackers=('wandb',)).__enter__()


def test_an_experiment_that_another_process_makes_at_the_same_time(tmp_path, fake):
  def refuse(name):
    raise RuntimeError('not allowed')

  def taken(name):
    Fake.create_experiment(fake, name)
    raise RuntimeError('it exists')

  fake.create_experiment = refuse
  with pytest.raises(UsageError, match=r'mlflow could not start \(not allowed\)'):
    open_recorder(tmp_path, trackers=('mlflow',)).__enter__()
  fake.create_experiment = taken
  with open_recorder(tmp_path, trackers=('mlflow',)):
    pass
  assert fake.started[0]['experiment'] == 'experiment-1'


def test_a_tracker_that_is_not_installed_is_one_line_before_training(tmp_path, monkeypatch):
  config = config_lib.vary(config_lib.default_config(), {'log.trackers': ('wandb',)})
  expected = r"config.log.trackers has 'wandb', which is not installed; install it with pip install 'cnn_jax\[wandb\]'"
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  (tmp_path / 'wandb').mkdir()  # what wandb leaves in the current folder is not the library
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  with pytest.raises(UsageError, match=expected):
    record.check_config(tmp_path, config)
  (tmp_path / 'wandb').rmdir()
  with pytest.raises(UsageError, match=expected):
    sinks.check_trackers(('wandb',))


# --- with the libraries


def read_log(file):
  """The records of a .wandb file, a LevelDB log: blocks of 32 KiB, of parts with checksum, length and type."""
  content, record_so_far, position = file.read_bytes(), b'', 7  # after the file's own header
  while position + 7 <= len(content):
    if (left := -position % 2**15) < 7 and left:
      position += left
      continue
    _, length, kind = struct.unpack_from('<IHB', content, position)
    record_so_far += content[position + 7 : position + 7 + length]
    position += 7 + length
    if kind in (1, 4):  # a whole record, or the last part of one
      yield record_so_far
      record_so_far = b''


def test_wandb_offline(tmp_path, monkeypatch):
  pytest.importorskip('wandb', reason='wandb is not installed: pip install cnn_jax[wandb]')
  from wandb.proto.wandb_internal_pb2 import Record

  settings = {'MODE': 'offline', 'ERROR_REPORTING': 'false', 'CONFIG_DIR': str(tmp_path), 'SILENT': 'true'}
  for variable, value in settings.items():
    monkeypatch.setenv(f'WANDB_{variable}', value)
  workdir = tmp_path / 'digits'
  workdir.mkdir()
  for step, steps in ((0, range(1, 7)), (4, range(5, 9))):
    with open_recorder(workdir, step, trackers=('wandb',)) as recorder:
      append_points(recorder, steps)
  files = sorted(workdir.glob('wandb/offline-run-*/*.wandb'))
  deadline = time.monotonic() + 30
  while True:  # wandb's own process may still be writing
    entries = [Record.FromString(data) for file in files for data in read_log(file)]
    if sum(entry.HasField('exit') for entry in entries) == 2:
      break
    assert time.monotonic() < deadline
    time.sleep(0.05)
  points = []
  for entry in entries:
    if entry.HasField('history'):
      items = {item.nested_key[0]: json.loads(item.value_json) for item in entry.history.item}
      points += [(tag, items['_step']) for tag in items if not tag.startswith('_')]
  assert sorted(points) == EVERY_POINT
  run_id = json.loads((workdir / 'trackers.json').read_text())['wandb']['run_id']
  runs = {(e.run.run_id, e.run.project, e.run.display_name) for e in entries if e.HasField('run')}
  assert runs == {(run_id, 'cnn_jax', 'digits')}


@pytest.mark.filterwarnings('ignore')  # of the library's own code
def test_mlflow_in_a_local_database(tmp_path, monkeypatch):
  pytest.importorskip('mlflow', reason='mlflow is not installed: pip install cnn_jax[mlflow]')
  monkeypatch.setenv('MLFLOW_DISABLE_TELEMETRY', 'true')
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path}/mlflow.db')
  from mlflow import MlflowClient

  workdir = tmp_path / 'digits'
  workdir.mkdir()
  for step, steps in ((0, range(1, 7)), (4, range(5, 9))):
    with open_recorder(workdir, step, trackers=('mlflow',)) as recorder:
      append_points(recorder, steps)
  client = MlflowClient()
  (experiment,) = [found for found in client.search_experiments() if found.name == 'cnn_jax']
  (run,) = client.search_runs([experiment.experiment_id])
  assert (run.info.run_name, run.info.status) == ('digits', 'FINISHED')
  assert run.data.params['optimizer.name'] == 'sgd'
  points = [
    (tag, metric.step) for tag in run.data.metrics for metric in client.get_metric_history(run.info.run_id, tag)
  ]
  assert sorted(points) == EVERY_POINT
  (workdir / 'trackers.json').write_text(json.dumps({'mlflow': {'run_id': 'f' * 32, 'sent': {}}}))
  with pytest.raises(UsageError, match=r'mlflow could not start .*, or remove .*trackers.json'):
    open_recorder(workdir, trackers=('mlflow',)).__enter__()
