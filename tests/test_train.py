import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import train
from cnn_jax.config import default_config
from cnn_jax.model import create_model
from tests.conftest import run_command


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """The same 20 steps and evaluations on one device and on eight."""
  directory = tmp_path_factory.mktemp('devices')
  found = {}
  for devices in (1, 8):
    output = directory / f'{devices}.npz'
    flags = f'--xla_force_host_platform_device_count={devices}'
    done = run_command('tests.devices_worker', output, XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr
    found[devices] = dict(np.load(output))
    assert found[devices].pop('devices') == devices
  return found


def test_eight_devices_take_the_steps_of_one(runs):
  one, eight = runs[1], runs[8]
  assert one.keys() == eight.keys()
  names = [name for name in one if name.startswith('state')]
  assert any('batch_stats' in name for name in names)
  assert any('ema' in name for name in names)
  for name in names:
    scale = max(np.abs(one[name]).max(), 1e-3)
    assert np.abs(one[name] - eight[name]).max() <= 1e-5 * scale, name
  assert one['state.step'] == 20
  for name in ('loss', 'learning_rate', 'gradient_norm', 'parameter_norm', 'update_norm'):
    np.testing.assert_allclose(one[f'measured/{name}'], eight[f'measured/{name}'], rtol=1e-4)
  np.testing.assert_array_equal(eight['measured/count'], 32)


@pytest.mark.parametrize('n', [0, 1, 7, 8, 9, 17])
def test_evaluation_counts_each_example_once(runs, n):
  assert runs[8][f'logits/{n}'].shape == (n, 10)
  np.testing.assert_allclose(runs[1][f'logits/{n}'], runs[8][f'logits/{n}'], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(runs[8][f'logits/{n}'], runs[8]['logits/17'][:n], rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_of_the_global_batch(runs):
  # Were they each device's own, eight devices would normalise by four images and differ widely.
  mean = runs[8]["state.batch_stats['block1']['norm1']['mean']"]
  np.testing.assert_allclose(mean, runs[1]["state.batch_stats['block1']['norm1']['mean']"], rtol=1e-4, atol=1e-6)
  assert np.abs(mean).max() > 1e-3


def test_one_step_by_hand():
  """Without norm, momentum and augmentation a step is params - learning_rate * gradient of the mean loss."""
  config = default_config()
  config.batch_size = 4
  config.model.update({'features': (2,), 'norm': 'none'})
  config.optimizer.update({'momentum': 0.0, 'nesterov': False, 'weight_decay': 0.0})
  model = create_model(config.model, 3)
  import optax

  from cnn_jax.data.augment import normalize
  from cnn_jax.optim import make_optimizer

  learning_rate = optax.constant_schedule(0.5)
  tx = make_optimizer(config.optimizer, learning_rate)
  state = train.create_state(model, tx, config, (5, 5, 1))
  images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 1), np.uint8)
  labels = np.array([0, 1, 2, 0, 1, 2], np.int32)
  order = np.array([[5, 1, 3, 0]], np.int32)

  def mean_loss(params):
    logits = model.apply({'params': params}, normalize(images[order[0]]))
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), labels[order[0]]])

  loss, gradient = jax.value_and_grad(mean_loss)(state.params)
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, gradient)
  steps = train.make_train_steps(model=model, tx=tx, learning_rate=learning_rate, config=config)
  new, measured = steps(
    train.replicate(state), *train.replicate((images, labels)), train.local_indices(order), np.int32(1)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), new.params, expected)
  assert float(measured['loss'][0]) == pytest.approx(4 * float(loss), rel=1e-5)
  assert float(measured['count'][0]) == 4
  assert float(measured['learning_rate'][0]) == 0.5
  assert float(measured['gradient_norm'][0]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)


def test_partners_are_the_neighbours_of_the_global_batch():
  parts = train.local_indices(np.array([[5, 6, 7, 8]], np.int32))
  np.testing.assert_array_equal(parts['own'].reshape(-1), [5, 6, 7, 8])
  np.testing.assert_array_equal(parts['partner'].reshape(-1), [8, 5, 6, 7])


def test_averages_follow_slowly_and_start_at_once():
  zero, one = {'w': jnp.zeros(2)}, {'w': jnp.ones(2)}
  state = train.TrainState(jnp.int32(1), one, {}, (), {'params': zero, 'batch_stats': {}})
  young = train._averaged(state, 0.99)['params']['w']
  np.testing.assert_allclose(young, 1 - 2 / 11, rtol=1e-6)
  old = train._averaged(state.replace(step=jnp.int32(100_000)), 0.99)['params']['w']
  np.testing.assert_allclose(old, 0.01, rtol=1e-4)
  assert train._averaged(state, 0.0) == {}
