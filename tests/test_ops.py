"""The fast operations equal those of lax and flax in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from cnn_jax import ops
from cnn_jax.ops import convolution, winograd
from tests.helpers import QUICK

pytestmark = pytest.mark.usefixtures('strict')

NHWC = ('NHWC', 'HWIO', 'NHWC')


@pytest.fixture
def not_cpu(monkeypatch):
  """Takes the branch of the platforms other than the CPU."""
  monkeypatch.setattr(lax, 'platform_dependent', lambda *arguments, cpu, default, **_: default(*arguments))


@pytest.fixture(autouse=True)
def _float64():
  before = jax.config.jax_enable_x64
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', before)


def normal(seed, *shape, dtype=np.float64):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def quick_jit(function):
  return jax.jit(function, compiler_options=QUICK)


def assert_same(function, reference, *arguments, then=(), **tolerance):
  """Checks that values and gradients agree, for a random cotangent.

  Args:
    function, reference: to compare; both are compiled in one program, which is faster than two.
    arguments: of both.
    then: more tuples of arguments of the same shapes.
    tolerance: for `np.testing.assert_allclose`.
  """

  def value_and_gradients(function, cotangent, arguments):
    y, vjp = jax.vjp(function, *arguments)
    return y, vjp(cotangent)

  @quick_jit
  def both(cotangent, arguments):
    return tuple(value_and_gradients(f, cotangent, arguments) for f in (function, reference))

  y = jax.eval_shape(reference, *arguments)
  for case in (arguments, *then):
    got, expected = both(normal(7, *y.shape, dtype=y.dtype), case)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), **(tolerance or {'atol': 1e-11}))


def convolutions(strides=(1, 1), padding='SAME', **options):
  return (
    functools.partial(conv, window_strides=strides, padding=padding, dimension_numbers=NHWC, **options)
    for conv in (ops.conv_general_dilated, lax.conv_general_dilated)
  )


NARROW = [
  ((2, 8, 8, 3), (3, 3, 3, 4), (1, 1), 'SAME'),
  ((1, 7, 5, 1), (3, 3, 1, 2), (1, 1), 'VALID'),
  ((2, 7, 6, 2), (3, 3, 2, 3), (2, 2), 'SAME'),
  ((2, 9, 8, 2), (2, 4, 2, 3), (3, 2), 'VALID'),
  ((2, 5, 6, 3), (1, 1, 3, 4), (1, 1), 'SAME'),
  ((2, 5, 6, 3), (1, 1, 3, 4), (2, 2), 'SAME'),
  ((2, 5, 7, 2), (5, 2, 2, 3), (1, 2), ((2, 1), (0, 3))),
  ((2, 4, 4, 2), (2, 2, 2, 3), (1, 1), ((3, 2), (0, 4))),
  ((1, 3, 3, 2), (3, 3, 2, 1), (1, 1), 'VALID'),
  ((2, 6, 5, 16), (5, 2, 16, 7), (1, 1), ((2, 1), (0, 3))),
  ((2, 7, 8, 16), (3, 3, 16, 16), (2, 2), 'SAME'),
]
WIDE = [
  ((2, 7, 5, 16), (3, 3, 16, 17), (1, 1), 'SAME'),
  ((1, 9, 6, 18), (3, 2, 18, 16), (1, 1), ((0, 3), (1, 0))),
]


@pytest.mark.parametrize(('shape', 'kernel', 'strides', 'padding'), NARROW + WIDE)
def test_convolution_is_that_of_lax(shape, kernel, strides, padding):
  assert_same(*convolutions(strides, padding), normal(0, *shape), normal(1, *kernel))


@pytest.mark.parametrize(('shape', 'kernel', 'strides', 'padding'), WIDE)
@pytest.mark.parametrize('wide', [16, 17])
def test_wide_convolution_is_that_of_lax(monkeypatch, wide, shape, kernel, strides, padding):
  _wide_from(monkeypatch, wide)
  assert_same(*convolutions(strides, padding), normal(0, *shape), normal(1, *kernel))


@pytest.mark.usefixtures('not_cpu')
@pytest.mark.parametrize(('shape', 'kernel', 'strides', 'padding'), [NARROW[0], NARROW[6]])
def test_convolution_of_other_platforms_is_that_of_lax(shape, kernel, strides, padding):
  assert_same(*convolutions(strides, padding), normal(0, *shape), normal(1, *kernel))


def _wide_from(monkeypatch, channels):
  """Uses Winograd from this number of channels and of features on, however few the multiplications."""
  monkeypatch.setattr(convolution, 'WIDE_FEATURES', channels)
  monkeypatch.setattr(convolution, 'WIDE_CHANNELS', channels)
  monkeypatch.setattr(convolution, 'FEW_PRODUCTS', -1)


@pytest.mark.parametrize('few', [True, False])
def test_the_gradient_of_a_kernel_takes_winograd_if_it_is_worth_it(monkeypatch, few):
  shape, kernel = (2, 7, 5, 16), (3, 3, 16, 17)
  _wide_from(monkeypatch, 16)
  monkeypatch.setattr(convolution, 'FEW_PRODUCTS', 2 * 7 * 5 * 17 * 16 - (0 if few else 1))
  taken = []
  by_winograd = winograd.kernel_gradient
  monkeypatch.setattr(winograd, 'kernel_gradient', lambda *arguments: taken.append(1) or by_winograd(*arguments))
  assert_same(*convolutions(), normal(0, *shape), normal(1, *kernel))
  assert bool(taken) is not few


@pytest.mark.parametrize(
  ('batch', 'at_a_time', 'part'),
  [(6, 6, 6), (6, 3, 3), (6, 5, 3), (6, 1, 1), (7, 5, 7), (0, 5, 0)],  # 7 images one at a time would be slower
)
def test_parts_divide_the_batch(monkeypatch, batch, at_a_time, part):
  monkeypatch.setattr(winograd, 'PART_SIZE', at_a_time * 5 * 4 * 16)
  assert winograd.images_at_a_time(jnp.zeros((batch, 5, 4, 16))) == part


@pytest.mark.parametrize(('batch', 'at_a_time'), [(6, 3), (6, 1), (0, 5)])
def test_large_batches_are_convolved_in_parts(monkeypatch, batch, at_a_time):
  monkeypatch.setattr(winograd, 'PART_SIZE', at_a_time * 5 * 4 * 16)
  _wide_from(monkeypatch, 16)
  assert_same(*convolutions(), normal(0, batch, 5, 4, 16), normal(1, 3, 3, 16, 17))


@pytest.mark.parametrize(
  'options',
  [{'rhs_dilation': (2, 1)}, {'lhs_dilation': (1, 2)}, {'feature_group_count': 2}, {'batch_group_count': 2}],
)
def test_unusual_convolutions_are_passed_on_to_lax(options):
  channels = 1 if 'feature_group_count' in options else 2
  assert_same(*convolutions(padding=((1, 1), (1, 1)), **options), normal(0, 2, 8, 7, 2), normal(1, 3, 3, channels, 4))


@pytest.mark.parametrize('padding', [((-1, 2), (0, 1)), ((1, 1), (-2, -1)), 'VALID'])
@pytest.mark.parametrize('kernel', [(3, 3, 2, 4), (8, 1, 2, 4), (1, 1, 2, 4), (3, 3, 1, 2), (3, 3, 16, 16)])
def test_cut_off_pixels_and_kernels_larger_than_the_image(monkeypatch, kernel, padding):
  _wide_from(monkeypatch, 16)
  channels = max(kernel[2], 2)
  options = {'feature_group_count': 2} if kernel[2] == 1 else {}
  arguments = normal(0, 2, 6, 7, channels), normal(1, *kernel)
  assert_same(*convolutions(padding=padding, **options), *arguments)
  if not options:
    assert_same(*convolutions_and_pools(padding=padding), *arguments)


def test_a_window_larger_than_the_image():
  x = normal(0, 2, 6, 7, 3)
  assert_same(*(functools.partial(f, window_shape=(8, 2), strides=(2, 2)) for f in (ops.max_pool, nn.max_pool)), x)


def test_unusual_layouts_are_passed_on_to_lax():
  x, kernel = normal(0, 2, 3, 7, 6), normal(1, 4, 3, 3, 3)
  for conv in (ops.conv_general_dilated, lax.conv_general_dilated):
    assert conv(x, kernel, (1, 1), 'SAME').shape == (2, 4, 7, 6)  # channels first if none is named
  one = [
    functools.partial(conv, window_strides=(1,), padding='SAME', dimension_numbers=('NWC', 'WIO', 'NWC'))
    for conv in (ops.conv_general_dilated, lax.conv_general_dilated)
  ]
  assert_same(*one, normal(0, 2, 9, 3), normal(1, 3, 3, 4))


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 0.04)])
def test_convolution_keeps_the_dtype(dtype, tolerance):
  arguments = normal(0, 2, 8, 8, 3, dtype=dtype), normal(1, 3, 3, 3, 4, dtype=dtype)
  assert_same(*convolutions(), *arguments, rtol=tolerance, atol=tolerance * 10)


POOLS = [
  ((2, 8, 6, 3), (2, 2), (2, 2), 'VALID'),
  ((1, 7, 5, 2), (2, 2), (2, 2), 'VALID'),
  ((2, 7, 5, 2), (2, 2), (2, 2), 'SAME'),
  ((2, 7, 8, 2), (3, 3), (2, 2), 'SAME'),
  ((2, 7, 8, 2), (3, 2), (2, 2), 'VALID'),
  ((2, 6, 5, 2), (2, 3), None, 'SAME'),
  ((2, 7, 7, 2), (3, 3), (3, 3), ((1, 2), (1, 0))),
  ((2, 9, 9, 1), (2, 2), (3, 4), 'VALID'),
]


@pytest.mark.parametrize(('shape', 'window', 'strides', 'padding'), POOLS)
def test_max_pool_is_that_of_flax(shape, window, strides, padding):
  x = normal(0, *shape)
  ties = jnp.maximum(jnp.round(x), 0)  # nearly every window has several maxima, and many are all zero
  pools = [
    functools.partial(p, window_shape=window, strides=strides, padding=padding) for p in (ops.max_pool, nn.max_pool)
  ]
  # The gradients of overlapping windows are added in either order.
  assert_same(*pools, jnp.concatenate([x, ties]), atol=1e-14)


@pytest.mark.usefixtures('not_cpu')
def test_max_pool_of_other_platforms_is_that_of_flax():
  pools = [
    functools.partial(p, window_shape=(3, 3), strides=(2, 2), padding='SAME') for p in (ops.max_pool, nn.max_pool)
  ]
  assert_same(*pools, normal(0, 2, 7, 8, 2), atol=1e-14)


def convolutions_and_pools(strides=(1, 1), padding='SAME'):
  def stock(x, kernel):
    return nn.max_pool(lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC), (2, 2), (2, 2))

  def fast(x, kernel):
    return ops.conv_max_pool(x, kernel, strides, padding, dimension_numbers=NHWC)

  return fast, stock


@pytest.mark.parametrize(
  ('shape', 'kernel', 'strides', 'padding'),
  [
    ((2, 8, 6, 1), (3, 3, 1, 5), (1, 1), 'SAME'),
    ((2, 9, 7, 3), (3, 3, 3, 4), (1, 1), 'SAME'),  # the last row and column are in no window
    ((1, 8, 7, 2), (2, 4, 2, 3), (1, 1), 'VALID'),
    ((2, 6, 7, 4), (5, 1, 4, 2), (1, 1), ((2, 1), (0, 3))),
    ((2, 9, 9, 2), (3, 3, 2, 3), (2, 2), 'SAME'),
    ((2, 6, 6, 5), (3, 3, 5, 3), (1, 1), 'SAME'),
    ((2, 1, 6, 1), (1, 1, 1, 3), (1, 1), 'SAME'),  # no window at all
  ],
)
def test_convolution_and_pool_in_one_is_both(shape, kernel, strides, padding):
  x, weights = normal(0, *shape), normal(1, *kernel)
  # For whole numbers nearly every window has several maxima.
  assert_same(*convolutions_and_pools(strides, padding), x, weights, then=[(jnp.round(x), jnp.round(weights))])


@pytest.mark.usefixtures('not_cpu')
def test_convolution_and_pool_in_one_is_both_on_other_platforms():
  assert_same(*convolutions_and_pools(), normal(0, 2, 9, 7, 3), normal(1, 3, 3, 3, 4))


def test_convolution_and_pool_in_one_has_a_second_gradient():
  @quick_jit
  def curvatures(x, kernel, direction):
    def curvature(network):
      slope = jax.grad(lambda k: (network(x, k) ** 3).sum())
      return jax.grad(lambda k: jnp.vdot(slope(k), direction))(kernel)

    return tuple(map(curvature, convolutions_and_pools()))

  fast, stock = curvatures(normal(0, 2, 6, 6, 2), normal(1, 3, 3, 2, 3), normal(2, 3, 3, 2, 3))
  np.testing.assert_allclose(fast, stock, atol=1e-10)


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 0.04)])
def test_convolution_and_pool_in_one_keeps_the_dtype(dtype, tolerance):
  fast, stock = convolutions_and_pools()
  arguments = normal(0, 2, 8, 8, 3, dtype=dtype), normal(1, 3, 3, 3, 4, dtype=dtype)
  # Two places of a window that are equal in bfloat16 may each win in one of the functions; then a whole gradient moves.
  if dtype == 'float32':
    assert_same(fast, stock, *arguments, rtol=tolerance, atol=tolerance * 10)
  else:
    y = [np.asarray(y, np.float64) for y in quick_jit(lambda *a: (fast(*a), stock(*a)))(*arguments)]
    np.testing.assert_allclose(*y, rtol=tolerance, atol=tolerance)
  gradients = jax.eval_shape(jax.grad(lambda *a: fast(*a).sum(), (0, 1)), *arguments)
  assert all(gradient.dtype == dtype for gradient in gradients)


def test_max_pool_sends_a_tie_to_the_first():
  gradient = jax.grad(lambda x: ops.max_pool(x, (2, 2), (2, 2)).sum())(jnp.zeros((1, 2, 4, 1)))
  np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0, 1, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(('shape', 'window', 'strides', 'padding'), POOLS)
def test_avg_pool_is_that_of_flax(shape, window, strides, padding):
  def pools(pool, x):
    return jnp.stack([pool(x, window, strides, padding, count_include_pad=c) for c in (True, False)])

  with jax.numpy_dtype_promotion('standard'):  # flax's avg_pool divides floats by an integer array
    assert_same(*[functools.partial(pools, p) for p in (ops.avg_pool, nn.avg_pool)], normal(0, *shape))


@pytest.mark.parametrize('pool', ['max_pool', 'avg_pool'])
def test_pools_keep_the_dtype_and_take_other_ranks(pool):
  fast, stock = getattr(ops, pool), getattr(nn, pool)
  for shape in [(6, 6, 2), (2, 2, 6, 6, 2)]:
    x = normal(0, *shape)
    with jax.numpy_dtype_promotion('standard'):  # as above
      np.testing.assert_allclose(fast(x, (2, 2), (2, 2)), stock(x, (2, 2), (2, 2)), rtol=1e-14)
  for dtype in (jnp.float32, jnp.bfloat16):
    assert fast(normal(0, 2, 6, 6, 2, dtype=dtype), (2, 2), (2, 2)).dtype == dtype


def small_network(conv, pool, kernels, x):
  for kernel in kernels:
    x = pool(jnp.tanh(conv(x, kernel, (1, 1), 'SAME', dimension_numbers=NHWC)), (2, 2), (2, 2))
  return x.sum()


FAST, STOCK = (ops.conv_general_dilated, ops.max_pool), (lax.conv_general_dilated, nn.max_pool)


def test_inside_a_scan():
  kernels = [normal(1, 3, 3, 2, 3), normal(2, 3, 3, 3, 2)]

  def trained(network, kernels, images):
    def step(kernels, x):
      gradients = jax.grad(functools.partial(small_network, *network))(kernels, x)
      return jax.tree.map(lambda k, g: k - 0.01 * g, kernels, gradients), None

    return lax.scan(step, kernels, images)[0]

  images = normal(0, 3, 2, 8, 8, 2)
  fast, stock = quick_jit(lambda *a: (trained(FAST, *a), trained(STOCK, *a)))(kernels, images)
  for a, b in zip(fast, stock, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-11)


def test_under_vmap():
  images, kernels = normal(0, 3, 2, 8, 8, 2), [normal(1, 3, 3, 2, 3)]
  for axes in [(None, 0), (0, 0)]:
    stacked = kernels if axes[0] is None else [normal(2, 3, 3, 3, 2, 3)]
    fast, stock = (
      quick_jit(jax.vmap(jax.grad(functools.partial(small_network, *network)), axes))(stacked, images)
      for network in (FAST, STOCK)
    )
    np.testing.assert_allclose(fast[0], stock[0], atol=1e-11)


@pytest.mark.parametrize(('batch', 'channels'), [(1, 2), (1, 16), (2, 16)], ids=['narrow', 'wide', 'in parts'])
def test_second_gradient(monkeypatch, batch, channels):
  _wide_from(monkeypatch, 16)
  monkeypatch.setattr(winograd, 'PART_SIZE', 6 * 6 * 16)
  kernel, direction = normal(1, 3, 3, channels, channels), normal(2, 3, 3, channels, channels)

  @quick_jit
  def curvatures(x, kernel, direction):
    def curvature(network):
      slope = jax.grad(lambda k: small_network(*network, [k], x))
      return jax.grad(lambda k: jnp.vdot(slope(k), direction))(kernel)

    return curvature(FAST), curvature(STOCK)

  fast, stock = curvatures(normal(0, batch, 6, 6, channels), kernel, direction)
  np.testing.assert_allclose(fast, stock, atol=1e-10)


@pytest.mark.parametrize(('window', 'on_cuda'), [((2, 2), False), ((3, 3), True)])  # without and with overlaps
def test_the_other_platforms_get_the_stock_gradients(window, on_cuda):
  x, kernel = normal(0, 2, 8, 8, 2, dtype=np.float32), normal(1, 3, 3, 2, 4, dtype=np.float32)
  pool = functools.partial(ops.max_pool, window_shape=window)
  gradient = jax.jit(jax.grad(lambda k: small_network(FAST[0], lambda y, _, s: pool(y, strides=s), [k], x)))
  programs = {p: jax.export.export(gradient, platforms=[p])(kernel).mlir_module() for p in ('cpu', 'cuda', 'tpu')}
  scattered = {p: 'select_and_scatter' in text for p, text in programs.items()}
  assert scattered == {'cpu': False, 'cuda': on_cuda, 'tpu': True}


def test_a_flax_layer_accepts_it():
  x = normal(0, 2, 8, 8, 3, dtype=np.float32)
  fast = nn.Conv(4, (3, 3), strides=2, conv_general_dilated=ops.conv_general_dilated)
  stock = nn.Conv(4, (3, 3), strides=2)
  variables = {'params': {'kernel': normal(1, 3, 3, 3, 4, dtype=np.float32), 'bias': jnp.arange(4, dtype=np.float32)}}
  y = quick_jit(lambda *a: (fast.apply(*a), stock.apply(*a)))(variables, x)
  np.testing.assert_allclose(*y, rtol=1e-5, atol=1e-5)
