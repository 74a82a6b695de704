"""Prediction: the command on files of every kind, the library's classifier, and evaluation beyond its own split."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import cnn_jax
from cnn_jax import UsageError, calibration, command, config, evaluate, predict
from cnn_jax.data import augment, drawings, files, load_dataset
from cnn_jax.model import create_model
from tests.conftest import ROOT, run_command

command.prepare_backend()


@pytest.fixture(scope='module')
def classifier(digits_run):
  return cnn_jax.load(digits_run)


@pytest.fixture(scope='module')
def held_out(classifier):
  return evaluate.load_run_dataset(classifier.run).test


@pytest.fixture(scope='module')
def pictures(held_out, tmp_path_factory):
  """200 test images of the run as PNG files, DIR/<class>/<number>.png."""
  folder = tmp_path_factory.mktemp('pictures')
  for name in '0123456789':
    (folder / name).mkdir()
  for i, (image, label) in enumerate(zip(held_out.images[:200], held_out.labels[:200], strict=True)):
    Image.fromarray(image[..., 0]).save(folder / str(label) / f'{i:03}.png')
  return folder


@functools.cache
def _untrained(image_shape=(8, 8, 1), num_classes=3, **model):
  """A run with random weights, statistics and bias: what holds for it holds for any."""
  settings = config.default_config()
  with settings.unlocked():
    settings.model.features = (4, 6)
    settings.model.update(model)
  network = create_model(settings.model, num_classes)
  variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *image_shape)))
  leaves, structure = jax.tree.flatten(variables)
  rng = np.random.default_rng(0)
  variables = structure.unflatten([leaf + 0.2 * rng.random(leaf.shape, np.float32) for leaf in leaves])
  names = tuple('abcdefghij'[:num_classes])
  return evaluate.Run(settings, network, variables, names, image_shape, 'none', 0, None)


def _predict(workdir, *arguments):
  done = run_command('cnn_jax.predict', f'--workdir={workdir}', *arguments)
  return done, [json.loads(line) for line in done.stdout.splitlines()] if '--json' in arguments else done.stdout


# The command --------------------------------------------------------------------------------------


def test_files_of_test_images_give_exactly_the_accuracy_of_evaluate(digits_run, classifier, held_out, pictures):
  done, found = _predict(digits_run, pictures, '--json', '--top_k=3')
  assert done.returncode == 0, done.stderr
  assert [x['file'] for x in found] == sorted(str(path) for path in pictures.glob('*/*.png'))
  accuracy = np.mean([x['label'] == os.path.basename(os.path.dirname(x['file'])) for x in found])
  run = classifier.run
  logits = evaluate.compute_logits(run.model, run.variables, held_out.images[:200], 100)
  assert accuracy == np.mean(np.argmax(logits, axis=1) == held_out.labels[:200])
  of_file = {int(os.path.basename(x['file'])[:3]): x for x in found}
  expected = calibration.softmax(logits)
  for i, row in enumerate(expected):
    assert of_file[i]['probability'] == pytest.approx(row.max(), abs=1e-6)
    assert [label for label, _ in of_file[i]['top_k']] == [str(k) for k in np.argsort(-row)[:3]]


def test_a_bad_file_has_its_own_line_and_the_others_their_prediction(digits_run, pictures, tmp_path):
  (tmp_path / 'b.png').write_text('no image')
  (tmp_path / 'empty').mkdir()
  os.mkfifo(tmp_path / 'pipe.png')
  good = sorted(pictures.glob('3/*.png'))[0]
  paths = [tmp_path / 'b.png', good, tmp_path / 'empty', tmp_path / 'none.png', tmp_path / 'pipe.png']
  done, found = _predict(digits_run, *paths, '--json')
  assert done.returncode == command.USAGE
  assert [x['file'] for x in found] == [str(path) for path in paths]
  assert set(found[1]) == {'file', 'label', 'probability', 'top_k'}
  for place, reason in {0: 'not an image', 2: 'no image', 3: 'does not exist', 4: 'a pipe'}.items():
    assert set(found[place]) == {'file', 'error'}
    assert reason in found[place]['error']
  assert done.stderr == 'error: 4 of 5 files could not be classified; their lines say why.\n'


def test_a_table_shows_names_safely(digits_run, held_out, tmp_path):
  hostile = tmp_path / 'a\x1b[31m\n\u202eb.png'
  Image.fromarray(held_out.images[0, ..., 0]).save(hostile)
  (tmp_path / 'c\r.png').write_text('no image')
  done, table = _predict(digits_run, tmp_path, '--top_k=2', '--one_hot')
  assert done.returncode == command.USAGE
  header, row, error = table.splitlines()
  assert header.split() == ['file', 'class', 'probability', 'one-hot', 'top', '2']
  assert f'{tmp_path}/a\\x1b[31m\\n\\u202eb.png' in row
  assert row.count('1') >= 1
  vector = row[row.index('[0' if '[0' in row else '[1') :].split(']')[0][1:].split()
  label = row.split('.png')[1].split()[0]
  assert [i for i, x in enumerate(vector) if x == '1'] == [int(label)]
  assert len(vector) == 10
  assert 'c\\r.png' in error
  assert 'error: the file is not an image' in error
  assert not set('\x1b\u202e\r') & set(table)


def test_options_that_cannot_be_are_one_line(digits_run, pictures):
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


def test_one_hot_and_top_k_of_objects(digits_run, pictures, capsys):
  path = str(sorted(pictures.glob('7/*.png'))[0])
  assert predict.main([f'--workdir={digits_run}', path, '--json', '--one_hot', '--top_k=99']) == 0
  found = json.loads(capsys.readouterr().out)
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


# Files --------------------------------------------------------------------------------------------


def test_walk_is_sorted_and_takes_only_images(tmp_path):
  for name in ('b/2.png', 'b/10.JPG', 'a.gif', 'c/.hidden.png', '.d/x.png', 'notes.txt', 'z/y/x.tiff'):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).touch()
  (tmp_path / 'loop').symlink_to(tmp_path)
  os.mkfifo(tmp_path / 'pipe.png')
  found = [os.path.relpath(path, tmp_path) for path in files.walk(str(tmp_path))]
  assert found == ['a.gif', 'b/10.JPG', 'b/2.png', 'z/y/x.tiff']


def test_walk_gives_back_what_is_no_folder_or_holds_nothing(tmp_path):
  assert list(files.walk(str(tmp_path / 'missing.png'))) == [str(tmp_path / 'missing.png')]
  assert list(files.walk(str(tmp_path))) == [str(tmp_path)]


def test_walk_does_not_list_before_it_must(tmp_path):
  for name in ('a/1.png', 'b/1.png'):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).touch()
  walked = files.walk(str(tmp_path))
  assert next(walked) == str(tmp_path / 'a/1.png')
  (tmp_path / 'b/0.png').touch()
  assert next(walked) == str(tmp_path / 'b/0.png')


def test_read_ahead_is_in_order_and_bounded():
  lock, taken, most, yielded = threading.Lock(), 0, 0, 0

  def items():
    nonlocal taken
    for i in range(2000):
      taken += 1
      yield i

  def read(i):
    nonlocal most
    with lock:
      most = max(most, taken - yielded)
    return -i

  for i, found in enumerate(files.read_ahead(items(), read, ahead=64)):
    assert found == -i
    yielded += 1
  assert yielded == 2000
  assert most <= 64 + 2 * 16


def test_read_ahead_raises_and_stops():
  def read(i):
    if i == 40:
      raise RuntimeError('a bug')
    return i

  with pytest.raises(RuntimeError, match='a bug'):
    list(files.read_ahead(range(1000), read, ahead=32))
  ended = files.read_ahead(iter(range(10**9)), read, ahead=16)
  assert next(ended) == 0
  ended.close()  # returns, though there is much left


def test_all_batches_of_a_list_have_one_shape(classifier, held_out, monkeypatch):
  sizes, real = [], evaluate.compute_logits
  monkeypatch.setattr(evaluate, 'compute_logits', lambda *a: sizes.append(a[2].shape[0]) or real(*a))
  few = predict.Classifier(classifier.run, batch_size=64)
  several = few.predict(held_out.images[:150])
  assert sizes == [64, 64, 64]
  sizes.clear()
  np.testing.assert_allclose(few.predict(held_out.images[:5]), several[:5], atol=1e-6)
  assert sizes == [8]


# Formats and inputs -------------------------------------------------------------------------------


def _grey():
  rng = np.random.default_rng(3)
  image = rng.integers(0, 256, (8, 8), np.uint8)
  image[0] = image[-1] = image[:, 0] = image[:, -1] = 0
  return image


_ROTATED = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 6: np.rot90, 8: lambda x: np.rot90(x, -1)}  # fmt: skip


@pytest.mark.parametrize('orientation', _ROTATED)
@pytest.mark.parametrize('extension', ['png', 'tiff', 'webp'])
def test_orientation_is_undone(classifier, tmp_path, extension, orientation):
  path = tmp_path / f'x.{extension}'
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored = Image.fromarray(np.ascontiguousarray(_ROTATED[orientation](_grey())))
  stored.save(path, exif=exif, **({'lossless': True} if extension == 'webp' else {}))
  np.testing.assert_array_equal(classifier.read(path)[..., 0], _grey())


@pytest.mark.parametrize(
  ('extension', 'convert'),
  [
    ('png', lambda x: Image.fromarray(x)),
    ('png', lambda x: Image.fromarray(x).convert('RGB')),
    ('png', lambda x: Image.fromarray(x).convert('RGBA')),
    ('png', lambda x: Image.fromarray(x).convert('LA')),
    ('png', lambda x: Image.fromarray(x.astype(np.uint16) * 257)),
    ('tiff', lambda x: Image.fromarray(x.astype(np.uint16) * 257)),
    ('tiff', lambda x: Image.fromarray(x.astype(np.float32))),
    ('tiff', lambda x: Image.fromarray(x)),
    ('tiff', lambda x: Image.merge('CMYK', [Image.new('L', (8, 8))] * 3 + [Image.fromarray(255 - x)])),
    ('gif', lambda x: Image.fromarray(x)),
    ('bmp', lambda x: Image.fromarray(x).convert('RGB')),
    ('pgm', lambda x: Image.fromarray(x)),
    ('tga', lambda x: Image.fromarray(x)),
    ('jp2', lambda x: Image.fromarray(x)),
  ],
  ids=['grey', 'rgb', 'rgba', 'la', 'png16', 'tiff16', 'float', 'tiff', 'cmyk', 'gif', 'bmp', 'pgm', 'tga', 'jp2'],
)
def test_lossless_formats_agree(classifier, tmp_path, extension, convert):
  path = tmp_path / f'x.{extension}'
  convert(_grey()).save(path)
  np.testing.assert_array_equal(classifier.read(path)[..., 0], _grey())


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


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I', 'F'])
def test_pillow_images_of_every_mode_are_read(classifier, mode):
  picture = Image.fromarray(_grey())
  if mode == 'I':
    picture = Image.fromarray(_grey().astype(np.int32) * 257)
  read = classifier.read(picture.convert(mode) if mode != 'I' else picture)
  if mode == '1':
    assert set(np.unique(read)) <= {0, 255}
  else:
    np.testing.assert_allclose(read[..., 0].astype(int), _grey(), atol=1)


def test_arrays_that_are_no_pictures_say_so(classifier):
  for wrong in (np.zeros((8, 8)), np.zeros((8, 8, 5), np.uint8), np.zeros((8,), np.uint8), np.zeros((0, 8), np.uint8)):
    with pytest.raises(UsageError, match='shape'):
      classifier.predict(wrong)
  with pytest.raises(UsageError, match=r'nothing\.png: the file does not exist'):
    classifier.predict('nothing.png')


def test_other_sizes_are_resized_as_for_training(classifier):
  from cnn_jax.data.images import resize_image

  rng = np.random.default_rng(0)
  image = np.zeros((20, 30, 1), np.uint8)
  image[5:15, 5:25] = rng.integers(0, 256, (10, 20, 1))
  np.testing.assert_array_equal(classifier.read(image), resize_image(image, 8, 'crop'))


# Dark drawings on light ---------------------------------------------------------------------------


def test_negatives_are_recognised(classifier, held_out):
  images = held_out.images[:50]
  expected = classifier.predict(images)
  np.testing.assert_array_equal(classifier.predict(255 - images), expected)
  never, always = (predict.Classifier(classifier.run, invert=invert) for invert in ('never', 'always'))
  np.testing.assert_array_equal(never.predict(images), expected)
  assert (never.predict(255 - images).argmax(axis=1) != expected.argmax(axis=1)).mean() > 0.3
  np.testing.assert_array_equal(always.predict(255 - images), expected)
  np.testing.assert_array_equal(always.read(images[0]), 255 - images[0])


def test_only_always_inverts_for_a_run_that_is_not_on_drawings():
  light = np.full((8, 8, 1), 200, np.uint8)
  for invert, level in {'auto': 200, 'never': 200, 'always': 55}.items():
    assert (predict.Classifier(_untrained(), invert=invert).read(light) == level).all()


@pytest.fixture(scope='module')
def mnist():
  settings = config.default_config()
  settings.data.source = 'bundled'
  return load_dataset(settings.data)


def _photograph(image, factor=8, top=60, left=130, height=400, width=500):
  """A drawing in dark ink on paper that lies in the shade to the left, as a camera might see it."""
  side = factor * image.shape[0]
  ink = np.zeros((height, width))
  large = Image.fromarray(image[..., 0]).resize((side, side), Image.Resampling.BICUBIC)
  ink[top : top + side, left : left + side] = np.asarray(large) / 255
  paper = 160 + 70 * np.arange(width) / width + np.random.default_rng(0).normal(0, 3, (height, width))
  return np.clip(paper * (1 - 0.7 * ink), 0, 255).astype(np.uint8)[..., None]


def test_drawings_are_measured(mnist, digits_run):
  # MNIST: scaled to fit 20x20, centre of mass in the centre of 28x28 (LeCun et al. 1998).
  found = drawings.measure(mnist.train.images)
  assert found['longer_side'] == 20
  assert found['centre'] == pytest.approx([14, 14], abs=0.1)
  assert drawings.measure(255 - mnist.train.images) is None
  assert drawings.measure(np.repeat(mnist.train.images[:100], 3, axis=3)) is None
  one_light_border = mnist.train.images[:100].copy()
  one_light_border[57, 0] = one_light_border[57, -1] = one_light_border[57, :, 0] = 255
  assert drawings.measure(one_light_border) is None
  assert drawings.measure(np.zeros((5, 8, 8, 1), np.uint8)) is None
  assert evaluate.load_run(digits_run).drawing['longer_side'] == 8


def test_photographs_become_what_mnist_is(mnist):
  drawing = drawings.measure(mnist.train.images)
  likeness = []
  for image in mnist.test.images[::10]:
    photograph = _photograph(image)
    assert drawings.is_dark_on_light(photograph)
    assert not drawings.is_dark_on_light(image)
    fitted = drawings.fit(photograph, drawing, (28, 28, 1))
    assert fitted.shape == (28, 28, 1)
    assert fitted.dtype == np.uint8
    likeness.append(np.corrcoef(fitted.ravel(), image.ravel())[0, 1])
  # As it was, but for the edges; thin strokes suffer most where rounding puts them a pixel aside.
  assert np.median(likeness) > 0.95
  assert min(likeness) > 0.75


def test_where_a_photograph_shows_its_drawing_does_not_matter(mnist):
  drawing = drawings.measure(mnist.train.images)
  image = mnist.test.images[0]
  one = drawings.fit(_photograph(image, top=10, left=10), drawing, (28, 28, 1))
  other = drawings.fit(_photograph(image, factor=5, top=200, left=300), drawing, (28, 28, 1))
  assert np.abs(one.astype(int) - other).mean() < 8


def test_an_empty_photograph_is_black():
  drawing = {'longer_side': 20, 'centre': [14.0, 14.0]}
  assert not drawings.fit(np.full((50, 70, 1), 220, np.uint8), drawing, (28, 28, 1)).any()


def test_a_run_classifies_photographs(classifier, held_out):
  images = held_out.images[:40]
  found = classifier.predict([_photograph(image, factor=20) for image in images]).argmax(axis=1)
  assert (found == held_out.labels[:40]).mean() > 0.7  # chance is 0.1; 8x8 pixels enlarged are blurred


# What the network sees ----------------------------------------------------------------------------


@pytest.mark.parametrize('head', ['dense', 'conv1x1'])
def test_the_mean_of_a_class_activation_map_and_the_bias_are_the_logit(head):
  run = _untrained(head=head)
  classifier = predict.Classifier(run)
  image = _grey()
  logits = classifier.feature_maps(image)['logits']
  bias = np.asarray(run.variables['params']['head']['bias'])
  for label, name in enumerate(run.class_names):
    evidence = classifier.class_activation_map(image, name)
    assert evidence.shape == (4, 4)
    assert evidence.mean() + bias[label] == pytest.approx(logits[label], abs=1e-4)
    np.testing.assert_array_equal(evidence, classifier.class_activation_map(image, label))
  best = classifier.class_activation_map(image)
  np.testing.assert_array_equal(best, classifier.class_activation_map(image, int(np.argmax(logits))))


def test_class_activation_maps_that_cannot_be():
  with pytest.raises(UsageError, match='aggregate'):
    predict.Classifier(_untrained(aggregate='flatten')).class_activation_map(_grey())
  for label in ('z', 3, -1):
    with pytest.raises(UsageError, match='not a class'):
      predict.Classifier(_untrained()).class_activation_map(_grey(), label)


def test_feature_maps_are_of_one_picture(classifier, held_out):
  maps = classifier.feature_maps(held_out.images[0])
  assert {name: x.shape for name, x in maps.items()} == {
    'block1': (4, 4, 32),
    'block2': (4, 4, 64),
    'gap': (64,),
    'logits': (10,),
  }
  expected = calibration.softmax(maps['logits'][None])[0]
  np.testing.assert_allclose(classifier.predict(held_out.images[0]), expected, atol=1e-6)


def test_the_example_runs(digits_run, tmp_path):
  done = subprocess.run(
    [sys.executable, ROOT / 'examples' / 'classify.py', digits_run],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert 'evidence for' in done.stdout
  assert 'block2  (4, 4, 64)' in done.stdout


# Test-time augmentation ---------------------------------------------------------------------------


def test_views_are_those_that_training_taught():
  settings = config.default_config().augment
  with pytest.raises(UsageError, match='nothing to average'):
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


def test_tta_averages_probabilities_over_the_views():
  settings = config.default_config()
  settings.augment.shift, settings.augment.flip = 2, True
  run = dataclasses.replace(_untrained(), config=settings)
  image = _grey()
  seen = []
  for mirrored in (image, image[:, ::-1]):
    seen.append(mirrored)
    for axis in (0, 1):
      for step in (-1, 1):
        seen.append(np.roll(mirrored, step, axis))  # the border is black, so nothing comes round
  plain = predict.Classifier(run, invert='never')
  expected = plain.predict(np.stack(seen)[..., None]).mean(axis=0)
  np.testing.assert_allclose(plain.predict(image, tta=True), expected, atol=1e-6)
  assert np.abs(expected - plain.predict(image)).max() > 1e-4


# Evaluation ---------------------------------------------------------------------------------------


def _evaluate(capsys, *arguments):
  evaluate.main([str(argument) for argument in arguments])
  return json.loads(capsys.readouterr().out)


def test_evaluate_adds_top_k_and_calibration(digits_run, classifier, held_out, capsys):
  found = _evaluate(capsys, f'--workdir={digits_run}', '--top_k=2', '--calibrate')
  run = classifier.run
  logits = evaluate.compute_logits(run.model, run.variables, held_out.images, 100)
  ranks = np.argsort(np.argsort(-logits, axis=1), axis=1)[np.arange(len(logits)), held_out.labels]
  assert found['top2_accuracy'] == np.mean(ranks < 2)
  validation = evaluate.load_run_dataset(run).validation
  temperature = calibration.fit_temperature(
    evaluate.compute_logits(run.model, run.variables, validation.images, 100), validation.labels
  )
  assert found['temperature'] == pytest.approx(temperature, rel=1e-4)
  for name, t in {'calibration_error': 1.0, 'calibrated_calibration_error': temperature}.items():
    expected = calibration.expected_calibration_error(calibration.softmax(logits, t), held_out.labels)
    assert found[name] == pytest.approx(expected, abs=1e-4)


def test_evaluate_with_tta_agrees_with_predict(digits_run, classifier, held_out, capsys):
  found = _evaluate(capsys, f'--workdir={digits_run}', '--tta')
  probabilities = classifier.predict(held_out.images, tta=True)
  assert found['accuracy'] == np.mean(probabilities.argmax(axis=1) == held_out.labels)
  of_label = probabilities[np.arange(len(probabilities)), held_out.labels]
  assert found['loss'] == pytest.approx(-np.log(of_label).mean(), rel=1e-4)


def test_evaluate_on_a_folder(digits_run, pictures, classifier, held_out, capsys):
  found = _evaluate(capsys, f'--workdir={digits_run}', f'--data_dir={pictures}')
  assert found['n'] == 200
  assert found['data_dir'] == str(pictures)
  assert 'split' not in found
  run = classifier.run
  logits = evaluate.compute_logits(run.model, run.variables, held_out.images[:200], 100)
  assert found['accuracy'] == np.mean(np.argmax(logits, axis=1) == held_out.labels[:200])


def test_a_folder_may_lack_classes_but_not_have_others(pictures, classifier, tmp_path):
  with pytest.raises(UsageError, match='not a directory'):
    evaluate.load_folder(tmp_path / 'none', classifier.run)
  with pytest.raises(UsageError, match='holds no image'):
    evaluate.load_folder(tmp_path, classifier.run)
  (tmp_path / '7').symlink_to(pictures / '7')
  (tmp_path / '2').mkdir()
  split = evaluate.load_folder(tmp_path, classifier.run)
  assert set(split.labels) == {7}
  assert split.names[0].startswith('7/')
  assert split.images.shape == (len(split), 8, 8, 1)
  np.testing.assert_array_equal(split.images[0], split.images[:1][0])
  np.testing.assert_array_equal(split.images[np.array([1, 0])][1], split.images[0])
  (tmp_path / 'cat').mkdir()
  with pytest.raises(UsageError, match='cat is not called as a class'):
    evaluate.load_folder(tmp_path, classifier.run)


def test_evaluate_refuses_what_makes_no_sense(digits_run, pictures, classifier, tmp_path):
  for arguments, reason in {
    ('--split=test', f'--data_dir={pictures}'): 'exclude each other',
    ('--split=validation', '--calibrate'): 'fits on the validation split',
    ('--top_k=0',): '--top_k is 0',
  }.items():
    with pytest.raises(UsageError, match=reason):
      evaluate.main([f'--workdir={digits_run}', *arguments])
  (tmp_path / '3').mkdir()
  (tmp_path / '3' / 'x.png').write_text('no image')
  with pytest.raises(UsageError, match=r'x\.png is not an image'):
    evaluate.main([f'--workdir={digits_run}', f'--data_dir={tmp_path}'])


def test_a_view_of_the_image_itself_is_the_plain_prediction():
  run = _untrained()
  images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1), np.uint8)
  views = evaluate.Views(((False, 0, 0),), 'constant')
  seen = evaluate.compute_logits(run.model, run.variables, images, 5, views)
  plain = evaluate.compute_logits(run.model, run.variables, images, 5)
  np.testing.assert_allclose(np.exp(seen), calibration.softmax(plain), atol=1e-6)
  shifted = evaluate.compute_logits(run.model, run.variables, images, 5, evaluate.Views(((False, 1, 0),), 'reflect'))
  moved = np.asarray(augment.warp(images, *_no_warp(5), np.tile([1, 0], (5, 1)), 'reflect')).astype(np.uint8)
  expected = evaluate.compute_logits(run.model, run.variables, moved, 5)
  np.testing.assert_allclose(np.exp(shifted), calibration.softmax(expected), atol=1e-6)


def _no_warp(n):
  return np.zeros(n, bool), np.zeros(n, np.float32), np.ones(n, np.float32)
