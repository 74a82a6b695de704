"""Helpers of the fault matrix: commands, pictures, processes that are stopped from outside.

The tests use commands rather than functions where they can, so that they can be run against any version.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from tests.helpers import ROOT, call_command, run_command

__all__ = ['ROOT', 'call_command', 'run_command']

# A run of about two seconds: main with these, and a workdir.
DIGITS = (
  '--config=configs/digits.py',
  '--config.epochs=4',
  '--config.model.convs_per_block=1',
  '--config.model.features=(8, 16)',
  '--config.schedule.warmup_epochs=1.0',
  '--config.log.tensorboard=False',
  '--config.log.report=False',
)


def folder_arguments(directory, workdir=None, **fields):
  """Arguments of main that train a tiny network on a folder of pictures for a few steps.

  Args:
    directory: the folder.
    workdir: of the run.
    fields: more fields of the config; two underscores stand for a dot.
  """
  settings = {
    'min_steps': 0,
    'epochs': 2,
    'batch_size': 8,
    'schedule.warmup_epochs': 1.0,
    'model.features': '(8,)',
    'model.convs_per_block': 1,
    'data.image_size': 16,
    'augment.shift': 1,
    'log.tensorboard': False,
    'log.report': False,
    'data.dir': directory,
  } | {name.replace('__', '.'): value for name, value in fields.items()}
  arguments = ['--config=configs/image_folder.py', *(f'--config.{name}={value}' for name, value in settings.items())]
  return [*arguments, *([f'--workdir={workdir}'] if workdir else [])]


def write_photographs(directory, classes=('cat', 'dog'), count=20, size=(16, 16), suffix='.png', seed=0):
  """Writes pictures that differ by class: DIRECTORY/<class>/000.png and so on. Returns the directory.

  Args:
    directory: made if it does not exist.
    classes: names of the classes.
    count: of pictures of each class.
    size: (height, width).
    suffix: of the files, which decides the format.
    seed: of the noise, so that no two pictures are equal.
  """
  rng = np.random.default_rng(seed)
  for number, name in enumerate(classes):
    folder = pathlib.Path(directory) / name
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
      pixels = rng.integers(0, 120, (*size, 3)) + (np.arange(3) == number % 3) * 130
      Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{index:03}{suffix}')
  return pathlib.Path(directory)


def start(*arguments, **environment):
  """Starts a command of the project in a process group of its own; end it with `stop`."""
  return subprocess.Popen(
    [sys.executable, '-m', *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {name: str(value) for name, value in environment.items()},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def stop(process, number=signal.SIGKILL, timeout=30):
  """Sends a signal to a process and returns (status, stdout, stderr) after its end."""
  if process.poll() is None:
    os.kill(process.pid, number)
  stdout, stderr = process.communicate(timeout=timeout)
  return process.returncode, stdout, stderr


def wait_for(condition, timeout=60, interval=0.02):
  """Waits until a function returns something true, and returns that; fails if it takes too long."""
  end = time.monotonic() + timeout
  while time.monotonic() < end:
    if value := condition():
      return value
    time.sleep(interval)
  raise AssertionError(f'nothing happened within {timeout} s')


def one_line(done, status=2):
  """Checks that a command ended with a status and one line on stderr, and returns the line."""
  lines = done.stderr.strip().splitlines()
  assert done.returncode == status, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
  assert 'Traceback' not in done.stderr, done.stderr[-2000:]
  assert [line for line in lines if line.startswith('error: ')] == lines[-1:], done.stderr[-2000:]
  return lines[-1]


def read_json(path):
  return json.loads(pathlib.Path(path).read_text())
