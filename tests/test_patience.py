"""A run with patience ends when validation no longer improves, and is then the best of its states."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from cnn_jax import UsageError, evaluate, main, saving, seeds
from cnn_jax.config import default_config
from cnn_jax.data import Dataset, Split
from cnn_jax.run import load_run

SCORES = (0.2, 0.5, 0.4, 0.6, 0.6, 0.5, 0.9)  # of each epoch; a patience of 2 ends after the sixth


def make_config(**fields):
  config = default_config()
  config.batch_size, config.epochs = 8, 9
  config.model.features = (4,)
  config.schedule.name = 'constant'
  config.evaluation.patience, config.evaluation.min_steps = 2, 0
  config.checkpoint.every_epochs = 5  # the best state is saved nevertheless
  config.log.tensorboard = config.log.report = False
  config.update_from_flattened_dict(fields)
  return config


def make_dataset(validation=6):
  random = np.random.default_rng(0)

  def split(labels):
    return Split(random.integers(0, 256, (len(labels), 6, 6, 1), np.uint8), np.array(labels, np.int32))

  train_split = split([0] * 30 + [1] * 6 + [2] * 4)
  return Dataset(
    'made up', 'for a test', ('a', 'b', 'c'), train_split, split([0, 1, 2] * (validation // 3)), split([0, 1, 2])
  )


@pytest.fixture
def plan(monkeypatch):
  """The score of each validation by its epoch; `plan.epoch` is that of the last one."""
  plan = ConfigDict({'epoch': 0})
  whole = evaluate.evaluate_split

  def measure(model, variables, split, **named):
    found = whole(model, variables, split, **named)
    if len(split) == 6 and 'measure' not in named:
      plan.epoch += 1
      found['balanced_accuracy'] = SCORES[plan.epoch - 1]
    return found

  monkeypatch.setattr(evaluate, 'evaluate_split', measure)
  return plan


def points(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_run_ends_out_of_patience_and_keeps_the_best_state(tmp_path, plan, capsys):
  dataset, config = make_dataset(), make_config(**{'loss.class_weights': ('balanced',)})
  result = main.train_and_evaluate(config, tmp_path, dataset=dataset)
  assert (result['epochs'], result['steps'], result['best_step'], result['stopped_early']) == (6, 30, 20, True)
  assert result['validation_balanced_accuracy'] == 0.6
  assert 'after 6 epochs, stopped early' in capsys.readouterr().out
  assert [point['step'] for point in points(tmp_path) if point['split'] == 'validation'] == [5, 10, 15, 20, 25, 30]
  # What is read back is the state that was tested.
  run = load_run(tmp_path)
  assert run.step == 20
  measured = evaluate.evaluate_split(run.model, run.variables, dataset.test, config=run.config)
  assert measured['loss'] == pytest.approx(result['test_loss'], rel=1e-6)
  # It is complete, also for more epochs.
  for epochs in (9, 20):
    config.epochs = epochs
    again = main.train_and_evaluate(config, tmp_path, dataset=dataset)
    assert again == json.loads((tmp_path / 'result.json').read_text())
  assert plan.epoch == 6


def test_only_validations_since_the_best_count():
  settings = default_config().evaluation
  settings.patience, settings.min_steps = 2, 30  # 10 steps per epoch: a validation every 3 epochs
  decide = [saving.out_of_patience(settings, 10, step, {'best_step': 30}) for step in (30, 60, 89, 90, 95, 120)]
  assert decide == [False, False, False, True, True, True]
  assert not saving.out_of_patience(settings, 10, 900, {})  # not validated
  # The best may be the last epoch of a run that was then continued.
  assert [saving.out_of_patience(settings, 10, step, {'best_step': 40}) for step in (60, 90)] == [False, True]
  settings.patience = 0
  assert not saving.out_of_patience(settings, 10, 900, {'best_step': 30})


def test_patience_needs_validation_before_anything_is_written(tmp_path):
  with pytest.raises(UsageError, match='config.evaluation.patience needs a validation split'):
    main.train_and_evaluate(make_config(), tmp_path / 'run', dataset=make_dataset(validation=0))
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_several_seeds_may_have_several_lengths():
  results = [
    {'seed': seed, 'num_train': 40, 'epochs': epochs, 'steps': 5 * epochs, 'stopped_early': epochs < 9, 'test_accuracy': 0.5,
     'num_test': 6, 'train_seconds': 1.0}
    for seed, epochs in ((0, 6), (1, 9))
  ]  # fmt: skip
  summary = seeds.summarize(results)
  assert summary['epochs']['values'] == [6, 9]
  assert summary['stopped_early']['mean'] == 0.5
  assert 'after 6 to 9 epochs' in seeds.describe(summary)
  assert seeds.summarize(results[1:] * 2)['epochs'] == 9
