"""CIFAR-10 and CIFAR-100: objects of 10 or 100 classes, 32x32 RGB; both need the prepared TFDS set.

TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10.py
    ResNet-18 with a stem for small images, 11,173,962 parameters, 100 epochs, for a GPU or TPU. Accuracy: not measured yet.
TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10.py:fast
    For two CPU cores: the network of cifar10_speedrun.py, 1,088,898 parameters, 12 epochs. 92.90 +- 0.22 % (seeds 0-2, at the
    last epoch, 49,000 training images), in 18 minutes from start to report on two cores of an AMD EPYC. The learning
    rate was chosen on 5,000 held-out training images.
TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10.py:100
    CIFAR-100, 11,220,132 parameters. Accuracy: not measured; the data set was unavailable on the benchmark machine.
"""

from ml_collections import ConfigDict

from cnn_jax import UsageError
from cnn_jax.config import default_config


def get_config(variant=''):
  if variant == 'fast':
    return _fast()
  config = default_config('resnet')
  config.data.name = 'cifar10'
  config.batch_size = 256
  config.epochs = 100
  config.model.stem = '3x3'
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
  config = default_config('airbench')
  config.data.name = 'cifar10'
  config.data.validation = 0.02
  config.data.mean = (125.307, 122.961, 113.8575)
  config.data.std = (62.985, 62.0925, 66.708)
  config.batch_size = 500
  config.epochs = 12
  config.model.features = (32, 128, 256)
  config.model.norm_momentum = 0.8
  config.augment.flip = True
  config.augment.alternate = True
  config.augment.shift = 2
  config.augment.padding = 'reflect'
  config.optimizer.name = 'muon_sgd'
  config.optimizer.learning_rate = 0.12
  config.optimizer.momentum = 0.6
  config.optimizer.head_rate = 0.67
  config.optimizer.bias_rate = 0.053
  config.optimizer.weight_decay = 4e-3
  config.optimizer.first_stage_epochs = 3.0
  config.optimizer.accumulate_steps = 4  # parts of 125 images stay in the caches
  config.schedule.name = 'linear'
  config.schedule.warmup_epochs = 0.0
  config.loss.label_smoothing = 0.2
  config.loss.reduction = 'sum'
  config.evaluation.views = True
  config.evaluation.view_rule = 'diagonal'
  return config
