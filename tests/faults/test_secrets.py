"""Passwords, keys and tokens: `***` wherever a command line, an address or an error is printed or recorded."""

import json
import logging

import optuna
import pytest

from cnn_jax import environment, passwords, sinks
from tests.faults.tools import call_command, run_command
from tests.helpers import open_recorder
from tests.sweep_helpers import call_sweep_with_threads, free_port, write_files

SECRET = 'hunter2-Zebra'


@pytest.mark.parametrize(
  'text',
  [
    f'postgresql://user:{SECRET}@host/b',
    f'https://user:{SECRET}@mlflow.example/api',
    f'redis://:{SECRET}@host',
    f'postgresql://host/b?user=a&password={SECRET}&x=1',
    f'https://host/b?sslPassword={SECRET}',
    f'https://host/b?token={SECRET}#x',
    f'https://store/b?X-Amz-Credential=a&X-Amz-Signature={SECRET}',
    f'https://store/b?sv=2020&sig={SECRET}',
    f'--api_key={SECRET}',
    f'--wandb-api-key {SECRET}',
    f'WANDB_API_KEY={SECRET}',
    f'AWS_SECRET_ACCESS_KEY="{SECRET}"',
    f'host=h password={SECRET} user=u',
    f"host=h password = '{SECRET} word' user=u",
    f'{{"api_key": "{SECRET}", "x": 1}}',
    f'Authorization: Bearer {SECRET}',
    f'Authorization: Basic {SECRET}==',
    'https://0123456789abcdef01234567hunter2-Zebra@github.com/a/b',
    'pushed with ghp_0123456789abcdef0123',
    'AKIAIOSFODNN7EXAMPLE is the key',
    'eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc_def',
  ],
)
def test_secrets_are_recognised_by_their_place_or_their_form(text):
  masked = passwords.mask(text)
  assert '***' in masked
  for secret in (SECRET, 'Zebra', 'ghp_', 'AKIA', 'eyJ'):
    assert secret not in masked
  assert passwords.mask(masked) == masked


@pytest.mark.parametrize(
  'text',
  [
    '--config.optimizer.learning_rate=0.1',
    '--config.data.dir=/home/me/passwords/pictures',
    'config.model.tokenizer=3',
    'compass=3 and bypass=1',
    'class token: 3',
    'password authentication failed for user "sweep"',
    'fe_sendauth: no password supplied',
    'postgresql://user@host:5433/b',
    'sqlite:////home/user@host/study.db',
    'commit 0123456789abcdef0123456789abcdef01234567',
  ],
)
def test_ordinary_text_stays(text):
  assert passwords.mask(text) == text


def test_a_secret_of_the_environment_is_masked_anywhere(monkeypatch):
  monkeypatch.setenv('MLFLOW_TRACKING_PASSWORD', SECRET)
  monkeypatch.setenv('PWD', '/home/me/project')
  assert passwords.mask(f'the server refused {SECRET}.') == 'the server refused ***.'
  assert passwords.mask('cannot write to /home/me/project/run') == 'cannot write to /home/me/project/run'


def test_a_secret_of_the_command_line_is_masked_anywhere():
  arguments = ['main', '--api_key', f'{SECRET} word', '--storage=postgresql://a:pa%40ss%2Fword@h/b', '--password=']
  assert passwords.mask_arguments(arguments) == [
    'main',
    '--api_key',
    '***',
    '--storage=postgresql://a:***@h/b',
    '--password=***',
  ]
  known = passwords.find(arguments)
  assert passwords.mask(f'no host "pa@ss/word" for {SECRET} word', known) == 'no host "***" for ***'


def test_the_record_of_a_run_holds_no_secret(monkeypatch):
  monkeypatch.setattr(
    'sys.orig_argv', ['python', 'x.py', '--token', SECRET, f'--uri=https://u:{SECRET}@h', '--epochs=3']
  )
  assert environment.describe()['command'] == "python x.py --token '***' '--uri=https://u:***@h' --epochs=3"


