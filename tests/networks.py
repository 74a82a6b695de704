"""Small variants of the networks, for the tests that hold for every network."""

from cnn_jax import models

# {network: fields of `config.model`}. A new network is tested when it has a line here, and a test asks for one.
SMALL = {
  'airbench': {'features': (4, 8, 8)},
  'cnn': {'features': (4, 8), 'dropout': 0.2},
  'resnet': {'width': 4, 'stem': '3x3'},
  'efficientnet': {'width': 0.05, 'depth': 0.1, 'drop_path': 0.3},
  'convnext': {'variant': 'atto', 'width': 4, 'depth': 0.1, 'drop_path': 0.3},
}
# Pixels a side of the images that their last stage needs.
SIDES = {'airbench': 9, 'cnn': 12, 'resnet': 12, 'efficientnet': 12, 'convnext': 32}


def small_network(name, num_classes=5, **fields):
  """A small variant of a network, with some fields set."""
  config = models.default_config(name)
  config.update(SMALL[name] | fields)
  return models.create(config, num_classes)
