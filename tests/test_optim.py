import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax.config import default_config
from cnn_jax.optim import is_kernel, make_optimizer, make_schedule

PARAMS = {
  'conv': {'kernel': jnp.ones((3, 3, 2, 4)), 'bias': jnp.ones(4)},
  'head': {'kernel': jnp.ones((4, 2))},
}


def _schedule(name, steps=100, warmup=2.0, end=0.0):
  config = default_config().schedule
  config.update({'name': name, 'warmup_epochs': warmup, 'end': end})
  return np.array([float(make_schedule(config, 0.5, steps, 10)(step)) for step in range(steps + 1)])


def test_schedules_by_hand():
  constant = _schedule('constant')
  np.testing.assert_allclose(constant[[0, 9, 19, 20, 99]], [0.5 / 20, 0.25, 0.5, 0.5, 0.5], rtol=1e-6)
  linear = _schedule('linear', end=0.1)
  np.testing.assert_allclose(linear[[19, 20, 60, 100]], [0.5, 0.5, 0.5 * 0.55, 0.05], rtol=1e-6)
  cosine = _schedule('cosine')
  np.testing.assert_allclose(cosine[[20, 60, 100]], [0.5, 0.25, 0], atol=1e-7)
  one_cycle = _schedule('one_cycle')
  np.testing.assert_allclose(one_cycle[[0, 10, 20, 60, 100]], [0.02, 0.26, 0.5, 0.25, 0], atol=1e-7)
  assert one_cycle.argmax() == 20


def test_without_warm_up_the_peak_comes_first():
  for name in ('constant', 'linear', 'cosine', 'one_cycle'):
    assert _schedule(name, warmup=0.0)[0] == 0.5


def _updates(gradients, params=PARAMS, steps=1, **fields):
  config = default_config().optimizer
  config.update({'weight_decay': 0.0, 'learning_rate': 0.1, 'nesterov': False} | fields)
  tx = make_optimizer(config, optax.constant_schedule(config.learning_rate))
  state = tx.init(params)
  for _ in range(steps):
    updates, state = tx.update(gradients, state, params)
  return updates


def test_sgd_with_momentum_by_hand():
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  second = _updates(ones, steps=2, name='sgd', momentum=0.9)
  np.testing.assert_allclose(second['head']['kernel'], -0.1 * 1.9, rtol=1e-6)
  nesterov = _updates(ones, steps=2, name='sgd', momentum=0.9, nesterov=True)
  np.testing.assert_allclose(nesterov['head']['kernel'], -0.1 * (1 + 0.9 * 1.9), rtol=1e-6)


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lion', 'muon'])
def test_weight_decay_is_decoupled_and_skips_what_is_no_kernel(name):
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates = _updates(zeros, name=name, weight_decay=0.5)
  np.testing.assert_allclose(updates['conv']['kernel'], -0.1 * 0.5, rtol=1e-5)
  np.testing.assert_allclose(updates['head']['kernel'], -0.1 * 0.5, rtol=1e-5)
  np.testing.assert_allclose(updates['conv']['bias'], 0)


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lion', 'muon'])
def test_every_optimizer_goes_downhill(name):
  gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), PARAMS)
  updates = _updates(gradients, name=name)
  product = jax.tree.map(lambda g, u: jnp.sum(g * u), gradients, updates)
  assert all(value < 0 for value in jax.tree.leaves(product)), product


def test_muon_orthogonalises_filters():
  gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), PARAMS)
  update = _updates(gradient, name='muon')['conv']['kernel'].reshape(-1, 4)
  singular = np.linalg.svd(update, compute_uv=False)
  assert singular.max() / singular.min() < 2 < np.linalg.cond(gradient['conv']['kernel'].reshape(-1, 4)) * 1.5


def test_clipping_bounds_the_norm():
  gradients = jax.tree.map(lambda p: 100 * jnp.ones_like(p), PARAMS)
  updates = _updates(gradients, name='sgd', clip_norm=2.0)
  assert float(optax.tree.norm(updates)) == pytest.approx(0.2, rel=1e-5)


def test_kernels_are_what_has_two_axes():
  assert is_kernel(PARAMS) == {'conv': {'kernel': True, 'bias': False}, 'head': {'kernel': True}}


def test_stages_have_rates_of_their_own_and_frozen_ones_none():
  params = {name: {'kernel': jnp.ones((2, 2))} for name in ('stem', 'middle', 'last', 'head')}
  stages = {name: {'kernel': stage} for stage, name in enumerate(params, 1)}
  config = default_config().optimizer
  config.update(
    {'weight_decay': 0.0, 'learning_rate': 1.0, 'momentum': 0.0, 'nesterov': False, 'stage_rates': (0.1, 0.5, 1)}
  )
  tx = make_optimizer(config, optax.constant_schedule(1.0), stages, 1)
  updates, _ = tx.update(params, tx.init(params), params)
  found = {name: float(update['kernel'][0, 0]) for name, update in updates.items()}
  assert found == pytest.approx({'stem': 0.0, 'middle': -0.1, 'last': -0.5, 'head': -1.0})
