"""Surroundings that are full, shared, or wrong about the time: one line, nothing lost."""

import contextlib
import os
import subprocess
import sys
import time

import jax
import pytest

from cnn_jax import checkpoint
from tests.faults.tools import DIGITS, ROOT, call_command, one_line, start, stop, wait_for

pytestmark = pytest.mark.faults


@contextlib.contextmanager
def small_disk(directory, options):
  """A file system in memory, mounted while the block runs."""
  if os.getuid():
    pytest.skip('only root can mount a small disk')
  directory.mkdir()
  subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', directory], check=True)
  try:
    yield directory
  finally:
    subprocess.run(['umount', '-l', directory], check=True)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # of orbax: a loop that is closed
@pytest.mark.parametrize('options', ['size=16k', 'size=24k', 'nr_inodes=8', 'nr_inodes=14'])
def test_a_disk_that_fills_up_is_one_line_and_the_run_continues(tmp_path, options):
  with small_disk(tmp_path / 'disk', options) as disk:
    workdir = disk / 'run'
    line = one_line(call_command('cnn_jax.main', *DIGITS, f'--workdir={workdir}'))
    assert 'No space left on device' in line
    assert not (workdir / 'result.json').exists()
    larger = 'size=64m,nr_inodes=10000'
    subprocess.run(['mount', '-o', f'remount,{larger}', disk], check=True)
    done = call_command('cnn_jax.main', *DIGITS, f'--workdir={workdir}')
    assert done.returncode == 0, done.stderr
    assert (workdir / 'result.json').exists()


def test_a_read_only_disk_is_one_line_and_the_run_can_be_read(tmp_path, digits_run):
  with small_disk(tmp_path / 'disk', 'size=64m') as disk:
    subprocess.run(['cp', '-r', digits_run, disk / 'run'], check=True)
    (disk / 'run' / 'result.json').unlink()
    subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    for name in ('run', 'new'):
      line = one_line(call_command('cnn_jax.main', *DIGITS, f'--workdir={disk}/{name}'))
      assert 'Read-only file system' in line
    assert call_command('cnn_jax.evaluate', f'--workdir={disk}/run').returncode == 0


def test_two_runs_in_one_workdir(tmp_path):
  workdir = tmp_path / 'run'
  first = start('cnn_jax.main', *DIGITS, '--config.epochs=2000', f'--workdir={workdir}')
  try:
    wait_for(lambda: list(workdir.glob('checkpoints/*/manifest.json')))
    line = one_line(call_command('cnn_jax.main', *DIGITS, '--config.epochs=2000', f'--workdir={workdir}'))
    assert f'is in use by process {first.pid}' in line
    assert first.poll() is None
  finally:
    stop(first)


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
  def params(workdir):
    state, step, _ = checkpoint.restore(workdir / 'checkpoints')
    return step, [leaf.tobytes() for leaf in jax.tree.leaves(state)]

  assert call_command('cnn_jax.main', *DIGITS, f'--workdir={tmp_path}/a').returncode == 0
  true, jumps = time.time, iter(range(10**9))
  monkeypatch.setattr(time, 'time', lambda: true() + (-1) ** next(jumps) * 10**8)
  done = call_command('cnn_jax.main', *DIGITS, '--config.log.tensorboard=True', f'--workdir={tmp_path}/b')
  assert done.returncode == 0, done.stderr
  assert params(tmp_path / 'a') == params(tmp_path / 'b')
  assert (tmp_path / 'a' / 'metrics.jsonl').read_bytes() == (tmp_path / 'b' / 'metrics.jsonl').read_bytes()


MEMORY = """
import json, sys
from cnn_jax import command, evaluate, main
measured, whole = [], evaluate.evaluate_split
def measure(*arguments, **options):
  fields = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())
  measured.append(int(fields['VmRSS'].split()[0]))
  return whole(*arguments, **options)
evaluate.evaluate_split = measure
status = command.call(main.main, sys.argv[1:])
print(json.dumps(measured))
sys.exit(status)
"""


def test_memory_stays_flat_over_many_epochs(tmp_path):
  if not os.path.exists('/proc/self/status'):
    pytest.skip('this system has no /proc')
  done = subprocess.run(
    [sys.executable, '-c', MEMORY, *DIGITS, '--config.epochs=120', '--config.evaluation.every_epochs=1', f'--workdir={tmp_path}/run'],
    cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  kilobytes = [int(number) for number in done.stdout.splitlines()[-1].strip('[]').split(',')]
  assert len(kilobytes) >= 120
  assert kilobytes[-2] - kilobytes[30] < 32 * 1024


def test_another_version_of_jax_continues_the_run(tmp_path):
  """CNN_JAX_OTHER_PYTHON names an interpreter with another version of jax and the packages of this project."""
  other = os.environ.get('CNN_JAX_OTHER_PYTHON')
  if not other:
    pytest.skip('CNN_JAX_OTHER_PYTHON names no interpreter with another version of jax')
  workdir, options = tmp_path / 'run', [*DIGITS, '--config.epochs=2000', f'--workdir={tmp_path}/run']
  first = start('cnn_jax.main', *options)
  wait_for(lambda: list(workdir.glob('checkpoints/*/manifest.json')))
  assert stop(first, number=15)[0] == 143
  for name in ('evaluate', 'report'):
    subprocess.run([other, '-m', f'cnn_jax.{name}', f'--workdir={workdir}'], cwd=ROOT, check=True, timeout=120)
