"""The least time of training to 99.0 % on the full MNIST on the CPU, compared with the same recipe in PyTorch.

    TFDS_DATA_DIR=DIR python -m benchmarks.mnist_speedrun.run [--seeds=10] [--pytorch_python=PATH] [--json=FILE]

The clock runs from the first step to the end of the last step, with compiled programs and uint8 images in memory.
Start-up, compilation and the test are outside of it. Each seed evaluates the test split once, after the last step.
"""

import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import peers, results
from cnn_jax import UsageError, command, distribute, evaluate, plan, train
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, Split, feed, load_dataset
from cnn_jax.state import TrainState, eval_variables
from cnn_jax.tables import format_mean_std, markdown

RECIPE = {
  'data.source': 'tfds',
  'data.validation': 0.0,
  'batch_size': 32,
  'epochs': 1,
  'model.features': (8, 16, 32, 32),
  'model.aggregate': 'flatten',
  'optimizer.learning_rate': 0.2,
  'optimizer.weight_decay': 2e-3,
  'schedule.warmup_epochs': 0.2,
  'loss.label_smoothing': 0.1,
}
# The fields that both programs read, directly or as the data that they get.
_SHARED = {
  'batch_size', 'epochs', 'data.source', 'data.name', 'data.dir', 'data.image_size', 'data.channels', 'data.validation',
  'data.test', 'data.split_seed', 'model.features', 'model.kernel_size', 'model.norm_momentum', 'model.aggregate',
  'optimizer.learning_rate', 'optimizer.momentum', 'optimizer.nesterov', 'optimizer.weight_decay',
  'schedule.warmup_epochs', 'schedule.end', 'loss.label_smoothing',
}  # fmt: skip
PROGRAMS = {'ours': 'ours', 'pytorch': 'PyTorch'}


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  parser.add_argument('--seeds', type=int, default=10, help='runs of each program (%(default)s)')
  parser.add_argument('--first_seed', type=int, default=0, help='the smallest seed (%(default)s)')
  parser.add_argument('--pytorch_python', help='an interpreter with PyTorch; without it, ours is measured alone')
  parser.add_argument('--select', action='store_true', help='hold out a sixth of the training images and test on them')
  args, overrides = parser.parse_known_args(argv)
  results.check_counts(args, 'seeds')
  fields = RECIPE | ({'data.validation': 1 / 6} if args.select else {})
  config = config_lib.override(config_lib.vary(config_lib.default_config(), fields), overrides)
  peers.check_pytorch(args.pytorch_python)
  if args.pytorch_python:
    check_peer(config)
  command.prepare_backend()
  dataset = load_dataset(config.data)
  config_lib.check_data(config, len(dataset.train), len(dataset.class_names), dataset.train.images.shape[1:])
  config_lib.check_devices(config, jax.device_count())
  split = dataset.validation if args.select else dataset.test
  versions, peer = {}, None
  with contextlib.ExitStack() as stack:
    if args.pytorch_python:
      peer = stack.enter_context(_start_peer(args.pytorch_python, config, dataset, split))
      versions['torch'] = peer.ready['version']

    def measure(program: str, i: int) -> Mapping[str, float]:
      seed = args.first_seed + i
      return run_ours(config, dataset, split, seed) if peer is None or program == 'ours' else peer.ask(seed)

    measure('ours', 0)  # the first run of a process is slower; the peer has taken some steps when it is ready
    runs = peers.interleave(measure, PROGRAMS if peer else ['ours'], args.seeds, what='runs')
  seconds = {name: [run['seconds'] for run in values] for name, values in runs.items()}
  measurements = [
    {
      'program': name,
      'accuracy': peers.sample([run['accuracy'] for run in values]),
      'seconds': peers.spread(seconds[name]),
    }
    for name, values in runs.items()
  ]
  found = results.describe(
    versions,
    split='validation' if args.select else 'test',
    first_seed=args.first_seed,
    measurements=measurements,
    ratio=peers.spread(_ratios(seconds)) if 'pytorch' in seconds else None,
  )
  results.publish(found, tables(found), args.json)


