"""What comes from elsewhere is read as data: prepared sets, workdirs, exports. Nothing of it runs, and bad input is one line."""

import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from cnn_jax import UsageError, calibration, checkpoint, evaluate, export, predict, record, report, run
from cnn_jax.data import Dataset, Split, drawings, load_dataset, prepared, tfds
from tests.datasets import make_tfds, settings
from tests.faults.tools import DIGITS, ROOT, call_command, one_line
from tests.helpers import LEVELS, logits_of, untrained_run

_FEATURES = 'tensorflow_datasets.core.features.'
_IMAGE = {'pythonClassName': _FEATURES + 'image_feature.Image', 'image': {'dtype': 'uint8'}}
_LABEL = {'pythonClassName': _FEATURES + 'class_label_feature.ClassLabel', 'classLabel': {'numClasses': '2'}}
_EVIL = {'pythonClassName': 'evil_of_a_data_set.Evil', 'jsonFeature': {'json': '{}'}}


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """A prepared set, and beside it a module on Python's path that leaves a mark if it is imported."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1] * 10, 'test': [0, 1]})
  (tmp_path / 'evil_of_a_data_set.py').write_text(f'open({str(tmp_path / "mark")!r}, "w").close()\nclass Evil: pass\n')
  monkeypatch.syspath_prepend(tmp_path)
  return root / 'toy' / '1.0.0'


def _load(toy):
  return load_dataset(settings('tfds', name='toy', dir=str(toy.parent.parent), validation=0.2))


def _features(**features):
  return {'pythonClassName': _FEATURES + 'features_dict.FeaturesDict', 'featuresDict': {'features': features}}


def _old(kind, content, **more):
  return {'type': kind, 'content': content, **more}


_OLD_IMAGE = _old(_FEATURES + 'image_feature.Image', {'shape': [4, 4, 1], 'dtype': 'uint8', 'encoding_format': 'png'})
_OLD_LABEL = _old(_FEATURES + 'class_label_feature.ClassLabel', {'num_classes': 2})
_OLD_DICT = _FEATURES + 'features_dict.FeaturesDict'
_NESTED = {
  'pythonClassName': _FEATURES + 'sequence_feature.Sequence',
  'sequence': {'feature': _features(deep={'pythonClassName': _FEATURES + 'dataset_feature.Dataset', 'sequence': {'feature': _EVIL}})},
}  # fmt: skip


@pytest.mark.parametrize(
  ('features', 'works'),
  [
    (_features(image=_IMAGE, label=_LABEL, more=_EVIL), True),
    (_features(image=_IMAGE, label=_LABEL, more=_NESTED), True),
    (_features(image={**_IMAGE, 'pythonClassName': 'evil_of_a_data_set.Evil'}, label=_LABEL), False),
    (_features(image=_IMAGE, label=_LABEL) | {'pythonClassName': 'evil_of_a_data_set.Evil'}, False),
    (_features(image=_IMAGE, label=_LABEL) | {'type': 'evil_of_a_data_set.Evil', 'content': {}}, False),
    (_old('evil_of_a_data_set.Evil', {'image': _OLD_IMAGE, 'label': _OLD_LABEL}), False),
    (_old(_OLD_DICT, {'image': _OLD_IMAGE, 'label': _OLD_LABEL, 'x': _old('evil_of_a_data_set.Evil', {})}), True),
    (_old(_OLD_DICT, {'image': _OLD_IMAGE, 'label': _old('evil_of_a_data_set.Evil', {'num_classes': 2})}), False),
    (_old(_OLD_DICT, {'features': {'image': _IMAGE, 'label': _LABEL, 'x': _EVIL}}, proto_cls='evil_of_a_data_set.Evil'), True),
    (
      {
        'python_class_name': _OLD_DICT,
        'features_dict': {
          'features': {
            'image': {'python_class_name': _FEATURES + 'image_feature.Image', 'image': {'dtype': 'uint8'}},
            'label': {'python_class_name': _LABEL['pythonClassName'], 'class_label': {'num_classes': 2}},
            'x': {'python_class_name': 'evil_of_a_data_set.Evil'},
          }
        },
      },
      True,
    ),
  ],
)  # fmt: skip
def test_no_class_that_a_set_names_is_imported(toy, tmp_path, features, works):
  (toy / 'features.json').write_text(json.dumps(features))
  if works:
    assert _load(toy).class_names == ('cat', 'dog')
  else:
    with pytest.raises(UsageError, match='is damaged: it does not describe|is not an image-classification set'):
      _load(toy)
  assert not (tmp_path / 'mark').exists()


def test_a_field_that_is_there_twice_is_refused(toy, tmp_path):
  """Readers differ in which of two equal fields they take."""
  text = json.dumps(_features(image=_IMAGE, label=_LABEL))
  (toy / 'features.json').write_text(text.replace('{', '{"pythonClassName": "evil_of_a_data_set.Evil", ', 1))
  with pytest.raises(UsageError, match='a field is there twice.*prepare the set again'):
    _load(toy)
  assert not (tmp_path / 'mark').exists()


def _change_info(**fields):
  def change(toy):
    path = toy / 'dataset_info.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

  return change


def _change_split(**fields):
  def change(toy):
    path = toy / 'dataset_info.json'
    info = json.loads(path.read_text())
    info['splits'][0] |= fields
    path.write_text(json.dumps(info))

  return change


def _put(name, make):
  def change(toy):
    (toy / name).unlink(missing_ok=True)
    make(toy / name)

  return change


@pytest.mark.parametrize(
  'change',
  [
    _put('features.json', os.mkfifo),
    _put('features.json', lambda path: path.symlink_to('/dev/zero')),
    _put('features.json', lambda path: path.write_text('[' * 10**5)),
    _put('features.json', lambda path: path.write_text('{"pythonClassName": 3}')),
    _put('features.json', lambda path: None),
    _put('label.labels.txt', os.mkfifo),
    _put('label.labels.txt', lambda path: path.write_bytes(b'caf\xe9\nx\n')),
    _put('label.labels.txt', lambda path: path.write_text('same\nsame\n')),
    _put('label.labels.txt', lambda path: path.write_text('one\ntwo\nthree\n')),
    _put('toy-train.array_record-00000-of-00001', os.mkfifo),
    _put('toy-train.array_record-00000-of-00001', os.mkdir),
    _put('toy-train.array_record-00000-of-00001', lambda path: path.write_bytes(b'x' * 1000)),
    _put('toy-train.array_record-00000-of-00001', lambda path: None),
    _change_split(filepathTemplate='../../../{SPLIT}'),
    _change_split(filepathTemplate='/etc/passwd'),
    _change_split(filepathTemplate='{SPLIT.__class__}'),
    _change_split(filepathTemplate='{SPLIT:>9999999999}'),
    _change_split(shardLengths=['-3']),
    _change_split(shardLengths=['1099511627776']),
    _change_split(shardLengths=[True]),
    _change_split(shardLengths='20'),
    _change_split(shardLengths=['1'] * 200_000),
    _change_split(name='../x'),
    _change_info(name='../x'),
    _change_info(name='\x1b[2J'),
    _change_info(version=['1.0.0']),
    _change_info(fileFormat={'x': 1}),
    _change_info(splits=[3]),
  ],
)
def test_a_damaged_description_is_one_line(toy, change):
  change(toy)
  with pytest.raises(UsageError) as error:
    _load(toy)
  assert '\n' not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize('label', [2, -2, 10**6])
def test_a_label_of_no_class_is_one_line(tmp_path, label):
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1] * 10 + [label], 'test': [0]})
  found = prepared.describe(root / 'toy' / '1.0.0')
  with pytest.raises(UsageError, match=r'toy/1.0.0 train\[20\] does not hold one'):
    list(prepared.Records(found, 'train').read([20]))


def _save(workdir, found, **info):
  """Writes a run with random weights as a workdir."""
  workdir.mkdir(exist_ok=True)
  record.write_config(workdir, found.config)
  notes = {'dataset': found.dataset, 'class_names': list(found.class_names), 'image_shape': list(found.image_shape)}
  checkpoint.save(workdir / 'checkpoints', 3, found.variables, info=notes | {'drawing': found.drawing} | info, keep=1)
  return workdir


@pytest.fixture
def picture(tmp_path):
  Image.new('L', (8, 8), 200).save(tmp_path / 'picture.png')
  return tmp_path / 'picture.png'


@pytest.mark.parametrize('name', ['mnist', 'toy'])
def test_reading_a_run_never_prepares_a_set(tmp_path, monkeypatch, name, offline):
  monkeypatch.setattr(tfds, 'network_is_up', lambda: True)
  monkeypatch.setattr(tfds, '_prepare', lambda _: pytest.fail('prepared a set'))
  found = untrained_run()
  found.config.data.update({'source': 'tfds', 'name': name, 'dir': str(tmp_path / 'somewhere')})
  workdir = _save(tmp_path / 'run', found)
  for command in ('evaluate', 'report'):
    line = one_line(call_command(f'cnn_jax.{command}', f'--workdir={workdir}'))
    assert 'a command that reads a run does not prepare sets' in line
  assert not (tmp_path / 'somewhere').exists()


def test_a_network_that_overflows_gives_no_answer(tmp_path, picture):
  found = untrained_run()
  found.variables['params']['head']['kernel'] = np.full_like(found.variables['params']['head']['kernel'], 3e38)
  workdir = _save(tmp_path / 'run', found)
  for arguments in ((), ('--json',)):
    done = call_command('cnn_jax.predict', f'--workdir={workdir}', picture, *arguments)
    assert 'computes numbers that are not finite' in one_line(done) and 'nan' not in done.stdout.lower()


def test_parameters_that_are_not_finite_give_no_answer(tmp_path, picture, monkeypatch):
  monkeypatch.setattr(checkpoint, '_check_state', lambda *_: None)  # an earlier version saved them
  found = untrained_run()
  found.variables['params']['head']['bias'] = np.array([1, np.nan, 2], np.float32)
  workdir = _save(tmp_path / 'run', found)
  for command in ('predict', 'export'):
    more = [picture] if command == 'predict' else [f'--output={tmp_path / "model.stablehlo"}']
    line = one_line(call_command(f'cnn_jax.{command}', f'--workdir={workdir}', *more))
    assert 'params/head/bias of step 3' in line and 'not finite' in line


def test_specks_of_dust_have_an_answer(tmp_path):
  levels = np.full((2000, 2000), 255, np.uint8)
  levels[3, 3] = levels[1990, 1990] = 0
  assert not drawings.fit(levels[..., None], {'longer_side': 8, 'centre': [4.0, 4.0]}, (8, 8, 1)).any()
  workdir = _save(tmp_path / 'run', untrained_run(drawing={'longer_side': 8, 'centre': [4.0, 4.0]}))
  Image.fromarray(levels).save(tmp_path / 'dust.png')
  done = call_command('cnn_jax.predict', f'--workdir={workdir}', tmp_path / 'dust.png')
  assert done.returncode == 0, done.stderr


def test_a_workdir_that_does_not_fit_names_several_arrays(tmp_path):
  found = untrained_run()
  found.config.model.features = (8, 12)
  workdir = _save(tmp_path / 'run', found)
  with pytest.raises(
    UsageError, match=r'does not fit the network.*4.* there and .*8.* here; .*; .*; and \d+ more; '
  ) as error:
    run.load_run(workdir)
  assert '\n' not in str(error.value)


def test_what_predicts_and_what_is_exported_compute_at_one_precision():
  found = untrained_run(features=(4, 6))
  images = np.zeros((2, *found.image_shape), np.uint8)
  texts = [
    evaluate.eval_step.lower(found.model, found.variables, images, LEVELS).as_text(),
    evaluate.view_step.lower(
      found.model, found.variables, images, LEVELS, np.bool_(True), np.array([1, 0], np.int32), 'constant'
    ).as_text(),
    jax.jit(export._probabilities(found)).lower(images).as_text(),
    predict.Classifier(found)._maps.lower(found.variables, images).as_text(),
  ]
  for text in texts:
    products = re.findall(r'stablehlo\.(?:convolution|dot_general).*', text)
    assert len(products) >= 2
    assert all(len(re.findall('HIGHEST', product)) == 2 for product in products), products
  train = jax.jit(lambda v, x: found.model.apply(v, x, train=False)[0]).lower(found.variables, images / 255.0).as_text()
  assert 'HIGHEST' not in train  # the default of training is unchanged


def test_an_output_that_is_no_file_is_one_line(tmp_path):
  workdir = _save(tmp_path / 'run', untrained_run())
  (tmp_path / 'folder.stablehlo').mkdir()
  os.mkfifo(tmp_path / 'pipe.stablehlo')
  for output in (
    'folder.stablehlo',
    'pipe.stablehlo',
    'absent/x.stablehlo',
    'run/config.json/x.stablehlo',
    'x' * 300 + '.stablehlo',
  ):
    one_line(call_command('cnn_jax.export', f'--workdir={workdir}', f'--output={tmp_path / output}'))
  one_line(call_command('cnn_jax.export', f'--workdir={workdir}', '--output=/proc/self/x.stablehlo'))  # read-only
  victim = tmp_path / 'victim'
  victim.write_text('precious')
  (tmp_path / 'link.stablehlo').symlink_to(victim)
  assert (
    call_command('cnn_jax.export', f'--workdir={workdir}', f'--output={tmp_path / "link.stablehlo"}').returncode == 0
  )
  assert victim.read_text() == 'precious' and not (tmp_path / 'link.stablehlo').is_symlink()


def test_an_export_says_how_pictures_are_prepared(tmp_path):
  drawing = {'longer_side': 6, 'centre': [3.5, 3.6]}
  found = untrained_run(drawing=drawing)
  found.config.data.resize = 'pad'
  (tmp_path / 'model.stablehlo').write_bytes(export.to_stablehlo(found))
  model = export.load(tmp_path / 'model.stablehlo')
  assert (model.resize, model.drawing) == ('pad', drawing)
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
  expected = calibration.softmax(logits_of(found, images, 3))
  np.testing.assert_allclose(model(images), expected, atol=1e-6)


@pytest.mark.faults
def test_a_page_is_small_at_any_size_of_images_and_names(tmp_path):
  found = untrained_run((1024, 1024, 3), features=(4, 6))
  names = ('x' * 900, 'y' * 999, '\x1b[2J' * 200)
  workdir = _save(tmp_path / 'run', found, class_names=list(names), dataset='z' * 9000)
  rng = np.random.default_rng(0)

  def split(n):
    return Split(rng.integers(0, 256, (n, 1024, 1024, 3), dtype=np.uint8), np.arange(n, dtype=np.int32) % 3)

  dataset = Dataset('z' * 9000, 'p' * 10**6, names, split(8), split(3), split(12))
  page = report.write_report(workdir, dataset)
  assert page.stat().st_size < 5_000_000
  assert 'y' * 300 not in page.read_text()


@pytest.mark.faults
def test_training_follows_no_link_that_is_planted_in_its_workdir(tmp_path):
  victim, workdir = tmp_path / 'victim', tmp_path / 'run'
  victim.write_text('precious')
  workdir.mkdir()
  for name in ('.config.json.tmp', '.environment.json.tmp', '.result.json.tmp'):
    (workdir / name).symlink_to(victim)
  done = call_command('cnn_jax.main', *DIGITS, '--config.epochs=2', f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  assert victim.read_text() == 'precious'
  (workdir / '.lock').unlink()
  (workdir / '.lock').symlink_to(victim)
  assert 'is a link' in one_line(call_command('cnn_jax.main', *DIGITS, '--config.epochs=2', f'--workdir={workdir}'))
  assert victim.read_text() == 'precious'


@pytest.mark.faults
def test_commands_work_for_a_user_without_home_and_name(digits_run, tmp_path, picture, monkeypatch):
  import pwd

  def unknown(*_):
    raise KeyError('getpwuid(): uid not found')

  workdir = shutil.copytree(digits_run, tmp_path / 'run')
  for name in ('HOME', 'USER', 'LOGNAME', 'XDG_CACHE_HOME', 'TFDS_DATA_DIR'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  monkeypatch.setattr(pwd, 'getpwnam', unknown)
  for command, *arguments in (
    ('predict', picture),
    ('evaluate',),
    ('report',),
    ('export', f'--output={tmp_path / "model.stablehlo"}'),
  ):
    done = call_command(f'cnn_jax.{command}', f'--workdir={workdir}', *arguments)
    assert done.returncode == 0, done.stderr
  one_line(call_command('cnn_jax.export', f'--workdir={workdir}', '--output=~/model.stablehlo'))
  with pytest.raises(UsageError, match='is not prepared in ~/tensorflow_datasets'):
    tfds.load(settings('tfds', name='cifar10'), prepare=False)


def test_each_promise_names_a_test_that_exists():
  page = (ROOT / 'docs' / 'security.md').read_text()
  named = re.findall(r'`(tests/[\w/]+\.py)::(\w+)`', page)
  assert len(named) >= 10
  for file, name in named:
    assert f'def {name}(' in (ROOT / file).read_text(), name
