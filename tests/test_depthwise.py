"""Depthwise and 1x1 convolutions and ReLU6 equal those of lax and jax.nn in values and gradients of any order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from cnn_jax import ops
from cnn_jax.models import layers
from tests.helpers import QUICK

pytestmark = pytest.mark.usefixtures('strict')

NHWC = ('NHWC', 'HWIO', 'NHWC')


@pytest.fixture(autouse=True)
def _float64():
  before = jax.config.jax_enable_x64
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', before)


def normal(seed, *shape, dtype=np.float64):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def both(strides=(1, 1), padding='SAME', groups=1):
  """Our convolution and that of lax."""
  return [
    functools.partial(conv, window_strides=strides, padding=padding, dimension_numbers=NHWC, feature_group_count=groups)
    for conv in (ops.conv_general_dilated, lax.conv_general_dilated)
  ]


def assert_same_gradients(pair, *arguments, **tolerance):
  """Compares values and gradients for a random cotangent, in one program."""

  @functools.partial(jax.jit, compiler_options=QUICK)
  def values_and_gradients(cotangent, arguments):
    made = []
    for function in pair:
      y, vjp = jax.vjp(function, *arguments)
      made.append((y, vjp(cotangent)))
    return made

  y = jax.eval_shape(pair[1], *arguments)
  ours, theirs = values_and_gradients(normal(7, *y.shape, dtype=y.dtype), arguments)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), **(tolerance or {'atol': 1e-11}))


# Shape of the images, of a window, strides, padding.
DEPTHWISE = {
  '3x3': ((2, 6, 7, 3), (3, 3), (1, 1), 'SAME'),
  '5x5, more blocks than one': ((1, 17, 30, 2), (3, 5), (1, 1), 'SAME'),
  '7x2, larger than the image': ((1, 5, 6, 2), (7, 2), (1, 1), 'SAME'),
  'stride 2, even size': ((2, 8, 6, 3), (3, 3), (2, 2), 'SAME'),
  'stride 2, odd size': ((1, 9, 7, 2), (5, 5), (2, 2), 'SAME'),
  'stride 2, symmetric': ((1, 8, 9, 2), (3, 3), (2, 2), ((1, 1), (1, 1))),
  'strides that differ, asymmetric': ((1, 7, 8, 2), (5, 3), (3, 2), ((2, 1), (1, 0))),
  'a stride larger than the window': ((1, 8, 8, 2), (1, 2), (3, 3), 'VALID'),
}


@pytest.mark.parametrize(('shape', 'window', 'strides', 'padding'), DEPTHWISE.values(), ids=DEPTHWISE)
def test_depthwise_convolution_is_that_of_lax(shape, window, strides, padding):
  channels = shape[-1]
  assert_same_gradients(both(strides, padding, channels), normal(0, *shape), normal(1, *window, 1, channels))


@pytest.mark.parametrize(
  ('strides', 'padding'), [((1, 1), 'SAME'), ((2, 2), 'SAME'), ((3, 2), 'VALID'), ((2, 2), ((1, 0), (0, 2)))]
)
def test_pointwise_convolution_is_that_of_lax(strides, padding):
  assert_same_gradients(both(strides, padding), normal(0, 2, 7, 6, 3), normal(1, 1, 1, 3, 4))


@pytest.mark.parametrize(('window', 'groups'), [((3, 2), 4), ((1, 1), 1)], ids=['depthwise', 'pointwise'])
def test_convolutions_in_bfloat16_are_those_of_lax(window, groups):
  dtype, tolerance = 'bfloat16', 0.04
  x, kernel = normal(0, 2, 6, 6, 4, dtype=dtype), normal(1, *window, 4 // groups, 4, dtype=dtype)
  assert_same_gradients(both((2, 2), 'SAME', groups), x, kernel, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(('window', 'groups'), [((2, 2), 2), ((1, 1), 1)], ids=['depthwise', 'pointwise'])
def test_convolutions_in_a_scan_under_vmap_have_a_second_gradient(window, groups):
  kernels, direction = (normal(seed, 2, *window, 2 // groups, 2) for seed in (1, 2))

  def curvature(conv, images):
    def total(kernels):
      return lax.scan(lambda x, kernel: (jnp.tanh(conv(x, kernel)), None), images, kernels)[0].sum()

    return jax.grad(lambda k: jnp.vdot(jax.grad(total)(k), direction))(kernels)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def curvatures(images):
    return [jax.vmap(functools.partial(curvature, conv))(images) for conv in both(groups=groups)]

  ours, theirs = curvatures(normal(0, 2, 1, 5, 4, 2))
  np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_the_other_platforms_get_the_convolution_of_lax():
  def total(kernel):
    x = jnp.ones((1, 6, 6, 2), jnp.float32)
    return ops.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=NHWC, feature_group_count=2).sum()

  kernel = jnp.ones((3, 3, 1, 2), jnp.float32)
  programs = {p: jax.export.export(jax.jit(total), platforms=[p])(kernel).mlir_module() for p in ('cpu', 'cuda')}
  assert {p: 'stablehlo.convolution' in text for p, text in programs.items()} == {'cpu': False, 'cuda': True}


def test_relu6_is_that_of_jax():
  x = jnp.array([-1.0, 0.5, 3.0, 5.9, 7.0])
  assert_same_gradients((ops.relu6, jax.nn.relu6), x)
  np.testing.assert_array_equal(jax.grad(lambda x: ops.relu6(x).sum())(x), [0, 1, 1, 1, 0])


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_batch_norm_with_running_statistics_is_that_of_flax(dtype):
  ours, theirs = (kind(use_running_average=True, dtype=dtype) for kind in (layers.BatchNorm, nn.BatchNorm))
  x = normal(0, 2, 3, 3, 4, dtype=dtype or 'float32')
  with jax.numpy_dtype_promotion('standard'):  # flax subtracts float32 from bfloat16
    variables = theirs.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x))
    variables = jax.tree.map(lambda v: jnp.abs(normal(1, *v.shape, dtype=v.dtype)) + 0.1, variables)
    stats = variables['batch_stats']
    pair = [lambda p, x, norm=norm: norm.apply({'params': p, 'batch_stats': stats}, x) for norm in (ours, theirs)]
    tolerance = 1e-5 if dtype is None else 0.05
    assert_same_gradients(pair, variables['params'], x, rtol=tolerance, atol=tolerance)
