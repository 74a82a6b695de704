"""Early stopping decides the same in a run that was killed and resumed, and in two processes."""

import json

import jax
import numpy as np
import pytest

from cnn_jax import checkpoint, train
from tests.faults import pairs
from tests.faults.tools import call_command, read_json
from tests.test_patience import make_config, make_dataset, plan, points

pytestmark = pytest.mark.faults
__all__ = ['plan']


@pytest.mark.parametrize('killed', [4, 6])  # at the best validation; right before the decision
def test_a_resumed_run_decides_as_an_uninterrupted_one(tmp_path, plan, killed):
  dataset, config = make_dataset(), make_config()
  for name in ('whole', 'killed'):
    (tmp_path / name).mkdir()
  whole = train.train(config, dataset, tmp_path / 'whole')
  plan.epoch = 0

  def dies(epoch, _):
    if epoch == killed:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train.train(config, dataset, tmp_path / 'killed', on_validation=dies)
  plan.epoch = checkpoint.restore(tmp_path / 'killed' / 'checkpoints')[1] // 5
  resumed = train.train(config, dataset, tmp_path / 'killed')
  # Trained, but not recorded: it is not trained again.
  plan.epoch = 6
  again = train.train(config, dataset, tmp_path / 'killed')
  for name in whole.keys() - {'train_seconds', 'images_per_second'}:
    assert whole[name] == resumed[name] == again[name], name
  assert points(tmp_path / 'whole') == points(tmp_path / 'killed')
  states = [checkpoint.restore(tmp_path / name / 'checkpoints', which='best') for name in ('whole', 'killed')]
  assert [step for _, step, _ in states] == [20, 20]
  jax.tree.map(np.testing.assert_array_equal, *(state for state, _, _ in states))


def test_two_processes_end_at_the_same_step_and_report_the_best(tmp_path):
  arguments = (
    *pairs.TINY, '--config.evaluation.patience=1', '--config.evaluation.min_steps=0', '--config.epochs=40',
    '--config.optimizer.learning_rate=0.3', '--config.loss.class_weights=balanced', '--config.loss.label_smoothing=0.1',
  )  # fmt: skip
  workdirs = [tmp_path / 'w', tmp_path / 'another']
  ended = pairs.end(pairs.start_pair(workdirs, *arguments), 120)
  assert [status for status, _, _ in ended] == [0, 0], ended
  result = read_json(tmp_path / 'w' / 'result.json')
  assert result['stopped_early'] and result['best_step'] < result['steps'] < 800
  found = call_command('cnn_jax.evaluate', f'--workdir={tmp_path / "w"}')
  assert json.loads(found.stdout)['loss'] == pytest.approx(result['test_loss'], rel=1e-5)
  assert (tmp_path / 'w' / 'predictions.csv').read_text().count('\n') == result['num_test'] + 1
  assert not (tmp_path / 'another' / 'predictions.csv').exists()
