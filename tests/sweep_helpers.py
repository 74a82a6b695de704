"""What the tests of the sweep share: a tiny config and space, and workers that are threads of the test's process."""

import atexit
import contextlib
import functools
import glob
import multiprocessing
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import jax
import pytest
from optuna.trial import TrialState

from cnn_jax.sweep import plots as sweep_plots
from cnn_jax.sweep import pool, worker
from cnn_jax.sweep.storage import open_storage, open_study
from cnn_jax.sweep.trials import Trials
from tests.helpers import ROOT, call_command

CONFIG = """
from cnn_jax.config import default_config

def get_config(arg=None):
  config = default_config()
  config.data.source = 'bundled'
  config.data.name = 'digits'
  config.data.test = 0.2
  config.batch_size = 64
  config.epochs = 1
  config.model.features = (4,)
  config.schedule.name = 'constant'
  config.log.tensorboard = False
  config.log.report = False
  return config
"""
# The split is not part of the compiled program, so only the first trial has to compile.
SPACE = """
def suggest(trial, config):
  config.data.split_seed = trial.suggest_int('split_seed', 0, 999)
"""


def write_files(directory, space=SPACE):
  """Writes the tiny config and a space file; returns the options that name them."""
  (directory / 'tiny.py').write_text(CONFIG)
  (directory / 'space.py').write_text(space)
  return [f'--config={directory / "tiny.py"}', f'--space={directory / "space.py"}']


def tiny_config(**fields):
  """The tiny config with some fields set, such as `epochs=2`."""
  names = {}
  exec(CONFIG, names)
  config = names['get_config']()
  config.update(fields)
  return config


def call_sweep(*arguments):
  """Runs the command in this process, with workers that are processes."""
  return call_command('cnn_jax.sweep.__main__', *arguments)


def call_sweep_with_threads(monkeypatch, *arguments, plots=False):
  """Runs the command in this process, with workers that are threads: no start-up, and nothing to kill."""
  with monkeypatch.context() as patched:
    patched.setattr(pool, 'Worker', ThreadWorker)
    patched.setattr(jax, 'clear_caches', lambda: None)  # which a worker calls after each trial
    if not plots:
      patched.setattr(sweep_plots, 'draw', lambda *_: None)
    return call_sweep(*arguments)


class ThreadWorker:
  """Does what `worker.Worker` does, in a thread of this process."""

  def __init__(self, share):
    self.share = share
    self.connection, theirs = multiprocessing.Pipe()
    self.give = self.reply = self.connection.send
    self._thread = threading.Thread(target=worker.serve, args=(theirs, lambda task: None), daemon=True)
    self._thread.start()

  def close(self):
    self.connection.close()
    self._thread.join(60)

  def processor_seconds(self):
    return time.monotonic()

  def stop(self):
    raise AssertionError('a thread cannot be stopped')

  kill = close


def sqlite_url(directory):
  """The URL of a new database in a directory, and the name of a study. Its tables are there: Optuna takes long to make them."""
  shutil.copy(_empty_database(), directory / 'study.db')
  return f'sqlite:///{directory}/study.db', 's'


@functools.cache
def _empty_database():
  path = pathlib.Path(tempfile.mkdtemp(prefix='cnn_jax_sqlite_')) / 'study.db'
  atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
  open_storage(f'sqlite:///{path}', 1)
  return path


def open_trials(url, runs=('a', 'b', 'c'), plan=None, alone=False):
  """Opens a study of some runs, given the URL of its storage and its name."""
  storage = open_storage(url[0], 1)
  return Trials(storage, open_study(storage, url[1], plan or {'x': 1}), runs, alone=alone)


def states(url, storage=None):
  """The runs that are finished, once for each finished trial, and the number of trials in each state."""
  storage = storage or open_storage(url[0], 1)
  trials = storage.get_all_trials(storage.get_study_id_from_name(url[1]))
  finished = [t.user_attrs['run'] for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
  return sorted(finished), {state.name: sum(t.state == state for t in trials) for state in TrialState}


def start_sweep(*arguments):
  """Starts the command in a process of its own."""
  return subprocess.Popen(
    [sys.executable, '-m', 'cnn_jax.sweep', *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip


def workers_of(process):
  """The ids of the workers of the sweep in a process, given its id."""
  children = {
    int(pid) for path in pathlib.Path(f'/proc/{process}/task').glob('*/children') for pid in path.read_text().split()
  }
  return [pid for pid in children if b'spawn_main' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()]


def wait_for(process, url, done, running):
  """Waits until a study has so many finished and running trials, and the sweep in a process has a worker."""
  storages = []

  def reached():
    if 'sqlite' in url[0] and not pathlib.Path(url[0].removeprefix('sqlite:///')).exists():
      return False
    storages[:] = storages or [open_storage(url[0], 1)]
    try:
      finished, counts = states(url, storages[0])
    except KeyError:  # no study yet
      return False
    return len(finished) >= done and counts['RUNNING'] >= running and bool(workers_of(process))

  wait(reached, 120)


def wait(condition, seconds):
  """Waits for a condition; fails if it takes longer."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'the condition was not reached'
    time.sleep(0.05)


def importable(name):
  """Whether a package is installed and works."""
  try:
    __import__(name)
  except ImportError:
    return False
  return True


@contextlib.contextmanager
def postgres_server():
  """Starts a private server on a free port of this machine, as an ordinary user; yields its URL."""
  found = sorted(glob.glob('/usr/lib/postgresql/*/bin/initdb')) or [shutil.which('initdb')]
  if found[-1] is None:
    pytest.skip('there is no PostgreSQL server on this machine: no initdb in the PATH or in /usr/lib/postgresql')
  if not any(map(importable, ('psycopg', 'psycopg2'))):
    pytest.skip('there is no driver for PostgreSQL: neither psycopg nor psycopg2 is installed')
  binaries = pathlib.Path(found[-1]).parent
  directory = tempfile.mkdtemp(prefix='cnn_jax_postgres_')
  user = {}
  if os.getuid() == 0:  # whom the server refuses
    user = {'user': 'nobody', 'group': 'nogroup', 'extra_groups': []}
    shutil.chown(directory, 'nobody', 'nogroup')
  port = free_port()
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
    # It listens before it accepts connections.
    ready = [binaries / 'pg_isready', '-q', '-h', '127.0.0.1', '-p', str(port)]
    wait(lambda: subprocess.run(ready, check=False).returncode == 0, 60)
    yield url
  finally:
    server.send_signal(signal.SIGINT)  # without waiting for clients
    server.wait(30)
    shutil.rmtree(directory, ignore_errors=True)


def free_port():
  """A port of this machine that nobody listens on."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]
