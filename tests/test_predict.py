"""Prediction: the command on files of every kind, and the classifier of the library."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import cnn_jax
from cnn_jax import UsageError, calibration, command, evaluate, predict
from cnn_jax.run import load_run_dataset
from tests.helpers import ROOT, call_command, logits_of, untrained_run, write_pictures
from tests.test_pictures import photograph


@pytest.fixture(scope='module')
def classifier(digits_run):
  return cnn_jax.load(digits_run)


@pytest.fixture(scope='module')
def held_out(classifier):
  return load_run_dataset(classifier.run).test


@pytest.fixture(scope='module')
def pictures(held_out, tmp_path_factory):
  """64 test images of the run as PNG files, DIR/<class>/<number>.png."""
  return write_pictures(held_out.images[:64], held_out.labels, tmp_path_factory.mktemp('pictures'))


def _predict(workdir, *arguments):
  done = call_command('cnn_jax.predict', f'--workdir={workdir}', *arguments)
  return done, [json.loads(line) for line in done.stdout.splitlines()] if '--json' in arguments else done.stdout


# The command --------------------------------------------------------------------------------------


def test_files_of_test_images_give_exactly_the_accuracy_of_evaluate(digits_run, classifier, held_out, pictures):
  done, found = _predict(digits_run, pictures, '--json', '--top_k=3')
  assert done.returncode == 0, done.stderr
  assert [x['file'] for x in found] == sorted(str(path) for path in pictures.glob('*/*.png'))
  accuracy = np.mean([x['label'] == os.path.basename(os.path.dirname(x['file'])) for x in found])
  run = classifier.run
  logits = logits_of(run, held_out.images[:64])
  assert accuracy == np.mean(np.argmax(logits, axis=1) == held_out.labels[:64])
  of_file = {int(os.path.basename(x['file'])[:3]): x for x in found}
  for i, row in enumerate(calibration.softmax(logits)):
    assert of_file[i]['probability'] == pytest.approx(row.max(), abs=1e-6)
    assert [label for label, _ in of_file[i]['top_k']] == [str(k) for k in np.argsort(-row)[:3]]


def test_a_bad_file_has_its_own_line_and_the_others_their_prediction(digits_run, pictures, tmp_path):
  (tmp_path / 'b.png').write_text('no image')
  (tmp_path / 'empty').mkdir()
  os.mkfifo(tmp_path / 'pipe.png')
  good = sorted(pictures.glob('3/*.png'))[0]
  paths = [tmp_path / 'b.png', good, tmp_path / 'empty', tmp_path / 'none.png', tmp_path / 'pipe.png']
  done, found = _predict(digits_run, *paths, '--json', '--batch_size=1')
  assert done.returncode == command.USAGE
  assert [x['file'] for x in found] == [str(path) for path in paths]
  assert set(found[1]) == {'file', 'label', 'probability', 'top_k'}
  for place, reason in {0: 'is a text file', 2: 'no image', 3: 'does not exist', 4: 'a pipe'}.items():
    assert set(found[place]) == {'file', 'error'}
    assert reason in found[place]['error']
  assert done.stderr == 'error: 4 of 5 files could not be classified; their lines give the reasons.\n'


def test_a_table_shows_names_safely(digits_run, held_out, tmp_path):
  hostile = tmp_path / 'a\x1b[31m\n\u202eb.png'
  Image.fromarray(held_out.images[0, ..., 0]).save(hostile)
  (tmp_path / 'c\r.png').write_text('no image')
  done, table = _predict(digits_run, tmp_path, '--top_k=2', '--one_hot', '--batch_size=1')
  assert done.returncode == command.USAGE
  header, row, error = table.splitlines()
  assert header.split() == ['file', 'class', 'probability', 'one-hot', 'top', '2']
  assert f'{tmp_path}/a\\x1b[31m\\n\\u202eb.png' in row
  vector = row[row.index('[0' if '[0' in row else '[1') :].split(']')[0][1:].split()
  label = row.split('.png')[1].split()[0]
  assert [i for i, x in enumerate(vector) if x == '1'] == [int(label)]
  assert len(vector) == 10
  assert 'c\\r.png' in error
  assert 'error: the file is a text file' in error
  assert not set('\x1b\u202e\r') & set(table)


def test_printable_escapes_what_moves_or_hides_text_and_nothing_else():
  assert command.printable('naïve 日本語\u3000x') == 'naïve 日本語\u3000x'
  assert command.printable('a\x1b[0m\n\u202e\u200b\udce9') == 'a\\x1b[0m\\n\\u202e\\u200b\\udce9'


def test_impossible_options_are_refused_in_one_line(digits_run, pictures):
  for argument, reason in {
    '--top_k=0': '--top_k is 0',
    '--batch_size=0': '--batch_size is 0',
    '--invert=maybe': 'invalid choice',
    '--workdir=none': 'config.json is missing',
  }.items():
    with pytest.raises(UsageError, match=reason):
      predict.main([f'--workdir={digits_run}', str(pictures), argument])
  with pytest.raises(UsageError, match='IMAGE_OR_FOLDER'):
    predict.main([f'--workdir={digits_run}'])


def test_one_hot_and_top_k_of_objects(digits_run, pictures):
  path = sorted(pictures.glob('7/*.png'))[0]
  done, (found,) = _predict(digits_run, path, '--json', '--one_hot', '--top_k=99')
  assert done.returncode == 0
  assert len(found['top_k']) == 10
  assert found['top_k'][0] == [found['label'], found['probability']]
  assert sum(p for _, p in found['top_k']) == pytest.approx(1)
  assert found['one_hot'] == [int(str(i) == found['label']) for i in range(10)]


def test_importing_is_light():
  script = (
    'import sys, cnn_jax; assert not {"jax", "numpy", "flax"} & set(sys.modules), "heavy"; import cnn_jax.predict'
  )
  script += (
    '; print(sorted({"tensorflow_datasets", "tensorflow", "sklearn", "matplotlib", "grain"} & set(sys.modules)))'
  )
  done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.stdout == '[]\n', done.stderr


# The classifier -----------------------------------------------------------------------------------


def test_all_batches_of_a_list_have_one_shape(classifier, held_out, monkeypatch):
  sizes, real = [], evaluate.compute_logits
  monkeypatch.setattr(evaluate, 'compute_logits', lambda *a: sizes.append(a[2].shape[0]) or real(*a))
  few = predict.Classifier(classifier.run, batch_size=8)
  several = few.predict(held_out.images[:20])
  assert sizes == [8, 8, 8]
  sizes.clear()
  np.testing.assert_allclose(few.predict(held_out.images[:1]), several[:1], atol=1e-6)
  assert sizes == [1]


def test_the_batch_fits_the_largest_layer():
  # 4 bytes for each of 1024 x 1024 x 32 outputs of the first convolution are 128 MiB, of which 8 make 1 GiB.
  assert predict.Classifier(untrained_run((1024, 1024, 1), features=(32, 8))).batch_size == 8
  assert predict.Classifier(untrained_run((4096, 4096, 1), features=(64, 8))).batch_size == 1
  assert predict.Classifier(untrained_run()).batch_size == 256


def test_every_kind_of_picture_gives_the_same_row(classifier, pictures):
  path = sorted(pictures.glob('5/*.png'))[0]
  array = np.asarray(Image.open(path))
  row = classifier.predict(path)
  assert row.shape == (10,)
  assert row.sum() == pytest.approx(1)
  for picture in (str(path), array, array[..., None], np.repeat(array[..., None], 3, axis=2), Image.open(path)):
    np.testing.assert_array_equal(classifier.predict(picture), row)
  with open(path, 'rb') as file:
    np.testing.assert_array_equal(classifier.predict(file), row)
  for several in ([path], array[None, ..., None], iter([array])):
    np.testing.assert_array_equal(classifier.predict(several), row[None])
  assert classifier.predict([]).shape == (0, 10)


def test_a_picture_that_cannot_be_read_is_named(classifier):
  with pytest.raises(UsageError, match=r'nothing\.png: the file does not exist'):
    classifier.predict('nothing.png')


def test_negatives_and_photographs_are_classified(classifier, held_out):
  classifier = predict.Classifier(classifier.run, batch_size=8)
  images = held_out.images[:40]
  np.testing.assert_array_equal(classifier.predict(255 - images), classifier.predict(images))
  found = classifier.predict([photograph(image, factor=20) for image in images]).argmax(axis=1)
  assert (found == held_out.labels[:40]).mean() > 0.7  # chance is 0.1; 8x8 pixels enlarged are blurred


def test_the_mean_of_a_class_activation_map_and_the_bias_are_the_logit(classifier, held_out):
  image = held_out.images[0]
  logits = classifier.feature_maps(image)['logits']
  bias = np.asarray(classifier.run.variables['params']['head']['bias'])
  for label in (0, 3, 9):
    evidence = classifier.class_activation_map(image, str(label))
    assert evidence.shape == (4, 4)
    assert evidence.mean() + bias[label] == pytest.approx(logits[label], abs=1e-4)
    np.testing.assert_array_equal(evidence, classifier.class_activation_map(image, label))
  best = classifier.class_activation_map(image)
  np.testing.assert_array_equal(best, classifier.class_activation_map(image, int(np.argmax(logits))))
  for wrong in ('z', 10, -1):
    with pytest.raises(UsageError, match='not a class'):
      classifier.class_activation_map(image, wrong)


def test_a_network_without_average_pooling_has_no_class_activation_maps():
  with pytest.raises(UsageError, match='does not read averages'):
    predict.Classifier(untrained_run(aggregate='flatten')).class_activation_map(np.zeros((8, 8), np.uint8))


def test_feature_maps_are_of_one_picture(classifier, held_out):
  maps = classifier.feature_maps(held_out.images[0])
  assert {name: x.shape for name, x in maps.items()} == {
    'stage1': (4, 4, 16),
    'stage2': (4, 4, 32),
    'pooled': (32,),
    'logits': (10,),
  }
  assert list(maps) == ['stage1', 'stage2', 'pooled', 'logits']
  expected = calibration.softmax(maps['logits'][None])[0]
  np.testing.assert_allclose(classifier.predict(held_out.images[0]), expected, atol=1e-6)


def test_the_example_runs(digits_run, monkeypatch, capsys):
  example = ROOT / 'examples' / 'classify.py'
  monkeypatch.setattr(sys, 'argv', [str(example), str(digits_run)])
  runpy.run_path(str(example), run_name='__main__')
  printed = capsys.readouterr().out
  assert 'evidence for' in printed
  assert 'stage2  (4, 4, 32)' in printed
