"""Networks whose blocks are computed again for the gradient: the same results, and less is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from cnn_jax import memory, models
from tests.networks import SIDES, SMALL, small_network

pytestmark = pytest.mark.usefixtures('quick_compilation')
# A deep network takes seconds to trace and to compile.
NETWORKS = [name if name == 'cnn' else pytest.param(name, marks=pytest.mark.faults) for name in sorted(models.names())]


def _shape(name, batch=4):
  return (batch, SIDES[name], SIDES[name], 3)


def _gradients(name, **fields):
  """Variables, logits, running statistics and gradients of a small network, with dropout."""
  model, images = small_network(name, **fields), jax.random.normal(jax.random.key(1), _shape(name))
  variables = models.init(model, jax.random.key(0), images.shape[1:])

  def loss(params, stats, images):
    (logits, maps), updated = model.apply(
      {'params': params, 'batch_stats': stats},
      images,
      train=True,
      positions=jnp.arange(4),
      mutable=['batch_stats'],
      rngs={'dropout': jax.random.key(3)},
    )
    return jnp.sum(logits**2), (updated, logits, maps)

  mesh, every = Mesh(np.array(jax.devices()[:1]), ('batch',)), PartitionSpec()
  differentiate = jax.shard_map(
    jax.value_and_grad(loss, has_aux=True), mesh=mesh, in_specs=every, out_specs=every, check_vma=False
  )
  return variables, jax.jit(differentiate)(variables['params'], variables['batch_stats'], images)


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize(
  'fields', [{}, pytest.param({'frozen_stages': 1}, marks=pytest.mark.faults), pytest.param({'dtype': 'bfloat16'}, marks=pytest.mark.faults)]
)  # fmt: skip
def test_the_results_are_the_same(name, fields):
  kept, again = (_gradients(name, **fields, rematerialize=rematerialize) for rematerialize in (False, True))
  assert jax.tree.structure(kept) == jax.tree.structure(again)  # the names of the variables as well
  # Before a norm, the gradient of a bias is the rounding error of the others, of which the largest gives the scale.
  scale = max(np.abs(np.asarray(x, np.float32)).max() for x in jax.tree.leaves(kept))
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(kept), jax.tree.leaves(again), strict=True):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    atol = (3e-2 if 'dtype' in fields else 1e-6) * scale
    np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))


@pytest.mark.parametrize('name', NETWORKS)
def test_less_is_kept_for_the_gradient(name):
  kept, again = (
    memory.saved_bytes(model, models.init_shapes(model, _shape(name)[1:]), _shape(name))
    for model in (small_network(name, rematerialize=rematerialize) for rematerialize in (False, True))
  )
  assert 0 < again < 0.8 * kept  # with the block that is computed again, which is large in so small a network


@pytest.mark.faults
@pytest.mark.parametrize('name', sorted(SMALL))
def test_frozen_and_skipped_stages_keep_nothing(name):
  model = small_network(name, rematerialize=True)
  shapes = models.map_shapes(model, _shape(name)[1:])
  last = len(models.stage_names(shapes))
  variables = models.init_shapes(model, _shape(name)[1:])
  whole = memory.saved_bytes(model, variables, _shape(name))
  frozen = memory.saved_bytes(model.clone(frozen_stages=last), variables, _shape(name))
  assert frozen < 0.5 * whole
  maps = shapes['stage1'].shape[1:]
  skipped = memory.saved_bytes(model.clone(skipped_stages=1, frozen_stages=1), variables, (4, *maps))
  assert skipped < whole
