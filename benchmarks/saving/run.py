"""The time that training loses to a save: until the checkpoint is on the disk, and with a thread that writes a copy.

    python -m benchmarks.saving.run [--saves=5] [--networks=NAME,NAME] [--folder=DIR] [--json=FILE]

A save is between calls of some steps, as in training.
"""

import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import peers, results
from cnn_jax import command, distribute, plan, saving, train
from cnn_jax.config import default_config, vary
from cnn_jax.tables import markdown

# {network: fields of the config, image shape, steps between two saves}
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, int, int], int]] = {
  'MNIST CNN': ({'batch_size': 128}, (28, 28, 1), 100),
  'ResNet-50': ({'model.name': 'resnet', 'model.depth': 50, 'batch_size': 8}, (64, 64, 3), 8),
}
WAYS = {'waits': 'until it is written', 'background': 'written in the background'}


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  parser.add_argument('--saves', type=int, default=5, help='saves of each kind (%(default)s)')
  parser.add_argument('--networks', default=','.join(NETWORKS), help='separated by commas (%(default)s)')
  parser.add_argument('--folder', help='where the checkpoints are written; default: a temporary folder')
  args = parser.parse_args(argv)
  names = args.networks.split(',')
  if unknown := [name for name in names if name not in NETWORKS]:
    parser.error(f'--networks has {unknown[0]!r}; the networks are {", ".join(NETWORKS)}')
  command.prepare_backend()
  rows = []
  for name in names:
    with tempfile.TemporaryDirectory(dir=args.folder) as directory:
      rows.append({'network': name, **measure(*NETWORKS[name], args.saves, pathlib.Path(directory))})
    print(f'{name}: {rows[-1]["step_ms"]["median"]:.1f} ms per step', file=sys.stderr, flush=True)
  found = results.describe(saves=args.saves, measurements=rows)
  results.publish(found, tables(found), args.json)


def measure(
  fields: Mapping[str, Any], shape: tuple[int, int, int], steps: int, saves: int, directory: pathlib.Path
) -> dict[str, Any]:
  """Times some steps by themselves, and after a save of each kind.

  Args:
    fields: of the config.
    shape: of the images.
    steps: in which a save in the background ends.
    saves: of each kind.
    directory: of the checkpoints.

  Returns:
    `megabytes` of the state, and `peers.spread`s: `step_ms` without saves; for each of `WAYS`, `stall_ms`, how long the
    call of a save takes, and `lost_ms`, by how much longer all takes than the steps alone, in the same round.
  """
  constant = {'schedule.name': 'constant', 'schedule.warmup_epochs': 0.0, 'optimizer.learning_rate': 1e-4}
  config = vary(default_config(fields.get('model.name', 'cnn')), dict(fields) | constant)
  size = config.batch_size
  made = plan.make_plan(config, steps * size, 10, shape, max_steps=steps)
  images = np.random.default_rng(0).integers(0, 256, (size, *shape), np.uint8)
  data = distribute.replicate((images, np.arange(size, dtype=np.int32) % 10))
  order = np.tile(np.arange(size, dtype=np.int32).reshape(jax.device_count(), -1), (steps, 1, 1))
  train_steps, state = train.compile_steps(made.step, config.seed), distribute.replicate(made.state)

  def take(count: int) -> None:
    nonlocal state
    state, _ = train_steps(state, *data, order, np.int32(count))
    jax.block_until_ready(state)

  def run(what: str, _: int) -> dict[str, float]:
    saver = saving.Saver(directory / 'checkpoints', config.checkpoint)
    started = stalled = time.perf_counter()
    if what != 'steps':
      saver.save(int(state.step), state, {}, wait=what == 'waits')
      stalled = time.perf_counter()
    take(steps)
    saver.close()
    return {'stall': 1e3 * (stalled - started), 'all': 1e3 * (time.perf_counter() - started)}

  take(2)
  run('waits', 0)  # imports what a save needs
  times = peers.interleave(run, ('steps', *WAYS), saves, what='saves')
  alone = [time['all'] for time in times['steps']]
  row = {
    'megabytes': sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6,
    'step_ms': peers.spread([ms / steps for ms in alone]),
  }
  for way in WAYS:
    lost = [time['all'] - ms for time, ms in zip(times[way], alone, strict=True)]
    row[way] = {'stall_ms': peers.spread([time['stall'] for time in times[way]]), 'lost_ms': peers.spread(lost)}
  return row


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md; see `benchmarks.results`."""
  rows = found['measurements']
  header = ['network', 'state, MB', 'a step, ms']
  header += [f'{what}, {shown}, ms' for shown in WAYS.values() for what in ('training waits', 'time lost')]
  cells = [
    [
      row['network'],
      f'{row["megabytes"]:,.1f}',
      peers.show(row['step_ms']),
      *(peers.show(row[way][what]) for way in WAYS for what in ('stall_ms', 'lost_ms')),
    ]
    for row in rows
  ]
  text = f'{results.source(found)} n = {found["saves"]} saves of each kind, median (minimum-maximum).'
  return {'measurements': f'{text}\n\n{markdown(header, cells)}'}


if __name__ == '__main__':
  command.run(main)
