"""A state that has diverged is never kept, and a score belongs to the state that is saved with it."""

import json

import numpy as np
import pytest

from cnn_jax import checkpoint, metrics
from tests.faults.tools import DIGITS, call_command, one_line, read_json

pytestmark = pytest.mark.faults

ONE_STEP = (
  '--config=configs/digits.py',
  '--config.batch_size=1295',
  '--config.epochs=1',
  '--config.schedule.name=constant',
  '--config.schedule.warmup_epochs=0.0',
  '--config.model.features=(8,)',
  '--config.log.tensorboard=False',
  '--config.log.report=False',
)


def _nothing_is_kept(workdir):
  assert not (workdir / 'result.json').exists()
  assert checkpoint.restore(workdir / 'checkpoints') is None
  assert not (workdir / 'metrics.jsonl').read_text()


@pytest.mark.parametrize(
  'arguments',
  [
    ('--config.optimizer.learning_rate=1e20',),
    ('--config.optimizer.learning_rate=1e20', '--config.model.dtype=bfloat16'),
    ('--config.optimizer.learning_rate=1e20', '--config.data.validation=0.0'),
    ('--config.optimizer.learning_rate=1e12',),  # all numbers are finite, and no step of usual size changes them
    ('--config.optimizer.learning_rate=1e30', '--config.optimizer.name=adamw'),
    ('--config.optimizer.learning_rate=1e37', '--config.model.norm=none', '--config.evaluation.ema_decay=0.9'),
  ],
)
def test_a_diverged_last_step_has_no_result(tmp_path, arguments):
  done = call_command('cnn_jax.main', *ONE_STEP, *arguments, f'--workdir={tmp_path}')
  assert 'of step 1 is ' in one_line(done, status=3)
  _nothing_is_kept(tmp_path)


def test_a_diverged_seed_ends_several_seeds(tmp_path):
  done = call_command(
    'cnn_jax.main', *ONE_STEP, '--config.seeds=2', '--config.optimizer.learning_rate=1e20', f'--workdir={tmp_path}'
  )
  assert 'with seed 0' in one_line(done, status=3)
  assert not list(tmp_path.rglob('result.json'))


@pytest.mark.parametrize('validation', [0.1, 0.0])
def test_a_state_whose_outputs_are_not_finite_is_not_kept(tmp_path, validation):
  """Weights of 1e6 in six layers without normalisation: each is finite, and so is their norm, but not the output."""
  arguments = (
    '--config.model.norm=none',
    '--config.model.features=(8, 8, 8)',
    '--config.model.convs_per_block=3',
    '--config.optimizer.name=lion',
    '--config.optimizer.learning_rate=3e4',
    f'--config.data.validation={validation}',
    '--config.batch_size=1200',
  )
  done = call_command('cnn_jax.main', *ONE_STEP, *arguments, f'--workdir={tmp_path}')
  line = one_line(done, status=3)
  assert ('the validation loss after step 1' if validation else 'the training loss after step 1') in line
  assert checkpoint.restore(tmp_path / 'checkpoints') is None


def test_a_prediction_that_is_not_a_number_is_wrong():
  found = metrics.classification_metrics(np.full((10, 10), np.nan), np.arange(10))
  assert found['accuracy'] == found['top5_accuracy'] == 0


def test_a_checkpoint_has_the_score_of_its_own_step(tmp_path):
  arguments = [argument for argument in DIGITS if 'epochs=4' not in argument]
  done = call_command(
    'cnn_jax.main', *arguments, '--config.epochs=8', '--config.evaluation.every_epochs=3', '--config.checkpoint.every_epochs=2',
    '--config.checkpoint.keep=9', f'--workdir={tmp_path}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  points = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  validated = {point['step']: point['loss'] for point in points if point['split'] == 'validation'}
  saved = {int(path.parent.name): read_json(path) for path in (tmp_path / 'checkpoints').glob('*/info.json')}
  assert {120, 160} <= set(saved) & set(validated)
  for step, info in saved.items():
    assert info.get('validation_loss') == validated.get(step), step
  assert set(saved) - set(validated)
