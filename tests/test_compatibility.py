"""The compatibility promise: this version reads, continues and uses what version 0.1 wrote.

references/run-v0.1 is a workdir that commit faa869b wrote and that was stopped in the second of two epochs.
references/run-v0.1-end.npz holds what the same commit made of the same command without a stop: the final state
(`end/...`), the bytes of metrics.jsonl (`metrics`), and `logits` of the stopped run for eight `images`.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from cnn_jax import checkpoint, record
from cnn_jax.run import load_run
from tests.helpers import ROOT, call_command, logits_of

REFERENCES = ROOT / 'tests' / 'references'
# The command in environment.json, less its workdir.
ARGUMENTS = (
  '--config=configs/digits.py',
  '--config.epochs=2',
  '--config.model.features=(4,)',
  '--config.model.convs_per_block=1',
  '--config.model.dropout=0.1',
  '--config.evaluation.every_epochs=1',
  '--config.evaluation.ema_decay=0.9',
  '--config.checkpoint.keep=1',
  '--config.schedule.warmup_epochs=1.0',
  '--config.log.every_steps=5',
  '--config.log.tensorboard=False',
  '--config.log.report=False',
)


@pytest.fixture
def old(tmp_path):
  return shutil.copytree(REFERENCES / 'run-v0.1', tmp_path / 'run')


@pytest.fixture(scope='module')
def end():
  with np.load(REFERENCES / 'run-v0.1-end.npz') as arrays:
    return dict(arrays)


def test_an_old_run_predicts_what_it_predicted(old, end):
  run = load_run(old)
  assert (run.step, run.image_shape, len(run.class_names)) == (25, (8, 8, 1), 10)
  assert run.config.model.name == 'cnn'
  logits = logits_of(run, end['images'], 8)
  np.testing.assert_allclose(logits, end['logits'], rtol=1e-5, atol=1e-6)


def test_the_same_command_continues_an_old_run_to_the_same_end(old, end):
  before = json.loads((old / 'environment.json').read_text())
  done = call_command('cnn_jax.main', *ARGUMENTS, f'--workdir={old}')
  assert done.returncode == 0, done.stderr
  assert 'Resuming at step 25 of 40.' in done.stdout
  state, step, info = checkpoint.restore(old / 'checkpoints')
  found = {'/'.join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
  expected = {name.removeprefix('end/'): leaf for name, leaf in end.items() if name.startswith('end/')}
  assert step == 40
  assert found.keys() == expected.keys()
  points = [json.loads(line) for line in (old / 'metrics.jsonl').read_text().splitlines()]
  for point in points:
    point.pop('balanced_accuracy', None)  # version 0.1 did not measure it
  expected_points = [json.loads(line) for line in end['metrics'].tobytes().splitlines()]
  now = json.loads((old / 'environment.json').read_text())
  if all(now[name] == before[name] for name in ('cpu', 'cpu_cores', 'device_kind', 'num_devices', 'versions')):
    assert all(leaf.tobytes() == expected[name].tobytes() for name, leaf in found.items())
    assert points == expected_points
  for name, leaf in found.items():  # other hardware rounds in another way
    np.testing.assert_allclose(leaf, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)
  assert [point.keys() for point in points] == [point.keys() for point in expected_points]
  assert now['runs'] == [{name: value for name, value in before.items() if name != 'runs'}]
  result = record.read_result(old)
  assert result['steps'] == 40
  assert info['trained_images'] == 1280 + 15 * 64
  assert result['images_per_second'] == info['trained_images'] / info['train_seconds']
