"""CIFAR-10 to 94 %, or to 96 %, in the least time on a GPU; benchmarks/cifar10_speedrun measures both.

TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10_speedrun.py
    94 %: the recipe airbench94_muon of Jordan et al. (2024). 1,971,650 parameters.
TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10_speedrun.py:96
    96 %: the network of airbench96, trained by Muon. 9,915,714 parameters. Accuracy and time: not measured yet.

The test split is evaluated once, after the last step; nothing is held out.
"""

from cnn_jax import UsageError
from cnn_jax.config import default_config


def get_config(variant=''):
  config = default_config('airbench')
  config.data.source = 'tfds'
  config.data.name = 'cifar10'
  config.data.validation = 0.0
  config.data.mean = (125.307, 122.961, 113.8575)
  config.data.std = (62.985, 62.0925, 66.708)
  config.batch_size = 2000
  config.epochs = 8
  config.model.dtype = 'bfloat16'
  config.augment.flip = True
  config.augment.alternate = True
  config.augment.shift = 2
  config.augment.padding = 'reflect'
  config.optimizer.name = 'muon_sgd'
  config.optimizer.learning_rate = 0.24
  config.optimizer.momentum = 0.6
  config.optimizer.head_rate = 0.67
  config.optimizer.bias_rate = 0.053
  config.optimizer.weight_decay = 4e-3
  config.optimizer.first_stage_epochs = 3.0
  config.schedule.name = 'linear'
  config.schedule.warmup_epochs = 0.0
  config.loss.label_smoothing = 0.2
  config.loss.reduction = 'sum'
  config.evaluation.batch_size = 2000
  config.evaluation.views = True
  config.evaluation.view_rule = 'diagonal'
  if variant == '96':
    # Width, depth, residual connections, shifts and warm-up are those of airbench96, which trains for 37 epochs by SGD and
    # erases a square of 12 pixels in each image; rectangles in four of five images cover as much, on average.
    config.batch_size = 1000
    config.epochs = 30
    config.model.features = (128, 384, 512)
    config.model.convs_per_group = 3
    config.model.residual = True
    config.augment.shift = 4
    config.augment.erase = 0.8
    config.optimizer.learning_rate = 0.17  # half the batch: the rate divided by the root of two
    config.optimizer.weight_decay = 2e-3
    config.schedule.warmup_epochs = 3.0
    config.evaluation.batch_size = 1000
  elif variant:
    raise UsageError(f"there is no variant {variant!r}; the variant is '96'.")
  return config
