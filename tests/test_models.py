"""The contract of a network, for each network; and that no other code names its layers."""

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_jax import UsageError, inspect, models
from cnn_jax.ops import convolution
from tests.helpers import ROOT
from tests.networks import SIDES, SMALL, small_network

pytestmark = pytest.mark.usefixtures('quick_compilation')

CLASSES, BATCH = 5, 6
# The contract of a network that is like another one but for its layers is checked by `make faults`.
NETWORKS = [pytest.param(name, marks=pytest.mark.faults) if name == 'convnext' else name for name in models.names()]
EACH_NETWORK = pytest.mark.parametrize('name', NETWORKS)
# Fields that change which layers there are, for the search for their names.
VARIANTS = {
  'airbench': [{'residual': True, 'convs_per_group': 3}],
  'cnn': [{'residual': True, 'convs_per_block': 2}],
  'resnet': [{'depth': 18}, {'depth': 50}],
  'efficientnet': [],
  'convnext': [],
}


@pytest.fixture(scope='module', autouse=True)
def stock_depthwise():
  """XLA's own depthwise convolution compiles in a fraction of the time; tests/test_depthwise.py compares the two."""

  def stock(images, kernel, strides, pads, precision):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(
      images, kernel, strides, pads,
      dimension_numbers=numbers, precision=precision, feature_group_count=images.shape[-1],
    )  # fmt: skip

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(convolution, 'depthwise_conv', stock)
    yield


@pytest.fixture(scope='module', params=NETWORKS)
def computed(request, quick_compilation):
  """A network, the shape of its images, random variables for it, and its logits and maps for random images."""
  model, shape = small_network(request.param, CLASSES), _shape(request.param)
  variables = _random_variables(model, shape)
  return model, shape, variables, *_apply(model)(variables, _images(shape))


def _shape(name):
  return (SIDES[name], SIDES[name], 3)


def _images(shape):
  return np.random.default_rng(1).normal(size=(BATCH, *shape)).astype(np.float32)


def _random_variables(model, shape):
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), models.init_shapes(model, shape))
  variables['batch_stats'] = jax.tree.map(lambda x: np.abs(x) + np.float32(0.5), variables['batch_stats'])
  return variables


def _apply(model):
  """The compiled network. Its maps keep their order, although `jit` returns dicts in the order of their sorted keys."""

  @jax.jit
  def compute(variables, images):
    logits, maps = model.apply(variables, images, train=False)
    names[:] = maps
    return logits, list(maps.values())

  names = []

  def apply(variables, images):
    logits, values = compute(variables, images)
    return logits, dict(zip(names, values, strict=True))

  return apply


def test_every_network_is_tested_small():
  assert set(SMALL) == set(VARIANTS) == set(models.names())
  assert 'layers' not in models.names()
  with pytest.raises(UsageError, match='must be one of: airbench, cnn'):
    models.default_config('layers')


def test_maps_come_in_order(computed):
  _, _, _, logits, maps = computed
  stages = models.stage_names(maps)
  assert len(stages) > 1
  assert list(maps) == [*stages, 'pooled', 'logits']
  sides = [maps[stage].shape[1:3] for stage in stages]
  assert all(len(maps[stage].shape) == 4 and maps[stage].shape[0] == BATCH for stage in stages)
  assert sides == sorted(sides, reverse=True)
  assert maps['pooled'].ndim == 2
  assert logits.shape == (BATCH, CLASSES)
  assert logits.dtype == jnp.float32
  np.testing.assert_array_equal(maps['logits'], logits)


def test_shapes_are_those_that_are_computed(computed):
  model, shape, variables, _, maps = computed
  assert {name: shape.shape[1:] for name, shape in models.map_shapes(model, shape).items()} == {
    name: x.shape[1:] for name, x in maps.items()
  }
  initial = models.init(model, jax.random.key(0), shape)
  assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, variables)
  assert {x.dtype for x in jax.tree.leaves(initial)} == {jnp.dtype('float32')}


def test_the_head_is_the_last_layer_and_linear(computed):
  model, shape, variables, logits, maps = computed
  head = variables['params']['head']
  assert set(head) == {'kernel', 'bias'}
  np.testing.assert_allclose(
    np.asarray(maps['pooled']) @ inspect.head_kernel(variables) + head['bias'], logits, rtol=1e-4, atol=1e-4
  )
  assert inspect.layer_table(model, shape)[-1].path == ('head',)


def test_the_mean_of_a_class_activation_map_and_the_bias_are_the_logit(computed):
  model, _, variables, logits, maps = computed
  if type(model).__name__ in ('Airbench', 'ConvNeXt'):  # the head reads maxima; there is a norm after the pooling
    assert inspect.averaged_stages(maps) == []
    return
  averaged = inspect.averaged_stages(maps)
  evidence = inspect.class_activation_maps(
    variables, {name: maps[name] for name in averaged}, np.tile(np.arange(CLASSES), (BATCH, 1))
  )
  assert evidence.shape == (BATCH, CLASSES, *maps[averaged[0]].shape[1:3])
  bias = variables['params']['head']['bias']
  np.testing.assert_allclose(evidence.mean((2, 3)) + bias, logits, rtol=1e-4, atol=1e-4)


