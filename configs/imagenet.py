"""ImageNet (ILSVRC 2012): a ResNet-50 of 224 pixels, 25,557,032 parameters, in 90 epochs or in 16.

TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/imagenet.py
    The usual recipe (Goyal et al. 2017, arXiv 1706.02677; the cosine of He et al. 2019, arXiv 1812.01187). Accuracy: not
    measured; the data set was unavailable on the benchmark machine.
TFDS_DATA_DIR=DIR python -m cnn_jax.main --config=configs/imagenet.py:fast
    16 epochs at 160 pixels, evaluated at 224 (Touvron et al. 2019, arXiv 1906.06423), with the learning rate of FFCV
    (Leclerc et al. 2023, arXiv 2306.12517). Accuracy: not measured.
python -m cnn_jax.main --config=configs/imagenet.py --config.data.source=folder --config.data.dir=DIR
    The same from files: DIR/train/<class>/*, and the official validation images in DIR/test/<class>/*, or in
    DIR/val/<class>/* beside the images without labels in DIR/test.

The official validation images are the test split, and have no part in selection: that uses 1 % of the training images,
which are held out. TFDS has the official test split, which makes the difference, from version 5.1.0 of the set on.
Images are decoded to 256 x 256 pixels: the shorter side is resized, and the centre is kept. Training samples random crops
from them on the device. Evaluation takes the 224 x 224 pixels in the middle.
"""

from cnn_jax import UsageError
from cnn_jax.config import default_config


def get_config(variant=''):
  config = default_config('resnet')
  config.data.source = 'tfds'
  config.data.name = 'imagenet2012'
  config.data.image_size = 224
  config.data.canvas_size = 256
  config.data.channels = 3
  config.data.mean = (123.675, 116.28, 103.53)
  config.data.std = (58.395, 57.12, 57.375)
  config.data.validation = 0.01
  config.batch_size = 1024
  config.epochs = 90
  config.model.depth = 50
  config.model.dtype = 'bfloat16'
  config.augment.crop = 0.08
  config.augment.flip = True
  config.optimizer.learning_rate = 0.4  # 0.1 per 256 images
  # The recipe adds 1e-4 times the weights to the gradient, before the momentum. In the momentum of 0.9 each gradient counts
  # 1 / (1 - 0.9) = 10 times. The decay of this project is added after the momentum, so it is ten times as large.
  config.optimizer.weight_decay = 1e-3
  config.schedule.name = 'cosine'
  config.schedule.warmup_epochs = 5.0
  config.loss.label_smoothing = 0.1
  config.evaluation.batch_size = 512
  config.log.every_steps = 100
  if variant == 'fast':
    config.epochs = 16
    config.augment.image_size = 160
    config.augment.crop = 0.25
    config.optimizer.learning_rate = 1.7
    config.schedule.name = 'linear'
    config.schedule.warmup_epochs = 2.0
  elif variant:
    raise UsageError(
      f"there is no variant {variant!r}; the only variant is 'fast' (16 epochs, 160 pixels in training)."
    )
  return config
