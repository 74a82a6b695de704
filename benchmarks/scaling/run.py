"""Training speed by batch size, width, depth, devices and processes; memory by the number of images.

    python -m benchmarks.scaling.run [--only=batch_size] [--rounds=3] [--json=FILE] [--plot=FILE.png]

Every measurement is a process of its own, which trains on random images of 28x28 pixels. The rounds are interleaved
over all points.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, peers, results
from cnn_jax import UsageError, command
from cnn_jax.tables import markdown

BASE = {'batch_size': 128, 'width': 32, 'depth': 3, 'devices': 1, 'processes': 1, 'examples': 4096}
POINTS = {
  'batch_size': [8, 32, 128, 512, 2048],
  'width': [8, 16, 32, 64],
  'depth': [1, 2, 3, 4],
  'devices': [1, 2, 4, 8],
  'processes': [1, 2],
  'examples': [4096, 60_000, 240_000, 960_000],
}


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  parser.add_argument('--rounds', type=int, default=3, help='measurements of each point (%(default)s)')
  parser.add_argument('--seconds', type=float, default=3.0, help='of training per measurement (%(default)s)')
  parser.add_argument('--only', choices=list(POINTS), help='measure one axis alone')
  parser.add_argument('--plot', type=Path, metavar='FILE.png', help='draw a panel for each axis')
  args = parser.parse_args(argv)
  points = [(axis, value) for axis in POINTS if args.only in (None, axis) for value in POINTS[axis]]
  measured = peers.interleave(lambda point, _: measure(BASE | {point[0]: point[1]}, args.seconds), points, args.rounds)
  measurements = [
    {'axis': axis, 'value': value}
    | {name: peers.spread([answer[name] for answer in answers]) for name in ('images_per_second', 'peak_mb')}
    for (axis, value), answers in measured.items()
  ]
  found = results.describe(rounds=args.rounds, base=BASE, measurements=measurements)
  results.publish(found, tables(found), args.json)
  if args.plot:
    plot(found, args.plot)


def measure(point: Mapping[str, int], seconds: float) -> dict[str, float]:
  """Measures one point in processes of its own; see `worker.measure`.

  Args:
    point: an object like `BASE`.
    seconds: of training.

  Raises:
    UsageError: a process failed; its message is on stderr.
  """
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    coordinator = f'127.0.0.1:{s.getsockname()[1]}'
  workers = []
  for process in range(point['processes']):
    arguments = json.dumps(dict(point) | {'process': process, 'coordinator': coordinator})
    workers.append(
      subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.scaling.worker', arguments, str(seconds)],
        cwd=peers.ROOT,
        env=os.environ | {'XLA_FLAGS': f'--xla_force_host_platform_device_count={point["devices"]}'},
        stdout=subprocess.PIPE,
        text=True,
      )
    )
  outputs = [worker.communicate()[0] for worker in workers]
  if any(worker.returncode for worker in workers):
    raise UsageError(f'the measurement of {dict(point)} failed; see the message above.')
  return json.loads(outputs[0].splitlines()[-1])


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md; see `benchmarks.results`."""
  header = ['axis', 'value', 'images/s', 'peak memory, MB', 'n']
  rows = [
    [
      row['axis'].replace('_', ' '),
      f'{row["value"]:,}',
      peers.show(row['images_per_second'], 0),
      peers.show(row['peak_mb'], 0),
      str(row['images_per_second']['n']),
    ]
    for row in found['measurements']
  ]
  made = {'measurements': f'{results.source(found)} Medians.\n\n{markdown(header, rows)}'}
  if 'runs' in found:
    header = ['config', 'features', 'epochs', 'peak memory, MB', 'commit']
    rows = [
      [row['config'], row['features'], str(row['epochs']), f'{row["peak_mb"]:,}', row['commit'] or 'unknown']
      for row in found['runs']
    ]
    made['runs'] = markdown(header, rows)
  return made


def plot(found: Mapping[str, Any], path: Path) -> None:
  """Draws a panel for each axis: the speed, or the memory by the number of examples.

  Args:
    found: the contents of results.json.
    path: of the PNG.
  """
  measurements = found['measurements']
  names = list(dict.fromkeys(row['axis'] for row in measurements))
  columns = -(-len(names) // 2)
  with figures.figure(path, rows=2, widths=[1] * columns, size=(10, 6)) as (_, grid):
    panels = list(grid.flat)
    for axes, name in zip(panels, names, strict=False):
      part = [row for row in measurements if row['axis'] == name]
      what, label = ('peak_mb', 'peak memory, MB') if name == 'examples' else ('images_per_second', 'images/s')
      values = [row['value'] for row in part]
      axes.plot(values, [row[what]['median'] for row in part], 'o-', color=figures.COLOURS[0], clip_on=False)
      axes.set(xscale='log', xlabel=name.replace('_', ' '), ylabel=label, ylim=(0, None))
      axes.set_xticks(values, [f'{value:,}' if value < 10_000 else f'{value // 1000}k' for value in values])
      axes.yaxis.set_major_formatter('{x:,.0f}')
      axes.minorticks_off()
    for axes in panels[len(names) :]:
      axes.remove()


if __name__ == '__main__':
  command.run(main)
