"""The network `cnn`: its variants, its head, and what its parts compute."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import models

pytestmark = pytest.mark.usefixtures('quick_compilation')


def _model(num_classes=10, **fields):
  config = models.default_config('cnn')
  config.update({'features': (4, 8)} | fields)
  return models.create(config, num_classes)


def _init(model, shape=(2, 8, 8, 1), seed=0):
  images = jax.random.normal(jax.random.key(seed), shape)
  return models.init(model, jax.random.key(1), shape[1:]), images


def _logits(model, variables, images, **options):
  return model.apply(variables, images, **options)[0]


def test_the_heads_are_the_same_function():
  dense, conv = _model(head='dense'), _model(head='conv1x1')
  variables, images = _init(dense)
  head = variables['params']['head']
  converted = variables | {'params': variables['params'] | {'head': head | {'kernel': head['kernel'][None, None]}}}
  assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, _init(conv)[0])
  np.testing.assert_allclose(_logits(dense, variables, images), _logits(conv, converted, images), rtol=1e-6, atol=1e-6)


def test_global_average_pooling_by_hand():
  # A 6x6x3 map becomes 1x1x3: each channel's mean.
  maps = np.arange(6 * 6 * 3, dtype=np.float32).reshape(1, 6, 6, 3)
  np.testing.assert_allclose(jnp.mean(maps, axis=(1, 2))[0], [52.5, 53.5, 54.5])
  # In the network: the vector before the head is the mean of the last block's maps.
  model = _model()
  variables, images = _init(model)
  maps = model.apply(variables, images)[1]
  np.testing.assert_allclose(maps['pooled'], maps['stage2'].mean(axis=(1, 2)), rtol=1e-6)


def test_gap_does_not_depend_on_the_image_size():
  model = _model(norm='none')
  small, large = (models.init_shapes(model, shape) for shape in ((8, 8, 1), (40, 24, 1)))
  assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, large)
  # A constant image gives constant maps except at the border, which is padded. The share of the border shrinks, so the
  # logits of growing images converge.
  variables, _ = _init(model)
  logits = [_logits(model, variables, jnp.ones((1, size, size, 1))) for size in (32, 64, 128)]
  assert jnp.abs(logits[2] - logits[1]).max() < 0.6 * jnp.abs(logits[1] - logits[0]).max()


@pytest.mark.parametrize(
  ('norm', 'pool', 'residual', 'activation'),
  [(n, p, r, a) for (n, p, r), a in zip(
    itertools.product(['batch', 'group', 'none'], ['max', 'avg', 'none'], [False, True]),
    itertools.cycle(['relu', 'gelu', 'silu']), strict=False)],
)  # fmt: skip
def test_every_variant_has_the_shapes_it_should(norm, pool, residual, activation):
  model = _model(norm=norm, pool=pool, residual=residual, activation=activation, stride=1 + (pool == 'none'))
  variables, maps = models.init_shapes(model, (9, 7, 3)), models.map_shapes(model, (9, 7, 3))
  assert maps['stage1'].shape == ((1, 9, 7, 4) if pool == 'none' else (1, 4, 3, 4))
  assert maps['stage2'].shape == ((1, 5, 4, 8) if pool == 'none' else (1, 4, 3, 8))
  assert maps['logits'].shape == (1, 10)
  assert bool(variables['batch_stats']) == (norm == 'batch')
  projections = [name for name in ('block1', 'block2') if 'projection' in variables['params'][name]]
  assert projections == (['block1', 'block2'] if residual else [])


def test_a_residual_block_of_zeros_passes_its_input():
  model = _model(features=(4, 4), residual=True, norm='none')
  variables, images = _init(model)
  params = variables['params'] | {'block2': jax.tree.map(jnp.zeros_like, variables['params']['block2'])}
  maps = model.apply({'params': params}, images)[1]
  np.testing.assert_allclose(maps['stage2'], maps['stage1'])


def test_dropout_is_keyed_by_position():
  model = _model(dropout=0.5, norm='none')
  variables, images = _init(model, (4, 8, 8, 1))

  def logits(part):
    positions, rngs = jnp.arange(4)[part], {'dropout': jax.random.key(7)}
    return _logits(model, variables, images[part], train=True, positions=positions, rngs=rngs)

  whole = logits(slice(0, 4))
  np.testing.assert_allclose(whole[2:], logits(slice(2, 4)), rtol=1e-5, atol=1e-6)
  assert not np.allclose(whole, _logits(model, variables, images))


def test_the_flatten_head_depends_on_positions():
  model = _model(aggregate='flatten', pool='none', norm='none')
  variables, _ = _init(model)
  assert variables['params']['head']['kernel'].shape == (8 * 8 * 8, 10)
  image = jnp.zeros((1, 8, 8, 1)).at[0, 2, 2, 0].set(1.0)
  moved = jnp.roll(image, 3, axis=2)
  assert not np.allclose(_logits(model, variables, image), _logits(model, variables, moved))
  gap = _model(pool='none', norm='none')
  variables, _ = _init(gap)
  np.testing.assert_allclose(_logits(gap, variables, image), _logits(gap, variables, moved), rtol=1e-5, atol=1e-6)


def test_softmax_and_one_hot_by_hand():
  probabilities = jax.nn.softmax(jnp.log(jnp.array([1.0, 2.0, 5.0])))
  np.testing.assert_allclose(probabilities, [0.125, 0.25, 0.625], rtol=1e-6)
  np.testing.assert_array_equal(jax.nn.one_hot(jnp.argmax(probabilities), 3), [0, 0, 1])


def test_the_number_of_parameters_by_hand():
  # 3*3*1*32 + 3*3*32*64 + 3*3*64*128, two per channel of each norm, 128*10 + 10.
  params = models.init_shapes(_model(features=(32, 64, 128)), (28, 28, 1))['params']
  assert models.num_parameters(params) == 288 + 18432 + 73728 + 2 * (32 + 64 + 128) + 1290
