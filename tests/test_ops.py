"""The fast operations equal the stock ones, values and gradients, and cases worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from cnn_jax import ops

NHWC = ('NHWC', 'HWIO', 'NHWC')


@pytest.fixture(params=['cpu', 'default'])
def branch(request, monkeypatch):
  """Each test that asks for it runs on the CPU's branch and on that of the other platforms."""

  def choose(*arguments, cpu, default):
    return cpu(*arguments) if request.param == 'cpu' else default(*arguments)

  monkeypatch.setattr(lax, 'platform_dependent', choose)
  return request.param


@pytest.fixture(autouse=True)
def _float64():
  before = jax.config.jax_enable_x64
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', before)


def normal(seed, *shape, dtype=np.float64):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same(function, reference, *arguments, **tolerance):
  """Values and gradients agree; the cotangent has another number in every place."""

  def value_and_gradients(function, cotangent, arguments):
    y, vjp = jax.vjp(function, *arguments)
    return y, vjp(cotangent)

  @jax.jit  # one program for both: compiling takes longer than running
  def both(cotangent, arguments):
    return tuple(value_and_gradients(f, cotangent, arguments) for f in (function, reference))

  y = jax.eval_shape(reference, *arguments)
  got, expected = both(normal(7, *y.shape, dtype=y.dtype), arguments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), **(tolerance or {'atol': 1e-11}))


def convolutions(strides=(1, 1), padding='SAME', **options):
  return (
    functools.partial(conv, window_strides=strides, padding=padding, dimension_numbers=NHWC, **options)
    for conv in (ops.conv_general_dilated, lax.conv_general_dilated)
  )


@pytest.mark.parametrize(
  ('shape', 'kernel', 'strides', 'padding'),
  [
    ((2, 8, 8, 3), (3, 3, 3, 4), (1, 1), 'SAME'),
    ((1, 7, 5, 1), (3, 3, 1, 2), (1, 1), 'VALID'),
    ((2, 7, 6, 2), (3, 3, 2, 3), (2, 2), 'SAME'),
    ((2, 9, 8, 2), (2, 4, 2, 3), (3, 2), 'VALID'),
    ((2, 5, 6, 3), (1, 1, 3, 4), (1, 1), 'SAME'),
    ((2, 5, 6, 3), (1, 1, 3, 4), (2, 2), 'SAME'),
    ((2, 5, 7, 2), (5, 2, 2, 3), (1, 2), ((2, 1), (0, 3))),
    ((2, 4, 4, 2), (2, 2, 2, 3), (1, 1), ((3, 2), (0, 4))),
    ((1, 3, 3, 2), (3, 3, 2, 1), (1, 1), 'VALID'),
    ((2, 7, 5, 16), (3, 3, 16, 17), (1, 1), 'SAME'),
    ((1, 9, 6, 18), (3, 2, 18, 16), (1, 1), ((0, 3), (1, 0))),
    ((2, 6, 5, 16), (5, 2, 16, 7), (1, 1), ((2, 1), (0, 3))),
    ((2, 7, 8, 16), (3, 3, 16, 16), (2, 2), 'SAME'),
  ],
)
@pytest.mark.parametrize('wide', [16, 17])
def test_convolution_is_that_of_lax(monkeypatch, branch, wide, shape, kernel, strides, padding):
  _wide_from(monkeypatch, wide)
  assert_same(*convolutions(strides, padding), normal(0, *shape), normal(1, *kernel))


def _wide_from(monkeypatch, channels):
  """Lets Winograd have the convolutions of so many channels and features."""
  monkeypatch.setattr(ops, '_WIDE_FEATURES', channels)
  monkeypatch.setattr(ops, '_WIDE_CHANNELS', channels)


@pytest.mark.parametrize(
  ('batch', 'at_a_time', 'part'),
  [(6, 6, 6), (6, 3, 3), (6, 5, 3), (6, 1, 1), (7, 5, 7), (0, 5, 0)],  # in parts of one 7 images would be slower
)
def test_large_batches_are_convolved_in_parts(monkeypatch, batch, at_a_time, part):
  x, kernel = normal(0, batch, 5, 4, 16), normal(1, 3, 3, 16, 17)
  monkeypatch.setattr(ops, '_PART_SIZE', at_a_time * 5 * 4 * 16)
  _wide_from(monkeypatch, 16)
  assert ops._part(x) == part
  assert_same(*convolutions(), x, kernel)


@pytest.mark.parametrize(
  'options',
  [{'rhs_dilation': (2, 1)}, {'lhs_dilation': (1, 2)}, {'feature_group_count': 2}, {'batch_group_count': 2}],
)
def test_unusual_convolution_is_left_to_lax(options):
  channels = 1 if 'feature_group_count' in options else 2
  assert_same(*convolutions(padding=((1, 1), (1, 1)), **options), normal(0, 2, 8, 7, 2), normal(1, 3, 3, channels, 4))


