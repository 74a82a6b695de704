"""Fashion-MNIST: clothing of ten classes, 28x28 grey; needs the prepared TFDS set.

TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/fashion_mnist.py
    372,682 parameters. Accuracy: not measured; the data set was unavailable on the benchmark machine.
"""

from cnn_jax.config import default_config


def get_config():
  config = default_config()
  config.data.name = 'fashion_mnist'
  config.epochs = 30
  config.model.features = (64, 128, 256)
  config.augment.flip = True
  config.augment.shift = 2
  config.augment.erase = 0.5
  config.loss.label_smoothing = 0.1
  return config
