"""The ingredients of the CIFAR-10 speed record, each against an independent computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from cnn_jax import config as config_lib
from cnn_jax import evaluate, metrics, models, muon, optim, plan, start, state
from cnn_jax.data import Dataset, Split, augment
from cnn_jax.step import train_step
from tests.helpers import ROOT

SHAPE = (14, 14, 3)
WHITEN, GROUP = 'whiten', 'group1_conv1'


def _config(**fields):
  config = config_lib.load(str(ROOT / 'configs' / 'cifar10_speedrun.py'))
  small = {'model.features': (4, 8), 'model.dtype': 'float32', 'batch_size': 8, 'epochs': 4}
  return config_lib.vary(config, small | fields)


def _images(n=64, seed=0):
  noise = np.random.default_rng(seed).normal(size=(n, *SHAPE))
  smooth = noise + np.roll(noise, 1, axis=1) + np.roll(noise, 1, axis=2)  # neighbours are correlated
  return np.clip(127 + 40 * smooth, 0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def made():
  return plan.make_plan(_config(), 64, 10, SHAPE)


# The first layer ------------------------------------------------------------------------------


def test_the_first_layer_whitens_patches(made):
  """By SciPy: patches through the filters have the covariance of independent numbers of variance about one."""
  config = _config()
  dataset = Dataset('a', 'b', tuple('0123456789'), *(Split(_images(), np.zeros(64, np.int32)),) * 3)
  params = start.from_data(made, made.state, dataset, config).params
  kernel = np.asarray(params[WHITEN]['kernel'], np.float64)
  assert kernel.shape == (2, 2, 3, 24)
  np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
  images = np.asarray(augment.normalize(_images(), config_lib.statistics(config.data)), np.float64)
  patches = np.stack(
    [images[:, i : i + 2, j : j + 2].reshape(64, 12) for i in range(13) for j in range(13)], axis=1
  ).reshape(-1, 12)
  moments = patches.T @ patches / len(patches)
  variances, _ = scipy.linalg.eigh(moments)
  outputs = patches @ kernel[..., :12].reshape(12, 12)
  expected = np.diag(variances / (variances + 5e-4))
  np.testing.assert_allclose(outputs.T @ outputs / len(outputs), expected, atol=2e-3)
  for layer in set(params) - {WHITEN}:
    jax.tree.map(np.testing.assert_array_equal, params[layer], made.state.params[layer])
  np.testing.assert_array_equal(params[WHITEN]['bias'], made.state.params[WHITEN]['bias'])


def test_weights_of_another_run_stay_as_they_are(made):
  dataset = Dataset('a', 'b', tuple('0123456789'), *(Split(_images(), np.zeros(64, np.int32)),) * 3)
  config = _config().copy_and_resolve_references()
  config.init_from = 'somewhere'
  assert start.from_data(made, made.state, dataset, config) is made.state
  assert start.from_data(made, made.state, dataset, _config(**{'model.name': 'cnn'})) is made.state


def test_the_first_filters_of_a_group_pass_on_their_inputs(made):
  kernel = np.asarray(models.init(_model(features=(32, 8)), jax.random.key(1), SHAPE)['params'][GROUP]['kernel'])
  images = np.random.default_rng(0).normal(size=(2, 7, 7, 24)).astype(np.float32)
  found = jax.lax.conv_general_dilated(
    images, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision='highest'
  )
  np.testing.assert_allclose(found[..., :24], images, rtol=1e-6)
  bound = 1 / np.sqrt(9 * 24)
  assert np.abs(kernel[..., 24:]).max() <= bound
  assert np.abs(kernel[..., 24:]).max() > 0.98 * bound
  narrow = np.asarray(made.state.params['group1_conv2']['kernel'])
  np.testing.assert_array_equal(narrow[1, 1], np.eye(4))
  assert np.count_nonzero(narrow) == 4
  head = np.asarray(made.state.params['head']['kernel'])
  assert np.std(head, ddof=1) == pytest.approx(1, rel=1e-5)


def _model(**fields):
  config = models.default_config('airbench')
  config.update(fields)
  return models.create(config, 10)


def test_the_network_by_hand(made):
  """In NumPy: whitening, GELU and the head, which reads maxima; the next test has the groups."""
  params, images = made.state.params, np.random.default_rng(2).normal(size=(2, *SHAPE)).astype(np.float32)
  variables = {'params': params, 'batch_stats': made.state.batch_stats}
  _, maps = made.model.apply(variables, images)
  patches = np.stack([images[:, i : 13 + i, j : 13 + j] for i in range(2) for j in range(2)], axis=3)
  x = np.einsum('nhwpc,pcf->nhwf', patches, params[WHITEN]['kernel'].reshape(4, 3, 24)) + params[WHITEN]['bias']
  np.testing.assert_allclose(maps['stage1'], _gelu(x), atol=1e-5)
  assert set(params['group1_norm1']) == {'bias'}
  np.testing.assert_allclose(maps['pooled'], np.asarray(maps['stage3']).max((1, 2)) / 8, rtol=1e-5)
  np.testing.assert_allclose(maps['logits'], maps['pooled'] @ params['head']['kernel'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('convs', 'residual'), [(2, False), (2, True), (3, False), (3, True)])
def test_a_group_by_hand(convs, residual):
  """With running statistics other than 0 and 1; the residual connection joins before the last activation."""
  model = _model(features=(6, 8), convs_per_group=convs, residual=residual)
  rng = np.random.default_rng(4)
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) / 5 if x.ndim == 4 else rng.uniform(0.5, 2, x.shape), jnp.float32),
    models.init(model, jax.random.key(0), SHAPE),
  )
  _, maps = model.apply(variables, rng.normal(size=(2, *SHAPE)).astype(np.float32))

  def layer(x, i):
    x = jax.lax.conv_general_dilated(
      x, variables['params'][f'group1_conv{i}']['kernel'], (1, 1), 'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision='highest',
    )  # fmt: skip
    x = np.asarray(x, np.float64)
    if i == 1:  # the last row and column of 13 have no partner
      x = x[:, :12, :12].reshape(2, 6, 2, 6, 2, -1).max((2, 4))
    statistics = variables['batch_stats'][f'group1_norm{i}']
    return (x - statistics['mean']) / np.sqrt(statistics['var']) + variables['params'][f'group1_norm{i}']['bias']

  x = first = _gelu(layer(maps['stage1'], 1))
  for i in range(2, convs):
    x = _gelu(layer(x, i))
  last = layer(x, convs)
  np.testing.assert_allclose(maps['stage2'], _gelu(last + first if residual else last), atol=1e-4)


def _gelu(x):
  """The approximation by tanh (Hendrycks and Gimpel, arXiv 1606.08415)."""
  return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


# The optimizer --------------------------------------------------------------------------------


def _newton_schulz(gradient):
  """With one row per filter, as published, in float64."""
  x = gradient.reshape(-1, gradient.shape[-1]).T.astype(np.float64)
  x = x / np.linalg.norm(x)
  x = x if x.shape[0] <= x.shape[1] else x.T
  for _ in range(3):
    gram = x @ x.T
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
  x = x if x.shape[0] == gradient.shape[-1] else x.T
  return x.T.reshape(gradient.shape)


@pytest.mark.parametrize('shape', [(3, 3, 5, 8), (1, 1, 3, 8)])
def test_newton_schulz_steps_by_hand(shape):
  gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  tx = muon.orthogonalized_momentum(0.6, nesterov=True)
  trees = {'a': jnp.asarray(gradient), 'b': jnp.asarray(2 * gradient), 'c': jnp.ones((3, 3, 2, 2))}
  found, _ = tx.update(trees, tx.init(trees))
  expected = _newton_schulz(gradient)
  for name in 'ab':  # half precision has two to three digits
    assert np.linalg.norm(found[name] - expected) < 0.06 * np.linalg.norm(expected)


def test_steps_of_the_optimizer_by_hand():
  """Two steps in float64: filters are rescaled and orthogonalised; head and biases have rates and a decay of their own."""
  config = _config().optimizer
  rng = np.random.default_rng(1)
  layers = {
    WHITEN: {'kernel': (2, 2, 3, 24), 'bias': (24,)},
    GROUP: {'kernel': (3, 3, 24, 4)},
    'group1_norm1': {'bias': (4,)},
    'head': {'kernel': (8, 10), 'bias': (10,)},
  }

  def draw(scale):
    return {a: {b: (scale * rng.normal(size=s)).astype(np.float32) for b, s in x.items()} for a, x in layers.items()}

  params, stages = draw(1), {WHITEN: 1, GROUP: 2, 'group1_norm1': 2, 'head': 3}
  stages = {layer: dict.fromkeys(values, stages[layer]) for layer, values in params.items()}
  steps_per_epoch, total = 2, 8  # so the first bias is trained for six steps
  schedule = config_lib.load(str(ROOT / 'configs' / 'cifar10_speedrun.py')).schedule
  rate = optim.make_schedule(schedule, config.learning_rate, total, steps_per_epoch)
  tx = optim.make_optimizer(config, rate, stages, 0, steps_per_epoch)
  assert optim.needs_stages(config)
  found, opt_state = jax.tree.map(jnp.asarray, params), tx.init(params)
  expected = jax.tree.map(lambda x: x.astype(np.float64), params)
  momenta = jax.tree.map(np.zeros_like, expected)
  for step in range(2):
    gradients = draw(0.1)
    updates, opt_state = tx.update(gradients, opt_state, found)
    found = jax.tree.map(jnp.add, found, updates)
    for layer, values in expected.items():
      for name, p in values.items():
        g = gradients[layer][name].astype(np.float64)
        if layer == GROUP:
          momenta[layer][name] = m = 0.6 * momenta[layer][name] + g
          p *= 2 / np.linalg.norm(p)  # the root of 4 features
          p -= 0.24 * (1 - step / total) * _newton_schulz(g + 0.6 * m)
        elif (name == 'bias') != (layer == 'head'):
          peak = 0.67 if name == 'kernel' else 0.053
          g = g + 4e-3 / peak * p
          momenta[layer][name] = m = 0.85 * momenta[layer][name] + g
          p -= peak * (1 - step / (6 if layer == WHITEN else total)) * (g + 0.85 * m)
  for layer, values in expected.items():
    tolerance = 1e-2 if layer == GROUP else 1e-5  # half precision
    jax.tree.map(lambda a, b, t=tolerance: np.testing.assert_allclose(a, b, rtol=t, atol=t), found[layer], values)
  np.testing.assert_array_equal(found[WHITEN]['kernel'], params[WHITEN]['kernel'])
  np.testing.assert_array_equal(found['head']['bias'], params['head']['bias'])  # the published network has none


def test_the_bias_of_the_head_does_not_move_the_logits(made):
  """A few steps on one batch lower the loss and leave the bias, whose gradient is a sum over the batch, as it is.

  With the rate of the other biases it moved the logits of all images by tens, back and forth.
  """
  batch = {'images': jnp.asarray(_images(8)), 'labels': jnp.arange(8) % 3, 'positions': jnp.arange(8)}
  step = jax.jit(
    jax.vmap(
      lambda s: train_step(s, batch, jax.random.key(0), **made.step.keywords),
      axis_name='batch', in_axes=None, out_axes=None, axis_size=1,
    )
  )  # fmt: skip
  trained, losses = made.state, []
  for _ in range(6):
    trained, measured = step(trained)
    losses.append(float(measured['loss']) / 8)
  np.testing.assert_array_equal(trained.params['head']['bias'], np.zeros(10))
  assert max(losses) < 2 * np.log(10)
  assert losses[-1] < losses[0]


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lion', 'muon', 'muon_sgd'])
@pytest.mark.parametrize('whitening', [True, False])
def test_no_optimizer_changes_the_whitening_filters(name, whitening):
  """Neither by a gradient nor by weight decay, momentum or a norm that is restored; random filters are trained."""
  fields = {'optimizer.name': name, 'optimizer.first_stage_epochs': 0.0, 'model.whitening': whitening}
  made = plan.make_plan(_config(**fields), 64, 10, SHAPE)
  before, opt_state = made.state.params, made.state.opt_state
  after = before
  for _ in range(2):
    updates, opt_state = made.tx.update(jax.tree.map(jnp.ones_like, after), opt_state, after)
    after = jax.tree.map(jnp.add, after, updates)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  assert moved.pop('head') == {'kernel': True, 'bias': name != 'muon_sgd'}
  assert moved.pop(WHITEN) == {'kernel': not whitening, 'bias': True}
  assert all(jax.tree.leaves(moved))


def test_the_first_bias_stops_after_its_epochs():
  config = _config().optimizer
  params = {'first': {'bias': jnp.ones(2)}, 'norm': {'bias': jnp.ones(2)}}
  tx = optim.make_optimizer(config, lambda _: config.learning_rate, {'first': {'bias': 1}, 'norm': {'bias': 2}}, 0, 1)
  opt_state = tx.init(params)
  moved = []
  for _ in range(5):
    updates, opt_state = tx.update(params, opt_state, params)
    moved.append(jax.tree.map(lambda x: bool(x[0]), updates))
  assert [step['first']['bias'] for step in moved] == [True, True, True, False, False]
  assert all(step['norm']['bias'] for step in moved)


# Data, loss and test --------------------------------------------------------------------------


def test_epochs_mirror_the_halves_in_turn():
  images, key = _images(400), jax.random.key(3)
  epochs = np.array([augment.alternate(key, images, jnp.int32(epoch)) for epoch in range(4)])
  assert 150 < epochs[0].sum() < 250
  np.testing.assert_array_equal(epochs[1], ~epochs[0])
  np.testing.assert_array_equal(epochs[2:], epochs[:2])
  order = np.random.default_rng(0).permutation(400)
  np.testing.assert_array_equal(augment.alternate(key, images[order], jnp.int32(0)), epochs[0][order])
  assert np.mean(epochs[0] == np.asarray(augment.alternate(jax.random.key(4), images, jnp.int32(0)))) < 0.65
  config = _config(**{'augment.shift': 0})
  statistics = config_lib.statistics(config.data)
  found, _ = augment.augment(config.augment, statistics, key, jnp.arange(400), images, jnp.zeros((400, 10)), epochs[0])
  expected = np.where(epochs[0][:, None, None, None], images[:, :, ::-1], images)
  np.testing.assert_allclose(found, augment.normalize(expected, statistics), rtol=1e-6)


def test_training_mirrors_by_the_epoch(made):
  """The step gets the epoch right: the images of the same draw differ between epochs by the mirroring alone."""
  seen = []

  def prepare(key, positions, images, labels, mirror):
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), mirror)
    return jnp.zeros(images.shape, jnp.float32), labels

  batch = {'images': jnp.asarray(_images(8)), 'labels': jnp.zeros(8, jnp.int32), 'positions': jnp.arange(8)}
  step = jax.vmap(
    lambda s: train_step(s, batch, jax.random.key(0), **(made.step.keywords | {'prepare': prepare})),
    axis_name='batch', in_axes=None, axis_size=1,
  )  # fmt: skip
  run = jax.jit(lambda number: step(made.state.replace(step=number))[1]['loss'])
  for number in (0, 7, 8):  # eight steps per epoch
    run(jnp.int32(number))
  jax.effects_barrier()
  np.testing.assert_array_equal(seen[0], seen[1])
  np.testing.assert_array_equal(seen[2].ravel(), ~seen[0].ravel())


def test_the_loss_is_the_sum_of_smoothed_cross_entropies():
  logits = np.random.default_rng(0).normal(size=(6, 10))
  labels = np.arange(6)
  log_p = scipy.special.log_softmax(logits, axis=1)
  by_hand = -(0.8 * log_p[labels, labels] + 0.2 * log_p.mean(1)).sum()
  smoothed = metrics.smooth_labels(jax.nn.one_hot(labels, 10), 0.2)
  assert float(metrics.cross_entropy(jnp.asarray(logits), smoothed).sum()) == pytest.approx(by_hand, rel=1e-5)


def test_the_gradient_of_the_sum_is_that_of_the_mean_times_the_batch(made):
  batch = {'images': jnp.asarray(_images(8)), 'labels': jnp.arange(8), 'positions': jnp.arange(8)}
  assert made.step.keywords['loss_factor'] == 8
  norms = [
    jax.vmap(
      lambda s, factor=factor: train_step(s, batch, jax.random.key(0), **(made.step.keywords | {'loss_factor': factor})),
      axis_name='batch', in_axes=None, axis_size=1,
    )(made.state)[1]['gradient_norm'][0]
    for factor in (1, 8)
  ]  # fmt: skip
  assert float(norms[1]) == pytest.approx(8 * float(norms[0]), rel=1e-3)


def test_the_schedule_by_hand():
  config = _config()
  found = optim.make_schedule(config.schedule, 0.24, 200, 25)
  np.testing.assert_allclose([found(0), found(50), found(199)], [0.24, 0.18, 0.24 / 200], rtol=1e-5)


def test_views_by_hand(made):
  config = _config()
  views, statistics = evaluate.run_views(config), config_lib.statistics(config.data)
  images, variables = _images(3), state.eval_variables(made.state)
  found = evaluate.compute_logits(made.model, variables, images, statistics, 3, views)

  def logits(x):
    return np.asarray(evaluate.eval_step(made.model, variables, x, statistics), np.float64)

  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='reflect')
  shifted = [padded[:, i : i + 14, i : i + 14] for i in (0, 2)]

  def both(x):
    return (logits(x) + logits(x[:, :, ::-1])) / 2

  expected = both(images) / 2 + (both(shifted[0]) + both(shifted[1])) / 4
  np.testing.assert_allclose(found, scipy.special.log_softmax(expected, axis=1), rtol=1e-4, atol=1e-5)
  settings = _config(**{'augment.shift': 0}).augment
  assert evaluate.tta_views(settings, 'diagonal').weights == (0.5, 0.5)
