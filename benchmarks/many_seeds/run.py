"""Training several seeds of a config: one after another, or all in one program by `jax.vmap`.

    python -m benchmarks.many_seeds.run [--quick] [--rounds=5] [--seconds=1.0] [--json=FILE]

Both ways take the steps of `step.take_steps` from the same states. Their parameters are compared before they are timed
in interleaved rounds.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers, results
from benchmarks.accelerator.part import largest_error
from cnn_jax import command, distribute, plan, step, train
from cnn_jax.config import default_config, vary
from cnn_jax.data import Split, feed
from cnn_jax.state import TrainState
from cnn_jax.tables import markdown

# Image shape, features of each convolution, images per step.
NETWORKS: dict[str, tuple[tuple[int, int, int], tuple[int, ...], int]] = {
  '8x8x1, 32-64': ((8, 8, 1), (32, 64), 64),
  '28x28x1, 32-64-128': ((28, 28, 1), (32, 64, 128), 128),
}
SEEDS = (2, 4, 8)
MAX_STEPS = 20  # of one call
CHECKED_STEPS = 3  # the parameters are compared after so many steps; later, rounding errors are amplified
WAYS = {'sequential': 'one after another', 'vmapped': 'vmapped'}

Way = Callable[[int], Iterator[TrainState]]


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  parser.add_argument('--quick', action='store_true', help='measure two seeds alone')
  parser.add_argument('--rounds', type=int, default=5, help='measurements of each way (%(default)s)')
  parser.add_argument(
    '--seconds', type=float, default=1.0, help='approximate length of a measurement, on the CPU (%(default)s)'
  )
  args = parser.parse_args(argv)
  command.prepare_backend()
  measurements = []
  for network in NETWORKS:
    for seeds in SEEDS[:1] if args.quick else SEEDS:
      measurements.append(measure(network, seeds, args.rounds, args.seconds))
      print(f'{network}, {seeds} seeds: {measurements[-1]["speedup"]:.2f}', file=sys.stderr, flush=True)
  found = results.describe(rounds=args.rounds, measurements=measurements)
  results.publish(found, tables(found), args.json)


def measure(network: str, seeds: int, rounds: int, seconds: float) -> dict[str, Any]:
  """Times one network with one number of seeds, in both ways.

  Args:
    network: a key of `NETWORKS`.
    seeds: how many are trained.
    rounds: measurements of each way.
    seconds: the approximate length of a measurement on the CPU; on other devices it has `MAX_STEPS` steps.

  Returns:
    One measurement of results.json: `ms` of one step of all seeds, a `peers.spread` of each way; `speedup`, the
    median over the rounds of time one after another / time vmapped; `difference`, the largest difference of a
    parameter after `CHECKED_STEPS` steps, relative to the largest number of its array.
  """
  shape, features, batch = NETWORKS[network]
  fields = {'batch_size': batch, 'model.features': features, 'augment.shift': 1, 'optimizer.learning_rate': 0.01}
  made = dict(zip(WAYS, _ways(vary(default_config(), fields), shape, seeds), strict=True))
  params = [jax.device_get([state.params for state in way(CHECKED_STEPS)]) for way in made.values()]
  leaves = (map(jax.tree.leaves, pair) for pair in zip(*params, strict=True))
  difference = largest_error((b, a) for alone, together in leaves for a, b in zip(alone, together, strict=True))

  def milliseconds(way: Way, steps: int) -> float:
    started = time.perf_counter()
    way(steps)
    return 1e3 * (time.perf_counter() - started) / steps

  steps = dict.fromkeys(made, MAX_STEPS)
  if jax.default_backend() == 'cpu':
    estimates = {name: milliseconds(way, CHECKED_STEPS) for name, way in made.items()}
    steps = {name: max(1, min(MAX_STEPS, round(1e3 * seconds / ms))) for name, ms in estimates.items()}
  times = peers.interleave(
    lambda name, _: milliseconds(made[name], steps[name]), made, rounds, what=f'{network}, {seeds} seeds'
  )
  return {
    'network': network,
    'batch': batch,
    'seeds': seeds,
    'ms': {name: peers.spread(values) for name, values in times.items()},
    'speedup': peers.ratio(times['sequential'], times['vmapped']),
    'difference': difference,
  }


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The table of README.md; see `benchmarks.results`."""
  header = ['network', 'batch', 'seeds', *(f'{name}, ms' for name in WAYS.values())]
  header += ['speed, vmapped / one after another', 'largest difference']
  rows = [
    [
      row['network'],
      str(row['batch']),
      str(row['seeds']),
      *(peers.show(row['ms'][name]) for name in WAYS),
      f'{row["speedup"]:.2f}',
      f'{row["difference"]:.0e}',
    ]
    for row in found['measurements']
  ]
  n = f'n = {found["rounds"]} rounds, ' if found['rounds'] else ''
  return {'measurements': f'{results.source(found)} {n}median (minimum-maximum).\n\n{markdown(header, rows)}'}


def _ways(config: Any, shape: tuple[int, ...], seeds: int) -> tuple[Way, Way]:
  """For each way a function that takes a number of steps with all seeds and yields the state of each seed."""
  examples = MAX_STEPS * config.batch_size
  random = np.random.default_rng(0)
  split = Split(
    random.integers(0, 256, (examples, *shape), np.uint8), random.integers(0, 10, examples).astype(np.int32)
  )
  configs = [vary(config, {'seed': seed}) for seed in range(seeds)]
  setups = [plan.make_plan(one, examples, 10, shape, max_steps=MAX_STEPS) for one in configs]
  feeds = [feed.Resident(split, config.batch_size, one.seed, MAX_STEPS) for one in configs]
  images, labels = feeds[0].images, feeds[0].labels
  orders = [data.indices(0, 0, MAX_STEPS) for data in feeds]
  stacked = distribute.replicate(jax.tree.map(lambda *x: jnp.stack(x), *(made.state for made in setups)))
  states = [distribute.replicate(made.state) for made in setups]
  calls = [train.compile_steps(made.step, one.seed) for made, one in zip(setups, configs, strict=True)]

  # What `train.compile_steps` compiles, with an axis of seeds inside.
  steps_of_all = jax.pmap(
    jax.vmap(partial(step.take_steps, setups[0].step), in_axes=(0, 0, None, None, 0, None)),
    axis_name=distribute.AXIS,
    in_axes=(None, None, None, None, 2, None),
    out_axes=(None, None),
    donate_argnums=1,
  )
  keys = np.stack([jax.random.key_data(jax.random.key(seed)) for seed in range(seeds)])
  stacked_orders = np.stack(orders)

  def sequential(count: int) -> Iterator[TrainState]:
    for i, take in enumerate(calls):
      states[i], _ = take(states[i], images, labels, orders[i], np.int32(count))
    jax.block_until_ready(states)
    return iter(states)

  def vmapped(count: int) -> Iterator[TrainState]:
    nonlocal stacked
    stacked, _ = steps_of_all(keys, stacked, images, labels, stacked_orders, np.int32(count))
    jax.block_until_ready(stacked)
    return (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(seeds))

  return sequential, vmapped


if __name__ == '__main__':
  command.run(main)
