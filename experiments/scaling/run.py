"""Training speed against batch size, devices, processes, width and depth; memory against the size of the data set.

    python -m experiments.scaling.run [--json=FILE] [--plot=FILE.png] [--only=batch_size]

Every point is a process of its own, which trains on made-up images of 28x28 pixels; the rounds go over all points, so
that a slow spell of the machine meets all of them alike.
"""

import argparse
import json
import os
import pathlib
import resource
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASE = {'batch_size': 128, 'width': 32, 'depth': 3, 'devices': 1, 'processes': 1, 'examples': 4096}
POINTS = {
  'batch_size': [8, 32, 128, 512, 2048],
  'width': [8, 16, 32, 64],
  'depth': [1, 2, 3, 4],
  'devices': [1, 2, 4, 8],
  'processes': [1, 2],
  'examples': [4096, 60_000, 240_000, 960_000],
}


def main() -> None:
  """Measures all points in rounds and prints a table of medians."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=3.0, help='of timed training per point and round')
  parser.add_argument('--only', choices=list(POINTS), help='one axis alone')
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--plot', type=pathlib.Path)
  parser.add_argument('--worker', type=json.loads, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    print(json.dumps(measure(args.seconds, **args.worker)))
    return
  points = [(axis, value) for axis in POINTS if args.only in (None, axis) for value in POINTS[axis]]
  found: dict[tuple[str, int], list[dict[str, float]]] = {point: [] for point in points}
  for i in range(args.rounds):
    for axis, value in points:
      found[axis, value].append(_start(BASE | {axis: value}, args.seconds))
      rate = found[axis, value][-1]['images_per_second']
      print(f'round {i + 1}/{args.rounds}: {axis} {value}: {rate:,.0f} images/s', file=sys.stderr, flush=True)
  rows: list[dict[str, Any]] = [
    {
      'axis': axis, 'value': value, 'n': len(runs),
      'images_per_second': statistics.median(run['images_per_second'] for run in runs),
      'peak_mb': statistics.median(run['peak_mb'] for run in runs),
    }
    for (axis, value), runs in found.items()
  ]  # fmt: skip
  print('| axis | value | images/s | peak memory, MB | n |\n| --- | --- | --- | --- | --- |')
  for row in rows:
    rate, peak = row['images_per_second'], row['peak_mb']
    print(f'| {row["axis"]} | {row["value"]:,} | {rate:,.0f} | {peak:,.0f} | {row["n"]} |')
  if args.json:
    args.json.write_text(json.dumps(rows, indent=2) + '\n')
  if args.plot:
    _plot(rows, args.plot)


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

  Returns:
    `images_per_second` over all devices of all processes, `peak_mb` of this process.
  """
  import jax
  import numpy as np

  from cnn_jax import command, train
  from cnn_jax.config import default_config
  from cnn_jax.model import create_model
  from cnn_jax.optim import make_optimizer

  command.prepare_backend()
  if processes > 1:
    jax.distributed.initialize(coordinator, processes, process)
  config = default_config()
  config.batch_size = batch_size
  config.model.features = tuple(width * 2**i for i in range(depth))
  model = create_model(config.model, 10)
  tx = make_optimizer(config.optimizer, lambda step: 0.01)
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (examples, 28, 28, 1), np.uint8)
  data = train.replicate((images, random.integers(0, 10, examples).astype(np.int32)))
  state = train.replicate(train.create_state(model, tx, config, (28, 28, 1)))
  steps = train.make_train_steps(model=model, tx=tx, learning_rate=lambda step: 0.01, config=config)
  chunk = max(1, 2048 // batch_size)
  indices = train.local_indices(random.integers(0, examples, (chunk, batch_size), np.int32))
  # A fixed number of chunks: processes that stop by their own clocks would wait for one another.
  durations = []
  for i in range(200):
    started = time.perf_counter()
    state, measured = steps(state, *data, indices, np.int32(chunk))
    np.asarray(measured['loss'])
    durations.append(time.perf_counter() - started)
    if processes == 1 and sum(durations[1:]) > seconds and i >= 3:
      break
    if processes > 1 and i >= 8:
      break
  return {
    'images_per_second': chunk * batch_size / statistics.median(durations[1:]),
    'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
  }


def _start(point: dict[str, int], seconds: float) -> dict[str, float]:
  environment = os.environ | {'XLA_FLAGS': f'--xla_force_host_platform_device_count={point["devices"]}'}
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    coordinator = f'127.0.0.1:{s.getsockname()[1]}'
  workers = []
  for process in range(point['processes']):
    worker: dict[str, Any] = point | {'process': process, 'coordinator': coordinator}
    arguments = ['--worker', json.dumps(worker), '--seconds', str(seconds)]
    workers.append(
      subprocess.Popen(
        [sys.executable, '-m', 'experiments.scaling.run', *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
      )
    )
  outputs = [worker.communicate()[0] for worker in workers]
  if any(worker.returncode for worker in workers):
    sys.exit(f'error: the measurement of {point} failed; see above.')
  return json.loads(outputs[0].splitlines()[-1])


def _plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  axes_of = list(dict.fromkeys(row['axis'] for row in rows))
  figure, grid = plt.subplots(2, -(-len(axes_of) // 2), figsize=(10, 6), squeeze=False, layout='constrained')
  for axes, axis in zip(grid.flat, axes_of, strict=False):
    part = [row for row in rows if row['axis'] == axis]
    what, label = ('peak_mb', 'peak memory, MB') if axis == 'examples' else ('images_per_second', 'images/s')
    axes.plot([row['value'] for row in part], [row[what] for row in part], 'o-', color='#1f6f8b')
    axes.set(xscale='log', xlabel=axis.replace('_', ' '), ylabel=label, ylim=(0, None))
    axes.set_xticks([row['value'] for row in part], [_short(row['value']) for row in part])
    axes.yaxis.set_major_formatter('{x:,.0f}')
    axes.minorticks_off()
    axes.spines[['top', 'right']].set_visible(False)
  for axes in list(grid.flat)[len(axes_of) :]:
    axes.remove()
  figure.savefig(path, dpi=120)


def _short(value: int) -> str:
  return f'{value:,}' if value < 10_000 else f'{value // 1000}k'


if __name__ == '__main__':
  main()
