"""CIFAR-10: ten kinds of object, 32x32 RGB; needs the prepared TFDS set.

    TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10.py

Accuracy on the official pixels: not measured yet. `configs/image_folder.py` has a result on the
same pictures as JPEG files.
"""

from cnn_jax.config import default_config


def get_config(arg=None):
  del arg
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
  return config
