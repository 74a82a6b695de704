"""Weights on the hub, from a server on loopback."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from cnn_jax import UsageError, hub, models, weights
from cnn_jax import config as config_lib
from tests.helpers import run_command
from tests.hub_server import COMMIT, serve
from tests.torch_writer import Tensor, write_archive

constants = pytest.importorskip('huggingface_hub.constants')

SMALL = {'width': 4}
SETTINGS = {
  'architecture': 'resnet18',
  'pretrained_cfg': {'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225], 'input_size': [3, 224, 224]},
}


@pytest.fixture(scope='module')
def tensors():
  config = models.default_config('resnet')
  config.update(SMALL)
  expected = models.init_shapes(models.create(config, 7), (64, 64, 3))
  flat = {tuple(key.key for key in path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(expected)}
  (table,) = models.foreign_names(config).values()
  return {
    name: np.full([flat[path][order.index(axis)] for axis in range(len(order))], 0.5, np.float32)
    for name, (path, order) in table.items()
  }


@pytest.fixture
def repositories(tensors, tmp_path, monkeypatch):
  """Repositories on a server, whose address the package uses, with an empty cache."""
  pickled = write_archive(tmp_path / 'w.bin', {name: Tensor(x) for name, x in tensors.items()}).read_bytes()
  files = {
    'timm/small': {
      'model.safetensors': safetensors.numpy.save(tensors), 'config.json': json.dumps(SETTINGS).encode(),
      'model.py': b'raise SystemExit',
    },
    'old/small': {'pytorch_model.bin': pickled},
    'an/other': {'config.json': json.dumps(SETTINGS | {'architecture': 'vit_base'}).encode()},
    'a/deeper': {'config.json': json.dumps(SETTINGS | {'architecture': 'resnet50'}).encode()},
    'bad/levels': {'config.json': b'{"pretrained_cfg": {"mean": [1e999, "a", 0], "std": [1, 1, 1]}}'},
    'bad/json': {'config.json': b'{"'},
  }  # fmt: skip
  with serve(files) as (address, asked):
    monkeypatch.setenv('HF_ENDPOINT', address)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_TELEMETRY', True)
    yield asked


def _config(place):
  return config_lib.vary(
    config_lib.default_config('resnet'), {'init_from': place} | {f'model.{name}': x for name, x in SMALL.items()}
  )


@pytest.mark.parametrize('place', ['hf:timm/small', f'hf:timm/small@{COMMIT}', 'hf:old/small'])
def test_a_run_starts_from_a_repository(repositories, tensors, place):
  config = _config(place)
  assert weights.statistics_of(config) == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
  shapes = models.init_shapes(models.create(config.model, 3), (64, 64, 3))
  started = weights.start(config, jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes), 'abc')
  assert (started['params']['stem_conv']['kernel'] == 0.5).all()
  assert not started['params']['head']['bias'].any()
  # Of a repository only the weights and config.json are fetched, never code.
  assert {path.rpartition('/')[2] for path in repositories if '/resolve/' in path} <= {
    'model.safetensors', 'pytorch_model.bin', 'config.json',
  }  # fmt: skip


@pytest.mark.parametrize(
  ('place', 'message'),
  [
    ('hf:timm/absent', 'the hub has no hf:timm/absent'),
    ('hf:timm/small@v9', 'the hub has no hf:timm/small@v9'),
    (
      'hf:an/other',
      "hf:an/other is the network 'vit_base'; the networks that can be used: convnext_atto, .*, resnet18,",
    ),
    ('hf:a/deeper', 'hf:a/deeper is not the network of config.model; set --config.model.depth=50'),
    ('hf:bad/levels', 'mean in config.json of hf:bad/levels is not 1 or 3 numbers from 0 to 1'),
    ('hf:bad/json', 'config.json is not JSON .* choose another repository'),
    ('hf:small', "'hf:small' names no repository; give hf:OWNER/NAME or hf:OWNER/NAME@REVISION"),
    ('hf:../../etc', "'hf:../../etc' names no repository"),
  ],
)
def test_what_cannot_be_used_is_one_line(repositories, place, message):
  with pytest.raises(UsageError, match=message):
    weights.statistics_of(_config(place))


def test_a_repository_without_weights_is_one_line(repositories):
  with pytest.raises(UsageError, match='hf:an/other has no model.safetensors and no pytorch_model.bin; choose another'):
    hub.fetch('hf:an/other')


def test_without_the_package_it_is_one_line(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'huggingface_hub', None)
  with pytest.raises(UsageError, match=r"hf:a/b needs the package huggingface_hub; run: pip install 'cnn_jax\[hub\]'"):
    hub.fetch('hf:a/b')


@pytest.mark.parametrize('variables', [{'HF_HUB_OFFLINE': 1}, {'HF_ENDPOINT': 'http://127.0.0.1:9'}])
@pytest.mark.faults
def test_without_a_network_the_command_ends_with_one_line(tmp_path, variables):
  done = run_command(
    'cnn_jax.main', '--config=configs/digits.py', '--config.model.name=resnet', '--config.init_from=hf:timm/resnet18',
    f'--workdir={tmp_path / "run"}', HF_HUB_CACHE=tmp_path / 'cache', **variables,
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith('error: hf:timm/resnet18 is not in the cache, and the hub cannot be')