@EACH_NETWORK
def test_parameters_belong_to_stages_in_order(name):
  model = small_network(name, CLASSES)
  layers = inspect.layer_table(model, _shape(name))
  num_stages = len(models.stage_names(models.map_shapes(model, _shape(name))))
  stages = [layer.stage for layer in layers]
  assert stages == sorted(stages)
  assert set(stages) == set(range(1, num_stages + 2))
  assert [layer.path for layer in layers if layer.stage > num_stages] == [('head',)]
  params = models.init_shapes(model, _shape(name))['params']
  assert sum(layer.parameters for layer in layers) == models.num_parameters(params)
  assert f'{models.num_parameters(params):,}' in inspect.summary(model, _shape(name)).splitlines()[-1]


@EACH_NETWORK
def test_bfloat16_is_the_dtype_of_the_arithmetic_alone(name):
  model = small_network(name, CLASSES, dtype='bfloat16')
  maps = models.map_shapes(model, _shape(name))
  assert {maps[stage].dtype for stage in models.stage_names(maps)} == {jnp.dtype('bfloat16')}
  assert maps['logits'].dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(models.init_shapes(model, _shape(name)))} == {jnp.dtype('float32')}


@EACH_NETWORK
@pytest.mark.parametrize('side', [32, 40])
def test_compiled_logits_in_bfloat16_are_those_in_float32(name, side):
  # Of several calls, because what a program reads from memory that nobody has written is not the same in each.
  shape = (side, side, 3)
  exact, rounded = (small_network(name, CLASSES, dtype=dtype) for dtype in ('float32', 'bfloat16'))
  variables = _random_variables(exact, shape)
  images = jax.random.normal(jax.random.key(3), (64, *shape))
  expected = models.infer(exact, variables, images)[0]
  logits = jax.jit(lambda variables, images: models.infer(rounded, variables, images)[0])
  for _ in range(3):
    found = logits(variables, images)
    assert jnp.abs(found - expected).max() < 0.1 * jnp.abs(expected).max()


@EACH_NETWORK
def test_frozen_stages_have_no_gradient_and_keep_their_statistics(name):
  frozen = 1
  model = small_network(name, CLASSES, frozen_stages=frozen)
  stages = models.parameters_by_stage(model, _shape(name))
  variables = _random_variables(model, _shape(name))
  images = _images(_shape(name))

  def loss(params):
    (logits, _), updated = model.apply(
      variables | {'params': params}, images, train=True, positions=jnp.arange(BATCH), mutable=['batch_stats'],
      rngs={'dropout': jax.random.key(2)},
    )  # fmt: skip
    return jnp.square(logits).sum(), updated['batch_stats']

  one_device = jax.vmap(jax.grad(loss, has_aux=True), axis_name='batch', in_axes=None, axis_size=1)
  gradients, statistics = jax.jit(one_device)(variables['params'])
  by_stage = {stage: [] for stage in jax.tree.leaves(stages)}
  for stage, gradient in zip(jax.tree.leaves(stages), jax.tree.leaves(gradients), strict=True):
    by_stage[stage].append(float(jnp.abs(gradient).max()))
  for stage, largest in by_stage.items():
    assert max(largest) > 0 if stage > frozen else max(largest) == 0, stage
  # A norm's statistics belong to the stage of its parameters.
  for path, before in jax.tree_util.tree_leaves_with_path(variables['batch_stats']):
    after, stage = statistics, stages
    for key in path:
      after, stage = after[key.key], stage.get(key.key, stage)
    assert np.array_equal(before, after[0]) == (min(jax.tree.leaves(stage)) <= frozen), path


def test_a_network_computes_the_same_from_the_maps_of_any_stage_on(computed):
  model, _, variables, logits, maps = computed
  *before, _ = models.stage_names(maps)
  inputs = [*(maps[stage] for stage in before), maps['pooled']]

  @jax.jit
  def compute(variables, inputs):
    return [model.clone(skipped_stages=i).apply(variables, x) for i, x in enumerate(inputs, 1)]

  for i, (found, found_maps) in enumerate(compute(variables, inputs), 1):
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    assert set(found_maps) == set(maps) - set(models.stage_names(maps)[:i]), i


