"""Gradients from parts of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import config as config_lib
from cnn_jax import main, parts
from cnn_jax.data import Dataset, Split


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
