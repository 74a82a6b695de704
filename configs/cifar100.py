"""CIFAR-100: a hundred kinds of object, 32x32 RGB; needs the prepared TFDS set.

    TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar100.py

Accuracy: not measured yet; the set could not be had where the others were measured.
"""

from configs import cifar10


def get_config(arg=None):
  config = cifar10.get_config(arg)
  config.data.name = 'cifar100'
  config.augment.cutmix = 1.0
  config.epochs = 80
  return config
