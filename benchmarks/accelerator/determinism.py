"""A part: whether the same run gives the same bits on the device: twice, resumed in the middle, compiled anew.

    python -m benchmarks.accelerator.determinism --worker=cnn --workdir=DIR [--interrupt] --output=FILE.npz

A run is a process. The runs of a chain share a directory of compiled programs, so that XLA chooses the algorithms of its
convolutions once; the others compile and choose anew. `XLA_FLAGS` of some makes XLA use deterministic operations alone.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.accelerator import part
from cnn_jax import UsageError, command

FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
  'cnn': ('cnn', {'model.features': (32, 64), 'model.convs_per_block': 2}),
  'resnet, bfloat16': ('resnet', {'model.stem': '3x3', 'model.width': 32, 'model.dtype': 'bfloat16'}),
}
MOST_SHORT = 5.0  # seconds within which no run ends
FLAG = '--xla_gpu_deterministic_ops=true'


@dataclasses.dataclass(frozen=True)
class Kind:
  """How a run differs from the first one of its chain.

  Attributes:
    cache: the directory of compiled programs; runs of one name share it.
    of: the run that it is compared with, if any; it waits for that one's programs if they share the directory.
    interrupt: whether the run is interrupted and resumed.
    flags: of XLA.
  """

  cache: str
  of: str = ''
  interrupt: bool = False
  flags: str = ''


KINDS = {
  'first': Kind('a'),
  'again': Kind('a', of='first'),
  'interrupted and resumed': Kind('a', of='first', interrupt=True),
  'compiled anew': Kind('b', of='first'),
  'deterministic': Kind('c', flags=FLAG),
  'deterministic, compiled anew': Kind('d', of='deterministic', flags=FLAG),
}
# Of the ResNet only what a user needs most, because compiling takes most of the time.
RUNS = {'cnn': list(KINDS), 'resnet, bfloat16': list(KINDS)[:3]}
SMALL = {'cnn': ['first', 'interrupted and resumed']}


class _InterruptedError(Exception):
  """Ends a run as if it had been killed."""


def main(argv: Sequence[str]) -> None:
  """Adds a row per network and kind of run."""
  parser = part.parser(__doc__)
  parser.add_argument('--worker', choices=FIELDS, help='train this network, and write its parameters to --output')
  parser.add_argument('--workdir', type=pathlib.Path, help='of the worker')
  parser.add_argument('--interrupt', action='store_true', help='interrupt the worker after a third, and resume')
  parser.add_argument('--epochs', type=int, default=6, help='of the worker (%(default)s)')
  args = parser.parse_args(argv)
  if args.worker:
    train(args.worker, args.workdir, args.interrupt, args.epochs, args.output)
    return
  rows = part.Rows(args.output, args.seconds)
  runs = SMALL if args.small else RUNS
  with (
    tempfile.TemporaryDirectory() as directory,
    concurrent.futures.ThreadPoolExecutor(16) as pool,
  ):
    start = functools.partial(_start, pathlib.Path(directory), rows, 3 if args.small else 6)
    for network, names in runs.items():
      made: dict[str, concurrent.futures.Future[pathlib.Path]] = {}
      for name in names:
        kind = KINDS[name]
        shares = made[kind.of] if kind.of and KINDS[kind.of].cache == kind.cache else None
        made[name] = pool.submit(start, network, name, kind, shares)
        if kind.of:
          about = {'network': network, 'run': name, 'compared_with': kind.of}
          pool.submit(rows.attempt, functools.partial(_compare, made[kind.of], made[name]), **about)


def train(network: str, workdir: pathlib.Path, interrupt: bool, epochs: int, output: pathlib.Path) -> None:
  """Trains a network on the bundled digits, and writes its parameters and its test accuracy.

  Args:
    network: a key of `FIELDS`.
    workdir: of the run, new.
    interrupt: whether to end the run after a third of the epochs, and to continue it.
    epochs: to train.
    output: the file.
  """
  import jax

  from cnn_jax import config
  from cnn_jax import main as training
  from cnn_jax.run import load_run

  command.prepare_backend()
  name, fields = FIELDS[network]
  of_data = {'data.source': 'bundled', 'data.name': 'digits', 'data.test': 0.2, 'augment.shift': 1}
  of_run = {'epochs': epochs, 'batch_size': 64, 'log.report': False, 'log.tensorboard': False}
  made = config.vary(config.default_config(name), fields | of_data | of_run | {'optimizer.learning_rate': 0.02})

  def stop(epoch: int, _: dict[str, float]) -> None:
    if epoch > epochs // 3:
      raise _InterruptedError

  if interrupt:
    try:
      training.train_and_evaluate(made, workdir, on_validation=stop)
    except _InterruptedError:
      pass
    else:
      raise UsageError('the run was not interrupted.')
  result = training.train_and_evaluate(made, workdir)
  arrays = [np.asarray(x) for x in jax.tree.leaves(load_run(workdir).variables)]
  np.savez(output, *arrays, accuracy=result['test_accuracy'])


def _start(
  directory: pathlib.Path,
  rows: part.Rows,
  epochs: int,
  network: str,
  name: str,
  kind: Kind,
  shares: concurrent.futures.Future[pathlib.Path] | None,
) -> pathlib.Path:
  """Runs a worker to its end, after the one that shares its compiled programs, and returns its file."""
  if shares:
    shares.result()
  if rows.left() < MOST_SHORT:
    raise UsageError('not measured, because the time of the part was over')
  place = directory / f'{network}-{name}'.replace(' ', '_')
  arguments = [f'--worker={network}', f'--workdir={place}', f'--epochs={epochs}', f'--output={place}.npz']
  arguments += ['--interrupt'] if kind.interrupt else []
  cache = directory / f'{network}-{kind.cache}'.replace(' ', '_')
  flags = ' '.join(filter(None, (os.environ.get('XLA_FLAGS'), kind.flags)))
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.accelerator.determinism', *arguments],
    cwd=peers.ROOT,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cache), 'XLA_FLAGS': flags},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    timeout=rows.left(),
    check=False,
  )
  if done.returncode:
    raise UsageError(f'a run ended with status {done.returncode}: {done.stderr[-300:]}')
  return pathlib.Path(f'{place}.npz')


def _compare(
  first: concurrent.futures.Future[pathlib.Path], second: concurrent.futures.Future[pathlib.Path]
) -> dict[str, Any]:
  a, b = np.load(first.result(), allow_pickle=False), np.load(second.result(), allow_pickle=False)
  arrays = [name for name in a.files if name != 'accuracy']
  return {
    'same_bits': all(np.array_equal(a[name], b[name]) for name in arrays),
    'difference': part.largest_error((b[name], a[name]) for name in arrays if a[name].size),
    'accuracy': [float(a['accuracy']), float(b['accuracy'])],
  }


if __name__ == '__main__':
  command.run(main)
