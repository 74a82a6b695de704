"""Conversion to ONNX, primitive by primitive: ONNX Runtime computes what JAX does, for batches of any size."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_jax import UsageError, ops

onnx = pytest.importorskip('onnx', reason='ONNX export needs the extra onnx')
onnxruntime = pytest.importorskip('onnxruntime', reason='checking ONNX files needs the extra onnx')

from cnn_jax.jaxpr_to_onnx import TABLE, convert  # noqa: E402

_RNG = np.random.default_rng(0)
_SHAPE = (7, 8, 4)
_IMAGES = _RNG.standard_normal((5, *_SHAPE)).astype(np.float32)
_NUMBERS = _RNG.standard_normal((3, 3, 4, 6)).astype(np.float32)
_NHWC = ('NHWC', 'HWIO', 'NHWC')


def _conv(x, kernel=_NUMBERS, strides=(1, 1), padding='SAME', **options):
  options.setdefault('dimension_numbers', _NHWC)
  return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _window(x, start, operation, window, strides, padding, **options):
  return lax.reduce_window(x, np.float32(start), operation, window, strides, padding, **options)


def _group_norm(x):
  groups = x.reshape(*x.shape[:3], 2, 2)
  centred = groups - groups.mean((1, 2, 4), keepdims=True)
  return (centred * lax.rsqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-6)).reshape(x.shape)


def _squeeze_excite(x):
  weights = jax.nn.sigmoid(x.mean((1, 2)) @ _NUMBERS[0, 0, :, :4])
  return x * weights[:, None, None, :]


def _layer_norm(x):
  return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def _attention(x):
  x = x.reshape(x.shape[0], -1, 2, 2)
  weights = jax.nn.softmax(jnp.einsum('bqhd,bkhd->bhqk', x, x), axis=-1)
  return jnp.einsum('bhqk,bkhd->bqhd', weights, x).reshape(x.shape[0], -1, 4)


@jax.custom_jvp
def _custom_jvp(x):
  return jnp.sin(x)


@jax.custom_vjp
def _custom_vjp(x):
  return jnp.cos(x)


_custom_jvp.defjvp(lambda primals, tangents: (_custom_jvp(*primals), tangents[0]))
_custom_vjp.defvjp(lambda x: (_custom_vjp(x), None), lambda _, g: (g,))

# Each case maps float32 (batch, 7, 8, 4) to (batch, ...).
_CASES = {
  # elementwise
  'arithmetic': lambda x: (x + 2) * x - x / 3 + (1 - x) / (2 + x * x) - (-x),
  'abs_sign_floor_ceil': lambda x: jnp.abs(x) + jnp.sign(x) * jnp.floor(3 * x) - jnp.ceil(2 * x),
  'round': lambda x: jnp.round(2 * x),
  'exp_log': lambda x: jnp.log(jnp.exp(x) + 1) + jnp.expm1(x) + jnp.log1p(jnp.abs(x)) + jnp.exp2(x),
  'trigonometry': lambda x: jnp.sin(x) + jnp.cos(x) + jnp.tan(x / 4) + jnp.tanh(x),
  'roots': lambda x: jnp.sqrt(jnp.abs(x)) + lax.rsqrt(1 + jnp.square(x)),
  'powers': lambda x: x**2 + x**3 + x**5 + (2 + jnp.abs(x)) ** -2 + jnp.abs(x) ** 1.5 + lax.integer_pow(x, 0),
  'remainder': lambda x: lax.rem(4 * x, jnp.full_like(x, 1.5)),
  'error_function': lambda x: lax.erf(x) + lax.erfc(x / 2),
  'activations': lambda x: nn.relu(x) + nn.silu(x) + nn.gelu(x) + nn.softplus(x) + nn.leaky_relu(x) + nn.elu(x),
  'exact_gelu': lambda x: nn.gelu(x, approximate=False),
  'hard_activations': lambda x: nn.hard_swish(4 * x) + nn.hard_sigmoid(x) + nn.relu6(8 * x) + jnp.clip(x, -0.5, 0.4),
  'clamp': lambda x: lax.clamp(np.float32(-0.5), x, np.float32(0.7)),
  'maximum': lambda x: jnp.maximum(x, 0.1) + jnp.minimum(x, -0.2) + jnp.maximum(x, -x),
  'comparisons': lambda x: jnp.where((x > 0.5) | ((x <= 0) & (x >= -0.5)), x, 0) + (x < 1) * 1.0,
  'logic': lambda x: jnp.where(~((x == 0) ^ (x != jnp.abs(x))), 1.0, 2.0),
  'select_constants': lambda x: jnp.where(x > 0, jnp.ones_like(x), jnp.zeros_like(x)),
  'casts': lambda x: (3 * x).astype(jnp.int32).astype(jnp.float32),
  # shapes
  'per_channel': lambda x: x * _NUMBERS[0, 0, :, 0] + _NUMBERS[0, 1, :, 0],
  'transpose': lambda x: _conv(x).transpose(0, 3, 2, 1) * 2,
  'flatten': lambda x: _conv(x).reshape(x.shape[0], -1),
  'split_and_merge_axes': lambda x: _conv(x).reshape(-1, 7, 4, 2, 6).sum(3) + _conv(x).reshape(-1, 7, 8, 3, 2)[:, :, :4, 0, :1],
  'merge_with_batch': lambda x: (x.reshape(-1, 4) @ _NUMBERS[0, 0]).reshape(-1, 7, 8, 6),
  'new_axes': lambda x: x[:, :, :, None, :, None].squeeze(3)[..., 0],
  'slices': lambda x: _conv(x)[:, 1:6:2, ::3, 2:],
  'one_row': lambda x: x[:, 2, -1],
  'split': lambda x: jnp.concatenate(jnp.split(_conv(x), 3, axis=-1)[::-1], axis=-1),
  'concatenate': lambda x: jnp.concatenate([x, _conv(x), jnp.ones((*x.shape[:3], 1))], axis=3),
  'class_token': lambda x: jnp.concatenate([jnp.broadcast_to(_NUMBERS[:1, 0], (len(x), 1, 4, 6)), _conv(x)[:, :, 0, None]
                                            .repeat(4, axis=2)], axis=1),
  'broadcast': lambda x: jnp.broadcast_to(x[:, :, :1], x.shape).reshape(x.shape[0], -1),
  'broadcast_constant': lambda x: jnp.broadcast_to(jnp.arange(3.0), (x.shape[0], 3)) + 0 * x[:, 0, 0, :3],
  'pad': lambda x: jnp.pad(_conv(x), ((0, 0), (1, 2), (0, 3), (2, 0)), constant_values=0.5),
  # products, reductions and windows
  'dense': lambda x: x.mean((1, 2)) @ _NUMBERS[0, 0] + _NUMBERS[0, 0, 0],
  'dense_on_maps': lambda x: nn.gelu(_conv(x) @ _NUMBERS[0, 0].T) @ _NUMBERS[0, 0],
  'several_contractions': lambda x: jnp.tensordot(x, _NUMBERS[:1, 0].repeat(8, 0), axes=((2, 3), (0, 1))),
  'several_columns': lambda x: jnp.tensordot(x, _NUMBERS, axes=((3,), (2,))),
  'attention': _attention,
  'reductions': lambda x: _conv(x).sum(1) + x.max(3, keepdims=True).min(1) + x[:, :2].prod((1,)).sum(-1, keepdims=True),
  'softmax': lambda x: jax.nn.softmax(x.reshape(x.shape[0], -1)) + jax.nn.log_softmax(x.sum((1, 2, 3)).reshape(-1, 1)),
  'layer_norm': lambda x: _layer_norm(_conv(x)),
  'group_norm': _group_norm,
  'squeeze_excite': _squeeze_excite,
  'conv_strided': lambda x: _conv(x, strides=(2, 2)),
  'conv_explicit_padding': lambda x: _conv(x, strides=(2, 1), padding=((1, 2), (0, 3))),
  'conv_dilated': lambda x: _conv(x, padding=((2, 2), (2, 2)), rhs_dilation=(2, 2)),
  'conv_depthwise': lambda x: _conv(x, _NUMBERS[:, :, :1, :4], feature_group_count=4, strides=(2, 2)),
  'conv_grouped': lambda x: _conv(x, _NUMBERS[:, :, :2], feature_group_count=2),
  'conv_even': lambda x: _conv(x, _NUMBERS[:2, :2], strides=(2, 2)),
  'conv_channels_first': lambda x: lax.conv(x.transpose(0, 3, 1, 2), _NUMBERS.transpose(3, 2, 0, 1), (1, 1), 'VALID'),
  'conv_one_dimension': lambda x: lax.conv_general_dilated(x[:, 0], _NUMBERS[0], (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')),
  'conv_kernel_of_images': lambda x: _conv(x) + _conv(x, _NUMBERS + 1.0),
  'conv_of_the_project': lambda x: ops.conv_max_pool(x, _NUMBERS, (1, 1), 'SAME', dimension_numbers=_NHWC),
  'max_pool_padded': lambda x: nn.max_pool(_conv(x), (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))),
  'max_pool_of_negative_numbers': lambda x: nn.max_pool(-1 - jnp.abs(x), (3, 3), strides=(2, 2), padding='SAME'),
  'max_pool_dilated': lambda x: _window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), 'VALID', window_dilation=(1, 2, 3, 1)),
  'max_pool_channels_first': lambda x: _window(x, -np.inf, lax.max, (1, 1, 3, 2), (1, 1, 2, 2), 'VALID'),
  'avg_pool': lambda x: nn.avg_pool(_conv(x), (3, 3), strides=(2, 2), padding='SAME'),
  'avg_pool_without_padding_in_it': lambda x: nn.avg_pool(x, (3, 3), strides=(2, 2), padding='SAME', count_include_pad=False),
  'avg_pool_of_tiles': lambda x: ops.avg_pool(_conv(x), (2, 2), (2, 2)),
  'avg_pool_of_rows': lambda x: x.reshape(-1, 7, 4, 2, 4).mean(3),
  # control
  'inlined': lambda x: jax.jit(_custom_jvp)(x) + jax.checkpoint(_custom_vjp)(x) + lax.stop_gradient(x),
  'platform': lambda x: lax.platform_dependent(x, cpu=lambda x: lax.sort(x) * 0 + x + 2, default=lambda x: x + 2),
  'constant_branch': lambda x: lax.cond(np.bool_(True), lambda x: x + 1, lambda x: lax.cumsum(x, 1), x),
  'barrier': lambda x: sum(lax.optimization_barrier((x, 2 * x))),
  'unused': lambda x: (x + 1, lax.sort(x))[0],
  'no_images': lambda x: jnp.ones((x.shape[0], 2)),
  'identity': lambda x: x,
  'folded_constants': lambda x: x * jnp.sort(jnp.asarray(_NUMBERS[0, 0, :, 0])) + jnp.arange(4) ** 2,
}  # fmt: skip


def _session(model):
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  options.log_severity_level = 3
  return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])


def _operators(model):
  return [node.op_type for node in model.graph.node]


@pytest.fixture(scope='module')
def expected():
  """What JAX computes in each case, by a single program, which compiles faster than many."""
  return jax.jit(lambda x: {name: function(x) for name, function in _CASES.items()})(_IMAGES)


@pytest.mark.parametrize('name', _CASES)
def test_onnx_computes_what_jax_does(name, expected):
  session = _session(convert(_CASES[name], _SHAPE, np.float32, 'x', 'y'))
  for n in (1, 5):
    (found,) = session.run(['y'], {'x': _IMAGES[:n]})
    rows = np.asarray(expected[name][:n])
    assert found.dtype == rows.dtype and found.shape == rows.shape
    np.testing.assert_allclose(found, rows, rtol=1e-5, atol=1e-5)


def test_every_primitive_of_the_table_has_a_case():
  reached = {'copy', 'copy_p', 'name', 'add_any'}  # what JAX makes of them does not reach the converter from a function

  def collect(jaxpr):
    for equation in jaxpr.eqns:
      reached.add(equation.primitive.name)
      for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, 'eqns')):
        if hasattr(value, 'eqns'):
          collect(getattr(value, 'jaxpr', value))

  for function in _CASES.values():
    collect(jax.make_jaxpr(function)(_IMAGES).jaxpr)
  assert set(TABLE) <= reached


@pytest.mark.parametrize(
  ('function', 'named'),
  [
    (lambda x: lax.cumsum(x, 1), 'cumsum'),
    (lambda x: lax.fori_loop(0, 3, lambda _, x: 2 * x, x), 'while|scan'),
    (lambda x: lax.cond(x[0, 0, 0, 0] > 0, jnp.sin, jnp.cos, x), 'slice'),
    (lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), 'reduce_sum'),
    (lambda x: x - x.mean(0), 'reduce_sum'),
    (lambda x: x.max((0, 1)), 'reduce_max'),
    (lambda x: x[:2], 'slice'),
    (lambda x: jnp.concatenate([x, x]), 'concatenate'),
    (lambda x: jnp.pad(x, ((1, 0), (0, 0), (0, 0), (0, 0))), 'pad'),
    (lambda x: lax.pad(x, np.float32(0), ((0, 0, 0), (-1, 0, 0), (0, 0, 0), (0, 0, 0))), 'pad'),
    (lambda x: x.transpose(1, 2, 3, 0) @ jnp.ones((x.shape[0], 2)), 'dot_general'),
    (lambda x: x[:, 0, 0] @ x[:, 0, 0].T, 'dot_general'),
    (lambda x: x + jnp.arange(x.shape[0], dtype=np.float32)[:, None, None, None], 'iota'),
    (lambda x: _conv(x, padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)), 'conv_general_dilated'),
    (lambda x: _window(x, -np.inf, lax.max, (1, 2, 1, 2), (1, 1, 1, 1), 'VALID'), 'reduce_window_max'),
    (lambda x: _window(x, 0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), 'VALID', window_dilation=(1, 2, 2, 1)), 'reduce_window'),
    (lambda x: lax.select_n(x.astype(jnp.int32), x, x, x), 'select_n'),
    (lambda x: x.astype(jnp.int32) & 3, 'and'),
    (lambda x: lax.round(x), 'round'),
  ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(function, named):
  with pytest.raises(UsageError, match=rf'the JAX primitive ({named}).*\.stablehlo'):
    convert(function, _SHAPE, np.float32)


def test_uint8_images_go_straight_into_a_cast():
  def function(x):
    return jnp.concatenate([x.astype(jnp.float32), jnp.zeros((len(x), *_SHAPE))], axis=-1)

  model = convert(function, _SHAPE)
  users = [node.op_type for node in model.graph.node if 'images' in node.input]
  assert users == ['Cast'] and 'Shape' in _operators(model)
  images = np.arange(3 * 7 * 8 * 4, dtype=np.uint8).reshape(3, *_SHAPE)
  np.testing.assert_array_equal(_session(model).run(None, {'images': images})[0], function(images))


def test_no_shape_holds_the_size_of_the_batch():
  empty = np.zeros((0, *_SHAPE), np.float32)
  for name in ('broadcast', 'merge_with_batch', 'no_images', 'class_token', 'group_norm'):
    assert _session(convert(_CASES[name], _SHAPE, np.float32, 'x', 'y')).run(None, {'x': empty})[0].shape[0] == 0
  model = convert(_CASES['flatten'], _SHAPE, np.float32)
  dims = model.graph.output[0].type.tensor_type.shape.dim
  assert (dims[0].dim_param, dims[1].dim_value) == ('batch', 7 * 8 * 6)


def test_images_are_transposed_once_on_the_way_through_convolutions():
  def function(x):
    for _ in range(3):
      x = nn.relu(_conv(x, _NUMBERS[..., :4])) + x * _NUMBERS[0, 0, :, 0]
    return nn.max_pool(x, (2, 2), strides=(2, 2)).mean((1, 2))

  model = convert(lambda x: function(_conv(2 * x - _NUMBERS[0, 0, :, 1])[..., :4]), _SHAPE, np.float32, 'x', 'y')
  operators = _operators(model)
  assert operators[:4] == ['Transpose', 'Mul', 'Sub', 'Conv'] and operators.count('Transpose') == 1
  expected = function(_conv(2 * _IMAGES - _NUMBERS[0, 0, :, 1])[..., :4])
  np.testing.assert_allclose(_session(model).run(None, {'x': _IMAGES})[0], expected, rtol=1e-4, atol=1e-4)


_SCALE, _SHIFT = np.float32([2, 0.5, 3, 1, 4, 5]), np.arange(6, dtype=np.float32)


def _norm(x, scale=_SCALE):
  return (x - _SHIFT / 3) * scale + _SHIFT


@pytest.mark.parametrize(
  ('function', 'operators'),
  [
    (lambda x: _norm(_conv(x)), ['Conv']),
    (lambda x: _norm(_conv(x) + 1) / 3, ['Conv']),
    (lambda x: ops.relu6(_norm(_conv(x))), ['Conv', 'Clip']),
    (lambda x: _norm(nn.max_pool(_conv(x), (2, 2), (2, 2))), ['Conv', 'MaxPool']),
    (lambda x: _norm(nn.max_pool(_conv(x), (2, 2), (2, 2)), -_SCALE), ['Conv', 'MaxPool', 'Mul', 'Add']),
    (lambda x: _norm(ops.avg_pool(_conv(x), (2, 2), (2, 2)), -_SCALE), ['Conv', 'Slice', 'AveragePool']),
    # An average over padding and shifts do not commute, and the sum is used without the shift too.
    (lambda x: _norm(nn.avg_pool(_conv(x), (3, 3), padding='SAME')), ['Conv', 'AveragePool', 'Sub', 'Mul', 'Add']),
    (lambda x: _conv(x) + (_conv(x) + _SHIFT), ['Conv', 'Conv', 'Add']),
    (lambda x: (lambda y: y * (y + _SHIFT))(_conv(x)), ['Conv', 'Add', 'Mul']),
    (lambda x: _SHIFT - _conv(x), ['Conv', 'Sub']),
    (lambda x: _conv(x) * _NUMBERS[0, 0, 0, 0] + _RNG.standard_normal((7, 8, 1)), ['Conv', 'Add']),
  ],
)
def test_norms_become_part_of_convolutions(function, operators):
  function = functools.partial(lambda f, x: f(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2), function)
  images = np.ascontiguousarray(_IMAGES.transpose(0, 3, 1, 2))  # channels first, so that no transposes are needed
  state = _RNG.bit_generator.state
  model = convert(function, images.shape[1:], np.float32, 'x', 'y')
  assert _operators(model) == operators
  _RNG.bit_generator.state = state
  np.testing.assert_allclose(
    _session(model).run(None, {'x': images})[0], np.asarray(function(images)), rtol=1e-5, atol=2e-5
  )
