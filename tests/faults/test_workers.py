"""Processes that read images: the same bits as threads, one line for each error, and none is left behind."""

import os
import signal
import time

import jax
import numpy as np
import pytest

from cnn_jax import run
from tests.faults.tools import (
  DIGITS,
  folder_arguments,
  run_command,
  start,
  stop,
  wait_for,
  write_photographs,
)

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures('offline')]


def parameters(workdir):
  return jax.tree.leaves(run.load_run(workdir).variables['params'])


def streamed(directory, workdir, **fields):
  return folder_arguments(directory, workdir, data__resident='never', data__workers=2, **fields)


def readers(group):
  """The processes of a group that read images, by their command lines."""
  found = []
  for number in filter(str.isdigit, os.listdir('/proc')):
    try:
      with open(f'/proc/{number}/cmdline', 'rb') as stream:
        if b'spawn_main' in stream.read() and os.getpgid(int(number)) == group:
          found.append(int(number))
    except OSError:  # it has ended
      continue
  return found


def training(directory, workdir):
  """Starts a run that lasts, and waits until processes read for it."""
  process = start('cnn_jax.main', *streamed(directory, workdir, epochs=100_000))
  assert len(wait_for(lambda: len(found := readers(process.pid)) == 2 and found)) == 2
  wait_for(lambda: (workdir / 'metrics.jsonl').exists() and (workdir / 'metrics.jsonl').stat().st_size)
  return process


@pytest.mark.parametrize('kind', ['array', 'folder'])
def test_processes_and_threads_train_to_the_same_bits(tmp_path, kind):
  folder = write_photographs(tmp_path / 'set', suffix='.jpg')
  trained = []
  for workers in (0, 2):
    workdir = tmp_path / f'run{workers}'
    if kind == 'array':
      arguments = (*DIGITS, '--config.data.resident=never', f'--workdir={workdir}')
    else:
      arguments = folder_arguments(folder, workdir, data__resident='never')
    done = run_command('cnn_jax.main', *arguments, f'--config.data.workers={workers}')
    assert done.returncode == 0, done.stderr
    assert 'leaked' not in done.stderr
    trained.append(parameters(workdir))
  for one, other in zip(*trained, strict=True):
    np.testing.assert_array_equal(one, other)


def test_a_bad_image_is_one_line_and_no_process_is_left(tmp_path):
  folder = write_photographs(tmp_path / 'set')
  process = training(folder, tmp_path / 'run')
  for file in (folder / 'cat').iterdir():
    file.write_bytes(b'%PDF-1.7')
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 2, stderr
  assert stderr.count('error: ') == 1 and 'Traceback' not in stderr and 'leaked' not in stderr
  assert '.png is a PDF document' in stderr.strip().splitlines()[-1]
  assert not readers(process.pid)


def test_a_killed_process_is_one_line(tmp_path):
  process = training(write_photographs(tmp_path / 'set'), tmp_path / 'run')
  os.kill(readers(process.pid)[0], signal.SIGKILL)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 2, stderr
  assert 'a process that reads images was killed' in stderr.strip().splitlines()[-1]
  assert 'Traceback' not in stderr
  assert not readers(process.pid)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize('whole_group', [False, True])
def test_processes_that_read_end_with_the_run(tmp_path, number, whole_group):
  process = training(write_photographs(tmp_path / 'set'), tmp_path / 'run')
  if whole_group:
    os.killpg(process.pid, number)
  status, _, stderr = stop(process, number)
  assert status == (143 if number == signal.SIGTERM else -9), stderr
  assert 'Traceback' not in stderr
  end = time.monotonic() + 10
  while readers(process.pid) and time.monotonic() < end:
    time.sleep(0.1)
  assert not readers(process.pid)
