"""Evaluation: chunks of a batch, test-time augmentation, and the command on splits and folders."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from cnn_jax import UsageError, calibration, evaluate, predict
from cnn_jax.config import default_config
from cnn_jax.pictures import load_folder
from cnn_jax.run import load_run, load_run_dataset
from tests.helpers import LEVELS, call_command, logits_of, untrained_run, write_pictures


@pytest.fixture(scope='module')
def run(digits_run):
  return load_run(digits_run)


@pytest.fixture(scope='module')
def dataset(run):
  return load_run_dataset(run)


@pytest.fixture(scope='module')
def pictures(dataset, tmp_path_factory):
  """64 test images of the run as PNG files, DIR/<class>/<number>.png."""
  return write_pictures(dataset.test.images[:64], dataset.test.labels, tmp_path_factory.mktemp('pictures'))


# Chunks -------------------------------------------------------------------------------------------


@pytest.mark.skipif(
  jax.default_backend() != 'cpu' or jax.__version_info__ < (0, 11),
  reason='only a CPU with the compiler of jax 0.11 or later computes a batch in chunks',
)
def test_chunks_are_divisors_if_possible():
  assert [evaluate.chunk_size(n, 784) for n in (1, 64, 100, 360, 1000)] == [1, 64, 50, 60, 50]
  assert [evaluate.chunk_size(n, 784) for n in (67, 143, 997)] == [64, 64, 64]
  assert [evaluate.chunk_size(n, 224 * 224) for n in (7, 10, 50, 12, 17)] == [7, 10, 10, 6, 10]


def test_a_batch_without_a_divisor_needs_little_memory_and_gives_the_same_logits():
  run = untrained_run()
  images = np.random.default_rng(1).integers(0, 256, (1000, 8, 8, 1), np.uint8)
  steps = [evaluate.eval_step.lower(run.model, run.variables, images[:n], LEVELS).compile() for n in (997, 1000)]
  odd, even = (step(run.variables, images[:n]) for step, n in zip(steps, (997, 1000), strict=True))
  np.testing.assert_allclose(odd, even[:997], rtol=1e-5, atol=1e-6)
  # The images are copied to be padded; the whole batch at once would take ten times as much.
  odd_bytes, even_bytes = (step.memory_analysis().temp_size_in_bytes for step in steps)
  assert odd_bytes < 3 * even_bytes


# Test-time augmentation ---------------------------------------------------------------------------


def test_views_are_the_augmentations_of_the_training():
  settings = default_config().augment
  with pytest.raises(UsageError, match='no views to average'):
    evaluate.tta_views(settings)
  settings.flip = True
  assert evaluate.tta_views(settings).views == ((False, 0, 0), (True, 0, 0))
  settings.shift, settings.padding = 4, 'reflect'
  found = evaluate.tta_views(settings)
  assert found.padding == 'reflect'
  assert len(set(found.views)) == 10
  assert all(abs(down) + abs(right) <= 1 for _, down, right in found.views)
  settings.flip = False
  assert len(evaluate.tta_views(settings).views) == 5


@pytest.fixture(scope='module')
def framed_image():
  """An image whose outer two pixels are black, so that a shift by one pixel brings in black, whatever the padding."""
  image = np.zeros((8, 8), np.uint8)
  image[2:-2, 2:-2] = np.random.default_rng(3).integers(0, 256, (4, 4))
  return image


def test_tta_averages_probabilities_over_the_views(framed_image):
  settings = default_config()
  settings.augment.shift, settings.augment.flip, settings.augment.padding = 2, True, 'reflect'
  settings.data.mean, settings.data.std = (90.0,), (40.0,)
  run = dataclasses.replace(untrained_run(), config=settings)
  views = []
  for mirrored in (framed_image, framed_image[:, ::-1]):
    views += [mirrored] + [np.roll(mirrored, step, axis) for axis in (0, 1) for step in (-1, 1)]
  plain = predict.Classifier(run, invert='never', batch_size=1)
  expected = plain.predict(np.stack(views)[..., None]).mean(axis=0)
  np.testing.assert_allclose(plain.predict(framed_image, tta=True), expected, atol=1e-6)
  assert np.abs(expected - plain.predict(framed_image)).max() > 1e-4
  settings.evaluation.views = True  # the run averages by itself
  np.testing.assert_array_equal(plain.predict(framed_image), plain.predict(framed_image, tta=True))
  assert np.abs(expected - plain.predict(framed_image, tta=False)).max() > 1e-4


def test_a_view_is_the_prediction_of_the_shifted_image():
  run = untrained_run()
  images = np.random.default_rng(1).integers(0, 256, (1, 8, 8, 1), np.uint8)

  def logits(images, *views):
    views = evaluate.Views(views, 'reflect') if views else None
    return logits_of(run, images, 1, views)

  np.testing.assert_allclose(np.exp(logits(images, (False, 0, 0))), calibration.softmax(logits(images)), atol=1e-6)
  moved = np.concatenate([images[:, 1:2], images[:, :-1]], axis=1)  # down by one; above, the reflection of row 1
  np.testing.assert_allclose(np.exp(logits(images, (False, 1, 0))), calibration.softmax(logits(moved)), atol=1e-6)


# The command --------------------------------------------------------------------------------------


def _evaluate(workdir, *arguments):
  done = call_command('cnn_jax.evaluate', f'--workdir={workdir}', *arguments)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_top_k_and_calibration(digits_run, run, dataset):
  found = _evaluate(digits_run, '--top_k=2', '--calibrate')
  logits, labels = logits_of(run, dataset.test.images), dataset.test.labels
  ranks = np.argsort(np.argsort(-logits, axis=1), axis=1)[np.arange(len(logits)), labels]
  assert found['top2_accuracy'] == np.mean(ranks < 2)
  validation = dataset.validation
  temperature = calibration.fit_temperature(logits_of(run, validation.images), validation.labels)
  assert found['temperature'] == pytest.approx(temperature, rel=1e-4)
  for name, t in {'calibration_error': 1.0, 'calibrated_calibration_error': temperature}.items():
    expected = calibration.expected_calibration_error(calibration.softmax(logits, t), labels)
    assert found[name] == pytest.approx(expected, abs=1e-4)


def test_tta_agrees_with_predict(digits_run, run, dataset, pictures):
  found = _evaluate(digits_run, f'--data_dir={pictures}', '--tta')
  labels = dataset.test.labels[:64]
  probabilities = predict.Classifier(run).predict(dataset.test.images[:64], tta=True)
  assert found['accuracy'] == np.mean(probabilities.argmax(axis=1) == labels)
  assert found['loss'] == pytest.approx(-np.log(probabilities[np.arange(64), labels]).mean(), rel=1e-4)


def test_a_folder_gives_the_metrics_of_its_images(digits_run, run, dataset, pictures):
  found = _evaluate(digits_run, f'--data_dir={pictures}')
  assert found['n'] == 64
  assert found['data_dir'] == str(pictures)
  assert 'split' not in found
  logits = logits_of(run, dataset.test.images[:64])
  assert found['accuracy'] == np.mean(np.argmax(logits, axis=1) == dataset.test.labels[:64])


def test_a_folder_may_lack_classes_but_not_have_others(pictures, run, tmp_path):
  with pytest.raises(UsageError, match='not a directory'):
    load_folder(tmp_path / 'none', run)
  with pytest.raises(UsageError, match='holds no image'):
    load_folder(tmp_path, run)
  (tmp_path / '7').symlink_to(pictures / '7')
  (tmp_path / '2').mkdir()
  (tmp_path / 'notes').mkdir()
  folder = load_folder(tmp_path, run)
  split = folder.split
  assert set(split.labels) == {7}
  assert split.names[0].startswith('7/')
  assert split.images.shape == (len(split), 8, 8, 1)
  np.testing.assert_array_equal(split.images[0], split.images[:1][0])
  np.testing.assert_array_equal(split.images[np.array([1, 0])][1], split.images[0])
  assert folder.bad == {}
  assert [note.split()[0] for note in folder.notes] == [str(tmp_path / '2'), str(tmp_path / 'notes')]
  (tmp_path / 'notes').rename(tmp_path / 'cat')
  (tmp_path / 'cat' / 'x.png').touch()
  with pytest.raises(UsageError, match='cat does not match any class of this run'):
    load_folder(tmp_path, run)
  (tmp_path / 'cat').rename(tmp_path / ' 7')
  with pytest.raises(UsageError, match="rename ' 7' to '7'"):
    load_folder(tmp_path, run)
  (tmp_path / ' 7').rename(tmp_path / 'test')
  with pytest.raises(UsageError, match=r'if it is a split, give it as the folder: .*/test'):
    load_folder(tmp_path, run)


def test_impossible_options_are_refused_in_one_line(digits_run, pictures, tmp_path):
  for arguments, reason in {
    ('--split=validation', '--calibrate'): 'fits on the validation split',
    ('--top_k=0',): '--top_k is 0',
  }.items():
    with pytest.raises(UsageError, match=reason):
      evaluate.main([f'--workdir={digits_run}', *arguments])
  (tmp_path / '3').mkdir()
  (tmp_path / '3' / 'x.png').write_text('no image')
  with pytest.raises(UsageError, match=r'no image of .* can be read; the first: .*x\.png is a text file'):
    evaluate.main([f'--workdir={digits_run}', f'--data_dir={tmp_path}'])


def test_images_of_a_folder_that_cannot_be_read_are_left_out(digits_run, run, dataset, pictures, tmp_path):
  shutil.copytree(pictures, tmp_path / 'some')
  (tmp_path / 'some' / '3' / 'a.png').write_text('no image')
  os.mkfifo(tmp_path / 'some' / '8' / 'pipe.png')
  done = call_command('cnn_jax.evaluate', f'--workdir={digits_run}', f'--data_dir={tmp_path / "some"}')
  assert done.returncode == 2
  found = json.loads(done.stdout)
  assert found['n'] == 64
  logits = logits_of(run, dataset.test.images[:64])
  assert found['accuracy'] == np.mean(np.argmax(logits, axis=1) == dataset.test.labels[:64])
  first, second, last = done.stderr.splitlines()
  assert 'a.png is a text file' in first
  assert 'pipe.png is a pipe, not a file' in second
  assert last == 'error: 2 of 66 images could not be read; see above.'