def test_unusual_layouts_are_left_to_lax():
  x, kernel = normal(0, 2, 3, 7, 6), normal(1, 4, 3, 3, 3)
  for conv in (ops.conv_general_dilated, lax.conv_general_dilated):
    assert conv(x, kernel, (1, 1), 'SAME').shape == (2, 4, 7, 6)  # channels first when none is named
  one = [
    functools.partial(conv, window_strides=(1,), padding='SAME', dimension_numbers=('NWC', 'WIO', 'NWC'))
    for conv in (ops.conv_general_dilated, lax.conv_general_dilated)
  ]
  assert_same(*one, normal(0, 2, 9, 3), normal(1, 3, 3, 4))


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 0.04)])
def test_convolution_keeps_the_dtype(branch, dtype, tolerance):
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
def test_max_pool_is_that_of_flax(branch, shape, window, strides, padding):
  x = normal(0, *shape)
  ties = jnp.maximum(jnp.round(x), 0)  # nearly every window has several maxima, many are all zero
  pools = [
    functools.partial(p, window_shape=window, strides=strides, padding=padding) for p in (ops.max_pool, nn.max_pool)
  ]
  # Overlapping windows add up their gradients, in either order.
  assert_same(*pools, jnp.concatenate([x, ties]), atol=1e-14)


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
@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_convolution_and_pool_in_one_is_both(monkeypatch, backend, shape, kernel, strides, padding):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  fast, stock = convolutions_and_pools(strides, padding)
  x, weights = normal(0, *shape), normal(1, *kernel)
  assert_same(fast, stock, x, weights)
  # Of whole numbers: nearly every window has several maxima.
  assert_same(fast, stock, jnp.round(x), jnp.round(weights))


def test_convolution_and_pool_in_one_has_a_second_gradient():
  x, kernel, direction = normal(0, 2, 6, 6, 2), normal(1, 3, 3, 2, 3), normal(2, 3, 3, 2, 3)

  def curvature(network):
    slope = jax.grad(lambda k: (network(x, k) ** 3).sum())
    return jax.grad(lambda k: jnp.vdot(slope(k), direction))(kernel)

  np.testing.assert_allclose(*map(curvature, convolutions_and_pools()), atol=1e-10)


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 0.04)])
def test_convolution_and_pool_in_one_keeps_the_dtype(dtype, tolerance):
  fast, stock = convolutions_and_pools()
  arguments = normal(0, 2, 8, 8, 3, dtype=dtype), normal(1, 3, 3, 3, 4, dtype=dtype)
  # Two places of a window that bfloat16 cannot tell apart may each win in one of the two: then a whole gradient moves.
  y = [np.asarray(f(*arguments), np.float64) for f in (fast, stock)]
  np.testing.assert_allclose(*y, rtol=tolerance, atol=tolerance)
  if dtype == 'float32':
    assert_same(fast, stock, *arguments, rtol=tolerance, atol=tolerance * 10)
  gradient = jax.grad(lambda k: fast(arguments[0], k).sum())(arguments[1])
  assert gradient.dtype == arguments[1].dtype


def test_max_pool_sends_a_tie_to_the_first():
  gradient = jax.grad(lambda x: ops.max_pool(x, (2, 2), (2, 2)).sum())(jnp.zeros((1, 2, 4, 1)))
  np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0, 1, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(('shape', 'window', 'strides', 'padding'), POOLS)
def test_avg_pool_is_that_of_flax(shape, window, strides, padding):
  def pools(pool, x):
    return jnp.stack([pool(x, window, strides, padding, count_include_pad=c) for c in (True, False)])

  assert_same(*[functools.partial(pools, p) for p in (ops.avg_pool, nn.avg_pool)], normal(0, *shape))


@pytest.mark.parametrize('pool', ['max_pool', 'avg_pool'])
def test_pools_keep_the_dtype_and_take_other_ranks(pool):
  fast, stock = getattr(ops, pool), getattr(nn, pool)
  for shape in [(6, 6, 2), (2, 2, 6, 6, 2)]:
    x = normal(0, *shape)
    np.testing.assert_allclose(fast(x, (2, 2), (2, 2)), stock(x, (2, 2), (2, 2)), rtol=1e-14)
  for dtype in (jnp.float32, jnp.bfloat16):
    x = normal(0, 2, 6, 6, 2, dtype=dtype)
    assert fast(x, (2, 2), (2, 2)).dtype == stock(x, (2, 2), (2, 2)).dtype == dtype


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
  fast, stock = (jax.jit(functools.partial(trained, network))(kernels, images) for network in (FAST, STOCK))
  for a, b in zip(fast, stock, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-11)


def test_under_vmap():
  images, kernels = normal(0, 3, 2, 8, 8, 2), [normal(1, 3, 3, 2, 3)]
  for axes in [(None, 0), (0, 0)]:
    stacked = kernels if axes[0] is None else [normal(2, 3, 3, 3, 2, 3)]
    fast, stock = (
      jax.jit(jax.vmap(jax.grad(functools.partial(small_network, *network)), axes))(stacked, images)
      for network in (FAST, STOCK)
    )
    np.testing.assert_allclose(fast[0], stock[0], atol=1e-11)


