"""Databases of sweeps that stop answering or go away: one line within a deadline, and the same command continues."""

import contextlib
import os
import pathlib
import signal
import socket
import threading
import time

import pytest

from cnn_jax import UsageError
from cnn_jax.sweep import storage
from tests.faults.test_sweeps import last_line, rows_of
from tests.sweep_helpers import call_sweep_with_threads, open_trials, postgres_server, write_files

pytestmark = [
  pytest.mark.faults,
  pytest.mark.filterwarnings('ignore::optuna.exceptions.ExperimentalWarning'),
]


def processes_below(pid):
  """A process and all processes below it."""
  children = [int(c) for f in pathlib.Path(f'/proc/{pid}/task').glob('*/children') for c in f.read_text().split()]
  return [pid, *(found for child in children for found in processes_below(child))]


def pid_of_server(url):
  """The process of a server that a test started: the one that listens on the port of its URL."""
  port = url.rpartition(':')[2].partition('/')[0].encode()
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    with contextlib.suppress(OSError):
      parts = path.read_bytes().split(b'\0')
      if parts[0].endswith(b'/postgres') and port in parts:
        return int(path.parent.name)
  raise AssertionError('no server')


@contextlib.contextmanager
def frozen(url):
  """Stops a server of this machine for a while: it accepts connections and answers nothing."""
  pids = processes_below(pid_of_server(url))
  for pid in pids:
    os.kill(pid, signal.SIGSTOP)
  try:
    yield
  finally:
    for pid in pids:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


class Proxy:
  """Forwards connections to a server, until it is told to forward nothing more."""

  def __init__(self, url):
    self._target = ('127.0.0.1', int(url.rpartition(':')[2].partition('/')[0]))
    self._listener = socket.create_server(('127.0.0.1', 0))
    port = self._listener.getsockname()[1]
    self.url = url.replace(f':{self._target[1]}/', f':{port}/')
    self.forwards = threading.Event()
    self.forwards.set()
    self._open = [self._listener]
    threading.Thread(target=self._accept, daemon=True).start()

  def _accept(self):
    with contextlib.suppress(OSError):
      while True:
        client, server = self._listener.accept()[0], socket.create_connection(self._target)
        self._open += [client, server]
        for source, sink in ((client, server), (server, client)):
          threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

  def _forward(self, source, sink):
    with contextlib.suppress(OSError):
      while data := source.recv(65536):
        self.forwards.wait()
        sink.sendall(data)
      sink.shutdown(socket.SHUT_WR)

  def close(self):
    self.forwards.set()
    for each in self._open:
      each.close()


@pytest.fixture(scope='module')
def server():
  with postgres_server() as url:
    yield url


@pytest.mark.parametrize('fault', ['stopped server', 'silent network'])
def test_a_storage_that_stops_answering_is_one_line_within_its_deadline(server, monkeypatch, fault):
  monkeypatch.setattr(storage, 'SECONDS_TO_ANSWER', 2.0)
  proxy = Proxy(server)
  url = proxy.url if fault == 'silent network' else server
  trials = open_trials((url, fault), ['a', 'b'])
  assert trials.claim()[0] == 'a'
  with frozen(server) if fault == 'stopped server' else contextlib.ExitStack():
    if fault == 'silent network':
      proxy.forwards.clear()
    for _ in range(2):  # on the connection that is open, and on a new one
      started = time.monotonic()
      with pytest.raises(UsageError, match='cannot use the storage .*: .*; start it'), storage.storage_errors(url):
        trials.claim()
      assert time.monotonic() - started < 15
    started = time.monotonic()
    with pytest.raises(UsageError, match='timeout expired'):
      storage.open_storage(url, 1)
    assert time.monotonic() - started < 15
  proxy.forwards.set()
  assert trials.claim()[0] == 'b'  # the same process goes on if the storage does
  proxy.close()


def test_a_sweep_whose_storage_stalls_ends_and_continues(server, tmp_path, monkeypatch):
  monkeypatch.setattr(storage, 'SECONDS_TO_ANSWER', 2.0)
  from cnn_jax import main

  train, first = main.train_and_evaluate, threading.Event()

  def slow(*arguments, **options):
    first.set()
    time.sleep(3)
    return train(*arguments, **options)

  secret = server.replace('sweep@', 'sweep:hunter2@')
  options = [*write_files(tmp_path), '--trials=2', '--sampler=random', '--seeds=0', f'--storage={secret}']
  options += ['--study=stalls', '--heartbeat=1', f'--workdir={tmp_path}/w']
  done = []
  with monkeypatch.context() as patched:
    patched.setattr(main, 'train_and_evaluate', slow)
    patched.setattr('tests.sweep_helpers.ThreadWorker.stop', lambda self: None)
    patched.setattr('cnn_jax.sweep.pool._SECONDS_TO_STOP', 5.0)
    thread = threading.Thread(target=lambda: done.append(call_sweep_with_threads(monkeypatch, *options)))
    thread.start()
    assert first.wait(60)
    with frozen(server):
      thread.join(60)
      assert not thread.is_alive()
  line = last_line(done[0])
  assert 'cannot use the storage postgresql://sweep:***@' in line and 'the same command continues' in line
  again = call_sweep_with_threads(monkeypatch, *options)
  assert again.returncode == 0, again.stderr
  assert [row['state'] for row in rows_of(tmp_path / 'w').values()] == ['complete'] * 2


def test_a_server_that_goes_away_is_one_line(tmp_path):
  with postgres_server() as url:
    trials = open_trials((url, 'away'), ['a'])
  started = time.monotonic()
  with pytest.raises(UsageError, match='cannot use the storage .*; start it'), storage.storage_errors(url):
    trials.claim()
  assert time.monotonic() - started < 15
