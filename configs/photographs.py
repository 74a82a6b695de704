"""Photographs: an EfficientNet-Lite0 with ImageNet weights, fine-tuned for the classes of a folder.

python -m cnn_jax.main --config=configs/photographs.py --config.data.dir=DIR
    DIR/train/<class>/* and DIR/test/<class>/*, or DIR/<class>/*; some dozens of photographs per class suffice. 3,379,973
    parameters for five classes, of which 2,679,205 are trained. 86.3 +- 1.4 % on five flowers and 74.9 +- 1.1 % on six
    kinds of trash, from 20 photographs of each (seeds 0-2), a minute on 2 cores (benchmarks/fine_tuning). The weights are
    installed with the project, so no network is needed.
"""

from cnn_jax.config import default_config


def get_config():
  config = default_config('efficientnet')
  config.init_from = 'pretrained:efficientnet_lite0'
  config.data.source = 'folder'
  config.data.image_size = 224
  config.data.channels = 3
  config.data.validation = 0.0
  config.batch_size = 64
  config.epochs = 5
  config.min_steps = 200
  config.adapt_to_data = True
  config.model.pooled_stages = 3
  config.model.frozen_stages = 5
  config.model.fixed_statistics = True
  config.fine_tuning.probe = 1e-4
  config.fine_tuning.views = 12
  config.augment.flip = True
  config.augment.crop = 0.5
  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 6e-4
  config.optimizer.weight_decay = 0.0
  config.schedule.name = 'cosine'
  config.schedule.warmup_epochs = 0.5
  config.loss.label_smoothing = 0.1
  config.evaluation.views = True
  config.evaluation.batch_size = 50
  config.checkpoint.every_epochs = 1000  # and every ten minutes
  return config
