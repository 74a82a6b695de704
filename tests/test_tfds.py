"""Prepared TFDS sets, read without TensorFlow; what happens if a set is not prepared."""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cnn_jax import UsageError
from cnn_jax.data import BUNDLED, load_dataset, tfds
from cnn_jax.data.tfds import network_is_up
from tests.datasets import contents, make_tfds, settings

TFDS_DATA_DIR = os.environ.get('TFDS_DATA_DIR', '')

pytestmark = pytest.mark.usefixtures('offline')


def _let_tfds_prepare(monkeypatch):
  """Makes TensorFlow and the network appear to be available."""
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name == 'tensorflow' or find_spec(name))
  monkeypatch.setattr(tfds, 'network_is_up', lambda: True)


@pytest.mark.parametrize('source', ['tfds', 'auto'])
def test_a_prepared_set_is_read_without_tensorflow(tmp_path, source):
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1] * 20, 'test': [1, 0, 0]})
  dataset = load_dataset(settings(source, name='toy', dir=str(root)))
  assert 'tensorflow' not in sys.modules
  assert dataset.class_names == ('cat', 'dog')
  assert dataset.name == 'toy/1.0.0'
  assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (36, 4, 3)
  assert np.bincount(dataset.validation.labels).tolist() == [2, 2]
  assert dataset.test.images[:, 0, 0, 0].tolist() == [60, 61, 62]
  assert dataset.test.labels.tolist() == [1, 0, 0]
  for split in (dataset.train, dataset.validation):
    assert (split.images[:, 0, 0, 0] % 2 == split.labels).all()  # images kept their labels
  assert not contents(dataset.train) & contents(dataset.validation)


def test_a_test_split_without_labels_is_carved_out_of_train(tmp_path):
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1] * 20, 'test': [-1, -1]})
  dataset = load_dataset(settings('tfds', name='toy', dir=str(root)))
  assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (32, 4, 4)
  assert 'test and validation carved out of train' in dataset.provenance


def test_an_official_validation_split_is_used(tmp_path):
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1] * 5, 'validation': [0, 1, 1], 'test': [0]})
  dataset = load_dataset(settings('tfds', name='toy:1.0.0', dir=str(root)))
  assert dataset.validation.labels.tolist() == [0, 1, 1]
  assert len(dataset.train) == 10


def test_a_set_in_a_format_of_tensorflow_is_an_error(tmp_path):
  root = make_tfds(tmp_path / 'tfds', {'train': [0, 1], 'test': [0]})
  info = root / 'toy' / '1.0.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(UsageError, match='tfrecord, which only TensorFlow reads'):
    load_dataset(settings('tfds', name='toy', dir=str(root)))


@pytest.mark.parametrize(
  ('splits', 'reason'),
  [
    ({'test': [0, 1]}, "has no 'train' split but test"),
    ({'train': [-1, -1], 'test': [0]}, "the 'train' split of .* has no labels"),
    ({'train': [0, 1]}, 'leaves the validation split empty; change config.data.validation or config.data.test'),
  ],
)
def test_each_unusable_set_is_one_clear_error(tmp_path, splits, reason):
  root = make_tfds(tmp_path / 'tfds', splits)
  with pytest.raises(UsageError, match=reason) as error:
    load_dataset(settings('tfds', name='toy', dir=str(root)))
  assert '\n' not in str(error.value)


def test_a_set_with_several_configurations_needs_one(tmp_path):
  for name in ('toy/large', 'toy/small'):
    (tmp_path / name / '1.0.0').mkdir(parents=True)
    (tmp_path / name / '1.0.0' / 'dataset_info.json').touch()
  with pytest.raises(UsageError, match='several configurations are prepared: toy/large, toy/small; choose one'):
    load_dataset(settings('tfds', name='toy', dir=str(tmp_path)))


@pytest.mark.parametrize('name', ['', '/etc', '../toy'])
def test_a_path_is_not_a_name(name):
  with pytest.raises(UsageError, match='give the name of a TFDS set'):
    load_dataset(settings('tfds', name=name))


def test_any_answer_shows_that_the_network_is_up():
  with http.server.HTTPServer(('127.0.0.1', 0), http.server.BaseHTTPRequestHandler) as server:
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.handle_request, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    assert network_is_up(url)  # with 501, since the handler implements no method
  assert not network_is_up(url)


def test_tfds_never_falls_back_and_the_error_has_the_remedy():
  with pytest.raises(UsageError, match='not prepared in .*TFDS_DATA_DIR.*config.data.source=bundled') as error:
    load_dataset(settings('tfds', name='mnist'))
  assert '\n' not in str(error.value)
  with pytest.raises(UsageError, match='not prepared in') as error:
    load_dataset(settings('tfds', name='cifar10'))
  assert 'bundled' not in str(error.value)


