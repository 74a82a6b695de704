"""Fashion-MNIST: ten kinds of clothing, 28x28 grey; needs the prepared TFDS set.

    TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/fashion_mnist.py

Accuracy: not measured yet; the set could not be had where the others were measured.
"""

from cnn_jax.config import default_config


def get_config(arg=None):
  del arg
  config = default_config()
  config.data.name = 'fashion_mnist'
  config.epochs = 30
  config.model.features = (64, 128, 256)
  config.augment.flip = True
  config.augment.shift = 2
  config.augment.erase = 0.5
  config.loss.label_smoothing = 0.1
  return config
