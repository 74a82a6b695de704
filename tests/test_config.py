import os
import re

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cnn_jax import UsageError, main, models, record, seeds
from cnn_jax import config as config_lib
from cnn_jax.config import default_config
from tests.helpers import ROOT

# Trainable parameters of each config's network, on images of its set.
PARAMETERS = {
  'mnist.py': ((28, 28, 1), 10, 241_898),
  'mnist.py:best': ((28, 28, 1), 10, 295_002),
  'mnist.py:small': ((28, 28, 1), 10, 7_788),
  'fashion_mnist.py': ((28, 28, 1), 10, 372_682),
  'cifar10.py': ((32, 32, 3), 10, 11_173_962),
  'cifar10.py:fast': ((32, 32, 3), 10, 1_088_898),
  'cifar10.py:100': ((32, 32, 3), 100, 11_220_132),
  'cifar10_speedrun.py': ((32, 32, 3), 10, 1_971_650),
  'cifar10_speedrun.py:96': ((32, 32, 3), 10, 9_915_714),
  'digits.py': ((8, 8, 1), 10, 65_834),
  'image_folder.py': ((32, 32, 3), 10, 373_834),
  'photographs.py': ((224, 224, 3), 5, 3_379_973),
  'imagenet.py': ((256, 256, 3), 1000, 25_557_032),
  'imagenet.py:fast': ((256, 256, 3), 1000, 25_557_032),
}


def test_every_config_is_covered():
  assert {path.name for path in (ROOT / 'configs').glob('*.py')} == {name.partition(':')[0] for name in PARAMETERS}


@pytest.mark.parametrize('name', PARAMETERS)
def test_every_config_is_valid_and_has_its_parameters(name):
  config = config_lib.load(f'{ROOT}/configs/{name}')
  shape, num_classes, expected = PARAMETERS[name]
  config_lib.check_data(config, 50_000 if name != 'digits.py' else 1_400, num_classes, shape)
  model = models.create(config.model, num_classes)
  assert models.num_parameters(models.init_shapes(model, shape)['params']) == expected


# Every field is read ------------------------------------------------------------------------------


class Recording(ConfigDict):
  """A config that notes which of its fields are read."""

  read: set[str] = set()  # noqa: RUF012
  paths: dict[int, str] = {}  # noqa: RUF012

  @classmethod
  def of(cls, values, prefix=''):
    made = cls()
    for name, value in values.items():
      made[name] = cls.of(value, f'{prefix}{name}.') if isinstance(value, ConfigDict) else value
    cls.paths[id(made)] = prefix
    return made

  def __getitem__(self, key):
    if id(self) in self.paths:
      self.read.add(self.paths[id(self)] + key)
    return super().__getitem__(key)

  def to_dict(self, *arguments, **named):
    """Copying a config, as the record does, reads no field."""
    before = set(self.read)
    copied = super().to_dict(*arguments, **named)
    Recording.read = before
    return copied


def _unread(tmp_path, monkeypatch, config):
  """The fields of a config that nothing reads while a run is trained in each of several ways."""
  pictures = tmp_path / 'pictures'
  for level, name in ((60, 'night'), (190, 'day')):
    (pictures / name).mkdir(parents=True)
    for i in range(30):
      Image.fromarray(np.full((9, 8), level + i, np.uint8)).save(pictures / name / f'{i}.png')
  # These look at all fields alike.
  alike = ((config_lib, 'check'), (record, 'check_config'), (record, 'write_config'), (seeds, 'facts'))
  for owner, name in alike:
    monkeypatch.setattr(owner, name, lambda *_: None)
  Recording.read, Recording.paths = set(), {}
  ways = (
    {'data.source': 'folder', 'data.dir': str(pictures), 'optimizer.name': 'adamw', 'schedule.name': 'cosine'},
    {
      'data.source': 'bundled',
      'data.name': 'digits',
      'data.dir': '',
      'optimizer.name': 'muon',
      'data.resident': 'never',
    },
    {'model.frozen_stages': 1, 'fine_tuning.views': 1},
    {'model.frozen_stages': 0, 'optimizer.name': 'muon_sgd', 'augment.flip': True, 'evaluation.views': True},
  )
  for i, fields in enumerate(ways):
    with config.unlocked():
      config.update_from_flattened_dict(fields)
    recorded = Recording.of(config)
    main.train_and_evaluate(recorded, tmp_path / f'{i}')
  return {field for field, _ in config_lib.leaves(config)} - Recording.read


