"""The benchmark compares the same networks and reports what it measured."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.config import default_config
from cnn_jax.model import create_model
from experiments.step_time import jax_peer, run
from tests.conftest import run_command


def test_the_stock_network_is_the_same_function():
  config = default_config()
  config.model.features = (8, 16)
  ours, stock = create_model(config.model, 10), jax_peer.StockCNN((8, 16))
  images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9, 8, 1)), jnp.float32)
  shapes = [jax.eval_shape(lambda m=model: m.init(jax.random.key(0), images, train=False)) for model in (ours, stock)]
  assert [s.shape for s in jax.tree.leaves(shapes[0])] == [s.shape for s in jax.tree.leaves(shapes[1])]
  # Numbers of either sign but positive: only a negative scale tells a pool before the norm from one after it.
  random = np.random.default_rng(1)
  leaves = [
    jnp.asarray(
      random.uniform(0.5, 1, s.shape) * (1 if 'var' in str(path) else random.choice([-1, 1], s.shape)), s.dtype
    )
    for path, s in jax.tree_util.tree_leaves_with_path(shapes[0])
  ]
  a, b = jax.jit(
    lambda leaves: [
      model.apply(jax.tree.unflatten(jax.tree.structure(s), leaves), images, train=False)
      for model, s in zip((ours, stock), shapes, strict=True)
    ]
  )(leaves)
  np.testing.assert_allclose(a, b, rtol=1e-4)


def test_operations_of_one_image_by_hand():
  # 8x8 pixels, 9 weights, 1 to 32 channels; 4x4 pixels, 9 weights, 32 to 64; 64 numbers to 10 classes; two each.
  assert run.forward_flops('8x8x1, 32-64') == (2 * (64 * 9 * 32 + 16 * 9 * 32 * 64 + 640), 2 * 64 * 9 * 32)


def test_medians_and_ratios_by_hand():
  times = {'ours': [2.0, 4.0, 3.0], 'flax': [8.0, 8.0, 9.0]}
  result = run._result('8x8x1, 32-64', 10, 'inference', times, {'ours': 100.0, 'flax': 100.0}, [50.0, 70.0, 60.0])
  assert (result['ours_ms'], result['flax_ms'], result['pytorch_ms']) == (3.0, 8.0, None)
  assert (result['speedup_over_flax'], result['speedup_over_pytorch']) == (3.0, None)  # of 4, 2 and 3
  assert result['gemm_gflops'] == 60.0
  assert result['gflops'] == pytest.approx(10 * run.forward_flops('8x8x1, 32-64')[0] / 3e6)


def test_measures_a_tiny_network(monkeypatch, tmp_path):
  monkeypatch.setitem(run.NETWORKS, 'tiny', ((6, 6, 1), (2, 3)))
  results = run.measure('tiny', 4, ['ours', 'flax'], None, rounds=2, seconds=0.01)
  assert [r['work'] for r in results] == ['train', 'inference']
  for result in results:
    assert result['ours_ms'] > 0
    assert result['flax_ms'] > 0
    assert result['pytorch_ms'] is None
    assert len(result['rounds']['ours']) == len(result['rounds']['flax']) == 2
  assert len(run.table(results).splitlines()) == 4
  json.dumps(results)
  run.plot(results, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')


def test_an_interpreter_without_pytorch_is_a_usage_error(tmp_path):
  done = run_command('experiments.step_time.run', f'--pytorch_python={tmp_path / "python"}')
  assert done.returncode == 2, done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert '--pytorch_python' in done.stderr
