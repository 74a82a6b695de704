"""Processes that train together agree before the first step, and end together, in one line each."""

import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from cnn_jax import checkpoint
from tests.faults import pairs
from tests.faults.tools import folder_arguments, read_json, write_photographs

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def _ended(processes, timeout, statuses):
  ended = pairs.end(processes, timeout)
  assert tuple(status for status, _, _ in ended) == statuses, ended
  for _, _, stderr in ended:
    assert pairs.is_one_line(stderr), stderr[-3000:]
  return [stderr for _, _, stderr in ended]


@pytest.mark.parametrize(
  ('own', 'message'),
  [
    (((), ('--config.optimizer.learning_rate=0.01',)), 'config.optimizer.learning_rate is 0.01 in process 1 and 0.1'),
    (((), ('--config.data.split_seed=3',)), 'in process 1 and 0 in process 0'),
  ],
)
def test_another_config_is_refused_by_both(tmp_path, own, message):
  lines = _ended(pairs.start_pair([tmp_path / 'w'] * 2, *pairs.TINY, own=own), 100, (2, 2))
  assert message in lines[0]
  assert all('start all processes with the same command' in line for line in lines)
  assert not (tmp_path / 'w' / 'checkpoints').exists()


def test_other_data_are_refused_by_both(tmp_path):
  for name, count in (('one', 20), ('other', 21)):
    write_photographs(tmp_path / name, count=count)
  own = [[f'--config.data.dir={tmp_path / name}'] for name in ('one', 'other')]
  lines = _ended(pairs.start_pair([tmp_path / 'w'] * 2, *folder_arguments(tmp_path / 'one'), own=own), 100, (2, 2))
  assert all('in process 1 and ' in line for line in lines)
  assert not (tmp_path / 'w' / 'checkpoints').exists()


@pytest.mark.parametrize(('devices', 'shared'), [(1, False), (2, True)])
def test_all_stop_at_one_step_and_continue_there(tmp_path, devices, shared):
  """The workdir of process 1 may be on a disk of its own: it gets step and state from process 0."""
  workdirs = [tmp_path / 'w', tmp_path / ('w' if shared else 'another')]
  processes = pairs.start_pair(workdirs, *pairs.TINY, devices=devices)
  pairs.wait_for_steps(processes, workdirs[0], lines=8)
  processes[1].send_signal(signal.SIGTERM)
  lines = _ended(processes, 30, (143, 143))
  assert lines[0] == lines[1]
  assert 'Stopped and saved at step' in lines[0]
  _ended(pairs.start_pair(workdirs, *pairs.TINY, devices=devices), 120, (0, 0))
  assert shared or not (workdirs[1] / 'checkpoints').exists()
  whole = [tmp_path / 'whole'] * 2
  _ended(pairs.start_pair(whole, *pairs.TINY, devices=devices), 120, (0, 0))
  (one, _, _), (two, _, _) = (checkpoint.restore(w / 'checkpoints') for w in (workdirs[0], whole[0]))
  jax.tree.map(np.testing.assert_array_equal, one['params'], two['params'])
  assert (workdirs[0] / 'metrics.jsonl').read_bytes() == (whole[0] / 'metrics.jsonl').read_bytes()
  results = [read_json(w / 'result.json') for w in (workdirs[0], whole[0])]
  assert results[0]['test_loss'] == results[1]['test_loss']


@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_the_other_ends_in_time_if_one_is_lost(tmp_path, victim, number):
  """While images of a folder are read."""
  pictures = write_photographs(tmp_path / 'pictures', count=40)
  arguments = folder_arguments(pictures, epochs=1000, data__resident='never', log__every_steps=1)
  processes = pairs.start_pair([tmp_path / 'w', tmp_path / 'v'], *arguments)
  pairs.wait_for_steps(processes, tmp_path / 'w', lines=4)
  os.kill(processes[victim].pid, number)
  started = time.monotonic()
  try:
    _, stderr = processes[1 - victim].communicate(timeout=30)
  finally:
    pairs.kill(processes)
  assert processes[1 - victim].returncode == 143
  assert time.monotonic() - started < 3 * pairs.HEARTBEAT + 3
  assert pairs.is_one_line(stderr)
  assert f'process {victim} has ended' in stderr
  assert 'the same command continues' in stderr


READING = """
from cnn_jax.data import feed
read = feed._Plan.read
def stall(self, number):
  if number > 50:
    time.sleep(100)
  return read(self, number)
feed._Plan.read = stall
"""
WRITING = """
from cnn_jax import record
append = record.Recorder.append
def stall(self, step, *arguments):
  if step > 50:
    time.sleep(100)
  append(self, step, *arguments)
record.Recorder.append = stall
"""


