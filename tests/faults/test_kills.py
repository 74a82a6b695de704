"""Runs that are killed at random moments end, by the same command, as one that was not; their number can be set."""

import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from cnn_jax import checkpoint
from tests.faults import pairs
from tests.faults.tools import read_json, run_command, start, stop

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

KILLS = int(os.environ.get('FAULTS_KILLS', '10'))  # 50 before a release
PAIRS = int(os.environ.get('FAULTS_PAIRS', '4'))  # 20 before a release
SEED = int(os.environ.get('FAULTS_SEED', '0'))
NO_HANG = 30  # seconds


def _record(workdir):
  """What a run has to leave, but for the clock."""
  state, step, info = checkpoint.restore(workdir / 'checkpoints')
  result = read_json(workdir / 'result.json')
  clock = ('train_seconds', 'images_per_second')
  return {
    'state': [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)],
    'step': step,
    'scores': {name: value for name, value in info.items() if name.startswith(('validation_', 'best_'))},
    'metrics': (workdir / 'metrics.jsonl').read_bytes(),
    'result': {name: value for name, value in result.items() if name not in clock},
    'config': read_json(workdir / 'config.json'),
  }


def test_killed_anywhere_and_started_again(tmp_path):
  """Half of the runs are killed once, the others twice, at moments drawn over all phases of a run."""
  arguments = ('cnn_jax.main', *pairs.TINY)
  for name in ('warm', 'whole'):  # the first compiles
    started = time.monotonic()
    done = run_command(*arguments, f'--workdir={tmp_path / name}')
    duration = time.monotonic() - started
    assert done.returncode == 0, done.stderr
  expected = _record(tmp_path / 'whole')
  draw = random.Random(SEED)
  for number in range(KILLS):
    workdir = tmp_path / f'killed{number}'
    for _ in range(draw.choice((1, 2))):
      after = draw.uniform(0.1, 1.05) * duration
      process = start(*arguments, f'--workdir={workdir}')
      time.sleep(after)
      status, _, stderr = stop(process, signal.SIGKILL)
      print(f'seed {SEED}, run {number}: killed after {after:.2f} s, status {status}')
      assert status in (0, -signal.SIGKILL), stderr
    done = run_command(*arguments, f'--workdir={workdir}')
    assert done.returncode == 0, (number, done.stderr)
    found = _record(workdir)
    assert found == expected, (number, [name for name in expected if found[name] != expected[name]])
    assert not list((workdir / 'checkpoints').glob('.*'))


def test_one_of_two_processes_is_killed_or_stopped(tmp_path):
  """No process outlives the other by more than 30 s, and the same command ends with the same numbers."""
  draw = random.Random(SEED)
  expected = {}
  for number in range(PAIRS):
    devices, shared = 1 + number % 2, number // 2 % 2 == 0
    if devices not in expected:
      whole = [tmp_path / f'whole{devices}'] * 2
      started = time.monotonic()
      for status, _, stderr in pairs.end(pairs.start_pair(whole, *pairs.TINY, devices=devices), 200):
        assert status == 0, stderr
      expected[devices] = _record(whole[0]), time.monotonic() - started
    workdirs = [tmp_path / f'{number}', tmp_path / (f'{number}' if shared else f'{number}_other')]
    victim, name = draw.randrange(2), draw.choice(('SIGKILL', 'SIGTERM', 'SIGSTOP'))
    after = draw.uniform(0.1, 1.0) * expected[devices][1]
    print(f'seed {SEED}, pair {number}: {devices} devices, shared {shared}, {name} to {victim} after {after:.2f} s')
    processes = pairs.start_pair(workdirs, *pairs.TINY, devices=devices)
    time.sleep(after)
    if processes[victim].poll() is None:
      processes[victim].send_signal(getattr(signal, name))
    try:
      _, stderr = processes[1 - victim].communicate(timeout=NO_HANG)
    finally:
      pairs.kill(processes)
    # 2: killed before the two have met, which the other one says after --join_seconds
    assert processes[1 - victim].returncode in (0, 2, 143), (number, stderr)
    assert pairs.is_one_line(stderr), (number, stderr)
    for status, _, stderr in pairs.end(pairs.start_pair(workdirs, *pairs.TINY, devices=devices), 200):
      assert status == 0, (number, stderr)
    found = _record(workdirs[0])
    reference = expected[devices][0]
    assert found == reference, (number, [key for key in reference if found[key] != reference[key]])
