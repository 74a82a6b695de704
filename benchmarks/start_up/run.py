"""The time from the start of a process to its first training step and its first prediction, with and without a cache.

python -m benchmarks.start_up.run [--repeats=5] [--config=configs/mnist.py] [--json=FILE] [--config.NAME=VALUE]
                                  [--files=1281167]

With --files, it measures the start on a folder of so many training images instead; FILE keeps what it has of the other.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import peers, results
from benchmarks.start_up import files
from cnn_jax import UsageError, command
from cnn_jax import config as config_lib
from cnn_jax.tables import markdown

TIMES = tuple(f'first {what}, {cache}' for what in ('training step', 'prediction') for cache in ('cold', 'warm'))
PACKAGES = ('jax', 'flax', 'optax', 'orbax', 'tensorflow_datasets', 'tensorboardX', 'PIL', 'matplotlib', 'sklearn')
_MODULES = ('cnn_jax.main', 'cnn_jax.train', 'cnn_jax.data', 'orbax.checkpoint')  # of a training process


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  command.add_config(parser)
  parser.set_defaults(config='configs/mnist.py')
  parser.add_argument('--repeats', type=int, default=5, help='measurements of each time (%(default)s)')
  parser.add_argument('--files', type=int, default=0, help='training images of a folder, at least 20')
  args, overrides = parser.parse_known_args(argv)
  if args.files:
    with tempfile.TemporaryDirectory() as directory:
      found = {'files': files.measure(Path(directory), args.files, args.repeats, overrides)}
    results.publish(found, tables(found), args.json)
    return
  config_lib.load(str(peers.ROOT / args.config), overrides)
  training = [f'--config={args.config}', *overrides]
  with tempfile.TemporaryDirectory() as directory:
    place = Path(directory)
    trained, image = place / 'trained', place / 'image.png'
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(image)
    train_digits(trained, place / 'cache')

    def measure(what: str, repeat: int) -> float:
      # The cold and the warm measurement of a repeat share a cache, which is empty before the cold one.
      if what.startswith('first training step'):
        return first_step(training, place / f'{what}{repeat}', place / f'training{repeat}')
      return first_prediction(trained, image, place / f'prediction{repeat}')

    measured = peers.interleave(measure, TIMES, args.repeats)
  imported = [imports() for _ in range(args.repeats)]
  measured |= {f'import {name}': [found.get(name, 0.0) for found in imported] for name in imported[0]}
  measurements = [{'what': name, 'seconds': peers.spread(values)} for name, values in measured.items()]
  found = results.describe(config=args.config, repeats=args.repeats, measurements=measurements)
  results.publish(found, tables(found), args.json)


def train_digits(workdir: Path, cache: Path) -> None:
  """Trains the run that the predictions use.

  Args:
    workdir: of the run, new.
    cache: the folder of compiled programs.
  """
  fields = ('--config.epochs=3', '--config.log.report=False')
  _finish(_start(['cnn_jax.main', '--config=configs/digits.py', *fields, f'--workdir={workdir}'], cache))


def first_step(arguments: Sequence[str], workdir: Path, cache: Path) -> float:
  """Seconds from the start of a training process to its first line of metrics, which describes the first step.

  Args:
    arguments: of `cnn_jax.main`.
    workdir: of the run, new.
    cache: the folder of compiled programs.
  """
  started = time.perf_counter()
  process = _start(['cnn_jax.main', *arguments, '--config.log.every_steps=1', f'--workdir={workdir}'], cache)
  metrics = workdir / 'metrics.jsonl'
  while not (metrics.exists() and metrics.stat().st_size):
    if process.poll() is not None:
      _finish(process)
    time.sleep(0.005)
  seconds = time.perf_counter() - started
  process.kill()
  process.communicate()
  return seconds


def first_prediction(workdir: Path, image: Path, cache: Path) -> float:
  """Seconds from the start of a prediction process to its end.

  Args:
    workdir: of a trained run.
    image: a picture.
    cache: the folder of compiled programs.
  """
  started = time.perf_counter()
  _finish(_start(['cnn_jax.predict', f'--workdir={workdir}', str(image)], cache))
  return time.perf_counter() - started


def imports() -> dict[str, float]:
  """Seconds that the imports of a training process take: of all, and of each package without those imported before."""
  done = subprocess.run(
    [sys.executable, '-X', 'importtime', '-c', f'import {", ".join(_MODULES)}'],
    cwd=peers.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  found = {'all': 0.0}
  for line in done.stderr.splitlines():
    parts = re.match(r'import time:\s+(\d+) \|\s+(\d+) \|( *)(\S+)', line)
    if parts:
      name, cumulative = parts[4].split('.')[0], int(parts[2]) / 1e6
      if name in PACKAGES:
        found[name] = max(found.get(name, 0.0), cumulative)
      if parts[3] == ' ':
        found['all'] += cumulative
  return found


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md; see `benchmarks.results`."""
  made = {'files': files.table(found['files'])} if 'files' in found else {}
  if 'measurements' in found:
    rows = [
      [row['what'], *(f'{row["seconds"][which]:.2f}' for which in ('median', 'min', 'max'))]
      for row in found['measurements']
    ]
    table = markdown(['what', 'median, s', 'minimum', 'maximum'], rows)
    made['measurements'] = f'{results.source(found)} `{found["config"]}`, n = {found["repeats"]}.\n\n{table}'
  return made


def _start(arguments: Sequence[str], cache: Path) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-m', *arguments],
    cwd=peers.ROOT,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cache)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(process: subprocess.Popen) -> None:
  _, errors = process.communicate()
  if process.returncode:
    raise UsageError(f'a process of the benchmark ended with status {process.returncode}: {errors}')


if __name__ == '__main__':
  command.run(main)
