"""The experiments that train run, resume, and make of data and configs what they say; their results are in their READMEs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import UsageError, evaluate
from cnn_jax.config import default_config
from cnn_jax.data import Dataset, Split
from cnn_jax.model import create_model, feature_maps
from cnn_jax.report import receptive_field
from configs import mnist_best, mnist_small
from experiments import runs
from experiments.depth_and_receptive_field import run as depth
from experiments.head import run as head
from experiments.label_noise import run as label_noise
from experiments.learning_rate_batch_size import run as learning_rate_batch_size
from experiments.mnist_accuracy import run as mnist_accuracy
from experiments.small_model import run as small_model
from experiments.training_set_size import run as training_set_size

EXPERIMENTS = {
  'mnist_accuracy': (mnist_accuracy, ['--config.model.convs_per_block=1']),
  'small_model': (small_model, ['--config.model.convs_per_block=1']),
  'head': (head, []),
  'depth': (depth, ['--images=200']),
  'training_set_size': (training_set_size, ['--sizes=128,256', '--steps=4']),
  'label_noise': (label_noise, ['--size=128']),
}
QUICK = [
  '--config.data.source=bundled', '--config.data.name=digits', '--config.data.test=0.2', '--config.epochs=1',
  '--config.schedule.warmup_epochs=0.5', '--config.batch_size=64', '--config.model.features=(4, 8)',
]  # fmt: skip


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_an_experiment_runs_and_resumes(name, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(label_noise, 'SHARES', (0.0, 0.4))
  module, more = EXPERIMENTS[name]
  arguments = [*QUICK, *more, '--seeds=2', f'--workdir={tmp_path / "runs"}']
  module.main([*arguments, f'--json={tmp_path / "found.json"}', f'--plot={tmp_path / "plot.png"}'])
  first = capsys.readouterr().out
  assert ' ± ' in first
  assert '| --- |' in first
  assert json.loads((tmp_path / 'found.json').read_text())
  assert (tmp_path / 'plot.png').stat().st_size > 10_000
  module.main(arguments)
  again = capsys.readouterr().out
  assert 'is complete' in again
  assert 'epoch 1/' not in again
  assert again.splitlines()[-1] == first.splitlines()[-1]


@pytest.mark.parametrize('module', [mnist_accuracy, small_model])
def test_candidates_are_compared_without_the_test(module, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(module, 'CANDIDATES', {'as it is': {}, 'the other': {'optimizer.learning_rate': 0.3}})
  module.main([*QUICK, '--config.model.convs_per_block=1', '--select=1', '--seeds=1', f'--workdir={tmp_path}'])
  told = capsys.readouterr().out
  assert '| the other |' in told
  results = list(tmp_path.rglob('result.json'))
  assert len(results) == 2
  assert not any('test_accuracy' in json.loads(result.read_text()) for result in results)


def test_the_sweeps_choose_on_validation(tmp_path, capsys):
  more = ['--trials=2', '--seeds=1', f'--workdir={tmp_path / "runs"}', f'--plot={tmp_path / "plot.png"}']
  learning_rate_batch_size.main([*QUICK[3:5], QUICK[6], '--config.model.convs_per_block=1', *more])
  assert 'Chosen: batch size' in capsys.readouterr().out
  assert (tmp_path / 'plot.png').stat().st_size > 10_000
  results = {path: json.loads(path.read_text()) for path in tmp_path.rglob('result.json')}
  assert {('test_accuracy' in result, result['seed'], 'chosen' in str(path)) for path, result in results.items()} == {
    (False, 0, False),
    (True, 1, True),
  }


@pytest.mark.parametrize(
  'module', [*(module for module, _ in EXPERIMENTS.values()), learning_rate_batch_size], ids=lambda m: m.__name__
)
def test_help_says_what_it_is(module, capsys):
  with pytest.raises(SystemExit) as stopped:
    module.main(['--help'])
  assert stopped.value.code == 0
  said = capsys.readouterr().out
  assert f'python -m {module.__name__}' in said
  assert '--seeds' in said


def test_the_chosen_cell():
  def runs_of(*pairs):
    return [{'accuracy': accuracy, 'loss': loss} for accuracy, loss in pairs]

  found = {
    (16, 0.1): runs_of((0.9, 0.4), (0.8, 0.5)),
    (32, 0.1): runs_of((0.8, 0.3), (0.9, 0.4)),  # as accurate, with less loss
    (64, 0.1): runs_of((1.0, 0.1), (0.0, np.inf)),  # the best seed of all, but the other one diverged
  }
  assert learning_rate_batch_size.best(found) == (32, 0.1)


# Data -------------------------------------------------------------------------------------------


def _dataset(n=1000):
  random = np.random.default_rng(0)
  labels = random.choice(4, n, p=(0.1, 0.3, 0.3, 0.3)).astype(np.int32)
  images = np.broadcast_to(np.arange(n)[:, None, None, None] % 256, (n, 2, 2, 1)).astype(np.uint8)
  images[:, 0, 0, 0] = labels
  split = Split(images, labels)
  return Dataset('numbers', '', ('a', 'b', 'c', 'd'), split, split, split)


def test_a_subset_is_balanced_seeded_and_nested():
  dataset = _dataset()
  few, more, others = runs.subset(dataset, 40, 0), runs.subset(dataset, 200, 0), runs.subset(dataset, 40, 1)
  assert np.bincount(few.train.labels).tolist() == [10, 10, 10, 10]
  np.testing.assert_array_equal(few.train.images, more.train.images[:40])
  np.testing.assert_array_equal(few.train.images[:, 0, 0, 0], few.train.labels)
  assert not np.array_equal(few.train.images, others.train.images)
  assert few.test is dataset.test
  assert len({few.name, more.name, others.name, dataset.name}) == 4
  # A class that is used up leaves the rest to the others; at last all images are there, once.
  assert np.bincount(runs.subset(dataset, 600, 0).train.labels).min() == np.bincount(dataset.train.labels).min()
  every = runs.subset(dataset, 1000, 0).train
  assert sorted(map(bytes, every.images)) == sorted(map(bytes, dataset.train.images))
  with pytest.raises(UsageError, match='1000 training images, which is less than 1001'):
    runs.subset(dataset, 1001, 0)


@pytest.mark.parametrize('share', [0.0, 0.1, 0.4, 1.0])
def test_wrong_labels_are_an_exact_share(share):
  labels = np.repeat(np.arange(10, dtype=np.int32), 500)
  spoiled = label_noise.wrong_labels(labels, share, 10, 0)
  assert np.sum(spoiled != labels) == round(share * 5000)
  assert spoiled.dtype == np.int32
  assert spoiled.min() >= 0 and spoiled.max() < 10
  np.testing.assert_array_equal(spoiled, label_noise.wrong_labels(labels, share, 10, 0))


def test_wrong_labels_are_any_of_the_others():
  labels = np.repeat(np.arange(10, dtype=np.int32), 5000)
  spoiled = label_noise.wrong_labels(labels, 1.0, 10, 3)
  counts = np.bincount(10 * labels + spoiled, minlength=100).reshape(10, 10)
  assert np.all(np.diag(counts) == 0)
  # 5000 / 9 of each, with a standard deviation of 22.
  others = counts[~np.eye(10, dtype=bool)]
  assert np.all(np.abs(others - 5000 / 9) < 6 * 22)
  few, many = (label_noise.wrong_labels(labels, share, 10, 3) for share in (0.1, 0.4))
  wrong = few != labels
  np.testing.assert_array_equal(few[wrong], many[wrong])
  assert not np.array_equal(few, label_noise.wrong_labels(labels, 0.1, 10, 4))


def test_shifted_images_are_filled_with_black():
  image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
  assert head.shifted(image, 1, 0)[0, :, :, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
  assert head.shifted(image, 0, -1)[0, :, :, 0].tolist() == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]
  assert head.shifted(image, -2, 1)[0, :, :, 0].tolist() == [[0, 7, 8], [0, 0, 0], [0, 0, 0]]
  np.testing.assert_array_equal(head.shifted(image, 0, 0), image)


def test_canvases_hold_the_whole_image():
  images = np.random.default_rng(0).integers(1, 256, (50, 4, 4, 1)).astype(np.uint8)
  middle = head.on_canvas(images, 8)
  np.testing.assert_array_equal(middle[:, 2:6, 2:6], images)
  anywhere = head.on_canvas(images, 8, seed=0)
  for canvases in (middle, anywhere):
    assert canvases.shape == (50, 8, 8, 1)
    np.testing.assert_array_equal(canvases.sum((1, 2, 3)), images.sum((1, 2, 3)))
  corners = {tuple(np.argwhere(canvas[:, :, 0])[0]) for canvas in anywhere}
  assert {row for row, _ in corners} == {column for _, column in corners} == set(range(5))
  np.testing.assert_array_equal(anywhere, head.on_canvas(images, 8, seed=0))


# Networks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('convs', [1, 2])
@pytest.mark.parametrize('blocks', [1, 2, 3])
def test_the_receptive_field_is_where_the_gradient_is(blocks, convs):
  config = default_config().model
  # Smooth and without statistics, so that every pixel of the field has a gradient.
  config.update(features=blocks * (3,), convs_per_block=convs, norm='none', activation='gelu', pool='avg')
  model, size = create_model(config, 2), 64
  variables = model.init(jax.random.key(0), jnp.zeros((1, size, size, 1)))
  image = jax.random.normal(jax.random.key(1), (1, size, size, 1))

  def place(image):
    maps = feature_maps(model, variables, image)[f'block{blocks}']
    return maps[0, maps.shape[1] // 2, maps.shape[2] // 2].sum()

  rows = np.flatnonzero(np.abs(np.asarray(jax.grad(place)(image))[0, :, :, 0]).sum(axis=1))
  assert len(rows) == rows[-1] - rows[0] + 1 == depth.field_side(config, size, blocks)
  assert receptive_field(config, size, blocks, size // 2 ** (blocks - 1) // 2) == (rows[0], rows[-1])


def test_receptive_fields_of_the_experiment():
  model = default_config().model
  sides = []
  for blocks in (1, 2, 3, 4):
    model.features = blocks * (8,)
    sides.append(depth.field_side(model, 28, blocks))
  assert sides == [3, 8, 18, 38]


def test_patches_are_cut_where_the_channel_is_excited():
  config = default_config()
  config.model.update(features=(1, 1), norm='none')
  model = create_model(config.model, 2)
  variables = jax.tree.map(np.array, model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
  variables['params']['block1']['conv1']['kernel'][:] = 0
  variables['params']['block1']['conv1']['kernel'][1, 1] = 1  # the first block's maps are the image, pooled
  run = evaluate.Run(config, model, variables, ('a', 'b'), (8, 8, 1), '', 0, None)
  # Dark but for one pixel each, brighter from image to image.
  images = np.zeros((64, 8, 8, 1), np.uint8)
  for i in range(64):
    images[i, i // 8, i % 8] = 150 + i
  (patches,) = depth.strongest_patches(run, images, 1)
  assert patches.shape == (9, 4, 4)
  np.testing.assert_allclose(np.max(patches, axis=(1, 2)), np.arange(213, 204, -1) / 255, rtol=1e-6)
  # The pixel lies in the middle 2x2 that are pooled, and the last one in the corner of the image.
  assert patches[0, 2, 2] == np.float32(213 / 255)
  assert np.all(patches[0, 3] == depth.OUTSIDE) and np.all(patches[0, :, 3] == depth.OUTSIDE)
  assert np.all(patches[0, :3, :3] >= 0)


def _parameters(config):
  model = create_model(config.model, 10)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1))))
  return sum(p.size for p in jax.tree.leaves(shapes['params']))


@pytest.mark.parametrize(
  ('module', 'config', 'limit'),
  [(small_model, mnist_small, small_model.LIMIT), (mnist_accuracy, mnist_best, 1_000_000)],
  ids=['small_model', 'mnist_accuracy'],
)
def test_every_candidate_is_valid_and_small_enough(module, config, limit):
  for name, fields in module.CANDIDATES.items():
    assert _parameters(runs.vary(config.get_config(), fields)) < limit, name


# Configs and tables -----------------------------------------------------------------------------


def test_fields_are_overridden_on_a_copy():
  config = default_config()
  made = runs.override(config, ['--config.model.features=(4, 8)', '--config.data.name=digits', '--config.epochs=3'])
  assert (tuple(made.model.features), made.data.name, made.epochs) == ((4, 8), 'digits', 3)
  assert config.epochs != 3


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--epochs=3', "'--epochs=3' is not an argument"),
    ('--config.epoch=3', 'Did you mean "epochs"'),
    ('--config.epochs=three', 'config.epochs: .*three'),
    ('--config.epochs=0', 'config.epochs is 0'),
  ],
)
def test_a_wrong_field_is_one_line(argument, message):
  with pytest.raises(UsageError, match=message):
    runs.override(default_config(), [argument])


@pytest.mark.parametrize(('size', 'epochs'), [(100, 600), (3000, 20), (60_000, 1)])
def test_every_size_takes_the_same_steps(size, epochs):
  config = training_set_size.take_steps(training_set_size._recipe(), size, 600)
  assert config.epochs == epochs
  assert config.schedule.warmup_epochs * (size // config.batch_size) == pytest.approx(120)


def test_steps_that_are_no_epochs_are_refused():
  with pytest.raises(UsageError, match='600 steps with batches of 100 are not a whole number of epochs of 54000'):
    training_set_size.take_steps(training_set_size._recipe(), 54_000, 600)


def test_mean_and_standard_deviation():
  assert runs.mean_std([0.99, 0.97]) == '98.00 ± 1.41 %'
  assert runs.mean_std([0.5]) == '50.00 %'
  assert runs.table(['a', 'b'], [['1', '2']]) == '| a | b |\n| --- | --- |\n| 1 | 2 |'


def test_what_was_measured_is_kept(tmp_path):
  assert runs.kept(tmp_path / 'found.json', lambda: {'accuracy': 0.5}) == {'accuracy': 0.5}
  assert runs.kept(tmp_path / 'found.json', lambda: {'accuracy': 0.6}) == {'accuracy': 0.5}
