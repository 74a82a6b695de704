"""The experiments train, resume, and do to data and configs what their pages claim; their results are in the READMEs."""

import json

import jax
import numpy as np
import pytest

from cnn_jax import UsageError, inspect, models
from cnn_jax import config as config_lib
from cnn_jax.config import default_config
from cnn_jax.run import Run
from experiments.depth_and_receptive_field import run as depth
from experiments.head import run as head
from experiments.label_noise import run as label_noise
from experiments.learning_rate_batch_size import run as learning_rate_batch_size
from experiments.mnist_accuracy import run as mnist_accuracy
from experiments.small_model import run as small_model
from experiments.training_set_size import run as training_set_size
from tests.helpers import call_command

pytestmark = pytest.mark.usefixtures('quick_compilation')

SMALL = ['--config.model.features=(4,)', '--config.model.convs_per_block=1', '--config.model.norm=none']
QUICK = [
  '--config.data.source=bundled', '--config.data.name=digits', '--config.data.test=0.2', '--config.epochs=1',
  '--config.schedule.warmup_epochs=0.5', '--config.batch_size=64', *SMALL,
]  # fmt: skip
# Each with the arguments that make it quick, and the rows of results that it then has.
EXPERIMENTS = {
  mnist_accuracy: (['--seeds=2'], 2),
  small_model: (['--seeds=2'], None),
  head: (['--seeds=1'], 2 * 9 + 5),
  depth: (['--seeds=1', '--images=200', '--config.model.features=(4, 8)'], 2),
  training_set_size: (['--seeds=1', '--sizes=128,256', '--steps=4'], 2 * 2),
  label_noise: (['--seeds=1', '--size=128'], 2 * 2),
}


@pytest.mark.parametrize('module', EXPERIMENTS, ids=lambda module: module.__name__)
def test_an_experiment_runs_and_resumes(module, tmp_path, monkeypatch):
  monkeypatch.setattr(label_noise, 'SHARES', (0.0, 0.4))
  more, rows = EXPERIMENTS[module]
  arguments = [module.__name__, *QUICK, *more, f'--workdir={tmp_path / "runs"}']
  done = call_command(*arguments, f'--output={tmp_path / "output"}')
  assert done.returncode == 0, done.stderr
  assert '| --- |' in done.stdout
  assert (' ± ' in done.stdout) == ('--seeds=2' in more)
  found = json.loads((tmp_path / 'output' / 'results.json').read_text())
  assert found['dataset'].startswith('Digits')
  assert found['commit'] and found['versions']['jax'] == jax.__version__
  if rows:
    assert len(found['measurements']) == rows
  if module is depth:  # 3 for a convolution; pooling adds 1 and a second convolution two strides of 2
    assert [one['receptive_field'] for one in found['measurements']] == [3, 8]
  assert (tmp_path / 'output' / 'figure.png').stat().st_size > 10_000
  again = call_command(*arguments)
  assert 'is complete' in again.stdout
  assert 'epoch 1/' not in again.stdout
  assert again.stdout[again.stdout.index('| --- |') :] == done.stdout[done.stdout.index('| --- |') :]


@pytest.mark.parametrize(
  ('module', 'flags', 'candidates', 'name', 'num_validation'),
  [
    (mnist_accuracy, [], 'CANDIDATES', 'selection', 239),
    (mnist_accuracy, ['--longer'], 'LONGER_CANDIDATES', 'longer_selection', 239),
    (small_model, [], 'CANDIDATES', 'selection', 143),
    (small_model, ['--longer'], 'LONGER_CANDIDATES', 'longer_selection', 239),
  ],
)
def test_candidates_are_compared_without_the_test(
  module, flags, candidates, name, num_validation, tmp_path, monkeypatch
):
  monkeypatch.setattr(module, candidates, {'as it is': {'optimizer.learning_rate': 0.03}})
  more = ['--select=1', '--seeds=1', f'--workdir={tmp_path / "runs"}', f'--output={tmp_path / "output"}', *flags]
  done = call_command(module.__name__, *QUICK, *more)
  assert done.returncode == 0, done.stderr
  assert '| **as it is** |' in done.stdout
  (result,) = (json.loads(path.read_text()) for path in tmp_path.rglob('result.json'))
  assert 'test_accuracy' not in result
  selection = json.loads((tmp_path / 'output' / 'results.json').read_text())[name]
  assert selection['num_validation'] == result['num_validation'] == num_validation
  assert selection['candidates'][0]['validation_accuracy']['values'] == [result['validation_accuracy']]


