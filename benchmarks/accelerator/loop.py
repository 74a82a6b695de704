"""A part: what many steps in one compiled call save, and what their dynamic number costs; see docs/decisions.md.

Training takes up to 1,024 steps in one call of `step.take_steps`, whose number is an argument, so that one program serves
calls of any length. With a fixed number XLA knows the length of the loop. Step by step, the host starts each step
without waiting for the one before.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np

from benchmarks import peers
from benchmarks.accelerator import part
from cnn_jax import UsageError, command, distribute, plan, step, train
from cnn_jax.config import default_config, vary

NETWORKS = {'28x28x1, 32-64-128': ((28, 28, 1), (32, 64, 128)), '32x32x3, 64-128-256': ((32, 32, 3), (64, 128, 256))}
STEPS = 128  # of the longest call


def main(argv: Sequence[str]) -> None:
  """Adds a row per network and batch."""
  args = part.parser(__doc__).parse_args(argv)
  rows = part.Rows(args.output, args.seconds)
  command.prepare_backend()
  cases = [('28x28x1, 32-64-128', 8)] if args.small else [(name, batch) for name in NETWORKS for batch in (128, 512)]
  for network, batch in cases:
    if rows.left() > 0:
      steps = 8 if args.small else STEPS
      rows.attempt(functools.partial(measure, network, batch, steps), network=network, batch=batch, steps=steps)


def measure(network: str, batch: int, steps: int) -> dict[str, Any]:
  """Times the ways in interleaved rounds.

  Args:
    network: a key of `NETWORKS`.
    batch: images per step.
    steps: of the longest call.

  Returns:
    `ms` per step, a `peers.spread` of each way; `overhead_us`, the time per step that the dynamic number adds to a fixed
    one, the median of the differences within each round; `difference`, the largest of a parameter after the same steps.
  """
  shape, features = NETWORKS[network]
  config = vary(default_config(), {'batch_size': batch, 'model.features': features, 'optimizer.learning_rate': 0.01})
  made = plan.make_plan(config, steps * batch, 10, shape, max_steps=steps)
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (4 * batch, *shape), np.uint8)
  data = distribute.replicate((images, random.integers(0, 10, len(images)).astype(np.int32)))
  devices = jax.local_device_count()
  order = random.integers(0, len(images), (steps, devices, batch // devices)).astype(np.int32)
  dynamic = train.compile_steps(made.step, config.seed)
  key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
  fixed = jax.pmap(
    lambda key, state, images, labels, indices: step.take_steps(
      made.step, key, state, images, labels, indices, cast(jax.Array, steps)
    ),
    axis_name=distribute.AXIS, in_axes=(None, None, None, None, 1), out_axes=(None, None), donate_argnums=1,
  )  # fmt: skip

  def many(state: Any) -> Any:
    return dynamic(state, *data, order, np.int32(steps))[0]

  def known(state: Any) -> Any:
    return fixed(key, state, *data, order)[0]

  # Made here, since a feed makes the next indices while the device computes.
  rolled = [np.roll(order, -first, 0) for first in range(steps)]

  def eighth(state: Any) -> Any:
    for first in range(0, steps, steps // 8):
      state, _ = dynamic(state, *data, rolled[first], np.int32(steps // 8))
    return state

  def singly(state: Any) -> Any:
    for first in range(steps):
      state, _ = dynamic(state, *data, rolled[first], np.int32(1))
    return state

  def waiting(state: Any) -> Any:
    for first in range(steps):
      state, measured = dynamic(state, *data, rolled[first], np.int32(1))
      jax.block_until_ready(measured)
    return state

  ways = {
    'one call': many,
    'one call, fixed number': known,
    'eight calls': eighth,
    'a call per step': singly,
    'a call per step, waiting for each': waiting,
  }
  after = {name: jax.device_get(way(_copy(made.state)).params) for name, way in list(ways.items())[:2]}
  pairs = zip(*map(jax.tree.leaves, after.values()), strict=True)
  difference = float(np.max([np.abs(a - b).max() for a, b in pairs]))
  if not np.isfinite(difference):
    raise UsageError(f'the parameters after {steps} steps are not finite.')
  times = peers.interleave(lambda name, _: _milliseconds(ways[name], made.state, steps), ways, 5, what=network)
  overhead = [1e3 * (a - b) for a, b in zip(times['one call'], times['one call, fixed number'], strict=True)]
  return {
    'ms': {name: peers.spread(values) for name, values in times.items()},
    'overhead_us': statistics.median(overhead),
    'difference': difference,
  }


def _milliseconds(way: Callable[[Any], Any], state: Any, steps: int) -> float:
  """Per step. The state is copied first, because training donates it."""
  state = jax.block_until_ready(_copy(state))
  started = time.perf_counter()
  jax.block_until_ready(way(state))
  return 1e3 * (time.perf_counter() - started) / steps


def _copy(state: Any) -> Any:
  return distribute.replicate(jax.tree.map(np.array, jax.device_get(state)))


if __name__ == '__main__':
  command.run(main)