@pytest.mark.parametrize(
  ('victim', 'code', 'what'), [(1, READING, 'Reading training images'), (0, WRITING, 'Writing the record')]
)
def test_a_disk_that_does_not_answer_one_of_them_ends_both_in_time(tmp_path, victim, code, what):
  """The process itself goes on to answer."""
  codes = [f'import time\n{code}' if i == victim else '' for i in range(2)]
  arguments = (*pairs.TINY, '--config.data.resident=never', '--stall_seconds=6')
  processes = pairs.start_pair([tmp_path / 'w', tmp_path / 'v'], *arguments, code=codes)
  pairs.wait_for_steps(processes, tmp_path / 'w', lines=6)
  lines = _ended(processes, 30, (143, 143))
  line = (
    f'{what} has taken more than 6 s, which --stall_seconds sets; the same command continues from what was saved last.'
  )
  assert lines[victim].splitlines()[-1] == line
  assert lines[1 - victim].splitlines()[-1] == f'process {victim}: {line}'
  assert f'warning: {what} has taken 2 s; the processes end after 6 s.' in lines[victim]


UNPLUGGED = """
import os
def unplug():
  if os.path.exists({workdir!r}):
    os.rename({workdir!r}, {workdir!r} + '.away')
"""
PHASES = {
  'training': """
from cnn_jax import record
append = record.Recorder.append
def later(self, step, *arguments):
  append(self, step, *arguments)
  if step == 47:
    unplug()
record.Recorder.append = later
""",
  'evaluation': """
from cnn_jax import evaluate
evaluate_split, calls = evaluate.evaluate_split, []
def later(*arguments, **options):
  calls.append(1)
  if len(calls) == 2:
    unplug()
  return evaluate_split(*arguments, **options)
evaluate.evaluate_split = later
""",
  'saving': """
from cnn_jax import arrays
write, calls = arrays.write, []
def later(directory, tree):
  calls.append(1)
  write(directory, tree)
  if len(calls) == 2:
    unplug()
arrays.write = later
""",
  'result': """
from cnn_jax import record
write = record.write_result
def later(*arguments):
  unplug()
  write(*arguments)
record.write_result = later
""",
}


def test_a_workdir_that_is_unplugged_ends_both_and_nothing_is_lost(tmp_path):
  """In every phase of a streamed run, one after another."""
  workdirs = [tmp_path / 'w', tmp_path / 'v']
  arguments = (
    *pairs.TINY,
    '--config.epochs=6',
    '--config.data.resident=never',
    '--config.checkpoint.every_minutes=1e-9',
  )
  for code in PHASES.values():
    code = UNPLUGGED.format(workdir=str(workdirs[0])) + code
    lines = _ended(pairs.start_pair(workdirs, *arguments, code=(code, '')), 100, (2, 2))
    assert lines[0].startswith('error: ') and str(workdirs[0]) in lines[0]
    assert lines[1] == f'process 0: {lines[0]}'
    # Orbax may make directories again and leave arrays there; but they never become a checkpoint.
    left = {path.name for path in workdirs[0].rglob('*') if path.is_file()}
    assert not left & {'manifest.json', 'metrics.jsonl', 'result.json'}, 'something was written to another disk'
    shutil.rmtree(workdirs[0], ignore_errors=True)
    (tmp_path / 'w.away').rename(workdirs[0])
  _ended(pairs.start_pair(workdirs, *arguments), 100, (0, 0))
  whole = tmp_path / 'whole'
  _ended(pairs.start_pair([whole, tmp_path / 'v'], *arguments), 100, (0, 0))
  (one, _, _), (two, _, _) = (checkpoint.restore(w / 'checkpoints') for w in (workdirs[0], whole))
  jax.tree.map(np.testing.assert_array_equal, one['params'], two['params'])
  assert (workdirs[0] / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def test_a_full_disk_of_the_first_ends_both(tmp_path):
  processes = pairs.start_pair([tmp_path / 'w', tmp_path / 'v'], *pairs.TINY, code=(pairs.LIMITED.format(5000), ''))
  lines = _ended(processes, 120, (2, 2))
  assert 'cannot save the checkpoint of step' in lines[0]
  assert lines[1].startswith('process 0: error: cannot save the checkpoint of step')


def test_a_diverged_state_ends_both(tmp_path):
  processes = pairs.start_pair([tmp_path / 'w'] * 2, *pairs.TINY, '--config.optimizer.learning_rate=1e25')
  assert all('diverged' in line or 'learning_rate' in line for line in _ended(processes, 100, (3, 3)))


def test_a_complete_run_is_complete_for_both(tmp_path):
  workdirs = [tmp_path / 'w', tmp_path / 'v']
  _ended(pairs.start_pair(workdirs, *pairs.TINY, '--config.epochs=2'), 120, (0, 0))
  before = (tmp_path / 'w' / 'result.json').read_bytes()
  _ended(pairs.start_pair(workdirs, *pairs.TINY, '--config.epochs=2'), 60, (0, 0))
  assert (tmp_path / 'w' / 'result.json').read_bytes() == before