def check_peer(config: Any) -> None:
  """Checks that the fields that the PyTorch program does not read are those of the recipe.

  Raises:
    UsageError: names the first that is not.
  """
  recipe = dict(config_lib.leaves(config_lib.vary(config_lib.default_config(), RECIPE)))
  for field, value in config_lib.leaves(config):
    if field not in _SHARED and value != recipe.get(field):
      raise UsageError(
        f'config.{field} is {value!r}, but the PyTorch program does not read it; leave it out, or --pytorch_python.'
      )


def run_ours(config: Any, dataset: Dataset, split: Split, seed: int) -> dict[str, float]:
  """Trains one seed, and returns the `accuracy` on a split and the `seconds` of the steps.

  Args:
    config: its `seed` is replaced.
    dataset: to train on.
    split: to evaluate on, once.
    seed: of initialisation, order and augmentation.
  """
  config = config_lib.vary(config, {'seed': seed})
  num_train, shape = len(dataset.train), tuple(dataset.train.images.shape[1:])
  steps = config_lib.steps_per_epoch(config, num_train)
  made = plan.make_plan(config, num_train, len(dataset.class_names), shape, max_steps=steps)
  train_steps = train.compile_steps(made.step, seed)
  data = feed.Resident(dataset.train, config.batch_size, seed, made.capacity)

  def take(state: TrainState, epoch: int, count: int) -> TrainState:
    indices = data.indices(epoch, 0, count)
    return train_steps(state, data.images, data.labels, indices, np.int32(count))[0]

  state = jax.block_until_ready(take(distribute.replicate(made.state), 0, 0))  # compiles
  started = time.perf_counter()
  for epoch in range(made.epochs):
    state = take(state, epoch, steps)
  jax.block_until_ready(state)
  seconds = time.perf_counter() - started
  found = evaluate.evaluate_split(made.model, eval_variables(state), split, config)
  return {'accuracy': found['accuracy'], 'seconds': seconds}


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md; see `benchmarks.results`."""
  rows = [
    [
      PROGRAMS[row['program']],
      _accuracy(row['accuracy'], 3),
      str(row['accuracy']['n']),
      *(f'{row["seconds"][which]:.2f}' for which in ('median', 'min', 'max')),
    ]
    for row in found['measurements']
  ]
  header = ['program', f'{found["split"]} accuracy, mean ± std', 'n', 'median, s', 'minimum', 'maximum']
  text = f'{results.source(found)} Seeds from {found["first_seed"]}.\n\n{markdown(header, rows)}'
  if found['ratio']:
    text += f'\n\nTime of ours / time of PyTorch, per seed: {peers.show(found["ratio"], 2)}.'
  made = {'measurements': text}
  if 'selection' in found:
    made['selection'] = _selection(found['selection'])
  return made


def _start_peer(python: str, config: Any, dataset: Dataset, split: Split) -> peers.Peer:
  with tempfile.TemporaryDirectory() as directory:  # the peer has read the files when it is ready
    np.savez(
      Path(directory) / 'data.npz',
      images=np.asarray(dataset.train.images), labels=dataset.train.labels,
      test_images=np.asarray(split.images), test_labels=split.labels,
    )  # fmt: skip
    (Path(directory) / 'config.json').write_text(config.to_json())
    device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
    return peers.Peer('benchmarks.mnist_speedrun.torch_peer', directory, device, python=python)


def _ratios(seconds: Mapping[str, Sequence[float]]) -> list[float]:
  return [ours / theirs for ours, theirs in zip(seconds['ours'], seconds['pytorch'], strict=True)]


def _selection(selection: Mapping[str, Any]) -> str:
  rows = [
    [
      f'**{row["recipe"]}**' if row['chosen'] else row['recipe'],
      _accuracy(row['accuracy'], 2),
      f'{row["seconds"]:.1f}',
    ]
    for row in selection['measurements']
  ]
  table = markdown(['recipe', 'held-out accuracy, mean ± std', 'median, s'], rows)
  return f'{results.source(selection)} n = {selection["seeds"]} seeds.\n\n{table}'


def _accuracy(measured: Mapping[str, Any], digits: int) -> str:
  return format_mean_std(measured['mean'], measured['std'], digits=digits)


if __name__ == '__main__':
  command.run(main)
