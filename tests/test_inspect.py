"""Receptive fields, class activation maps and layers of a network, against values computed by hand."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import inspect, models


def _network(num_classes=2, **fields):
  config = models.default_config('cnn')
  config.update(fields)
  return models.create(config, num_classes)


def _random_variables(model, image_shape, scale=1.0):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (scale * rng.normal(size=x.shape)).astype(x.dtype), models.init_shapes(model, image_shape)
  )


class Unusual(nn.Module):
  """Keeps the contract of a network with layers that the project's own networks do not have."""

  num_classes: int = 2
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, train=False, positions=None):
    maps = {}
    maps['stage1'] = x = nn.Conv(4, (3, 3), padding='VALID', name='valid')(images)
    settings = {'feature_group_count': 4, 'kernel_dilation': 2, 'padding': 'CIRCULAR', 'use_bias': False}
    x = nn.Conv(4, (3, 3), **settings, name='depthwise')(x)
    x = x * self.param('scale', nn.initializers.constant(1e-6), (4,))
    shared = nn.Dense(4, name='shared')
    maps['stage2'] = x = nn.LayerNorm(name='norm')(shared(nn.relu(shared(x))))
    maps['stage3'] = x = x * nn.sigmoid(x.mean((1, 2), keepdims=True))
    maps['pooled'] = x = x.mean((1, 2))
    maps['logits'] = nn.Dense(self.num_classes, name='head')(x)
    return maps['logits'], maps