@pytest.mark.parametrize('module', [mnist_accuracy, small_model], ids=lambda module: module.__name__)
@pytest.mark.parametrize('argument', ['--select=0', '--select=-2', '--seeds=0'])
def test_less_than_one_epoch_or_run_is_refused(module, argument):
  done = call_command(module.__name__, *QUICK, argument)
  name, _, value = argument.partition('=')
  assert (done.returncode, done.stderr) == (2, f'error: {name} is {value}; it must be at least 1.\n')


@pytest.mark.parametrize(
  ('module', 'arguments'), [(small_model, []), (small_model, ['--select=1']), (mnist_accuracy, ['--select=1'])]
)
def test_an_experiment_without_the_validation_that_it_needs_is_refused(module, arguments, tmp_path):
  workdir = f'--workdir={tmp_path / "runs"}'
  done = call_command(module.__name__, *QUICK, '--config.data.validation=0.0', '--seeds=1', workdir, *arguments)
  assert done.returncode == 2
  assert 'has no validation images; set config.data.validation above 0.' in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / 'runs').exists()


def test_the_sweeps_select_on_validation(tmp_path):
  pytest.importorskip('optuna')
  more = ['--trials=2', '--seeds=1', f'--workdir={tmp_path / "runs"}', f'--output={tmp_path / "output"}']
  done = call_command(learning_rate_batch_size.__name__, *QUICK[3:5], *SMALL, *more)
  assert done.returncode == 0, done.stderr
  assert 'Selected: batch size' in done.stdout
  found = json.loads((tmp_path / 'output' / 'results.json').read_text())
  assert (len(found['measurements']), found['seeds'], found['chosen']['seeds']) == (2, [0], [1])
  assert (tmp_path / 'output' / 'figure.png').stat().st_size > 10_000
  runs = {path: json.loads(path.read_text()) for path in tmp_path.rglob('result.json')}
  assert {('test_accuracy' in run, run['seed'], 'chosen' in str(path)) for path, run in runs.items()} == {
    (False, 0, False),
    (True, 1, True),
  }


@pytest.mark.parametrize('module', [*EXPERIMENTS, learning_rate_batch_size], ids=lambda module: module.__name__)
def test_help_describes_the_experiment(module):
  done = call_command(module.__name__, '--help')
  assert done.returncode == 0
  assert f'python -m {module.__name__}' in done.stdout
  assert '--seeds' in done.stdout


def test_the_selected_cell():
  def cell(*pairs):
    return [{'accuracy': accuracy, 'loss': loss} for accuracy, loss in pairs]

  cells = {
    (16, 0.1): cell((0.9, 0.4), (0.8, 0.5)),
    (32, 0.1): cell((0.8, 0.3), (0.9, 0.4)),  # as accurate, with less loss
    (64, 0.1): cell((1.0, 0.1), (0.0, np.inf)),  # the best single seed, but the other one diverged
  }
  assert learning_rate_batch_size.best(cells) == (32, 0.1)


# Data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('share', [0.0, 0.1, 0.4, 1.0])
def test_wrong_labels_are_an_exact_share(share):
  labels = np.repeat(np.arange(10, dtype=np.int32), 500)
  wrong = label_noise.wrong_labels(labels, share, 10, 0)
  assert np.sum(wrong != labels) == round(share * 5000)
  assert wrong.dtype == np.int32
  assert wrong.min() >= 0 and wrong.max() < 10
  np.testing.assert_array_equal(wrong, label_noise.wrong_labels(labels, share, 10, 0))