@pytest.mark.parametrize(('batch', 'channels'), [(1, 2), (1, 16), (2, 16)], ids=['narrow', 'wide', 'in parts'])
def test_second_gradient(monkeypatch, batch, channels):
  _wide_from(monkeypatch, 16)
  monkeypatch.setattr(ops, '_PART_SIZE', 6 * 6 * 16)
  x = normal(0, batch, 6, 6, channels)
  kernel, direction = normal(1, 3, 3, channels, channels), normal(2, 3, 3, channels, channels)

  def curvature(network):
    slope = jax.grad(lambda k: small_network(*network, [k], x))
    return jax.grad(lambda k: jnp.vdot(slope(k), direction))(kernel)

  fast, stock = jax.jit(lambda: (curvature(FAST), curvature(STOCK)))()
  np.testing.assert_allclose(fast, stock, atol=1e-10)


def test_the_other_platforms_get_the_stock_gradients():
  x, kernel = normal(0, 2, 8, 8, 2, dtype=np.float32), normal(1, 3, 3, 2, 4, dtype=np.float32)
  gradient = jax.jit(jax.grad(lambda k: small_network(*FAST, [k], x)))
  programs = {p: jax.export.export(gradient, platforms=[p])(kernel).mlir_module() for p in ('cpu', 'cuda', 'tpu')}
  assert {p: 'select_and_scatter' in text for p, text in programs.items()} == {'cpu': False, 'cuda': True, 'tpu': True}


def test_flax_layer_takes_it():
  x = normal(0, 2, 8, 8, 3, dtype=np.float32)
  fast = nn.Conv(4, (3, 3), strides=2, conv_general_dilated=ops.conv_general_dilated)
  stock = nn.Conv(4, (3, 3), strides=2)
  variables = stock.init(jax.random.key(0), x)
  np.testing.assert_allclose(fast.apply(variables, x), stock.apply(variables, x), atol=1e-6)


# --- cases worked by hand ---


def convolve(image, kernel, padding='VALID'):
  image, kernel = jnp.asarray(image, jnp.float64), jnp.asarray(kernel, jnp.float64)
  y = ops.conv_general_dilated(
    image[None, :, :, None], kernel[:, :, None, None], (1, 1), padding, dimension_numbers=NHWC
  )
  return np.asarray(y[0, :, :, 0])


def test_7x7_image_convolved_with_3x3_kernel_is_5x5():
  # Pixel (r, c) is 7 r + c, and the kernel's weights sum to 3 with their centre of mass in the middle, so that
  # output (r, c) is 3 times the pixel below the kernel's centre: 3 (7 (r + 1) + (c + 1)) = 21 r + 3 c + 24.
  image = np.arange(49).reshape(7, 7)
  kernel = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
  expected = [
    [24, 27, 30, 33, 36],
    [45, 48, 51, 54, 57],
    [66, 69, 72, 75, 78],
    [87, 90, 93, 96, 99],
    [108, 111, 114, 117, 120],
  ]
  np.testing.assert_array_equal(convolve(image, kernel), expected)


def test_kernel_of_a_vertical_edge():
  # Dark on the left, bright on the right: only windows that see both sides answer, each with 3 x 9.
  image = np.repeat([[0, 0, 0, 9, 9, 9]], 6, axis=0)
  kernel = [[-1, 0, 1]] * 3
  np.testing.assert_array_equal(convolve(image, kernel), [[0, 27, 27, 0]] * 4)
  np.testing.assert_array_equal(convolve(image.T, kernel), np.zeros((4, 4)))  # a horizontal edge: nothing


def test_same_padding_sees_zeros_outside():
  expected = [[4, 6, 4], [6, 9, 6], [4, 6, 4]]  # how many of the nine pixels are inside
  np.testing.assert_array_equal(convolve(np.ones((3, 3)), np.ones((3, 3)), 'SAME'), expected)


def test_pools_of_a_4x4_image():
  x = jnp.asarray([[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]])[None, :, :, None]
  np.testing.assert_array_equal(ops.max_pool(x, (2, 2), (2, 2))[0, :, :, 0], [[4, 8], [12, 16]])
  np.testing.assert_array_equal(ops.avg_pool(x, (2, 2), (2, 2))[0, :, :, 0], [[2.5, 6.5], [10.5, 14.5]])


def test_global_average_of_6x6x3_is_1x1x3():
  x = jnp.stack([jnp.full((6, 6), 4.0), jnp.arange(36.0).reshape(6, 6), jnp.zeros((6, 6)).at[0, 0].set(9)], -1)[None]
  y = ops.avg_pool(x, (6, 6))
  assert y.shape == (1, 1, 1, 3)
  np.testing.assert_allclose(y[0, 0, 0], [4, 17.5, 0.25])
  np.testing.assert_allclose(x.mean((1, 2)), y[:, 0, 0])


def test_softmax_and_one_hot_of_three_logits():
  probabilities = nn.softmax(jnp.log(jnp.asarray([1.0, 2.0, 5.0])))
  np.testing.assert_allclose(probabilities, [0.125, 0.25, 0.625], rtol=1e-14)
  np.testing.assert_array_equal(nn.one_hot(probabilities.argmax(), 3), [0, 0, 1])
