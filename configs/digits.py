"""Digits: 1,797 images of 8x8 pixels, trained in seconds; also what the tests train on.

    python -m cnn_jax.main --config=configs/digits.py

Test accuracy at the last epoch: 98.79 +- 0.16 %, mean and standard deviation of seeds 0, 1, 2, on 359 images.
"""

from cnn_jax.config import default_config


def get_config(arg=None):
  del arg
  config = default_config()
  config.data.source = 'bundled'
  config.data.name = 'digits'
  config.data.test = 0.2
  config.batch_size = 64
  config.epochs = 30
  config.model.features = (32, 64)
  config.model.convs_per_block = 2
  config.loss.label_smoothing = 0.1
  config.augment.shift = 1
  config.evaluation.every_epochs = 5
  config.checkpoint.every_epochs = 5
  return config
