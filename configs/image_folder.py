"""Image files in folders: DIR/train/<class>/* and DIR/test/<class>/*, or DIR/<class>/*, split by class and a seeded hash.

Other spellings of the splits, labels in a table and small sets: docs/folders.md.

python -m cnn_jax.main --config=configs/image_folder.py --config.data.dir=DIR
    373,834 parameters for ten classes. Images of any size and format are cropped to squares of `data.image_size`
    pixels. A smaller network reaches 67.82 % on CIFAR-10 as JPEG files after 4 epochs (one seed; see README.md).
"""

from cnn_jax.config import default_config


def get_config():
  config = default_config()
  config.data.source = 'folder'
  config.data.image_size = 32
  config.data.channels = 3
  config.epochs = 10
  config.min_steps = 1000
  config.adapt_to_data = True
  config.model.features = (64, 128, 256)
  config.augment.flip = True
  config.augment.shift = 4
  config.augment.padding = 'reflect'
  return config
