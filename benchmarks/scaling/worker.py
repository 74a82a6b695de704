"""Trains for some seconds on random images and reports the speed and the peak memory; `run.py` starts it.

python -m benchmarks.scaling.worker '{"batch_size": 128, ...}' SECONDS
"""

import json
import statistics
import sys
import time

import jax
import numpy as np

from benchmarks import peers
from cnn_jax import command, distribute, plan, train
from cnn_jax.config import default_config, vary
from cnn_jax.data import Split, feed

SHAPE = (28, 28, 1)
_IMAGES_PER_CALL = 2048
_CALLS = 9  # of each of several processes, the first one untimed


def measure(
  seconds: float,
  *,
  batch_size: int,
  width: int,
  depth: int,
  examples: int,
  devices: int,
  processes: int,
  process: int = 0,
  coordinator: str = '',
) -> dict[str, float]:
  """Trains for some seconds in this process, after compiling.

  Args:
    seconds: the least time of training. Several processes take a fixed number of calls instead, because processes that
      stop by their own clocks would wait for one another.
    batch_size: images per step, over all devices.
    width: features of the first convolution; each further one has twice as many as the one before it.
    depth: convolutions.
    examples: images in memory.
    devices: of this process; must have been set by XLA_FLAGS.
    processes, process, coordinator: how many train together, which one this is, and host:port of the first.

  Returns:
    `images_per_second` over all devices of all processes, and `peak_mb` of this process.
  """
  command.prepare_backend()
  if processes > 1:
    distribute.join(coordinator, processes, process)
  assert jax.local_device_count() == devices
  fields = {
    'batch_size': batch_size,
    'model.features': tuple(width * 2**i for i in range(depth)),
    'optimizer.learning_rate': 0.01,
    'schedule.name': 'constant',
    'schedule.warmup_epochs': 0.0,
  }
  config = vary(default_config(), fields)
  made = plan.make_plan(config, examples, 10, SHAPE, max_steps=max(1, _IMAGES_PER_CALL // batch_size))
  train_steps = train.compile_steps(made.step, config.seed)
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (examples, *SHAPE), np.uint8)
  data = feed.Resident(Split(images, random.integers(0, 10, examples).astype(np.int32)), batch_size, 0, made.capacity)
  state, indices, steps = distribute.replicate(made.state), data.indices(0, 0, made.capacity), np.int32(made.capacity)
  durations: list[float] = []
  while len(durations) < _CALLS if processes > 1 else len(durations) < 4 or sum(durations[1:]) < seconds:
    started = time.perf_counter()
    state, measured = train_steps(state, data.images, data.labels, indices, steps)
    np.asarray(measured['loss'])
    durations.append(time.perf_counter() - started)
  return {
    'images_per_second': made.capacity * batch_size / statistics.median(durations[1:]),
    'peak_mb': peers.peak_mb(),
  }


if __name__ == '__main__':
  print(json.dumps(measure(float(sys.argv[2]), **json.loads(sys.argv[1]))))
