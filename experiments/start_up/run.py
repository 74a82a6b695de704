"""How long until the first training step and the first prediction, with and without compiled programs in the cache.

python -m experiments.start_up.run [--repeats=5] [--config=configs/mnist.py] [--json=FILE]
"""

import argparse
import collections
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMPORTED = ('jax', 'flax', 'optax', 'orbax', 'tensorflow_datasets', 'tensorboardX', 'PIL', 'matplotlib', 'sklearn')


def main() -> None:
  """Measures and prints medians over the repeats; every process starts from nothing."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--config', default='configs/mnist.py')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  measured: dict[str, list[float]] = collections.defaultdict(list)
  with tempfile.TemporaryDirectory() as directory:
    place = pathlib.Path(directory)
    trained, image = _trained_run(place), place / 'image.png'
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(image)
    for repeat in range(args.repeats):
      cache = place / f'cache{repeat}'
      for start in ('cold', 'warm'):
        measured[f'first training step, {start}'].append(first_step(args.config, place / f'{start}{repeat}', cache))
      for start in ('cold', 'warm'):
        measured[f'first prediction, {start}'].append(first_prediction(trained, image, place / f'predict{repeat}'))
      for name, seconds in imports().items():
        measured[f'import {name}'].append(seconds)
      print(f'repeat {repeat + 1} of {args.repeats} done', file=sys.stderr, flush=True)
  rows: list[dict[str, Any]] = [
    {'what': name, 'median_s': statistics.median(values), 'min_s': min(values), 'max_s': max(values), 'n': len(values)}
    for name, values in measured.items()
  ]
  print('| what | median s | min | max |\n| --- | --- | --- | --- |')
  for row in rows:
    print(f'| {row["what"]} | {row["median_s"]:.2f} | {row["min_s"]:.2f} | {row["max_s"]:.2f} |')
  if args.json:
    args.json.write_text(json.dumps(rows, indent=2) + '\n')


def first_step(config: str, workdir: pathlib.Path, cache: pathlib.Path) -> float:
  """Seconds from the start of a training process to its first line of metrics, which is of the first step."""
  command = ['cnn_jax.main', f'--config={config}', '--config.log.every_steps=1', f'--workdir={workdir}']
  started = time.perf_counter()
  process = _start(command, cache)
  metrics = workdir / 'metrics.jsonl'
  while not (metrics.exists() and metrics.stat().st_size):
    if process.poll() is not None:
      raise RuntimeError(f'the training process ended: {process.communicate()[1]}')
    time.sleep(0.005)
  seconds = time.perf_counter() - started
  process.kill()
  process.communicate()
  return seconds


def first_prediction(run: pathlib.Path, image: pathlib.Path, cache: pathlib.Path) -> float:
  """Seconds from the start of a prediction process to its end, for one image."""
  started = time.perf_counter()
  process = _start(['cnn_jax.predict', f'--workdir={run}', str(image)], cache)
  _, errors = process.communicate()
  if process.returncode:
    raise RuntimeError(errors)
  return time.perf_counter() - started


def imports() -> dict[str, float]:
  """Seconds that the imports of a training process take, by package: what each adds when its turn comes."""
  code = 'import cnn_jax.main, cnn_jax.train, cnn_jax.data.sources, orbax.checkpoint'
  done = subprocess.run(
    [sys.executable, '-X', 'importtime', '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
  )
  found = {'all': 0.0}
  for line in done.stderr.splitlines():
    parts = re.match(r'import time:\s+(\d+) \|\s+(\d+) \|( *)(\S+)', line)
    if parts:
      name, cumulative = parts[4].split('.')[0], int(parts[2]) / 1e6
      if name in IMPORTED:
        found[name] = max(found.get(name, 0.0), cumulative)
      if parts[3] == ' ':
        found['all'] += cumulative
  return found


def _trained_run(place: pathlib.Path) -> pathlib.Path:
  arguments = ['--config=configs/digits.py', '--config.epochs=3', f'--workdir={place / "trained"}']
  process = _start(['cnn_jax.main', *arguments], place / 'cache')
  _, errors = process.communicate()
  if process.returncode:
    raise RuntimeError(errors)
  return place / 'trained'


def _start(command: list[str], cache: pathlib.Path) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-m', *command],
    cwd=ROOT,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cache)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


if __name__ == '__main__':
  main()
