"""Training several seeds of one config: one after another, or all in one program by `jax.vmap`?

    python -m experiments.many_seeds.run [--quick] [--rounds=5] [--seconds=1.0] [--json=FILE]

Both ways take the same steps, of `train.take_steps`, from the same states; their parameters are compared before the
clock starts. They are timed in turn, round after round, so that a slow spell of the machine meets both.
"""

import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import UsageError, command, train
from cnn_jax.config import default_config
from cnn_jax.data import batches
from cnn_jax.model import create_model
from cnn_jax.optim import make_optimizer, make_schedule

# Image shape, channels of the blocks, images a step.
NETWORKS: dict[str, tuple[tuple[int, int, int], tuple[int, ...], int]] = {
  '8x8x1, 32-64': ((8, 8, 1), (32, 64), 64),
  '28x28x1, 32-64-128': ((28, 28, 1), (32, 64, 128), 128),
}
SEEDS = (2, 4, 8)
MAX_STEPS = 20  # a call
CHECKED_STEPS = 3  # after which the parameters are compared: later, rounding errors grow by themselves


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = command.Parser(__doc__)
  parser.add_argument('--quick', action='store_true', help='two seeds alone')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=1.0, help='about so long a measurement, on the CPU')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args(argv)
  if args.rounds < 1:
    raise UsageError(f'--rounds is {args.rounds}; there must be at least one.')
  command.prepare_backend()
  results = []
  for network in NETWORKS:
    for seeds in SEEDS[:1] if args.quick else SEEDS:
      results.append(measure(network, seeds, args.rounds, args.seconds))
      print(f'{network}, {seeds} seeds: {results[-1]["speedup"]:.2f}', file=sys.stderr, flush=True)
  device = jax.devices()[0]
  print(
    f'{device.platform} ({device.device_kind}), {platform.machine()}, {os.cpu_count()} CPUs, jax {jax.__version__}, '
    f'n = {args.rounds} rounds; load average over 15 minutes: {os.getloadavg()[2]:.1f}\n'
  )
  print(table(results))
  if args.json:
    args.json.write_text(json.dumps(results, indent=2) + '\n')


def measure(network: str, seeds: int, rounds: int, seconds: float) -> dict[str, Any]:
  """Times one network with one number of seeds, both ways.

  Args:
    network: a key of `NETWORKS`.
    seeds: trained at once.
    rounds: measurements of each way.
    seconds: about so long each, on the CPU; elsewhere `MAX_STEPS` steps.

  Returns:
    Medians in ms for one step of all seeds; `speedup`, the median over the rounds of time one after another / time
    in one program; `difference`, the largest of a parameter after `CHECKED_STEPS` steps, relative to the
    largest number of its array; `rounds` has all measurements.
  """
  shape, features, batch = NETWORKS[network]
  config = default_config()
  config.batch_size = batch
  config.model.features = features
  config.augment.shift = 1
  ways = _ways(config, shape, seeds)
  params = [jax.device_get([state.params for state in way(CHECKED_STEPS)]) for way in ways.values()]
  difference = max(
    float(np.abs(a - b).max() / np.abs(b).max())
    for alone, together in zip(*params, strict=True)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True)
  )
  times: dict[str, list[float]] = {name: [] for name in ways}
  steps = {}
  for name, way in ways.items():
    begun = time.perf_counter()
    way(CHECKED_STEPS)
    one = (time.perf_counter() - begun) / CHECKED_STEPS
    steps[name] = max(1, min(MAX_STEPS, round(seconds / one))) if jax.default_backend() == 'cpu' else MAX_STEPS
  for _ in range(rounds):
    for name, way in ways.items():
      begun = time.perf_counter()
      way(steps[name])
      times[name].append(1e3 * (time.perf_counter() - begun) / steps[name])
  ratios = [a / b for a, b in zip(times['sequential'], times['vmapped'], strict=True)]
  return {
    'network': network,
    'batch': batch,
    'seeds': seeds,
    'sequential_ms': statistics.median(times['sequential']),
    'vmapped_ms': statistics.median(times['vmapped']),
    'speedup': statistics.median(ratios),
    'difference': difference,
    'rounds': times,
  }


def table(results: Sequence[dict[str, Any]]) -> str:
  """A Markdown table of results: milliseconds as median (min-max), ratios as medians over the rounds."""
  lines = [
    '| network | batch | seeds | one after another, ms | vmapped, ms | speed-up by vmap | largest difference |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for row in results:
    sequential, vmapped = (
      f'{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})' for times in row['rounds'].values()
    )
    lines.append(
      f'| {row["network"]} | {row["batch"]} | {row["seeds"]} | {sequential} | {vmapped} | {row["speedup"]:.2f} '
      f'| {row["difference"]:.0e} |'
    )
  return '\n'.join(lines)


def _ways(config: Any, shape: tuple[int, ...], seeds: int) -> dict[str, Callable[[int], Iterator[train.TrainState]]]:
  """For either way a function that takes so many steps with all seeds and yields the state of each."""
  examples = MAX_STEPS * config.batch_size
  learning_rate = make_schedule(config.schedule, 0.01, 10 * MAX_STEPS, MAX_STEPS)
  model = create_model(config.model, 10)
  tx = make_optimizer(config.optimizer, learning_rate)
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (examples, *shape), np.uint8)
  data = train.replicate((images, random.integers(0, 10, examples).astype(np.int32)))
  keys, states, orders = [], [], []
  for seed in range(seeds):
    config.seed = seed
    keys.append(train.seed_key(seed))
    states.append(train.create_state(model, tx, config, shape))
    orders.append(train.local_indices(batches.epoch_indices(examples, config.batch_size, seed, 0)))
  stacked = train.replicate(jax.tree.map(lambda *x: jnp.stack(x), *states))
  states = [train.replicate(state) for state in states]
  stacked_keys, stacked_orders = np.stack(keys), jax.tree.map(lambda *x: np.stack(x), *orders)
  # As train.make_train_steps compiles them, whose program does for one seed at a time alone.
  steps = partial(train.take_steps, model=model, tx=tx, learning_rate=learning_rate, config=config)
  compiled = partial(jax.pmap, axis_name='batch', out_axes=(None, None), donate_argnums=1)
  steps_of_one = compiled(steps, in_axes=(None, None, None, None, 1, None))
  steps_of_all = compiled(
    jax.vmap(steps, in_axes=(0, 0, None, None, 0, None)), in_axes=(None, None, None, None, 2, None)
  )

  def sequential(count: int) -> Iterator[train.TrainState]:
    for i in range(seeds):
      states[i], _ = steps_of_one(keys[i], states[i], *data, orders[i], np.int32(count))
    jax.block_until_ready(states)
    return iter(states)

  def vmapped(count: int) -> Iterator[train.TrainState]:
    nonlocal stacked
    stacked, _ = steps_of_all(stacked_keys, stacked, *data, stacked_orders, np.int32(count))
    jax.block_until_ready(stacked)
    return (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(seeds))

  return {'sequential': sequential, 'vmapped': vmapped}


if __name__ == '__main__':
  command.run(main)