def test_the_warning_about_a_tracker_holds_no_secret(tmp_path, monkeypatch, capsys):
  class Fake:
    run_id = 'x'

    def __init__(self, *_):
      pass

    def append(self, *_):
      raise ConnectionError(f'https://user:{SECRET}@mlflow.example/api does not answer')

    def close(self, complete):
      pass

  monkeypatch.setitem(sinks._TRACKERS, 'mlflow', Fake)
  with open_recorder(tmp_path, trackers=('mlflow',)) as recorder:
    recorder.append(1, 1, 'train', {'loss': 0.5})
  printed = capsys.readouterr().err
  assert 'https://user:***@mlflow.example' in printed
  assert SECRET not in printed


@pytest.mark.parametrize(
  'arguments',
  [
    ('cnn_jax.main', '--config=configs/digits.py', '--api_key', SECRET),
    ('cnn_jax.main', '--config=configs/digits.py', f'--config.init_from=https://u:{SECRET}@h/run'),
    ('cnn_jax.evaluate', f'--workdir=https://u:{SECRET}@h/run'),
    ('cnn_jax.predict', '--workdir=x', f'https://u:{SECRET}@h/x.png'),
    ('cnn_jax.export', '--workdir=x', f'--output=https://h/x?token={SECRET}'),
    ('cnn_jax.report', '--workdir=x', f'--password={SECRET}'),
    ('cnn_jax.sweep.__main__', '--config=configs/digits.py', '--space=x', '--trials=1', f'--secret={SECRET}'),
  ],
)
def test_an_error_about_an_argument_holds_no_secret(arguments, monkeypatch):
  monkeypatch.setattr('sys.argv', list(arguments))
  done = call_command(*arguments)
  assert done.returncode == 2
  assert SECRET not in done.stderr + done.stdout


@pytest.mark.parametrize(
  'storage',
  [
    'postgresql://sweep:{}@127.0.0.1:{}/postgres',
    'postgresql://sweep:/{}@127.0.0.1:{}/postgres',
    'postgresql://sweep:x@{}@127.0.0.1:{}/postgres',
    'postgresql://sweep:{}@127.0.0.1:{}x/postgres',
    'postgresql://127.0.0.1:{1}/postgres?user=sweep&password={0}',
    'mysql+nothing://sweep:{}@127.0.0.1:{}/x',
    'postgresq//sweep:{}@127.0.0.1:{}/x',
  ],
)
def test_an_error_of_the_storage_holds_no_secret(tmp_path, monkeypatch, storage):
  options = write_files(tmp_path)
  done = call_sweep_with_threads(
    monkeypatch, *options, '--trials=1', f'--storage={storage.format(SECRET, free_port())}', f'--workdir={tmp_path}/w'
  )
  assert done.returncode == 2, done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert SECRET not in done.stderr and 'Zebra' not in done.stderr


def test_the_log_of_optuna_holds_no_secret(tmp_path, monkeypatch):
  call_sweep_with_threads(
    monkeypatch, *write_files(tmp_path), '--trials=1', '--storage=nonsense', f'--workdir={tmp_path}'
  )
  logger = optuna.logging.get_logger('optuna')
  line = logging.LogRecord('optuna', logging.ERROR, '', 1, 'cannot reach %s', (f'mysql://u:{SECRET}@h/x',), None)
  for handler in logger.handlers:
    assert handler.filter(line)
  assert line.getMessage() == 'cannot reach mysql://u:***@h/x'


@pytest.mark.faults
def test_nothing_that_a_run_writes_holds_a_secret(tmp_path):
  """The command line of a process of its own, with the secret in its environment as well."""
  done = run_command(
    'cnn_jax.main', '--config=configs/digits.py', '--config.epochs=1', '--config.schedule.name=constant',
    '--config.model.features=(4,)', '--config.log.report=False', f'--workdir={tmp_path}/run',
    WANDB_API_KEY=SECRET, MLFLOW_TRACKING_URI=f'https://user:{SECRET}@127.0.0.1:1',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  written = b''.join(path.read_bytes() for path in tmp_path.rglob('*') if path.is_file())
  assert SECRET.encode() not in written + done.stdout.encode() + done.stderr.encode()
  assert json.loads((tmp_path / 'run' / 'environment.json').read_text())['command'].endswith('/run')
