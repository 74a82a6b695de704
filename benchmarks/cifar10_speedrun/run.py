"""The least time of training to 94 % or 96 % on CIFAR-10, by the clock of the published records.

    TFDS_DATA_DIR=DIR python -m benchmarks.cifar10_speedrun [--seeds=100] [--accurate | --ablate | --quarter] [--data=FILE.npz]
      [--json=FILE]

The clock runs from the computation of the whitening filters to the accuracy on the test split, with uint8 images on the
device and compiled programs. Random weights, loading and compilation are outside of it. Each seed evaluates the test split
once, after the last step.
"""

import concurrent.futures
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers, results
from cnn_jax import UsageError, command, distribute, evaluate, models, plan, start, train
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, Split, augment, feed, load_dataset
from cnn_jax.state import INIT, TrainState, create_state, eval_variables
from cnn_jax.tables import format_mean_std, markdown

CONFIG = peers.ROOT / 'configs' / 'cifar10_speedrun.py'
RECIPE, SGD = 'the recipe', 'plain SGD'
# What a recipe without one of the ingredients changes.
ABLATIONS: dict[str, dict[str, Any]] = {
  'one view in the test': {'evaluation.views': False},
  'flips at random': {'augment.alternate': False},
  'no translation': {'augment.shift': 0},
  'no label smoothing': {'loss.label_smoothing': 0.0},
  'batch norm with a scale': {'model.norm_scale': True},
  'filters start at random': {'model.identity': False},
  'first layer at random, and trained': {'model.whitening': False, 'optimizer.first_stage_epochs': 0.0},
  'half precision off': {'model.dtype': 'float32'},
  SGD: {
    'optimizer.name': 'sgd',
    'optimizer.learning_rate': 3.2,  # the best of 0.05 to 6.4 on 5,000 held-out images, at a quarter of the width
    'optimizer.momentum': 0.9,
    'optimizer.weight_decay': 5e-4,
    'loss.reduction': 'mean',
  },
}
# 200 steps at a quarter of the width, for a CPU, which has no fast half precision.
QUARTER = {
  'model.features': (16, 64, 64),
  'model.dtype': 'float32',
  'batch_size': 500,
  'epochs': 2,
  'optimizer.first_stage_epochs': 0.75,
  'evaluation.batch_size': 500,
}
# The parts of results.json: to 94 %, to 96 %, without one ingredient each, and at a quarter of the width.
PARTS = ('record', 'accurate', 'ablation', 'quarter')


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  parser.add_argument('--seeds', type=int, default=100, help='runs of each recipe (%(default)s)')
  parser.add_argument('--first_seed', type=int, default=0, help='the smallest seed (%(default)s)')
  parser.add_argument('--data', type=command.local_path, metavar='FILE', help='images and labels; see `read`')
  which = parser.add_mutually_exclusive_group()
  which.add_argument('--accurate', action='store_true', help='the recipe for 96 %%')
  which.add_argument('--ablate', action='store_true', help='also leave out each ingredient')
  which.add_argument('--quarter', action='store_true', help='a quarter of the width, beside SGD')
  args, overrides = parser.parse_known_args(argv)
  results.check_counts(args, 'seeds')
  config = config_lib.load(f'{CONFIG}:96' if args.accurate else str(CONFIG), overrides)
  config = config_lib.vary(config, QUARTER) if args.quarter else config
  variants = ABLATIONS if args.ablate else {SGD: ABLATIONS[SGD]} if args.quarter else {}
  configs = {RECIPE: config} | {name: config_lib.vary(config, fields) for name, fields in variants.items()}
  command.prepare_backend()
  dataset = read(args.data) if args.data else load_dataset(config.data)
  for one in configs.values():
    config_lib.check_data(one, len(dataset.train), len(dataset.class_names), dataset.train.images.shape[1:])
    config_lib.check_devices(one, jax.device_count())
  with concurrent.futures.ThreadPoolExecutor() as pool:  # compiles all recipes at the same time
    prepared = dict(zip(configs, pool.map(partial(prepare, dataset=dataset), configs.values()), strict=True))
  runs = peers.interleave(
    lambda name, i: prepared[name](args.first_seed + i), prepared, args.seeds, what='runs of each recipe'
  )
  measurements = []
  for name, values in runs.items():
    accuracy, seconds = ([one[what] for one in values] for what in ('accuracy', 'seconds'))
    measurements.append({'recipe': name, 'accuracy': peers.sample(accuracy), 'seconds': peers.spread(seconds)})
  about = results.describe()
  part = 'accurate' if args.accurate else 'ablation' if args.ablate else 'quarter' if args.quarter else 'record'
  earlier = results.read(args.json) if args.json and args.json.exists() else {}
  found = about | {name: earlier[name] for name in PARTS if name in earlier}
  found[part] = about | {'first_seed': args.first_seed, 'measurements': measurements}
  results.publish(found, tables(found), args.json)


