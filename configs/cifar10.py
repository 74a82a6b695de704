"""CIFAR-10 and CIFAR-100: objects of 10 or 100 classes, 32x32 RGB; both need the prepared TFDS set.

TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10.py
    ResNet-18 with a stem for small images, 11,173,962 parameters, 60 epochs in bfloat16, for a GPU or TPU. 95.16 % (seed 0, at the
    last epoch, 49,000 training images), in two minutes of training on an H100 that ten other runs shared.
TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10.py:fast
    For two CPU cores: the network of cifar10_speedrun.py, 1,088,898 parameters, 12 epochs. 92.90 +- 0.22 % (seeds 0-2, at the
    last epoch, 49,000 training images), in 18 minutes from start to report on two cores of an AMD EPYC. The learning
    rate was chosen on 5,000 held-out training images.
TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10.py:100
    CIFAR-100, 11,220,132 parameters. Accuracy: not measured; the data set was unavailable on the benchmark machine.
"""

import pathlib

from ml_collections import ConfigDict

from cnn_jax import UsageError
from cnn_jax.config import default_config, load


def get_config(variant=''):
  if variant == 'fast':
    return _fast()
  config = default_config('resnet')
  config.data.name = 'cifar10'
  config.data.validation = 0.02
  config.batch_size = 256
  config.epochs = 60
  config.model.stem = '3x3'
  config.model.dtype = 'bfloat16'
  config.augment.flip = True
  config.augment.shift = 4
  config.augment.padding = 'reflect'
  config.augment.trivial = True
  config.augment.erase = 0.5
  config.optimizer.learning_rate = 0.2
  config.schedule.warmup_epochs = 5.0
  config.loss.label_smoothing = 0.1
  if variant == '100':
    config.data.name = 'cifar100'
    config.augment.cutmix = 1.0
  elif variant:
    raise UsageError(f"there is no variant {variant!r}; the variants are 'fast' and '100' (CIFAR-100).")
  return config


def _fast() -> ConfigDict:
  """The recipe of cifar10_speedrun.py for less arithmetic: narrower, longer, in smaller batches."""
  config = load(str(pathlib.Path(__file__).with_name('cifar10_speedrun.py')))
  config.data.source = 'auto'
  config.data.validation = 0.02
  config.batch_size = 500
  config.epochs = 12
  config.model.features = (32, 128, 256)
  config.model.norm_momentum = 0.8
  config.model.dtype = 'float32'
  config.optimizer.learning_rate = 0.12
  config.optimizer.accumulate_steps = 4  # parts of 125 images stay in the caches
  config.evaluation.batch_size = 1000
  return config
