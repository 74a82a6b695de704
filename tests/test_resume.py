"""A run that is stopped anywhere and started again ends like one that was not stopped, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cnn_jax import checkpoint
from tests.helpers import ROOT, call_command

# Augmentation, dropout, batch norm and averages: everything that has randomness or state.
ARGUMENTS = (
  '--config=configs/digits.py',
  '--config.epochs=4',
  '--config.model.convs_per_block=1',
  '--config.model.features=(8, 16)',
  '--config.schedule.warmup_epochs=1.0',
  '--config.evaluation.every_epochs=1',
  '--config.checkpoint.every_epochs=1',
  '--config.log.every_steps=5',
  '--config.log.tensorboard=False',
  '--config.log.report=False',
  '--config.model.dropout=0.2',
  '--config.evaluation.ema_decay=0.9',
  '--config.augment.rotate=10.0',
  '--config.augment.mixup=0.2',
)
# Starts the command with a function replaced by one that kills the process at its n-th call, if a checkpoint is written.
KILLER = """
import glob, os, signal, sys, time
from cnn_jax import checkpoint, command, main, record
owner, name, calls = {owner}, {name!r}, {calls}
original = getattr(owner, name)
def dies(*arguments, **named):
  global calls
  calls -= 1
  if not calls:
    while not glob.glob({workdir!r} + '/checkpoints/[1-9]*'):
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
  return original(*arguments, **named)
setattr(owner, name, dies)
command.run(main.main)
"""


def _train(workdir):
  done = call_command('cnn_jax.main', *ARGUMENTS, f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('resume') / 'whole'
  _train(workdir)
  return workdir


def _assert_same(one, other):
  (state, step, info), (state2, step2, info2) = (checkpoint.restore(w / 'checkpoints') for w in (one, other))
  assert step == step2 == 80
  assert jax.tree.structure(state) == jax.tree.structure(state2)
  for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    np.testing.assert_array_equal(leaf, _at(state2, path), err_msg=str(path))
  assert {'params', 'batch_stats', 'opt_state', 'ema'} <= set(state)
  assert info['validation_loss'] == info2['validation_loss']
  assert (one / 'metrics.jsonl').read_bytes() == (other / 'metrics.jsonl').read_bytes()
  results = [json.loads((w / 'result.json').read_text()) for w in (one, other)]
  for result in results:
    images = result['steps'] * 64
    assert result.pop('images_per_second') == pytest.approx(images / result.pop('train_seconds'))
  assert results[0] == results[1]


def _at(tree, path):
  for key in path:
    tree = tree[key.key]
  return tree


@pytest.mark.parametrize(
  ('owner', 'name', 'calls'),
  [
    ('record.Recorder', 'append', 8),  # in the middle of an epoch
    ('checkpoint', '_sync_tree', 2),  # in a save: written, not yet in place
    ('checkpoint', '_prune', 2),  # in a save: in place, the old ones not yet removed
    ('record', 'write_result', 1),  # trained, tested, not yet recorded
  ],
)
def test_sigkill_then_the_same_command(uninterrupted, tmp_path, owner, name, calls):
  workdir = tmp_path / 'killed'
  killer = KILLER.format(owner=owner, name=name, calls=calls, workdir=str(workdir))
  killed = subprocess.run(
    [sys.executable, '-c', killer, *ARGUMENTS, f'--workdir={workdir}'],
    cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
  )  # fmt: skip
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert not (workdir / 'result.json').exists()
  assert 'Resuming at step' in _train(workdir)
  _assert_same(uninterrupted, workdir)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_stop_saves_and_exits_with_143(uninterrupted, tmp_path, number):
  workdir = tmp_path / 'stopped'
  process = subprocess.Popen(
    [sys.executable, '-m', 'cnn_jax.main', *ARGUMENTS, f'--workdir={workdir}'],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline and not _lines(workdir / 'metrics.jsonl'):
    time.sleep(0.002)
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 143, errors
  assert 'the same command continues from there' in errors
  assert len(errors.splitlines()) == 1
  assert list((workdir / 'checkpoints').glob('[1-9]*'))
  _train(workdir)
  _assert_same(uninterrupted, workdir)


def _lines(path):
  return path.read_text().count('\n') if path.exists() else 0


def test_a_complete_run_is_left_alone_and_another_config_is_refused(uninterrupted):
  before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob('*.json*')}
  assert 'is complete' in _train(uninterrupted)
  refused = call_command('cnn_jax.main', *ARGUMENTS, '--config.seed=1', f'--workdir={uninterrupted}')
  assert refused.returncode == 2
  assert 'config.seed is 1' in refused.stderr
  assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob('*.json*')}


def test_damage_is_reported_and_the_one_before_is_used(uninterrupted, tmp_path):
  workdir = tmp_path / 'damaged'
  subprocess.run(['cp', '-r', uninterrupted, workdir], check=True)
  (workdir / 'result.json').unlink()
  *_, earlier, newest = sorted((workdir / 'checkpoints').glob('[1-9]*'), key=lambda path: int(path.name))
  assert newest.name == '80'
  victim = max((path for path in newest.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  with victim.open('r+b') as file:
    file.seek(victim.stat().st_size // 2)
    byte = file.read(1)
    file.seek(-1, os.SEEK_CUR)
    file.write(bytes([byte[0] ^ 1]))
  done = call_command('cnn_jax.main', *ARGUMENTS, f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  assert 'is damaged' in done.stderr
  assert f'Resuming at step {earlier.name} ' in done.stdout
  _assert_same(uninterrupted, workdir)
  for path in (workdir / 'checkpoints').glob('*/manifest.json'):
    path.unlink()
  (workdir / 'result.json').unlink()
  lost = call_command('cnn_jax.main', *ARGUMENTS, f'--workdir={workdir}')
  assert lost.returncode == 2
  assert 'all checkpoints are damaged' in lost.stderr
  assert [line.split(':')[0] for line in lost.stderr.splitlines()] == ['warning', 'error']
