"""What frozen stages compute once: kept maps, and the linear probe that starts the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cnn_jax import config as config_lib
from cnn_jax import frozen, main, models
from cnn_jax.data import Dataset, Split

SHAPE, CLASSES, N = (8, 8, 1), ('a', 'b', 'c'), 24


def _config(**fields):
  config = config_lib.default_config()
  config.batch_size = 8
  config.epochs = 3
  config.schedule.warmup_epochs = 1.0
  config.model.update({'features': (4, 6), 'frozen_stages': 1, 'fixed_statistics': True})
  config.log.update({'report': False, 'tensorboard': False})
  config.data.validation = 0.0
  config.fine_tuning.views = 2
  return config_lib.vary(config, {name.replace('__', '.'): value for name, value in fields.items()})


def _dataset():
  """Images of three classes that differ in brightness."""
  rng = np.random.default_rng(0)
  labels = (np.arange(N) % 3).astype(np.int32)
  images = (60 * labels[:, None, None, None] + rng.integers(0, 100, (N, *SHAPE))).astype(np.uint8)
  split = Split(images, labels)
  return Dataset('shades', 'made', CLASSES, split, Split(images[:0], labels[:0]), split)


def _boundary(**fields):
  config = _config(**fields)
  return frozen.find_boundary(config, models.create(config.model, 3), N, SHAPE, config.epochs)


def test_the_boundary_is_where_the_frozen_stages_end():
  assert _boundary() == frozen.Boundary(1, 'stage1', (4, 4, 4), 2, pytest.approx(2 * N * 64 * 2 / 1e6))
  assert _boundary(model__frozen_stages=2).name == 'pooled'
  assert _boundary(model__frozen_stages=2).shape == (6,)
  assert _boundary(model__frozen_stages=0) is None
  assert _boundary(fine_tuning__views=0) is None


def test_no_more_views_are_kept_than_there_are_epochs_and_memory():
  assert _boundary(fine_tuning__views=9).views == 3
  one = N * 64 * 2 / 1e6
  image_shape, config = (80, 80, 1), _config(fine_tuning__megabytes=1, fine_tuning__views=9, epochs=9)
  model = models.create(config.model, 3)
  assert one * 100 < 1
  assert frozen.find_boundary(config, model, N, image_shape, 9).views == int(1 / (100 * one))
  assert frozen.find_boundary(config, model, 1000 * N, image_shape, 9) is None


def test_the_maps_that_are_kept_are_described():
  def line(num_train=N, **fields):
    config = _config(**fields)
    model = models.create(config.model, 3)
    boundary = frozen.find_boundary(config, model, num_train, SHAPE, config.epochs)
    return frozen.describe(config, model, num_train, SHAPE, config.epochs, boundary)

  assert line().startswith('The first 1 stages are frozen: their maps of 2 views of each image are computed once')
  assert 'random weights' in line(fine_tuning__views=0)
  assert line(fine_tuning__views=0, init_from='a/run') == ''
  assert line(fine_tuning__views=0, model__frozen_stages=0) == ''
  assert 'no effect' in line(model__frozen_stages=0)
  few = line(100_000, fine_tuning__megabytes=13)
  assert 'of 1 view of each' in few and 'megabytes is 13; 2 views need 26' in few
  assert 'are not kept' in line(1_000_000, fine_tuning__megabytes=1)


def test_one_view_is_kept_if_its_maps_are_smaller_than_the_images():
  config = _config(model__frozen_stages=2, fine_tuning__megabytes=1)
  model = models.create(config.model, 3)
  assert frozen.find_boundary(config, model, 10**6, SHAPE, 3).views == 1
  assert frozen.find_boundary(_config(fine_tuning__megabytes=1), model, 10**6, SHAPE, 3) is None


def _maps(config, **variables):
  model = models.create(config.model, 3)
  variables = models.init(model, jax.random.key(0), SHAPE)
  boundary = frozen.find_boundary(config, model, N, SHAPE, config.epochs)
  split = _dataset().train
  computed = frozen.compute_maps(model, variables, split, config, jax.random.key(1), boundary)
  return model, variables, split, *computed


def test_the_first_view_is_the_image_and_the_others_are_augmented():
  model, variables, split, maps, features = _maps(_config(augment__flip=True, augment__shift=2))
  assert maps.shape == (2, N, 4, 4, 4) and maps.dtype == np.float16
  assert features.shape == (2, N, 6) and features.dtype == np.float32
  _, expected = model.apply(variables, (split.images - np.float32(127.5)) / np.float32(127.5))
  np.testing.assert_allclose(maps[0], expected['stage1'], rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(features[0], expected['pooled'], rtol=1e-4, atol=1e-5)
  assert np.abs(maps[1].astype(np.float32) - maps[0]).max() > 0.1


def test_without_a_boundary_there_are_features_alone():
  *_, maps, features = _maps(_config(fine_tuning__views=0))
  assert maps.shape == (1, N, 0)
  assert features.shape == (1, N, 6)


def test_training_on_kept_maps_is_training_on_images(tmp_path):
  results = {}
  for views in (0, 1):
    results[views] = main.train_and_evaluate(
      _config(fine_tuning__views=views), tmp_path / str(views), dataset=_dataset()
    )
  assert results[1]['test_loss'] == pytest.approx(results[0]['test_loss'], rel=2e-3)
  assert results[0]['test_loss'] < 1.0  # it has learnt something; by chance it is 1.1


def test_the_probe_is_a_logistic_regression():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(60, 5)) * [1, 2, 3, 0.1, 10] + 7
  labels = (features[:, 0] + rng.normal(size=60) > 7).astype(np.int32) + (features[:, 1] > 8)
  kernel, bias = frozen.fit_probe(features, labels, 3, 1e-2)
  scale = np.sqrt(features.std(0))
  x = (features - features.mean(0)) / scale
  lengths = np.linalg.norm(x, axis=1, keepdims=True)
  reference = LogisticRegression(C=1 / (1e-2 * 60), tol=1e-8, max_iter=10_000).fit(x / lengths, labels)
  expected = x / lengths.mean() @ reference.coef_.T + reference.intercept_
  found = features @ kernel + bias
  centred = [logits - logits.mean(1, keepdims=True) for logits in (found, expected)]
  np.testing.assert_allclose(*centred, atol=2e-2)
  assert (found.argmax(1) == expected.argmax(1)).mean() > 0.95


def test_the_probe_of_features_that_do_not_vary_is_the_prior():
  kernel, bias = frozen.fit_probe(np.ones((4, 3)), np.array([0, 0, 0, 1]), 3, 1e-3)
  assert np.isfinite(kernel).all()
  probabilities = jax.nn.softmax(np.ones(3) @ kernel + bias)
  np.testing.assert_allclose(probabilities, [0.75, 0.25, 0], atol=1e-2)


@pytest.mark.parametrize('fields', [{'loss__class_weights': (1, 1, 5)}, {'data__sampling': 'balanced'}])
def test_the_probe_weights_classes_as_training_does(fields):
  labels = np.array([0] * 8 + [1] * 3 + [2], np.int32)
  features = np.zeros((1, 12, 6), np.float32)
  params = {'head': {'kernel': jnp.zeros((6, 3)), 'bias': jnp.zeros(3)}, 'stem': {'kernel': jnp.ones(2)}}
  probed = frozen.with_probe(
    {'params': params, 'batch_stats': {}}, features, labels, _config(fine_tuning__probe=0.1, **fields)
  )
  shares = jax.nn.softmax(probed['params']['head']['bias'])
  expected = np.array([8, 3, 5]) / 16 if 'loss__class_weights' in fields else np.full(3, 1 / 3)
  np.testing.assert_allclose(shares, expected, atol=1e-2)
  assert probed['params']['stem'] is params['stem']


def test_a_run_starts_from_its_probe_and_only_a_new_one(tmp_path):
  fields = {'fine_tuning__probe': 1e-4, 'optimizer__learning_rate': 1e-6, 'model__frozen_stages': 2}
  result = main.train_and_evaluate(_config(**fields), tmp_path / 'probed', dataset=_dataset())
  assert result['test_accuracy'] == 1.0
  fields['model__head'] = 'conv1x1'
  assert main.train_and_evaluate(_config(**fields), tmp_path / 'conv', dataset=_dataset())['test_accuracy'] == 1.0


def test_a_probe_is_fitted_to_a_bounded_number_of_examples(monkeypatch):
  monkeypatch.setattr(frozen, '_MAX_PROBED', 10)
  chosen = frozen.choose_probed(N, 3)
  assert len(set(chosen.tolist())) == 10 and (np.diff(chosen) > 0).all()
  assert frozen.choose_probed(N, 4).tolist() != chosen.tolist()
  *_, _split, maps, features = _maps(_config(seed=3))
  assert maps.shape[:2] == (2, N) and features.shape[:2] == (1, 10)
  *_, maps, alone = _maps(_config(seed=3, fine_tuning__views=0))
  assert maps.shape[:2] == (1, 10)
  np.testing.assert_allclose(alone, features, rtol=1e-5, atol=1e-6)
