"""Gradients from parts of a batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import UsageError, main, parts, plan
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, Split

pytestmark = pytest.mark.usefixtures('quick_compilation')


def test_parts_fit_large_images_on_a_cpu_if_examples_are_independent(monkeypatch):
  assert parts.count(32, 224 * 224, True) == 8
  assert parts.count(6, 224 * 224, True) == 2  # of 3
  assert parts.count(7, 224 * 224, True) == 7
  assert parts.count(2, 224 * 224, True) == 1
  assert parts.count(32, 224 * 224, False) == 1
  assert parts.count(32, 32 * 32, True) == 1
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert parts.count(32, 224 * 224, True) == 1


@pytest.mark.parametrize('weights', [None, np.arange(1, 7, dtype=np.float32)])
def test_the_gradient_of_parts_is_that_of_the_whole(weights):
  x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)

  def loss(params, examples):
    x, weights = examples
    losses = jnp.tanh(x @ params['w']) ** 2 * (1 if weights is None else weights)
    return jnp.mean(losses), {'loss': jnp.sum(losses)}

  params = {'w': jnp.array([1.0, -2.0, 0.5])}
  whole, sums = parts.gradient(loss, params, (x, weights), 1)
  for num_parts in (2, 6):
    gradient, added = parts.gradient(loss, params, (x, weights), num_parts)
    np.testing.assert_allclose(gradient['w'], whole['w'], rtol=1e-5)
    np.testing.assert_allclose(added['loss'], sums['loss'], rtol=1e-6)


def test_training_in_parts_is_training(tmp_path, monkeypatch):
  labels = (np.arange(16) % 2).astype(np.int32)
  images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
  split = Split(images, labels)
  dataset = Dataset('noise', 'made', ('a', 'b'), split, Split(images[:0], labels[:0]), split)
  config = config_lib.default_config()
  config.update({'batch_size': 8, 'epochs': 2})
  config.model.update({'features': (4,), 'fixed_statistics': True, 'dropout': 0.5})
  config.augment.update({'mixup': 1.0, 'flip': True})
  config.loss.class_weights = (1, 2)
  config.data.validation, config.schedule.warmup_epochs = 0.0, 1.0
  config.log.update({'report': False, 'tensorboard': False})
  losses = []
  for pixels in (1, 10_000):
    monkeypatch.setattr(parts, 'PIXELS', pixels)
    losses.append(main.train_and_evaluate(config, tmp_path / str(pixels), dataset=dataset)['test_loss'])
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Accumulation: config.optimizer.accumulate_steps -------------------------------------------------


def _step(devices, **fields):
  """The state and the metrics after a step on a batch of 16, on some devices that `vmap` imitates."""
  config = config_lib.vary(
    config_lib.default_config(),
    {'batch_size': 16, 'model.features': (4,), 'optimizer.learning_rate': 0.1, 'loss.class_weights': (1, 2.0, 4)}
    | fields,
  )
  made = plan.make_plan(config, 32, 3, (6, 6, 1))
  mapped = jax.vmap(partial(made.step, key=jax.random.key(0)), axis_name='batch', in_axes=(None, 0))
  state, measured = jax.jit(mapped)(made.state, _batch(devices))
  jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[-1]), state)
  return made, jax.tree.map(lambda x: x[0], (state, measured))


def _batch(devices):
  random = np.random.default_rng(0)
  images, labels = random.integers(0, 256, (16, 6, 6, 1), np.uint8), (np.arange(16) ** 2 % 3).astype(np.int32)
  batch = {'images': images, 'labels': labels, 'positions': np.arange(16, dtype=np.int32)}
  return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def _assert_close(one, other, rtol=2e-5):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(a).max(initial=1e-3), err_msg=str(path))


def test_a_batch_in_parts_is_the_large_batch_without_batch_norm():
  fields = {
    'model.norm': 'group',
    'model.dropout': 0.5,
    'augment.mixup': 1.0,
    'augment.cutmix': 1.0,
    'augment.shift': 1,
  }
  _, whole = _step(1, **fields)
  made, parted = _step(2, **fields, **{'optimizer.accumulate_steps': 4})
  assert made.step.keywords['num_parts'] == 4
  _assert_close(whole, parted)


def test_each_part_has_its_own_batch_norm():
  """Against parts that are computed by themselves: every fourth example, and weights of the whole batch."""
  made, (state, measured) = _step(
    1, **{'optimizer.accumulate_steps': 4, 'optimizer.momentum': 0.0, 'optimizer.weight_decay': 0.0}
  )
  batch = jax.tree.map(lambda x: x[0], _batch(1))
  weights = np.array([1, 2, 4], np.float32)[batch['labels']]

  def losses_of(params, stats, part):
    def apply(images):
      return made.model.apply(
        {'params': params, 'batch_stats': stats}, images, train=True, mutable=['batch_stats'], positions=None
      )

    images = (batch['images'][part::4].astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    (logits, _), updated = jax.vmap(apply, axis_name='batch')(images[None])
    losses = -jax.nn.log_softmax(logits[0])[jnp.arange(4), batch['labels'][part::4]]
    return losses * weights[part::4], jax.tree.map(lambda x: x[0], updated['batch_stats'])

  def loss_of(params, stats):
    found = [losses_of(params, stats, part) for part in range(4)]
    means = jax.tree.map(lambda *x: sum(x) / 4, *[updated for _, updated in found])
    return sum(jnp.sum(losses) for losses, _ in found) / weights.sum(), means

  params, stats, rate = made.state.params, made.state.batch_stats, made.step.keywords['learning_rate']
  (loss, stats), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params, stats)
  params = jax.tree.map(lambda p, g: p - rate(0) * g, params, gradient)
  _assert_close((params, stats), (state.params, state.batch_stats))
  assert float(measured['loss']) == pytest.approx(16 * float(loss), rel=1e-5)


@pytest.mark.faults
def test_the_parts_of_two_devices_are_those_of_one():
  fields = {'optimizer.accumulate_steps': 4, 'model.dropout': 0.5, 'augment.mixup': 1.0}
  _assert_close(_step(1, **fields)[1], _step(2, **fields)[1])


@pytest.mark.faults
def test_fixed_statistics_stay_as_they_are_to_the_bit():
  made, (state, _) = _step(1, **{'optimizer.accumulate_steps': 8, 'model.fixed_statistics': True})
  jax.tree.map(np.testing.assert_array_equal, made.state.batch_stats, state.batch_stats)


def test_parts_that_do_not_divide_a_batch_are_one_line():
  config = config_lib.vary(config_lib.default_config(), {'batch_size': 24, 'optimizer.accumulate_steps': 5})
  with pytest.raises(UsageError, match='accumulate_steps is 5, which does not divide the 12 images .*: 4 or 6.$'):
    config_lib.check_devices(config, 2)
  config.optimizer.accumulate_steps = 100
  with pytest.raises(UsageError, match='that do: 12.$'):
    config_lib.check_devices(config, 2)
  config.optimizer.accumulate_steps = 12
  config_lib.check_devices(config, 2)
  with pytest.raises(UsageError, match='must be greater than zero'):
    config_lib.vary(config, {'optimizer.accumulate_steps': 0})