class Shuffled(nn.Module):
  """Two 3x3 convolutions whose channels are exchanged in pairs between them, which needs their number."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, train=False, positions=None):
    maps = {'stage1': nn.Conv(6, (3, 3))(images)}
    x = maps['stage1'].reshape(*images.shape[:3], 3, 2).swapaxes(3, 4).reshape(*images.shape[:3], 6)
    maps['stage2'] = nn.Conv(6, (3, 3))(x)
    return maps['stage2'].mean((1, 2)), maps


def test_layers_of_an_unusual_network_by_hand():
  layers = {'/'.join(layer.path): layer for layer in inspect.layer_table(Unusual(), (7, 7, 1))}
  # A 7x7 image convolved with a 3x3 kernel gives a 5x5 map.
  assert layers['valid'] == inspect.Layer(('valid',), 'Conv', 1, (3, 3, 1, 4), (5, 5, 4), 3 * 3 * 4 + 4, 2 * 25 * 36)
  # One channel in, one out, four times; circular padding keeps the size.
  depthwise = inspect.Layer(('depthwise',), 'Conv', 2, (3, 3, 1, 4), (5, 5, 4), 36, 2 * 25 * 36)
  assert layers['depthwise'] == depthwise
  # A layer that is called twice has its parameters once.
  assert layers['shared'] == inspect.Layer(('shared',), 'Dense', 2, (4, 4), (5, 5, 4), 4 * 4 + 4, 2 * 2 * 25 * 16)
  assert layers['norm'] == inspect.Layer(('norm',), 'LayerNorm', 2, None, (5, 5, 4), 8, 0)
  assert layers['head'] == inspect.Layer(('head',), 'Dense', 4, (4, 2), (2,), 10, 2 * 4 * 2)
  own = layers['']  # of the network itself
  assert (own.kind, own.stage, own.parameters, own.operations) == ('Unusual', 2, 4, 0)
  assert [layer.parameters for layer in layers.values()] == [40, 36, 20, 8, 10, 4]


def test_receptive_fields_of_an_unusual_network_by_hand():
  fields = inspect.receptive_fields(Unusual(), (31, 25, 2))
  assert fields['stage1'] == (inspect.Field(0, 3, 1),) * 2
  assert fields['stage2'] == (inspect.Field(-2, 7, 1),) * 2  # a 3x3 kernel with holes, over 3x3 pixels: 5 + 2
  assert fields['stage3'] is None  # its gate depends on all pixels
  fields = inspect.receptive_fields(Shuffled(), (9, 9, 1))
  assert fields == {'stage1': (inspect.Field(-1, 3, 1),) * 2, 'stage2': (inspect.Field(-2, 5, 1),) * 2}


def test_receptive_fields_by_hand():
  # A 3x3 convolution adds two pixels times the stride so far. 2x2 pooling adds that stride once, and doubles it.
  fields = inspect.receptive_fields(_network(features=(16, 16, 8, 2)), (28, 28, 1))
  # Of the third map, three places a side, two depend on most of the image. The fourth depends on 38 pixels.
  assert fields == {
    'stage1': (inspect.Field(-1, 4, 2),) * 2,
    'stage2': (inspect.Field(-3, 10, 4),) * 2,
    'stage3': (inspect.Field(-7, 22, 8),) * 2,
    'stage4': None,
  }


def test_rows_and_columns_have_fields_of_their_own():
  fields = inspect.receptive_fields(_network(features=(3, 3), stride=2, pool='none'), (9, 30, 3))
  rows, columns = fields['stage2']
  assert (rows.size, rows.stride) == (columns.size, columns.stride) == (5, 2)
  assert rows.first == -2  # nine rows: one of padding before the strided convolution
  assert columns.first == -1  # thirty columns: all of its padding comes after


def test_a_field_as_large_as_the_image_is_none():
  fields = inspect.receptive_fields(_network(features=(3, 3)), (8, 8, 1))
  assert fields['stage1'] is not None
  assert fields['stage2'] is None


@pytest.mark.parametrize(
  ('kernel_size', 'stride', 'convs', 'pool'), [(3, 2, 1, 'none'), (5, 2, 2, 'avg'), (2, 1, 1, 'avg')]
)
def test_receptive_fields_hold_for_every_place(kernel_size, stride, convs, pool):
  """The gradient of any place of a map is zero outside its field and not at the ends of its field."""
  model = _network(
    features=(3, 3, 3), kernel_size=kernel_size, stride=stride, convs_per_block=convs, pool=pool, norm='none',
    activation='gelu',
  )  # fmt: skip
  size = 37
  variables = _random_variables(model, (size, size, 1), 0.1)  # so small that no activation saturates
  image = np.random.default_rng(1).normal(size=(1, size, size, 1)).astype(np.float32)
  maps = models.map_shapes(model, image.shape[1:])
  gradient = jax.jit(lambda ones: jax.vjp(lambda x: model.apply(variables, x)[1], image)[1](ones)[0])
  for name, field in inspect.receptive_fields(model, image.shape[1:]).items():
    side = maps[name].shape[1]
    for place in (0, side // 2, side - 1) if field else ():
      ones = {other: np.zeros(x.shape, np.float32) for other, x in maps.items()}
      ones[name][0, place, place] = 1
      touched = np.flatnonzero(np.abs(np.asarray(gradient(ones))).sum(axis=(0, 2, 3)))
      first = field[0].first + place * field[0].stride
      assert (touched[0], touched[-1]) == (max(first, 0), min(first + field[0].size, size) - 1), (name, place)


@pytest.mark.parametrize('head', ['dense', 'conv1x1'])
def test_activation_maps_average_to_the_logits(head):
  model = _network(3, features=(8, 16), norm='none', head=head)
  variables = _random_variables(model, (8, 8, 1))
  images = np.random.default_rng(1).normal(size=(5, 8, 8, 1)).astype(np.float32)
  maps = model.apply(variables, images)[1]
  assert inspect.averaged_stages(maps) == ['stage2']
  assert inspect.averaged_stages({name: x[0] for name, x in maps.items()}) == ['stage2']
  evidence = inspect.class_activation_maps(variables, {'stage2': maps['stage2']}, np.tile(np.arange(3), (5, 1)))
  assert evidence.shape == (5, 3, 4, 4)
  bias = variables['params']['head']['bias']
  np.testing.assert_allclose(evidence.mean(axis=(2, 3)) + bias, maps['logits'], rtol=1e-5, atol=1e-4)


def test_a_head_that_reads_something_else_has_no_activation_maps():
  stage = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
  mean = stage.mean(axis=(1, 2))
  assert inspect.averaged_stages({'stage1': stage, 'pooled': mean}) == ['stage1']
  for pooled in (stage.reshape(2, -1), mean / np.linalg.norm(mean, axis=1, keepdims=True), stage.max(axis=(1, 2))):
    assert inspect.averaged_stages({'stage1': stage, 'pooled': pooled}) == []  # flattened, normed, maximum


def test_evidence_of_several_stages_averages_to_the_logits():
  rng = np.random.default_rng(0)
  shapes = {'stage1': (2, 9, 9, 5), 'stage2': (2, 7, 5, 3), 'stage3': (2, 4, 3, 4)}
  maps = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  pooled = np.concatenate([maps['stage2'].mean((1, 2)), maps['stage3'].mean((1, 2))], axis=1)
  assert inspect.averaged_stages(maps | {'pooled': pooled}) == ['stage2', 'stage3']
  head = {'kernel': rng.normal(size=(7, 6)).astype(np.float32)}
  averaged = {name: maps[name] for name in ('stage2', 'stage3')}
  evidence = inspect.class_activation_maps({'params': {'head': head}}, averaged, np.tile(np.arange(6), (2, 1)))
  assert evidence.shape == (2, 6, 7, 5)
  np.testing.assert_allclose(evidence.mean((2, 3)), pooled @ head['kernel'], rtol=1e-5, atol=1e-5)


def test_layers_by_hand():
  model, shape = _network(4, features=(8, 16), residual=True, norm='group'), (12, 16, 3)
  layers = {
    layer.path[-1] if layer.path[0] == 'head' else '/'.join(layer.path): layer
    for layer in inspect.layer_table(model, shape)
  }
  first, second = layers['block1/conv1'], layers['block2/conv1']
  # 12x16 RGB, 3x3 kernels, 8 then 16 channels, 2x2 pooling between, 4 classes; norms bring the biases.
  assert (first.kind, first.kernel, first.output) == ('Conv', (3, 3, 3, 8), (12, 16, 8))  # before pooling
  assert first.operations == 2 * 12 * 16 * 9 * 3 * 8
  assert (second.stage, second.output) == (2, (6, 8, 16))
  assert second.operations == 2 * 6 * 8 * 9 * 8 * 16
  assert layers['block2/projection'].parameters == 8 * 16
  assert (layers['block1/norm1'].kind, layers['block1/norm1'].parameters) == ('GroupNorm', 16)
  head = layers['head']
  assert (head.stage, head.parameters, head.operations) == (3, 16 * 4 + 4, 2 * 16 * 4)
  assert list(layers)[-1] == 'head'
  params = models.init_shapes(model, shape)['params']
  assert sum(layer.parameters for layer in layers.values()) == models.num_parameters(params)


def test_the_first_convolution_is_the_one_that_reads_the_image():
  model = _network(features=(4, 6), norm='none', pool='none')
  variables = _random_variables(model, (5, 5, 1))
  images = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2].set(1)
  maps, kernel, response = inspect.maps_and_first_convolution(model, variables, images)
  assert list(maps) == ['stage1', 'stage2', 'pooled', 'logits']
  assert kernel.shape == (3, 3, 1, 4)
  # The response to a single bright pixel is the kernel, mirrored, and the bias.
  bias = variables['params']['block1']['conv1']['bias']
  np.testing.assert_allclose(response[0, 1:4, 1:4] - bias, kernel[::-1, ::-1, 0], atol=1e-5)