def test_every_field_is_read(tmp_path, monkeypatch):
  config = default_config()
  with config.unlocked():
    config.batch_size, config.epochs, config.schedule.warmup_epochs = 8, 1, 0.5
    config.model.features, config.data.image_size = (4,), 8
    config.log.report, config.augment.shift = False, 1
    config.nothing_reads_this = 1
  assert _unread(tmp_path, monkeypatch, config) == {'nothing_reads_this'}


# Overrides ----------------------------------------------------------------------------------------


def test_overrides_have_two_forms_and_the_last_counts():
  config = config_lib.override(
    default_config(),
    [
      '--config.model.features=(8,)',
      '--config.model.features',
      '(16, 4)',
      '--config.seed',
      '3',
      '--noconfig.log.report',
    ],
  )
  assert config.model.features == (16, 4)
  assert config.seed == 3
  assert config.log.report is False
  assert default_config().seed == 0


def test_two_loads_in_one_process_are_independent():
  file = f'{ROOT}/configs/digits.py'
  first = config_lib.load(file, ['--config.epochs=3'])
  second = config_lib.load(file)
  assert (first.epochs, second.epochs) == (3, 30)


def test_another_network_brings_its_own_fields(tmp_path, monkeypatch):
  (tmp_path / 'other.py').write_text(
    'from ml_collections import ConfigDict\n'
    'RULES = {"depth": "positive"}\n'
    'def default_config():\n'
    '  return ConfigDict({"depth": 3, "frozen_stages": 0, "dtype": "float32"})\n'
  )
  monkeypatch.setattr(models, '__path__', [*models.__path__, str(tmp_path)])
  config = config_lib.override(default_config(), ['--config.model.depth=4', '--config.model.name=other'])
  assert config.model.to_dict() == {'name': 'other', 'depth': 4, 'frozen_stages': 0, 'dtype': 'float32'}
  with pytest.raises(UsageError, match='features'):
    config_lib.override(default_config(), ['--config.model.name=other', '--config.model.features=(4,)'])
  assert config_lib.vary(default_config(), {'model.name': 'other', 'model.depth': 2}).model.depth == 2
  with pytest.raises(UsageError, match='config.model.depth is 0; it must be greater than zero'):
    config_lib.vary(default_config(), {'model.name': 'other', 'model.depth': 0})


def test_the_networks_are_files_of_the_folder():
  assert 'cnn' in models.names()
  assert 'layers' not in models.names()
  for name in ('layers', 'os.path', '../train', ''):
    with pytest.raises(UsageError, match=f'config.model.name is {name!r}; it must be one of: airbench, cnn'):
      models.default_config(name)


@pytest.mark.parametrize(
  ('body', 'message'),
  [
    ('raise OSError("no such thing")', 'OSError: no such thing'),
    ('import sys; sys.exit(0)', 'SystemExit: 0'),
    ('get_config = lambda: 3', 'returned a int; it must return a ConfigDict'),
    ('def get_config(:', 'SyntaxError'),
    ('from cnn_jax.config import default_config as get_config\nimport nowhere', "No module named 'nowhere'"),
  ],
)
def test_a_config_file_that_fails_is_one_line(tmp_path, body, message):
  (tmp_path / 'mine.py').write_text(body)
  with pytest.raises(UsageError, match='mine.py') as error:
    config_lib.load(str(tmp_path / 'mine.py'))
  assert message in str(error.value)


def test_variants_of_a_config_file(tmp_path):
  with pytest.raises(UsageError, match='best'):
    config_lib.load(f'{ROOT}/configs/mnist.py:bset')
  assert config_lib.load(f'{ROOT}/configs/mnist.py:best').epochs == 12


# Records ------------------------------------------------------------------------------------------


def test_a_config_of_an_earlier_version_is_translated():
  old = default_config().to_dict()
  old['model'] = {name: value for name, value in old['model'].items() if name not in ('name', 'frozen_stages')}
  old['model']['frozen_blocks'] = 2
  del old['log']['trackers']
  config = config_lib.from_record(old)
  config_lib.check(config)
  assert config.model.name == 'cnn'
  assert config.model.frozen_stages == 2
  assert config.log.trackers == ()
  with pytest.raises(UsageError, match='config.model is 3; it must be an object'):
    config_lib.from_record({'model': 3})


