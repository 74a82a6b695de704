"""The test accuracy on MNIST of a network with fewer than 8,000 parameters.

    TFDS_DATA_DIR=DIR python -m experiments.small_model.run [--seeds=5] [--output=experiments/small_model]
    TFDS_DATA_DIR=DIR python -m experiments.small_model.run --select=20 --seeds=1 [--output=experiments/small_model]

The first command trains `configs/mnist.py:small` on all training images and evaluates the test split once per seed, after
the last epoch, without and with test-time augmentation. The second one selected that config: it holds out 10,000 training
images, trains each candidate for 20 epochs and evaluates the held-out images only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cnn_jax import command
from cnn_jax import config as config_lib
from cnn_jax.data import load_dataset
from experiments import results, study
from experiments.mnist_accuracy import run as mnist_accuracy

CONFIG = f'{study.CONFIGS}/mnist.py:small'
LIMIT = 8_000  # parameters: kernels, biases, and the scales and biases of norms

_FIRST: dict[str, Any] = {
  'model.features': (6, 10, 12, 14),
  'model.aggregate': 'gap',
  'model.residual': False,
  'augment.elastic': 0.0,
  'schedule.warmup_epochs': 0.5,
}
# The fields of each that differ from the config.
CANDIDATES: dict[str, dict[str, Any]] = {
  'four blocks of two': _FIRST,
  'distortion of half a pixel': _FIRST | {'augment.elastic': 0.5},
  'GELU': _FIRST | {'model.activation': 'gelu'},
  'SiLU': _FIRST | {'model.activation': 'silu'},
  'flattened maps': _FIRST | {'model.features': (6, 9, 12, 12), 'model.aggregate': 'flatten'},
  'residual': _FIRST | {'model.features': (6, 10, 12, 12), 'model.residual': True},
  'stronger augmentation': _FIRST | {'augment.shift': 2, 'augment.rotate': 10.0, 'augment.scale': 0.1},
  'weight decay 5e-4': _FIRST | {'optimizer.weight_decay': 5e-4},
  'learning rate 0.6': _FIRST | {'optimizer.learning_rate': 0.6},
}


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = study.parser(__doc__, 'small_model', seeds=5)
  study.add_select(parser)
  args, overrides = study.parse(parser, argv)
  config = config_lib.load(CONFIG, overrides)
  if args.select:
    config = config_lib.vary(config, {'data.validation': 1 / 6})
  command.prepare_backend()
  dataset = load_dataset(config.data)
  if args.select:
    selection = study.select(config, CANDIDATES, args, dataset)
    results.publish({'selection': selection}, tables, args.output)
    return
  args.workdir /= 'chosen'
  found = mnist_accuracy.measure(config, args, dataset)
  results.publish(found, tables, args.output, lambda path: mnist_accuracy.plot(found, path))


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md: the selection, and the result."""
  made = {'selection': study.selection_table(found['selection'])} if 'selection' in found else {}
  return made | ({'results': mnist_accuracy.table(found)} if 'measurements' in found else {})


if __name__ == '__main__':
  command.run(main)
