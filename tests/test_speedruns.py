"""The speedruns on MNIST and CIFAR-10: what they refuse, and what their clocks leave out. Their runs: test_benchmarks.py."""

import jax
import numpy as np
import pytest

from benchmarks.accelerator import run as accelerator
from benchmarks.cifar10_speedrun import run as cifar10_speedrun
from benchmarks.mnist_speedrun import run as mnist_speedrun
from cnn_jax import UsageError, config
from cnn_jax.data import load_dataset
from tests.helpers import call_command

# The data and the size of which a CPU trains.
SMALL = [word for word in accelerator.PARTS['cifar10_speedrun'].small if word.startswith('--config.')]
DIGITS = ['--config.data.source=bundled', '--config.data.name=digits']


def test_nothing_is_compiled_while_the_clock_runs(caplog):
  small = config.load(str(cifar10_speedrun.CONFIG), SMALL)
  dataset = load_dataset(small.data)
  of_both = [config.vary(small, {'epochs': epochs, 'optimizer.first_stage_epochs': 0.5}) for epochs in (1, 2)]
  first, second = (cifar10_speedrun.prepare(one, dataset) for one in of_both)
  with jax.log_compiles():
    accuracies = [run(seed)['accuracy'] for seed in (5, 6) for run in (first, second)]
    assert [record.getMessage() for record in caplog.records if 'ompil' in record.getMessage()] == []
    jax.jit(lambda x: x + 1)(0)
  assert any('ompil' in record.getMessage() for record in caplog.records)  # such messages have that word
  assert len(set(accuracies)) == 4


@pytest.mark.parametrize(
  ('name', 'overrides', 'message'),
  [
    ('cifar10_speedrun', [*SMALL, '--config.batch_size=5000'], 'batch_size is 5000 but there are 1618 training images'),
    ('cifar10_speedrun', [*SMALL, '--config.augment.shift=9'], 'augment.shift is 9 but images are 8x8 pixels'),
    ('cifar10_speedrun', [*SMALL, '--config.seed=4294967296'], 'config.seed is 4294967296'),
    ('mnist_speedrun', [*DIGITS, '--config.batch_size=5000'], 'batch_size is 5000 but there are 1618 training images'),
    ('mnist_speedrun', [*DIGITS, '--config.seed=4294967296'], 'config.seed is 4294967296'),
  ],
)
def test_a_config_that_does_not_fit_the_data_or_the_devices_is_refused(name, overrides, message):
  done = call_command(f'benchmarks.{name}.run', '--seeds=1', *overrides)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1


def _arrays(images=(4, 8, 8, 1), labels=(4,)):
  arrays = {}
  for split in ('train', 'test'):
    arrays[f'{split}_images'] = np.arange(np.prod(images), dtype=np.uint8).reshape(images)
    arrays[f'{split}_labels'] = np.arange(np.prod(labels)).reshape(labels)
  return arrays


def test_arrays_are_read(tmp_path):
  file = tmp_path / 'images.npz'
  np.savez(file, **_arrays())
  dataset = cifar10_speedrun.read(file)
  for split in (dataset.train, dataset.test):
    np.testing.assert_array_equal(split.images, _arrays()['train_images'])
    assert (split.labels.tolist(), split.labels.dtype) == ([0, 1, 2, 3], np.int32)
  assert dataset.class_names == ('0', '1', '2', '3')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'train_images': np.zeros((4, 8, 8, 1))}, 'train_images are float64'),
    ({'test_images': np.zeros((4, 8, 8), np.uint8)}, r'test_images are uint8 \(4, 8, 8\) and not uint8 \(n, height'),
    ({'test_images': np.zeros((4, 3, 8, 8), np.uint8)}, r'test_images are uint8 \(4, 3, 8, 8\)'),
    ({'train_images': np.zeros((0, 8, 8, 1), np.uint8)}, r'train_images are uint8 \(0, 8, 8, 1\)'),
    ({'train_labels': np.zeros((4, 1), np.int64)}, r'train_labels are int64 \(4, 1\) and not integers of .*, \(4,\)'),
    ({'test_labels': np.zeros(3, np.int64)}, r'test_labels are int64 \(3,\)'),
    ({'test_labels': np.zeros(4)}, 'test_labels are float64'),
    ({'train_labels': np.array([0, 1, 2, -1])}, 'train_labels are int64'),
    ({'test_labels': None}, 'test_labels.* it must hold images and labels of both splits'),
  ],
)
def test_unusable_arrays_are_refused(changes, message, tmp_path):
  file = tmp_path / 'images.npz'
  np.savez(file, **{name: array for name, array in (_arrays() | changes).items() if array is not None})
  with pytest.raises(UsageError, match=message):
    cifar10_speedrun.read(file)


def test_arrays_that_are_not_there_are_refused(tmp_path):
  with pytest.raises(UsageError, match='cannot read .*nothing.npz'):
    cifar10_speedrun.read(tmp_path / 'nothing.npz')


def test_the_program_of_pytorch_gets_only_fields_that_it_reads():
  recipe = config.vary(config.default_config(), mnist_speedrun.RECIPE)
  mnist_speedrun.check_peer(recipe)
  mnist_speedrun.check_peer(config.vary(recipe, {'model.features': (2,), 'epochs': 3, 'data.validation': 0.2}))
  for fields in (
    {'optimizer.name': 'adamw'},
    {'schedule.name': 'linear'},
    {'model.convs_per_block': 2},
    {'augment.shift': 1},
    {'data.mean': (1.0,), 'data.std': (1.0,)},
    {'model.name': 'airbench'},
  ):
    with pytest.raises(UsageError, match='but the PyTorch program does not read it'):
      mnist_speedrun.check_peer(config.vary(recipe, fields))
