"""Full MNIST to 99.0 % on the CPU in the least time, beside the same recipe in PyTorch.

    TFDS_DATA_DIR=DIR python -m experiments.mnist_speedrun.run [--seeds=10] [--pytorch_python=PATH] [--json=FILE]

The clock runs from the first step to the end of the last one, with compiled programs and the uint8 images in memory;
start-up, compilation and the test are outside of it. The test is taken once a seed, after the last step.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import tempfile
import time
from typing import Any

import jax
import numpy as np

from cnn_jax import command, evaluate, train
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, batches, load_dataset
from cnn_jax.model import create_model
from cnn_jax.optim import make_optimizer, make_schedule
from experiments.step_time.run import Peer


def recipe() -> Any:
  """The config of the run; the peer gets the same numbers."""
  config = config_lib.default_config()
  config.data.source = 'tfds'
  config.data.validation = 0.0
  config.batch_size = 32
  config.epochs = 1
  config.model.features = (8, 16, 32, 32)
  config.model.aggregate = 'flatten'
  config.optimizer.learning_rate = 0.2
  config.optimizer.weight_decay = 2e-3
  config.schedule.warmup_epochs = 0.2
  config.loss.label_smoothing = 0.1
  config.evaluation.batch_size = 1000
  return config


def main() -> None:
  """Takes the seeds in turn, ours and the peer's, and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seeds', type=int, default=10)
  parser.add_argument('--first_seed', type=int, default=0)
  parser.add_argument('--pytorch_python', help='an interpreter with PyTorch, for the peer')
  parser.add_argument('--select', action='store_true', help='hold 10,000 training images out and test on those')
  parser.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE', help='change the recipe')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  command.prepare_backend()
  config = recipe()
  if args.select:
    config.data.validation = 1 / 6
  for setting in args.set:
    field, value = setting.split('=')
    config.update_from_flattened_dict({field: json.loads(value)})
  config_lib.check(config)
  dataset = load_dataset(config.data)
  runs: dict[str, list[dict[str, float]]] = {'ours': []}
  run_ours = _ours(config, dataset, 'validation' if args.select else 'test')
  with contextlib.ExitStack() as stack:
    peer = None
    if args.pytorch_python:
      directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
      # Closed whatever happens: a process that is stopped does not see that nobody asks any more.
      peer = stack.enter_context(contextlib.closing(_peer(args.pytorch_python, config, dataset, directory)))
    run_ours(0)  # compiles
    for seed in range(args.first_seed, args.first_seed + args.seeds):
      runs['ours'].append(run_ours(seed))
      if peer is not None:
        runs.setdefault('PyTorch', []).append(peer.ask(seed))
      print(json.dumps({'seed': seed} | {name: values[-1] for name, values in runs.items()}), flush=True)
  print('\n| | accuracy mean ± std | n | median s | min | max |\n| --- | --- | --- | --- | --- | --- |')
  for name, values in runs.items():
    accuracy, seconds = [v['accuracy'] for v in values], [v['seconds'] for v in values]
    spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
    print(
      f'| {name} | {statistics.mean(accuracy):.3%} ± {spread:.3%} | {len(values)} '
      f'| {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} |'
    )
  if 'PyTorch' in runs:
    ratios = [a['seconds'] / b['seconds'] for a, b in zip(runs['ours'], runs['PyTorch'], strict=True)]
    print(f'\ntime of ours / time of PyTorch, pair by pair: median {statistics.median(ratios):.3f}')
  if args.json:
    args.json.write_text(json.dumps(runs, indent=2) + '\n')


def _ours(config: Any, dataset: Dataset, split: str):
  num_train, shape = len(dataset.train), tuple(dataset.train.images.shape[1:])
  per_epoch = config_lib.steps_per_epoch(config, num_train)
  total = per_epoch * config.epochs
  model = create_model(config.model, len(dataset.class_names))
  learning_rate = make_schedule(config.schedule, config.optimizer.learning_rate, total, per_epoch)
  tx = make_optimizer(config.optimizer, learning_rate)
  data = train.replicate((np.asarray(dataset.train.images), dataset.train.labels))
  # The seed of augmentation is part of the program; that of the initialisation and the order is not.
  steps = train.make_train_steps(model=model, tx=tx, learning_rate=learning_rate, config=config)

  def run(seed: int) -> dict[str, float]:
    config.seed = seed
    state = train.replicate(train.create_state(model, tx, config, shape))
    jax.block_until_ready(state)
    started = time.perf_counter()
    for epoch in range(config.epochs):
      order = batches.epoch_indices(num_train, config.batch_size, seed, epoch)
      state, _ = steps(state, *data, train.local_indices(order), np.int32(per_epoch))
    jax.block_until_ready(state)
    seconds = time.perf_counter() - started
    found = evaluate.evaluate_split(
      model, train.eval_variables(state), getattr(dataset, split), config.evaluation.batch_size
    )
    return {'accuracy': found['accuracy'], 'seconds': seconds}

  return run


def _peer(python: str, config: Any, dataset: Dataset, directory: pathlib.Path) -> Peer:
  split = dataset.validation if len(dataset.validation) else dataset.test
  np.savez(
    directory / 'data.npz',
    images=np.asarray(dataset.train.images), labels=dataset.train.labels,
    test_images=np.asarray(split.images), test_labels=split.labels,
  )  # fmt: skip
  (directory / 'config.json').write_text(config.to_json())
  command_line = [python, str(pathlib.Path(__file__).with_name('torch_peer.py')), str(directory)]
  peer = Peer(subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
  peer.wait_until_ready()
  return peer


if __name__ == '__main__':
  main()
