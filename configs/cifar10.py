"""CIFAR-10 and CIFAR-100: objects of 10 or 100 classes, 32x32 RGB; both need the prepared TFDS set.

TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10.py
    2,370,698 parameters. Accuracy on the official pixels: not measured. `configs/image_folder.py` has a result on a
    JPEG re-encoding of CIFAR-10 (see the results in README.md).
TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10.py:100
    CIFAR-100, 2,393,828 parameters. Accuracy: not measured; the data set was unavailable on the benchmark machine.
"""

from cnn_jax import UsageError
from cnn_jax.config import default_config


def get_config(variant=''):
  config = default_config()
  config.data.name = 'cifar10'
  config.batch_size = 256
  config.epochs = 40
  config.model.features = (64, 128, 256, 256)
  config.model.convs_per_block = 2
  config.model.residual = True
  config.augment.flip = True
  config.augment.shift = 4
  config.augment.padding = 'reflect'
  config.optimizer.learning_rate = 0.4
  config.schedule.warmup_epochs = 5.0
  config.loss.label_smoothing = 0.1
  if variant == '100':
    config.data.name = 'cifar100'
    config.augment.cutmix = 1.0
    config.epochs = 80
  elif variant:
    raise UsageError(f"there is no variant {variant!r}; the only variant is '100' (CIFAR-100).")
  return config
