"""MNIST: a 94,000-parameter network. TABLE

python -m cnn_jax.main --config=configs/mnist.py
"""

from cnn_jax.config import default_config


def get_config(arg=None):
  del arg
  config = default_config()
  config.data.name = 'mnist'
  config.data.test = 0.2  # of the bundled images; the full set has a test split of its own
  config.epochs = 10
  config.min_steps = 1200
  config.model.features = (32, 64, 128, 128)
  config.loss.label_smoothing = 0.1
  config.augment.shift = 2
  config.augment.rotate = 10.0
  config.augment.scale = 0.1
  return config
