"""MNIST, as accurately as one small network can: 295,002 parameters.

    TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/mnist_best.py

It trains on all 60,000 training images: what is here was chosen beforehand, with a part of them held out (see
`experiments/mnist_accuracy`), and the last epoch is reported: 99.67 +- 0.03 % on test, mean and standard deviation of
seeds 0 to 4; 99.70 +- 0.02 % with test-time augmentation. Four minutes a seed on 2 cores of an AMD EPYC.
"""

from configs import mnist


def get_config(arg=None):
  config = mnist.get_config(arg)
  config.data.source = 'tfds'
  config.data.validation = 0.0
  config.epochs = 12
  config.min_steps = 0
  config.model.features = (16, 32, 64, 128)
  config.model.convs_per_block = 2
  config.augment.rotate = 15.0
  config.augment.scale = 0.15
  config.evaluation.ema_decay = 0.999
  return config
