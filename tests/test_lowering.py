"""Steps that are lowered on a CPU for other platforms are those of the other platforms."""

import functools
import re

import jax
import jax.export
import numpy as np
import pytest

from cnn_jax import config as config_lib
from cnn_jax import distribute
from cnn_jax.plan import make_plan
from cnn_jax.step import take_steps
from tests.helpers import ROOT


def _operations(config, image_shape, num_classes, platform):
  """How often each operation of StableHLO occurs in the program of some training steps, lowered for a platform."""
  kept = []

  def state():
    kept.append(make_plan(config, 100 * config.batch_size, num_classes, image_shape))
    return kept[0].state

  shapes = jax.eval_shape(state)  # computes and compiles nothing
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (distribute.AXIS,))
  everywhere = jax.sharding.PartitionSpec()
  steps = jax.shard_map(
    functools.partial(take_steps, kept[0].step), mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
  )
  n, of = config.batch_size, jax.ShapeDtypeStruct
  arguments = (
    of((2,), np.uint32), shapes, of((n, *image_shape), np.uint8), of((n,), np.int32), of((1, n), np.int32), of((), np.int32),
  )  # fmt: skip
  exported = jax.export.export(jax.jit(steps), platforms=[platform])(*arguments)
  assert exported.platforms == (platform,)
  found = re.findall(r'stablehlo\.(\w+)', exported.mlir_module())
  return {name: found.count(name) for name in set(found)}


def test_a_first_convolution_with_pooling_is_lowered_for_the_platform():
  config = config_lib.load(f'{ROOT}/configs/digits.py', ['--config.model.features=(4, 6)', '--config.batch_size=4'])
  # Two convolutions of each of two blocks, each with two gradients but for the first, whose images have none.
  for platform in ('cuda', 'tpu'):
    found = _operations(config, (8, 8, 1), 10, platform)
    assert found['convolution'] in (3 * 4 - 1, 3 * 4)  # JAX 0.10 leaves it to XLA to remove the gradient of the images
    assert found['select_and_scatter'] == 1  # of the pooling, as XLA has it there
  of_cpu = _operations(config, (8, 8, 1), 10, 'cpu')
  assert 'select_and_scatter' not in of_cpu


@pytest.mark.faults
@pytest.mark.parametrize('variant', ['', ':fast'])
@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_the_step_of_imagenet_is_lowered_for_accelerators(platform, variant):
  config = config_lib.load(f'{ROOT}/configs/imagenet.py{variant}', ['--config.batch_size=256'])
  found = _operations(config, (256, 256, 3), 1000, platform)
  assert found['convolution'] in (3 * 53 - 1, 3 * 53)
  assert found['dot_general'] == 3  # the head and its gradients; on the CPU 1x1 convolutions are matrix products
  assert found['select_and_scatter'] == 1