# Checks -------------------------------------------------------------------------------------------


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
    ('model.features', (), 'one or more whole numbers greater than zero'),
    ('model.features', (8, 0), 'one or more whole numbers'),
    ('model.features', (8, True), 'one or more whole numbers'),
    ('model.features', ('8',), 'one or more whole numbers'),
    ('log.trackers', ('wandb', 'tensorbord'), "holds 'tensorbord'; the trackers are: wandb, mlflow"),
    ('model.frozen_stages', -1, 'must not be negative'),
    ('model.dropout', 1.0, 'less than 1'),
    ('optimizer.learning_rate', float('nan'), 'finite'),
    ('schedule.warmup_epochs', 12.0, 'must end before'),
    ('augment.erase', 1.5, 'at most 1'),
    ('augment.hue', 0.6, 'at most 0.5'),
    ('evaluation.views', True, 'config.augment has neither'),
    ('augment.alternate', True, 'needs config.augment.flip'),
    ('data.mean', (128.0,), 'config.data.mean is (128.0,) but config.data.std is ()'),
    ('data.std', (1.0, 2.0), 'give one number of levels, such as (127.5,), or three'),
    ('data.std', ('1',), 'give one number of levels'),
    ('data.std', (0.0,), 'config.data.std is (0.0,); it is in levels from 0 to 255, and must be at least 0.001'),
    ('data.std', (1e-4,), 'config.data.std is (0.0001,); it is in levels'),
    (
      'optimizer.learning_rate',
      1e-60,
      'config.optimizer.learning_rate is 1e-60, which is zero in float32; the smallest',
    ),
    ('loss.class_weights', (1e-60, 1.0), 'config.loss.class_weights is (1e-60, 1.0), which is zero in float32'),
    ('data.canvas_size', 8193, 'config.data.canvas_size is 8193; it must be from 0 to 8192'),
  ],
)
def test_impossible_values_are_one_sentence(field, value, message):
  config = default_config()
  section, _, name = field.rpartition('.')
  with config.ignore_type():
    (config[section] if section else config)[name] = value
  with pytest.raises(UsageError, match=re.escape(message)) as error:
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


def test_processes_suit_the_machine(monkeypatch):
  monkeypatch.setattr(os, 'cpu_count', lambda: 3)
  config = default_config()
  config.data.workers = 24
  config_lib.check_devices(config, 1)
  config.data.workers = 25
  with pytest.raises(UsageError, match='config.data.workers is 25, but this machine has 3 cores; make it at most 24'):
    config_lib.check_devices(config, 1)


@pytest.mark.parametrize('features', [(10**5, 10**5), (2**31 - 1,), (8, 2**31 - 1, 8)])
def test_a_network_fits_into_the_memory(features):
  config = config_lib.vary(default_config(), {'model.features': features})
  with pytest.raises(UsageError, match=r'config.model has [\d,]+ parameters, which need [\d,]+ GB; this machine has'):
    config_lib.check_data(config, 128, 10, (28, 28, 1))


def test_the_config_fits_the_data():
  config = default_config()
  config_lib.check_data(config, 128, 10, (28, 28, 1))
  with pytest.raises(UsageError, match='127 training images'):
    config_lib.check_data(config, 127, 10, (28, 28, 1))
  config.augment.shift = 28
  with pytest.raises(UsageError, match='28x28 pixels'):
    config_lib.check_data(config, 128, 10, (28, 28, 1))
  config.augment.shift = 0
  with pytest.raises(UsageError, match='at least 4 pixels'):
    config_lib.check_data(config, 128, 10, (3, 28, 1))
  config.data.mean, config.data.std = (120.0, 110.0, 100.0), (60.0, 60.0, 60.0)
  config_lib.check_data(config, 128, 10, (28, 28, 3))
  with pytest.raises(UsageError, match='the images are grey'):
    config_lib.check_data(config, 128, 10, (28, 28, 1))


def test_statistics_have_a_default():
  config = default_config()
  assert config_lib.statistics(config.data) == ((127.5,), (127.5,), 0)
  config.data.mean, config.data.std = (120, 110, 100), (60.5, 60, 60)
  assert config_lib.statistics(config.data) == ((120.0, 110.0, 100.0), (60.5, 60.0, 60.0), 0)


def test_the_warm_up_ends_before_the_training_of_the_data_at_hand():
  config = default_config()
  config.epochs, config.min_steps, config.schedule.warmup_epochs = 1, 40, 2.0
  config_lib.check(config)
  config_lib.check_data(config, 1280, 10, (28, 28, 1))  # 10 steps per epoch: 4 epochs
  with pytest.raises(UsageError, match=r'warmup_epochs is 2.0 of 1 epochs'):
    config_lib.check_data(config, 128 * 40, 10, (28, 28, 1))


def test_durations_are_derived_from_the_data():
  config = default_config()
  config.batch_size, config.epochs, config.min_steps = 100, 3, 0
  assert config_lib.steps_per_epoch(config, 1999) == 19
  assert config_lib.num_epochs(config, 1999) == 3
  config.min_steps = 58
  assert config_lib.num_epochs(config, 1999) == 4
