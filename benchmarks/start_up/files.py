"""The time to the first training step on a folder of many files, with and without the index of an earlier start."""

import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import peers, results
from cnn_jax import UsageError
from cnn_jax.tables import markdown

STARTS = ('first start', 'second start')
_IMAGENET = (1_281_167, 50_000, 1000)  # training images, validation images, classes
_LINKS = 40_000  # names of a file, which file systems limit


def measure(place: pathlib.Path, count: int, repeats: int, overrides: Sequence[str]) -> dict[str, Any]:
  """Measures starts of training on a folder with the shape of ImageNet.

  Args:
    place: an empty directory.
    count: of training images, which are hard links to few files.
    repeats: of each start.
    overrides: of `configs/image_folder.py`.

  Returns:
    The section `files` of results.json.
  """
  make(place / 'set', count)
  arguments = ['--config=configs/image_folder.py', f'--config.data.dir={place / "set"}', '--config.data.resident=never']
  arguments += overrides
  start(arguments, place)  # compiles
  measured: dict[str, list[tuple[float, float]]] = {name: [] for name in STARTS}
  for _ in range(repeats):
    shutil.rmtree(place / 'cache', ignore_errors=True)
    for name in STARTS:
      measured[name].append(start(arguments, place))
  rows = [
    {
      'what': name,
      'seconds': peers.spread([seconds for seconds, _ in values]),
      'peak_mb': peers.spread([peak for _, peak in values]),
    }
    for name, values in measured.items()
  ]
  return results.describe(count=count, repeats=repeats, measurements=rows)


def make(root: pathlib.Path, count: int) -> None:
  """Makes a folder of JPEG files of 375x500 pixels: ROOT/train/CLASS/* and ROOT/val/CLASS/*.

  Args:
    root: new.
    count: of the files of train.
  """
  classes = min(_IMAGENET[2], max(2, count // 10))
  validation = max(classes, count * _IMAGENET[1] // _IMAGENET[0])
  sources = [root.parent / f'{i}.jpg' for i in range((count + validation) // _LINKS + 2)]
  rng = np.random.default_rng(0)
  for source in sources:
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    coarse.resize((500, 375), Image.Resampling.BICUBIC).save(source, quality=90)
  for split, files in (('train', count), ('val', validation)):
    for label in range(classes):
      folder = root / split / f'n{10_000_000 + 7919 * label}'
      folder.mkdir(parents=True)
      for number in range(label, files, classes):
        os.link(sources[number % len(sources)], folder / f'{folder.name}_{number}.JPEG')


def start(arguments: Sequence[str], place: pathlib.Path) -> tuple[float, float]:
  """Starts training, and ends it after the first line of metrics.

  Args:
    arguments: of `cnn_jax.main`.
    place: for the workdir, the cache and the compiled programs.

  Returns:
    Seconds until then, and the peak memory in MB of 2^20 bytes.
  """
  workdir = place / 'run'
  shutil.rmtree(workdir, ignore_errors=True)
  command = [sys.executable, '-m', 'cnn_jax.main', *arguments, '--config.log.every_steps=1', f'--workdir={workdir}']
  caches = {'XDG_CACHE_HOME': str(place / 'cache'), 'JAX_COMPILATION_CACHE_DIR': str(place / 'compiled')}
  started, metrics = time.perf_counter(), workdir / 'metrics.jsonl'
  with open(place / 'errors', 'w') as errors:
    process = subprocess.Popen(
      command, cwd=peers.ROOT, env=os.environ | caches, stdout=subprocess.DEVNULL, stderr=errors
    )
  while not (metrics.exists() and metrics.stat().st_size):
    if process.poll() is not None:
      raise UsageError(f'training ended with status {process.returncode}: {(place / "errors").read_text()}')
    time.sleep(0.005)
  seconds = time.perf_counter() - started
  status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
  process.kill()
  process.wait()
  return seconds, int(status.partition('VmHWM:')[2].split()[0]) / 1024


def table(found: Mapping[str, Any]) -> str:
  """The table of README.md from the section `files` of results.json."""
  rows = [
    [
      row['what'],
      *(f'{row["seconds"][which]:.1f}' for which in ('median', 'min', 'max')),
      peers.show(row['peak_mb'], 0),
    ]
    for row in found['measurements']
  ]
  shown = markdown(['what', 'median, s', 'minimum', 'maximum', 'peak memory, MB'], rows)
  return f'{results.source(found)} {found["count"]:,} training images, n = {found["repeats"]}.\n\n{shown}'
