import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import UsageError, checkpoint, distribute, evaluate, metrics, plan, progress, step, train
from cnn_jax.config import default_config
from cnn_jax.data import Dataset, Split, feed
from cnn_jax.optim import average


@pytest.mark.parametrize('class_weights', [(), (1, 2.0, 5)])
def test_one_step_by_hand(class_weights):
  """Without norm, momentum and augmentation a step is params - learning_rate * gradient of the (weighted) mean loss."""
  config = default_config()
  config.batch_size = 4
  config.loss.class_weights = class_weights
  config.model.update({'features': (2,), 'norm': 'none'})
  config.optimizer.update({'learning_rate': 0.5, 'momentum': 0.0, 'nesterov': False, 'weight_decay': 0.0})
  config.schedule.update({'name': 'constant', 'warmup_epochs': 0.0})
  config.data.mean, config.data.std = (90.0,), (40.0,)
  images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 1), np.uint8)
  labels = np.array([0, 1, 2, 0, 1, 2], np.int32)
  made = plan.make_plan(config, 6, 3, (5, 5, 1))
  examples = feed.Resident(Split(images, labels), 4, 0, made.capacity)
  order = feed.epoch_indices(6, 4, 0, 0)[0]

  def mean_loss(params):
    logits, _ = made.model.apply({'params': params}, (images[order] - np.float32(90)) / np.float32(40))
    losses = -jax.nn.log_softmax(logits)[jnp.arange(4), labels[order]]
    weights = np.array(class_weights or (1, 1, 1), np.float32)[labels[order]]
    return jnp.sum(weights * losses) / jnp.sum(weights)

  loss, gradient = jax.value_and_grad(mean_loss)(made.state.params)
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, made.state.params, gradient)
  state = distribute.replicate(made.state)
  train_steps = train.compile_steps(made.step, config.seed)
  new, measured = train_steps(state, examples.images, examples.labels, examples.indices(0, 0, 1), np.int32(1))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), new.params, expected)
  assert float(measured['loss'][0]) == pytest.approx(4 * float(loss), rel=1e-5)
  assert float(measured['count'][0]) == 4
  assert float(measured['learning_rate'][0]) == 0.5
  assert float(measured['gradient_norm'][0]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)


def test_averages_follow_slowly_and_start_at_once():
  zero, one = {'w': jnp.zeros(2)}, {'w': jnp.ones(2)}
  np.testing.assert_allclose(average(zero, one, jnp.int32(1), 0.99)['w'], 1 - 2 / 11, rtol=1e-6)
  np.testing.assert_allclose(average(zero, one, jnp.int32(100_000), 0.99)['w'], 0.01, rtol=1e-4)
  assert average({}, one, jnp.int32(1), 0.0) == {}


# The loop ---------------------------------------------------------------------------------------


def _config(**fields):
  config = default_config()
  config.batch_size = 8
  config.epochs = 2
  config.model.features = (4,)
  config.schedule.warmup_epochs = 0.5
  config.log.tensorboard = False
  config.log.every_steps = 3
  config.update(fields)
  return config


def _dataset(train_images=80):
  random = np.random.default_rng(0)

  def split(n):
    return Split(random.integers(0, 256, (n, 6, 6, 1), np.uint8), (np.arange(n) % 3).astype(np.int32))

  return Dataset('made up', 'for a test', ('a', 'b', 'c'), split(train_images), split(6), split(6))


def _params(workdir):
  return checkpoint.restore(workdir / 'checkpoints')[0]['params']


def test_the_length_of_calls_changes_nothing_but_the_clock(tmp_path, monkeypatch):
  """Calls of one step, as of a slow network, and calls of an epoch end with the same bits and the same record."""
  results = {}
  for name, seconds in (('short', 0.0), ('long', 1e9)):
    monkeypatch.setattr(progress, 'SECONDS_PER_CALL', seconds)
    (tmp_path / name).mkdir()
    results[name] = train.train(_config(), _dataset(), tmp_path / name)
  jax.tree.map(np.testing.assert_array_equal, _params(tmp_path / 'short'), _params(tmp_path / 'long'))
  short, long = ((tmp_path / name / 'metrics.jsonl').read_bytes() for name in ('short', 'long'))
  assert short == long
  steps = [json.loads(line)['step'] for line in short.splitlines() if b'"train"' in line]
  assert steps == [3, 6, 9, 10, 13, 16, 19, 20]


def test_calls_are_bounded_by_time(tmp_path, monkeypatch):
  """A step of 20 ms and a bound of 50 ms: calls inside an epoch, each of at most two steps."""
  counts = []
  compile_steps = train.compile_steps

  def slow(*arguments, **named):
    train_steps = compile_steps(*arguments, **named)

    def take(state, images, labels, indices, num_steps):
      counts.append(int(num_steps))
      time.sleep(0.02 * int(num_steps))
      return train_steps(state, images, labels, indices, num_steps)

    return take

  monkeypatch.setattr(train, 'compile_steps', slow)
  monkeypatch.setattr(progress, 'SECONDS_PER_CALL', 0.05)
  train.train(_config(epochs=1), _dataset(), tmp_path)
  assert counts[0] == 0  # compiles
  assert sum(counts) == 10
  assert max(counts) <= 2


def test_checkpoints_by_the_clock_come_inside_an_epoch(tmp_path, monkeypatch):
  saved = []
  save = checkpoint.save
  monkeypatch.setattr(checkpoint, 'save', lambda d, step, *a, **k: saved.append(step) or save(d, step, *a, **k))
  config = _config(epochs=1)
  config.checkpoint.every_minutes = 1e-9
  train.train(config, _dataset(), tmp_path)
  assert saved == [1, 3, 7, 10]


def test_the_clock_of_training_counts_training_alone(tmp_path, monkeypatch):
  def wait(function):
    def slow(*arguments, **named):
      time.sleep(0.5)
      return function(*arguments, **named)

    return slow

  monkeypatch.setattr(checkpoint, 'save', wait(checkpoint.save))
  monkeypatch.setattr(evaluate, 'evaluate_split', wait(evaluate.evaluate_split))
  started = time.monotonic()
  result = train.train(_config(), _dataset(), tmp_path)
  # Two validations, one test, the last checkpoint, and the compilation.
  assert result['train_seconds'] < time.monotonic() - started - 2.0
  assert result['images_per_second'] == pytest.approx(160 / result['train_seconds'])


def test_another_data_set_is_refused(tmp_path):
  train.train(_config(epochs=1), _dataset(), tmp_path)
  train.train(_config(epochs=1), dataclasses.replace(_dataset(), name='another name'), tmp_path)  # the same data
  other = dataclasses.replace(_dataset(), class_names=('a', 'c', 'b'))
  with pytest.raises(UsageError, match='the classes have another order'):
    train.train(_config(epochs=1), other, tmp_path)


def test_log_points_continue_after_a_restart():
  measured = {name: np.arange(1, 8, dtype=np.float32) for name in step.STEP_METRICS}
  whole = metrics.Windows(4, 7).add(0, measured)
  first = metrics.Windows(4, 7)
  points = first.add(0, {name: values[:2] for name, values in measured.items()})
  restored = json.loads(json.dumps(first.pending))
  points += metrics.Windows(4, 7, restored).add(2, {name: values[2:] for name, values in measured.items()})
  assert points == whole
  assert [step for step, _ in whole] == [4, 7]
  assert whole[0][1]['loss'] == (1 + 2 + 3 + 4) / (1 + 2 + 3 + 4)
  assert whole[0][1]['learning_rate'] == 4
  assert whole[1][1]['gradient_norm'] == 6
