"""N devices take the steps of one, and evaluate each example once, for every network."""

import numpy as np
import pytest

from cnn_jax import models
from tests.devices_worker import SHALLOW, SIZES, SPEED, THOROUGH
from tests.helpers import run_command


def _results(directory, networks):
  """The same steps and evaluations on one device and on eight: {devices: {name: array}}."""
  found = {}
  for devices in (1, 8):
    output = directory / f'{devices}.npz'
    # Compiling takes a third of the time so.
    flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
    done = run_command('tests.devices_worker', output, *networks, XLA_FLAGS=flags, timeout=250)
    assert done.returncode == 0, done.stderr
    found[devices] = dict(np.load(output))
    assert found[devices].pop('devices') == devices
  assert found[1].keys() == found[8].keys()
  return found


def _check_steps(runs, network, steps, smallest, tolerance=1e-5):
  """Compares states and metrics; arrays whose numbers are all below `smallest` are compared to that."""
  one, eight = runs[1], runs[8]
  names = [name for name in one if name.startswith(f'{network}/state')]
  assert any('ema' in name for name in names)
  for name in names:
    scale = max(np.abs(one[name]).max(), smallest)
    assert np.abs(one[name] - eight[name]).max() <= tolerance * scale, name
  assert one[f'{network}/state.step'] == steps
  for name in ('loss', 'learning_rate', 'gradient_norm', 'parameter_norm', 'update_norm'):
    np.testing.assert_allclose(one[f'{network}/measured/{name}'], eight[f'{network}/measured/{name}'], rtol=1e-4)
  np.testing.assert_array_equal(eight[f'{network}/measured/count'], 32)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  return _results(tmp_path_factory.mktemp('devices'), [*SHALLOW, SPEED])


@pytest.mark.parametrize('network', SHALLOW)
def test_eight_devices_take_the_steps_of_one(runs, network):
  _check_steps(runs, network, 12, smallest=1e-3)


def test_eight_devices_take_the_steps_of_one_with_the_speed_recipe(runs):
  _check_steps(runs, SPEED, 3, smallest=1e-2, tolerance=2e-4)
  assert runs[8][f'{SPEED}/measured/gradient_norm'] > 10  # of a sum and not of a mean


@pytest.mark.faults
@pytest.mark.parametrize('network', sorted({*models.names()} - {*SHALLOW}))
def test_eight_devices_take_the_steps_of_one_with_a_deep_network(tmp_path, network):
  # The gradient of a bias before the next norm is zero but for rounding.
  _check_steps(_results(tmp_path, [network]), network, 2, smallest=0.1)


@pytest.mark.parametrize('n', SIZES)
def test_evaluation_counts_each_example_once(runs, n):
  one, eight = (runs[devices][f'{THOROUGH}/logits/{n}'] for devices in (1, 8))
  assert eight.shape == (n, 10)
  np.testing.assert_allclose(one, eight, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(eight, runs[8][f'{THOROUGH}/logits/17'][:n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('network', SHALLOW)
def test_batch_statistics_are_of_the_global_batch(runs, network):
  # Statistics of each device's four images would differ widely.
  names = [name for name in runs[1] if name.startswith(f'{network}/state.batch_stats') and name.endswith("['mean']")]
  for name in names:
    np.testing.assert_allclose(runs[8][name], runs[1][name], rtol=1e-3, atol=1e-5)
  assert max(np.abs(runs[8][name]).max() for name in names) > 1e-3