@pytest.mark.parametrize('source', ['tfds', 'auto'])
def test_an_unknown_name_is_an_error_with_the_nearest_name(source):
  with pytest.raises(UsageError, match=r"'cifar_10'.* did you mean cifar10\?"):
    load_dataset(settings(source, name='cifar_10'))


def test_auto_falls_back_to_the_bundled_set_with_a_notice(capsys):
  dataset = load_dataset(settings('auto', name='mnist'))
  assert dataset.name == BUNDLED['mnist']
  notice = capsys.readouterr().err.splitlines()
  assert len(notice) == 6
  assert len({len(line) for line in notice}) == 1
  assert 'NOT THE FULL SET' in notice[1]


def test_auto_without_a_bundled_set_is_an_error():
  with pytest.raises(UsageError, match='TFDS_DATA_DIR'):
    load_dataset(settings('auto', name='cifar10'))


def test_digits_never_involve_tfds(capsys, monkeypatch):
  monkeypatch.setattr(tfds, 'find_obstacle', lambda _: pytest.fail('looked at TFDS'))
  monkeypatch.setattr(tfds, 'load', lambda _: pytest.fail('looked at TFDS'))
  assert load_dataset(settings('auto', name='digits')).name == BUNDLED['digits']
  assert capsys.readouterr().err == ''


def test_auto_prepares_a_set_if_it_can(tmp_path, monkeypatch):
  root = tmp_path / 'tfds'
  commands = []

  def run(command, **_):
    commands.append(command)
    make_tfds(root, {'train': [0, 1] * 20, 'test': [0]}, name='mnist')
    return subprocess.CompletedProcess(command, 0)

  _let_tfds_prepare(monkeypatch)
  monkeypatch.setattr(subprocess, 'run', run)
  dataset = load_dataset(settings('auto', name='mnist', dir=str(root)))
  assert dataset.name == 'mnist/1.0.0'
  assert commands[0][-2:] == ['mnist', str(root)]


def test_a_failed_preparation_is_an_error(tmp_path, monkeypatch):
  _let_tfds_prepare(monkeypatch)
  monkeypatch.setattr(subprocess, 'run', lambda command, **_: subprocess.CompletedProcess(command, 1))
  with pytest.raises(UsageError, match='could not prepare'):
    load_dataset(settings('tfds', name='mnist', dir=str(tmp_path)))


def test_offline_is_noticed_in_time(tmp_path):
  """In a fresh process with a package `tensorflow` that must not be imported and a proxy that never answers."""
  (tmp_path / 'tensorflow').mkdir()
  (tmp_path / 'tensorflow' / '__init__.py').write_text('raise RuntimeError("must not be imported")')
  fields = json.loads(settings('tfds', name='mnist', dir=str(tmp_path / 'none')).to_json())
  code = f"""
import concurrent.futures, os, socket, sys, time
silent = socket.create_server(('127.0.0.1', 0))
os.environ['https_proxy'] = 'http://127.0.0.1:%d' % silent.getsockname()[1]
sys.path.append({str(tmp_path)!r})
import tensorflow_datasets  # what is timed is the search for a network
from ml_collections import ConfigDict
from cnn_jax import UsageError
from cnn_jax.data import load_dataset
def load(source):
  data = ConfigDict({fields!r} | dict(source=source))
  start = time.monotonic()
  try:
    text = load_dataset(data).name
  except UsageError as error:
    text = str(error)
  return text, time.monotonic() - start
with concurrent.futures.ThreadPoolExecutor() as pool:
  for text, seconds in pool.map(load, ('auto', 'tfds')):
    print(text, seconds, sep=chr(10))
print('tensorflow' in sys.modules)
"""
  environment = {name: value for name, value in os.environ.items() if 'proxy' not in name.lower()}
  lines = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=True, env=environment
  ).stdout.splitlines()
  assert lines[0] == BUNDLED['mnist']
  assert 'cannot be reached' in lines[2]
  assert max(float(lines[1]), float(lines[3])) < 5
  assert lines[4] == 'False'


@pytest.mark.skipif(not TFDS_DATA_DIR, reason='TFDS_DATA_DIR, with a prepared MNIST, is not set')
def test_full_mnist(monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', TFDS_DATA_DIR)
  if not os.path.isdir(os.path.join(TFDS_DATA_DIR, 'mnist')):
    pytest.skip('TFDS_DATA_DIR holds no prepared MNIST')
  dataset = load_dataset(settings('tfds', name='mnist'))
  assert len(dataset.train) + len(dataset.validation) == 60000
  # The counts of the digits 0 and 9 in the official files.
  labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
  assert np.bincount(labels)[[0, 9]].tolist() == [5923, 5949]
  assert np.bincount(dataset.test.labels)[[0, 9]].tolist() == [980, 1009]
  start = time.monotonic()
  again = load_dataset(settings('tfds', name='mnist'))
  assert time.monotonic() - start < 5
  np.testing.assert_array_equal(again.train.images, dataset.train.images)
