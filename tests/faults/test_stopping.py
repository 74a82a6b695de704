"""Signals, slow and tiny epochs, reports, caches and full disks: a run is saved or nothing is lost, in one line."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cnn_jax import checkpoint, report
from tests.faults import pairs
from tests.faults.tools import DIGITS, ROOT, call_command, one_line, read_json, run_command, start, stop, wait_for

pytestmark = pytest.mark.faults

# Starts a command with a function replaced by one that waits for a minute, as for a slow compiler or disk.
SLOW = """
import sys, time
from cnn_jax import checkpoint, command, evaluate, main, train
def slow(*arguments, **named):
  print('WAITING', flush=True)
  time.sleep(60)
{owner}.{name} = slow
command.run(main.main)
"""


def _start_slow(owner, name, *arguments):
  process = subprocess.Popen(
    [sys.executable, '-c', SLOW.format(owner=owner, name=name), *map(str, arguments)],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  for line in process.stdout:
    if 'WAITING' in line:
      return process
  raise AssertionError(process.communicate()[1])


@pytest.fixture(autouse=True)
def _ctrl_c():
  """Lets the processes that a test starts be interrupted, also if the tests run in the background of a shell."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def _handles(process, number):
  """Whether a process has a handler of a signal."""
  status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
  caught = int(next(line for line in status.splitlines() if line.startswith('SigCgt')).split()[1], 16)
  return caught >> (number - 1) & 1


# --- signals


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='only Linux shows which signals are handled')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
  ('name', 'delay'), [('main', 0.0), ('main', 0.1), ('main', 0.4), ('predict', 0.0), ('evaluate', 0.3), ('report', 0.6)]
)
def test_a_signal_while_a_command_starts_is_one_line(digits_run, tmp_path, name, delay, number):
  arguments = [f'--workdir={digits_run if name != "main" else tmp_path}']
  arguments += {'main': [pairs.TINY[0]], 'predict': [ROOT / 'tests']}.get(name, [])
  process = start(f'cnn_jax.{name}', *arguments)
  wait_for(lambda: _handles(process, signal.SIGTERM))  # Python alone handles SIGINT
  time.sleep(delay)
  status, _, stderr = stop(process, number)
  assert status == 143, stderr
  assert stderr.count('\n') <= 1, stderr
  assert 'Traceback' not in stderr