def prepare(config: Any, dataset: Dataset) -> Callable[[int], dict[str, float]]:
  """Compiles a recipe, and returns what trains and tests one seed.

  Args:
    config: of all seeds.
    dataset: its training and test split are placed on the devices.

  Returns:
    A function from the seed to the `accuracy` on the test split and the `seconds` by the clock.
  """
  num_train, shape = len(dataset.train), tuple(dataset.train.images.shape[1:])
  steps = config_lib.steps_per_epoch(config, num_train)
  made = plan.make_plan(config, num_train, len(dataset.class_names), shape, max_steps=steps)
  data = feed.Resident(dataset.train, config.batch_size, config.seed, made.capacity)
  statistics, views, size = config_lib.statistics(config.data), evaluate.run_views(config), config.evaluation.batch_size
  # Held here, since runs of other recipes come between two of this one; `train.compile_steps` would compile again.
  train_steps = train.compile_for_seeds(made.step, False)
  tested = [distribute.shard(np.asarray(dataset.test.images[i : i + size])) for i in range(0, len(dataset.test), size)]

  @jax.jit
  def begin(key: jax.Array) -> TrainState:
    variables = models.init(made.model, jax.random.fold_in(key, INIT), shape)
    return create_state(variables, made.tx, config.evaluation.ema_decay)

  @partial(jax.jit, donate_argnums=0)
  def whiten(state: TrainState, images: jax.Array) -> TrainState:
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    first = augment.normalize(images[: start.INITIAL_IMAGES], statistics)
    return state.replace(params=models.initialize(config.model, variables, first)['params'])

  def predict(variables: Any, images: jax.Array) -> jax.Array:
    return jnp.argmax(evaluate.batch_logits(made.model, variables, images, statistics, views), axis=-1)

  def run(seed: int) -> dict[str, float]:
    state = jax.block_until_ready(distribute.replicate(begin(jax.random.key(seed))))
    key = np.asarray(jax.random.key_data(jax.random.key(seed)))
    started = time.perf_counter()
    state = whiten(state, data.images)
    for epoch in range(made.epochs):
      order = feed.epoch_indices(num_train, config.batch_size, seed, epoch)
      indices = order.reshape(steps, jax.local_device_count(), -1)
      state, _ = train_steps(key, state, data.images, data.labels, indices, None)
    predicted = [predict(eval_variables(state), images) for images in tested]
    accuracy = float(np.mean(np.concatenate(predicted) == dataset.test.labels))
    return {'accuracy': accuracy, 'seconds': time.perf_counter() - started}

  run(config.seed)  # compiles
  return run


def read(path: str) -> Dataset:
  """The data of a file of NumPy arrays, as an alternative to the prepared TFDS set.

  Args:
    path: of an `.npz` with `train_images` and `test_images`, uint8 (n, height, width, 1 or 3), and with `train_labels`
      and `test_labels`, integers (n,).

  Raises:
    UsageError: the file is missing, or one of the arrays, or it has another dtype or shape, or a label is negative.
  """
  try:
    with np.load(path, allow_pickle=False) as arrays:
      train_split, test = (_split(arrays, name) for name in ('train', 'test'))
  except (OSError, KeyError, ValueError) as error:
    raise UsageError(f'cannot read {path}: {error}; it must hold images and labels of both splits.') from error
  names = tuple(map(str, range(int(train_split.labels.max()) + 1)))
  nothing = Split(train_split.images[:0], train_split.labels[:0])
  return Dataset(pathlib.Path(path).stem, path, names, train_split, nothing, test)


def _split(arrays: Mapping[str, np.ndarray], name: str) -> Split:
  images, labels = (arrays[f'{name}_{what}'] for what in ('images', 'labels'))
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
    raise ValueError(f'{name}_images are {images.dtype} {images.shape} and not uint8 (n, height, width, 1 or 3)')
  if labels.dtype.kind not in 'iu' or labels.shape != images.shape[:1] or labels.min() < 0:
    raise ValueError(
      f'{name}_labels are {labels.dtype} {labels.shape} and not integers of at least 0, ({len(images)},)'
    )
  return Split(images, labels.astype(np.int32))


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md; see `benchmarks.results`."""
  header = ['recipe', 'test accuracy, mean ± std', 'n', 'median, s', 'minimum', 'maximum']
  made = {}
  for part in PARTS:
    if part in found:
      rows = [_cells(row) for row in found[part]['measurements']]
      about = f'{results.source(found[part])} Seeds from {found[part]["first_seed"]}.'
      made[part] = f'{about}\n\n{markdown(header, rows)}'
  return made


def _cells(row: Mapping[str, Any]) -> list[str]:
  accuracy, seconds = row['accuracy'], row['seconds']
  shown = format_mean_std(accuracy['mean'], accuracy['std'])
  return [row['recipe'], shown, str(accuracy['n']), *(f'{seconds[which]:.2f}' for which in ('median', 'min', 'max'))]


if __name__ == '__main__':
  command.run(main)