def test_wrong_labels_are_any_of_the_others():
  labels = np.repeat(np.arange(10, dtype=np.int32), 5000)
  wrong = label_noise.wrong_labels(labels, 1.0, 10, 3)
  counts = np.bincount(10 * labels + wrong, minlength=100).reshape(10, 10)
  assert np.all(np.diag(counts) == 0)
  # 5000 / 9 of each, with a standard deviation of 22.
  others = counts[~np.eye(10, dtype=bool)]
  assert np.all(np.abs(others - 5000 / 9) < 6 * 22)
  few, many = (label_noise.wrong_labels(labels, share, 10, 3) for share in (0.1, 0.4))
  changed = few != labels
  np.testing.assert_array_equal(few[changed], many[changed])
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


@pytest.mark.parametrize(('size', 'epochs'), [(100, 600), (3000, 20), (60_000, 1)])
def test_every_size_takes_the_same_steps(size, epochs):
  config = training_set_size.with_steps(training_set_size.recipe(), size, 600)
  assert config.epochs == epochs
  assert config.schedule.warmup_epochs * (size // config.batch_size) == pytest.approx(120)


def test_steps_that_are_not_whole_epochs_are_refused():
  with pytest.raises(UsageError, match='600 steps with batches of 100 are not a whole number of epochs of 54000'):
    training_set_size.with_steps(training_set_size.recipe(), 54_000, 600)


# Networks ---------------------------------------------------------------------------------------


def test_the_deepest_receptive_field_by_hand():
  # A 3x3 convolution adds two strides and a pooling one; each pooling doubles the stride; the last stage has none.
  assert 1 + (2 + 1) + 2 * (2 + 1) + 4 * (2 + 1) + 8 * 2 == 38
  assert depth.field_side(models.create(depth.recipe().model, 10), 28) == 38


def test_patches_are_cut_where_the_channel_is_excited():
  config = config_lib.vary(default_config(), {'model.features': (1, 1), 'model.norm': 'none'})
  model = models.create(config.model, 2)
  variables = jax.tree.map(np.array, models.init(model, jax.random.key(0), (8, 8, 1)))
  first, *_ = (layer.path for layer in inspect.layer_table(model, (8, 8, 1)))
  kernel = variables['params']
  for name in (*first, 'kernel'):
    kernel = kernel[name]
  kernel[:] = 0
  kernel[1, 1] = 1  # the maps of the first stage are the image, pooled
  run = Run(config, model, variables, ('a', 'b'), (8, 8, 1), '', 0, None)
  # Dark but for one pixel each, brighter from image to image.
  images = np.zeros((64, 8, 8, 1), np.uint8)
  for i in range(64):
    images[i, i // 8, i % 8] = 150 + i
  (patches,) = depth.strongest_patches(run, images)['stage1']
  assert patches.shape == (9, 4, 4)
  np.testing.assert_allclose(np.max(patches, axis=(1, 2)), np.arange(213, 204, -1) / 255, rtol=1e-6)
  # The pixel lies in the middle 2x2 that are pooled, and the last one in the corner of the image.
  assert patches[0, 2, 2] == np.float32(213 / 255)
  assert np.all(patches[0, 3] == depth.OUTSIDE) and np.all(patches[0, :, 3] == depth.OUTSIDE)
  assert np.all(patches[0, :3, :3] >= 0)


@pytest.mark.parametrize('module', [small_model, mnist_accuracy], ids=lambda module: module.__name__)
def test_every_candidate_is_valid_and_small_enough(module):
  config = config_lib.load(module.CONFIG)
  compared = {'the config': (config, {})} | {name: (config, fields) for name, fields in module.CANDIDATES.items()}
  longer = config_lib.vary(config, module.LONGER)
  compared |= {'longer': (longer, {})}
  compared |= {f'longer, {name}': (longer, fields) for name, fields in module.LONGER_CANDIDATES.items()}
  for name, (base, fields) in compared.items():
    model = models.create(config_lib.vary(base, fields).model, 10)
    assert models.num_parameters(models.init_shapes(model, (28, 28, 1))['params']) < module.LIMIT, name