@pytest.mark.parametrize('owner', ['train', 'evaluate'])
def test_a_signal_during_compilation_ends_the_run_within_ten_seconds(tmp_path, owner):
  """What was saved before stays: a second start, whose evaluation is slow to compile, continues it."""
  target = {'train': ('train', 'take_steps'), 'evaluate': ('evaluate', 'compute_logits')}[owner]
  process = _start_slow(*target, *pairs.TINY, f'--workdir={tmp_path}')
  started = time.monotonic()
  status, _, stderr = stop(process, signal.SIGTERM)
  assert status == 143
  assert time.monotonic() - started < 12
  assert stderr.startswith('stopped; the same command continues')
  assert stderr.count('\n') == 1
  done = run_command('cnn_jax.main', *pairs.TINY, f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_during_a_save_ends_the_run_at_once(tmp_path, number):
  process = _start_slow('checkpoint', '_sync_tree', *pairs.TINY, f'--workdir={tmp_path}')
  process.send_signal(number)
  process.send_signal(number)  # as from a closed terminal or `timeout`: does not count
  time.sleep(1.5)
  assert process.poll() is None
  started = time.monotonic()
  status, _, stderr = stop(process, number)
  assert status == 143
  assert time.monotonic() - started < 3
  assert stderr == 'stopped at once; what was saved last remains.\n'
  done = run_command('cnn_jax.main', *pairs.TINY, f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr
  assert not list((tmp_path / 'checkpoints').glob('.*'))


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_signals_of_terminals_and_schedulers_save(tmp_path, number):
  process = start('cnn_jax.main', *pairs.TINY, '--config.epochs=2000', f'--workdir={tmp_path}')
  wait_for(lambda: (tmp_path / 'metrics.jsonl').exists() and (tmp_path / 'metrics.jsonl').read_text())
  status, _, stderr = stop(process, number)
  assert status == 143, stderr
  assert 'Stopped and saved at step' in stderr
  assert stderr.count('\n') == 1
  assert checkpoint.restore(tmp_path / 'checkpoints') is not None


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has /dev/full')
@pytest.mark.parametrize('output', ['| grep -m1 training', '> /dev/full', '>&-', '2>&-'])
def test_a_run_goes_on_if_its_output_fails(tmp_path, output):
  command = f"'{sys.executable}' -m cnn_jax.main {' '.join(repr(a) for a in pairs.TINY)} --workdir={tmp_path} {output}"
  subprocess.run(['bash', '-c', command], cwd=ROOT, capture_output=True, check=False, timeout=120)
  assert read_json(tmp_path / 'result.json')['epochs'] == 12


# --- saves and validations


def test_tiny_epochs_share_validations_and_saves(tmp_path, monkeypatch):
  saved = []
  save = checkpoint.save

  def slow(directory, step, *arguments, **named):
    saved.append(step)
    time.sleep(0.3)
    save(directory, step, *arguments, **named)

  monkeypatch.setattr(checkpoint, 'save', slow)
  fields = ('--config.batch_size=1295', '--config.epochs=60', '--config.optimizer.learning_rate=0.001')
  done = call_command('cnn_jax.main', *pairs.TINY, *fields, f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr
  points = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [point['step'] for point in points if point['split'] == 'validation'] == [20, 40, 60]
  assert len(saved) < 15
  assert saved[-1] == 60


def test_the_best_is_saved_though_saving_is_slow(tmp_path, monkeypatch):
  """Of epochs that are shorter than a save, those with a new best validation are saved all the same."""
  save = checkpoint.save
  monkeypatch.setattr(checkpoint, 'save', lambda *a, **k: (time.sleep(1.5), save(*a, **k)))
  arguments = ('--config.epochs=6', '--config.checkpoint.keep=50', '--config.checkpoint.every_epochs=1')
  done = call_command('cnn_jax.main', *pairs.TINY, *arguments, f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr
  points = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  scores = {point['step']: point['balanced_accuracy'] for point in points if point['split'] == 'validation'}
  best = min(scores, key=lambda step: (-scores[step], step))
  assert checkpoint.restore(tmp_path / 'checkpoints', which='best')[1] == best


# --- after the end


@pytest.fixture(scope='module')
def complete(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('complete') / 'run'
  done = call_command('cnn_jax.main', *DIGITS, f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  return workdir


def test_what_was_left_at_the_end_is_done_by_the_next_start(complete, tmp_path):
  workdir = shutil.copytree(complete, tmp_path / 'run')
  (workdir / 'checkpoints' / '.tmp-80').mkdir()
  done = call_command('cnn_jax.main', *DIGITS, '--config.log.report=True', f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  assert 'is complete' in done.stdout
  assert '</html>' in (workdir / 'report.html').read_text()
  assert not list((workdir / 'checkpoints').glob('.*'))


def test_a_report_that_fails_leaves_the_result(complete, tmp_path, monkeypatch):
  workdir = shutil.copytree(complete, tmp_path / 'run')

  def fails(*_, **__):
    raise OSError('no fonts\nare installed')

  monkeypatch.setattr(report, 'write_report', fails)
  done = call_command('cnn_jax.main', *DIGITS, '--config.log.report=True', f'--workdir={workdir}')
  assert done.returncode == 0
  assert done.stderr == 'warning: no report was written, the same command tries again: no fonts are installed\n'


def test_more_epochs_continue_a_constant_schedule_exactly(tmp_path):
  arguments = (*DIGITS, '--config.schedule.name=constant', '--config.evaluation.every_epochs=1')
  results = {}
  for name, runs in (('longer', (2, 4)), ('at_once', (4,))):
    for epochs in runs:
      done = call_command('cnn_jax.main', *arguments, f'--config.epochs={epochs}', f'--workdir={tmp_path / name}')
      assert done.returncode == 0, done.stderr
    results[name] = read_json(tmp_path / name / 'result.json')
    assert results[name]['epochs'] == 4
    assert read_json(tmp_path / name / 'config.json')['epochs'] == 4
  states = [checkpoint.restore(tmp_path / name / 'checkpoints')[0] for name in results]
  jax.tree.map(np.testing.assert_array_equal, *states)
  assert (tmp_path / 'longer' / 'metrics.jsonl').read_bytes() == (tmp_path / 'at_once' / 'metrics.jsonl').read_bytes()
  assert results['longer']['test_loss'] == results['at_once']['test_loss']


def test_more_epochs_of_a_schedule_that_has_ended_name_what_to_do(complete):
  before = (complete / 'result.json').read_bytes()
  done = call_command('cnn_jax.main', *DIGITS, '--config.epochs=8', f'--workdir={complete}')
  assert f'--config.init_from={complete}' in one_line(done)
  assert (complete / 'result.json').read_bytes() == before


def test_another_machine_is_named(complete, tmp_path):
  workdir = shutil.copytree(complete, tmp_path / 'run')
  (workdir / 'result.json').unlink()
  path = workdir / 'environment.json'
  facts = read_json(path)
  path.write_text(json.dumps(facts | {'cpu_cores': 99, 'versions': facts['versions'] | {'jax': '0.9.9'}}))
  done = call_command('cnn_jax.main', *DIGITS, f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  lines = [line for line in done.stdout.splitlines() if 'This run was started with' in line]
  assert len(lines) == 1
  assert 'jax 0.9.9 and continues with' in lines[0]
  assert 'cpu_cores 99 and continues with' in lines[0]


# --- disks

COMPILES = """
import jax, jax.numpy as jnp
from cnn_jax import command
command.prepare_backend()
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4)))[0, 0]))
"""


def _compile(cache):
  done = subprocess.run(
    [sys.executable, '-c', COMPILES], cwd=ROOT, capture_output=True, text=True, check=True,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'},
  )  # fmt: skip
  return done.stdout, done.stderr


@pytest.mark.parametrize('damage', ['a bit', 'cut off', 'empty', 'without a checksum'])
def test_a_damaged_file_of_the_compile_cache_is_replaced(tmp_path, damage):
  expected = _compile(tmp_path)
  programs = sorted(tmp_path.glob('*-cache'))
  assert programs and expected[1] == ''
  whole = {}
  for path in programs:
    whole[path] = contents = bytearray(path.read_bytes())
    changed = bytes(contents[:40]) if damage != 'empty' else b''
    if damage == 'a bit':
      changed = bytearray(contents)
      changed[len(changed) // 2] ^= 4
    path.write_bytes(changed)
    if damage == 'without a checksum':  # as JAX alone writes it
      path.with_name(path.name.replace('-cache', '-sum')).unlink()
  assert _compile(tmp_path) == expected
  assert all(len(path.read_bytes()) > 0.9 * len(contents) for path, contents in whole.items())
  assert _compile(tmp_path) == expected


def test_a_compile_cache_that_cannot_be_used_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  _, stderr = _compile(tmp_path / 'file')
  assert stderr == f'warning: compiled programs are not kept in {tmp_path / "file"}: File exists.\n'


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can mount a small disk')
def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path):
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=160k', 'tmpfs', tmp_path], check=False).returncode:
    pytest.skip('mounting is not allowed here')
  try:
    done = run_command('cnn_jax.main', *pairs.TINY, '--config.checkpoint.keep=50', f'--workdir={tmp_path / "run"}')
    assert 'No space left on device' in one_line(done)
    assert done.stderr.count('\n') == 1
    subprocess.run(['mount', '-o', 'remount,size=8m', tmp_path], check=True)
    done = run_command('cnn_jax.main', *pairs.TINY, '--config.checkpoint.keep=50', f'--workdir={tmp_path / "run"}')
    assert done.returncode == 0, done.stderr
  finally:
    subprocess.run(['umount', tmp_path], check=True)