def test_training_with_fixed_statistics(computed):
  """The networks compute as in evaluation but for what they drop, which depends on the position, and keep statistics."""
  model, shape, variables, logits, maps = computed
  model = model.clone(fixed_statistics=True) if variables['batch_stats'] else model
  frozen = max(1, len(models.stage_names(maps)) // 2)
  drops = {name: 0.0 for name in ('dropout', 'drop_path') if hasattr(model, name)}

  @jax.jit
  def compute(images, positions):
    options = {
      'train': True,
      'positions': positions,
      'rngs': {'dropout': jax.random.key(2)},
      'mutable': ['batch_stats'],
    }
    (all_logits, _), statistics = model.apply(variables, images, **options)
    (plain, _), _ = model.clone(**drops).apply(variables, images, **options)
    part = model.clone(frozen_stages=frozen)
    (from_image, kept), _ = part.apply(variables, images, **options)
    (from_maps, _), _ = part.clone(skipped_stages=frozen).apply(variables, kept[f'stage{frozen}'], **options)
    return all_logits, statistics, plain, from_image, from_maps

  images, positions = _images(shape), np.arange(BATCH, dtype=np.int32)
  found, statistics, plain, from_image, from_maps = compute(images, positions)
  jax.tree.map(np.testing.assert_array_equal, statistics.get('batch_stats', {}), variables['batch_stats'])
  np.testing.assert_allclose(plain, logits, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(from_maps, from_image, rtol=1e-4, atol=1e-5)
  if drops:
    assert np.abs(found - plain).max() > 1e-3
  # In another order on another device each image loses the same.
  np.testing.assert_allclose(compute(images[::-1], positions[::-1])[0], found[::-1], rtol=1e-4, atol=1e-5)
  if drops:
    assert np.abs(compute(images, positions + 9)[0] - found).max() > 1e-3


@pytest.mark.parametrize('name', ['cnn', 'efficientnet'])
def test_more_frozen_stages_than_there_are_is_an_error(name):
  config = models.default_config(name)
  config.update(SMALL[name])
  models.check_images(config, CLASSES, _shape(name))
  config.frozen_stages = 9
  with pytest.raises(UsageError, match='frozen_stages is 9'):
    models.check_images(config, CLASSES, _shape(name))


def test_images_too_small_are_an_error():
  config = models.default_config('cnn')
  config.features = (4, 4, 4, 4)
  models.check_images(config, CLASSES, (8, 8, 1))
  with pytest.raises(UsageError, match='at least 8 pixels a side, but these have 9x7'):
    models.check_images(config, CLASSES, (9, 7, 1))


# --- names of layers ---


@functools.cache
def layer_names():
  """The names of all layers of all networks but the head, with # for their numbers."""
  names = set()
  for name in models.names():
    for fields in [{}, *VARIANTS[name]]:
      params = models.init_shapes(small_network(name, CLASSES, **fields), _shape(name))['params']
      for path, _ in jax.tree_util.tree_leaves_with_path(params):
        names |= {re.sub(r'\d+', '#', key.key) for key in path[:-1]}
  return names - {'head'}


def named_layers(source, names):
  """The strings of a Python file that are or hold the name of a layer, also as part of a path."""
  tree = ast.parse(source)
  inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.JoinedStr):
      text = ''.join(part.value if isinstance(part, ast.Constant) else '#' for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
      text = node.value
    else:
      continue
    parts = re.split(r"""[/.\[\]'"]""", re.sub(r'\d+', '#', text))
    found += [text for part in parts if part in names]
  return found


def test_the_search_finds_names_of_layers():
  names = layer_names()
  assert {'block#', 'conv#', 'norm#', 'projection', 'stage#_block#', 'stem_conv', 'branch_norm'} <= names
  for source in ("p['block1']", "f'block{i}'", "'block2/conv1/kernel'", "f'{name}.conv{i + 1}'", "'projection'"):
    assert named_layers(source, names), source
  for source in ("'head'", "'model.norm'", "'stage1'", "f'stage{i}'", "'each block of the network'", 'block1'):
    assert not named_layers(source, names), source


def test_no_other_file_names_a_layer():
  names = layer_names()
  found = {}
  for top in ('cnn_jax', 'experiments', 'benchmarks', 'examples', 'configs'):
    for path in sorted((ROOT / top).rglob('*.py')):
      if (ROOT / 'cnn_jax' / 'models') not in path.parents:
        found |= {str(path.relative_to(ROOT)): texts for texts in [named_layers(path.read_text(), names)] if texts}
  assert not found


def test_the_head_of_an_efficientnet_may_read_several_stages():
  model = small_network('efficientnet', CLASSES, pooled_stages=3)
  variables = _random_variables(model, _shape('efficientnet'))
  images = np.random.default_rng(1).normal(size=(BATCH, *_shape('efficientnet'))).astype(np.float32)
  logits, maps = model.apply(variables, images)
  averages = [np.asarray(maps[stage]).mean((1, 2)) for stage in ('stage6', 'stage7', 'stage8')]
  np.testing.assert_allclose(maps['pooled'], np.concatenate(averages, axis=-1), rtol=1e-5, atol=1e-6)
  for skipped, start in ((5, maps['stage5']), (6, maps['stage6']), (8, maps['pooled'])):
    np.testing.assert_allclose(
      model.clone(skipped_stages=skipped).apply(variables, start)[0], logits, rtol=1e-5, atol=1e-5
    )


@EACH_NETWORK
def test_a_head_that_is_initialised_alone_has_the_same_numbers(name):
  model, key = small_network(name, CLASSES), jax.random.key(3)
  whole, head = models.init(model, key, _shape(name)), models.init(model, key, _shape(name), head_only=True)
  assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, head)
  jax.tree.map(np.testing.assert_array_equal, whole['params']['head'], head['params']['head'])
  others = {layer: values for layer, values in head['params'].items() if layer != 'head'}
  assert not any(np.any(x) for x in jax.tree.leaves(others))
