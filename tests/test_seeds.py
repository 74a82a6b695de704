"""Several seeds in one command: each is the run that it would be alone, and the result summarises all."""

import functools
import json
import statistics
import subprocess
import sys

import jax
import numpy as np
import pytest

from cnn_jax import UsageError, checkpoint, evaluate, export, predict, report
from cnn_jax.run import load_run
from tests.helpers import ROOT, call_command, run_command

ARGUMENTS = (
  '--config=configs/digits.py',
  '--config.epochs=2',
  '--config.model.features=(4, 8)',
  '--config.model.convs_per_block=1',
  '--config.model.dropout=0.1',
  '--config.schedule.warmup_epochs=1.0',
  '--config.log.tensorboard=False',
  '--config.log.report=False',
)
SEEDS = (*ARGUMENTS, '--config.seed=5', '--config.seeds=3')
CLOCK = ('train_seconds', 'images_per_second')
# Starts the command with a recorder that sends SIGTERM to its process when it writes its n-th line.
STOPPER = """
import os, signal
from cnn_jax import command, main, record
append, lines = record.Recorder.append, 0
def stops(*arguments):
  global lines
  lines += 1
  if lines == {line}:
    os.kill(os.getpid(), signal.SIGTERM)
  return append(*arguments)
record.Recorder.append = stops
command.run(main.main)
"""


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The workdir of one seed, with the cache of the programs compiled for it beside it."""
  workdir = tmp_path_factory.mktemp('seeds') / 'alone'
  _train(workdir, (*ARGUMENTS, '--config.seed=6'), JAX_COMPILATION_CACHE_DIR=workdir.parent / 'compiled')
  return workdir


@pytest.fixture(scope='module')
def several(alone):
  """The workdir of three seeds, and in a file beside it what they added to the cache."""
  workdir, cache = alone.parent / 'several', alone.parent / 'compiled'
  before = _programs(cache)
  _train(workdir, JAX_COMPILATION_CACHE_DIR=cache)
  (workdir.parent / 'added').write_text('\n'.join(_programs(cache) - before))
  return workdir


def _train(workdir, arguments=SEEDS, **environment):
  # With an environment of its own in a process of its own.
  run = functools.partial(run_command, **environment) if environment else call_command
  done = run('cnn_jax.main', *arguments, f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  return done.stdout


def _programs(cache):
  return {path.name for path in cache.iterdir() if not path.name.endswith('-atime')}


def _result(workdir):
  """What was recorded, but for what the clock decides."""
  result = json.loads((workdir / 'result.json').read_text())
  assert set(CLOCK) <= set(result)
  return {name: value for name, value in result.items() if name not in CLOCK}


def test_each_seed_is_its_own_single_run(alone, several):
  one, other = alone, several / 'seed_00006'
  assert _result(one) == _result(other)
  for name in ('config.json', 'metrics.jsonl'):
    assert (one / name).read_bytes() == (other / name).read_bytes()
  states = [checkpoint.restore(place / 'checkpoints')[0] for place in (one, other)]
  jax.tree.map(np.testing.assert_array_equal, *states)
  assert load_run(other).config.seed == 6


def test_the_result_has_mean_std_n_and_each_value(several):
  result = _result(several)
  runs = [_result(several / f'seed_0000{seed}') for seed in (5, 6, 7)]
  assert (result.pop('n'), result.pop('seeds')) == (3, [run.pop('seed') for run in runs]) == (3, [5, 6, 7])
  assert result.keys() == runs[0].keys()
  classes, by_run = result.pop('test_per_class'), [run.pop('test_per_class') for run in runs]
  recalls = [run['3']['recall'] for run in by_run]
  assert classes['3']['n'] == by_run[0]['3']['n'] > 30
  assert classes['3']['recall'] == {'mean': statistics.mean(recalls), 'std': statistics.stdev(recalls)}
  for name, value in result.items():
    values = [run[name] for run in runs]
    if isinstance(value, dict):
      assert value == {'mean': statistics.mean(values), 'std': statistics.stdev(values), 'n': 3, 'values': values}
      assert value['std'] > 0 or name.endswith('accuracy')
    else:
      assert values == 3 * [value]
  assert {'test_accuracy', 'test_loss', 'validation_accuracy'} <= {k for k, v in result.items() if isinstance(v, dict)}
  seconds = json.loads((several / 'result.json').read_text())['train_seconds']
  assert len(seconds['values']) == seconds['n'] == 3


def test_another_seed_needs_no_other_program(several):
  assert any('eval_step' in name for name in _programs(several.parent / 'compiled'))
  assert (several.parent / 'added').read_text() == ''


def test_a_finished_seed_is_not_trained_again(several, tmp_path):
  workdir = tmp_path / 'resumed'
  subprocess.run(['cp', '-rp', several, workdir], check=True)
  (workdir / 'result.json').unlink()
  subprocess.run(['rm', '-r', workdir / 'seed_00006'], check=True)
  kept = [path for seed in (5, 7) for path in (workdir / f'seed_0000{seed}').rglob('*') if path.name != '.lock']
  before = {path: path.stat().st_mtime_ns for path in kept}
  shown = _train(workdir)
  assert 'Seed 6, 2 of 3' in shown
  assert 'Seed 5, 1 of 3' not in shown
  assert before == {path: path.stat().st_mtime_ns for path in kept}
  assert _result(workdir) == _result(several)
  assert 'is complete' in _train(workdir)


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (3, 'Stopped after 1 of 3 seeds'),  # the last of the first seed, which has nothing left to save
    (4, 'Stopped and saved at step 20 of 40'),  # the first of the second
  ],
)
def test_a_stop_ends_all_and_the_same_command_goes_on(several, tmp_path, line, message):
  workdir = tmp_path / 'stopped'
  stopped = subprocess.run(
    [sys.executable, '-c', STOPPER.format(line=line), *SEEDS, f'--workdir={workdir}'],
    cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
  )  # fmt: skip
  assert stopped.returncode == 143, stopped.stderr
  assert stopped.stderr.startswith(message)
  assert len(stopped.stderr.splitlines()) == 1
  assert (workdir / 'seed_00005' / 'result.json').exists()
  assert not (workdir / 'seed_00006' / 'result.json').exists()
  _train(workdir)
  assert _result(workdir) == _result(several)


def test_commands_for_one_run_ask_for_one_of_the_seeds(several, tmp_path):
  picture = tmp_path / 'picture.png'
  picture.write_bytes(b'')
  for main, arguments in (
    (evaluate.main, []), (predict.main, [str(picture)]), (report.main, []), (export.main, ['--output=x.stablehlo']),
  ):  # fmt: skip
    with pytest.raises(UsageError, match='holds the runs of 3 seeds; give one of .*seed_00005 to seed_00007'):
      main([f'--workdir={several}', *arguments])


def test_a_workdir_keeps_its_number_of_seeds(several):
  for arguments in (ARGUMENTS, (*SEEDS, '--config.seeds=4')):
    done = call_command('cnn_jax.main', *arguments, '--config.seed=5', f'--workdir={several}')
    assert done.returncode == 2
    assert 'config.seeds is ' in done.stderr


def test_a_trial_of_a_sweep_has_one_seed(tmp_path):
  done = call_command(
    'cnn_jax.sweep.__main__',
    *SEEDS,
    '--space=experiments/spaces/learning_rate.py',
    '--trials=1',
    f'--workdir={tmp_path}',
  )
  assert done.returncode == 2
  assert 'config.seeds is 3, but a trial has one seed' in done.stderr
