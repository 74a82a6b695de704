import importlib
import pathlib

import pytest
from ml_collections import ConfigDict

from cnn_jax import UsageError
from cnn_jax import config as config_lib
from cnn_jax.config import default_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Trainable parameters of each config's network, on images of its set.
PARAMETERS = {
  'mnist': ((28, 28, 1), 10, 241_898),
  'mnist_best': ((28, 28, 1), 10, 295_002),
  'mnist_small': ((28, 28, 1), 10, 7_788),
  'fashion_mnist': ((28, 28, 1), 10, 372_682),
  'cifar10': ((32, 32, 3), 10, 2_370_698),
  'cifar100': ((32, 32, 3), 100, 2_393_828),
  'digits': ((8, 8, 1), 10, 65_834),
  'image_folder': ((32, 32, 3), 10, 373_834),
}


def _load(name):
  return importlib.import_module(f'configs.{name}').get_config()


def test_every_config_is_covered():
  assert {path.stem for path in (ROOT / 'configs').glob('*.py')} == set(PARAMETERS)


@pytest.mark.parametrize('name', PARAMETERS)
def test_every_config_is_valid_and_has_its_parameters(name):
  import jax
  import jax.numpy as jnp

  from cnn_jax.model import create_model

  config = _load(name)
  config_lib.check(config)
  shape, num_classes, expected = PARAMETERS[name]
  config_lib.check_data(config, 50_000 if name != 'digits' else 1_400, *shape[:2])
  model = create_model(config.model, num_classes)
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))
  assert sum(p.size for p in jax.tree.leaves(variables['params'])) == expected


def test_every_field_is_read():
  package = [path for path in (ROOT / 'cnn_jax').rglob('*.py') if path.name != 'config.py']
  source = '\n'.join(path.read_text() for path in package)
  derived = '\n'.join((ROOT / 'cnn_jax' / 'config.py').read_text().split('def check(')[1:])
  for field, _ in config_lib._leaves(default_config()):
    name = field.rsplit('.', 1)[-1]
    used = f'.{name}' in source or (field in ('epochs', 'min_steps') and f'config.{name}' in derived)
    assert used, f'nothing reads config.{field}'


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('epochs', 0, 'config.epochs is 0; it must be greater than zero'),
    ('batch_size', -4, 'config.batch_size is -4'),
    ('seeds', 0, 'config.seeds is 0; it must be greater than zero'),
    ('seeds', 2.0, 'config.seeds is 2.0, a float; it must be a int'),
    ('seed', 1.5, 'config.seed is 1.5, a float; it must be a int'),
    ('log.tensorboard', 1, 'config.log.tensorboard is 1, a int; it must be a bool'),
    ('model.pool', 'mean', 'one of: max, avg, none'),
    ('model.features', (), 'channels of each block'),
    ('model.dropout', 1.0, 'less than 1'),
    ('optimizer.learning_rate', float('nan'), 'finite'),
    ('schedule.warmup_epochs', 12.0, 'must end before'),
    ('augment.erase', 1.5, 'at most 1'),
  ],
)
def test_impossible_values_are_one_sentence(field, value, message):
  config = default_config()
  section, _, name = field.rpartition('.')
  with config.ignore_type():
    (config[section] if section else config)[name] = value
  with pytest.raises(UsageError, match=message.replace('.', r'\.').replace('(', r'\(')) as error:
    config_lib.check(config)
  assert '\n' not in str(error.value)


def test_unknown_and_missing_fields_are_named():
  fields = default_config().to_dict()
  fields['optimizer']['learning_rte'] = 0.1
  with pytest.raises(UsageError, match='learning_rte is not a field; did you mean config.optimizer.learning_rate'):
    config_lib.check(ConfigDict(fields))
  del fields['optimizer']
  with pytest.raises(UsageError, match='config.optimizer is missing'):
    config_lib.check(ConfigDict(fields))
  with pytest.raises(AttributeError, match='epoch'):
    default_config().epoch = 3


def test_batches_divide_over_devices():
  config = default_config()
  config.batch_size = 100
  config_lib.check_devices(config, 4)
  with pytest.raises(UsageError, match='nearest that do: 96 or 104'):
    config_lib.check_devices(config, 8)
  config.batch_size = 3
  with pytest.raises(UsageError, match='nearest that do: 8'):
    config_lib.check_devices(config, 8)


def test_the_config_fits_the_data():
  config = default_config()
  config_lib.check_data(config, 128, 28, 28)
  with pytest.raises(UsageError, match='127 training images'):
    config_lib.check_data(config, 127, 28, 28)
  config.augment.shift = 28
  with pytest.raises(UsageError, match='28x28 pixels'):
    config_lib.check_data(config, 128, 28, 28)
  config.augment.shift = 0
  with pytest.raises(UsageError, match='at least 4 pixels'):
    config_lib.check_data(config, 128, 3, 28)


def test_durations_are_derived_from_the_data():
  config = default_config()
  config.batch_size, config.epochs, config.min_steps = 100, 3, 0
  assert config_lib.steps_per_epoch(config, 1999) == 19
  assert config_lib.num_epochs(config, 1999) == 3
  config.min_steps = 58
  assert config_lib.num_epochs(config, 1999) == 4
