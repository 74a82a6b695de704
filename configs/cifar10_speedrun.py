"""CIFAR-10 to 94 % in the least time: the recipe airbench94_muon of Jordan et al. (2024).

    TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/cifar10_speedrun.py

benchmarks/cifar10_speedrun measures it. The test split is evaluated once, after the last step; nothing is held out.
"""

from cnn_jax.config import default_config


def get_config():
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
  return config
