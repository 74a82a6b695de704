"""A part: training from JPEG files that are decoded while the device computes, beside training from memory.

    python -m benchmarks.accelerator.streamed --worker='{...}' --folder=DIR --output=FILE     (one run)

The photographs are made here: 375x500 pixels, as most of ImageNet are, with the contrasts of clouds, about 60 kB each.
Each run is a process that calls `train.train`. Images per second and the share of waiting are those of its timing.jsonl,
without the first calls. The programs of both ways are compiled beforehand, at the same time.
"""

import concurrent.futures
import functools
import importlib.util
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import peers
from benchmarks.accelerator import part
from cnn_jax import UsageError, command, files

CLASSES = 16
DISTINCT = 128  # photographs; the others have the same pixels in other files, since making them takes long
SIZE = (500, 375)  # of a photograph: width, height
# The runs; each has these fields of the config, and the packages that it does without.
RUNS: tuple[dict[str, Any], ...] = (
  {'resident': 'never', 'workers': 0},
  {'resident': 'always'},
  {'resident': 'never', 'workers': 4},
  {'resident': 'never', 'workers': 0, 'without': 'simplejpeg'},
  {'resident': 'never', 'workers': 2},
  {'resident': 'never', 'workers': 8},
)


def main(argv: Sequence[str]) -> None:
  """Adds a row per run, and one about decoding alone."""
  parser = part.parser(__doc__)
  parser.add_argument('--worker', help='make one run; JSON of its fields')
  parser.add_argument('--compile', action='store_true', help='of a worker: end after the first steps')
  parser.add_argument('--folder', type=pathlib.Path, help='of the images')
  parser.add_argument('--images', type=int, default=0, help='how many are made (4,096; with --small 64)')
  parser.add_argument('--batch', type=int, default=0, help='images per step (256; with --small 8)')
  parser.add_argument('--epochs', type=int, default=4, help='of a run (%(default)s)')
  args = parser.parse_args(argv)
  count, batch = args.images or (64 if args.small else 4096), args.batch or (8 if args.small else 256)
  if args.worker:
    found = run(json.loads(args.worker), args.folder, batch, args.epochs, args.small, args.compile)
    args.output.write_text(json.dumps(found))
    return
  rows = part.Rows(args.output, args.seconds)
  with tempfile.TemporaryDirectory() as directory:
    folder = pathlib.Path(directory) / 'photographs'
    rows.attempt(functools.partial(make_photographs, folder, count), run='photographs made', images=count)
    common = [f'--folder={folder}', f'--batch={batch}', f'--epochs={1 if args.small else args.epochs}']
    common += ['--small'] if args.small else []

    def measure(number: int, fields: dict[str, Any], *more: str) -> dict[str, Any]:
      output = pathlib.Path(directory) / f'{number}.json'
      return _run_worker([f'--worker={json.dumps(fields)}', f'--output={output}', *common, *more], output, rows.left())

    if not args.small:
      with concurrent.futures.ThreadPoolExecutor() as pool:
        list(
          pool.map(lambda i: rows.attempt(lambda: measure(i, RUNS[i], '--compile'), run='compiled', **RUNS[i]), (0, 1))
        )
    for number, fields in enumerate(RUNS[:2] if args.small else RUNS):
      if rows.left() < 5:
        break
      if fields.get('without') and importlib.util.find_spec(fields['without']) is None:
        continue
      rows.attempt(functools.partial(measure, number, fields), run='training', **fields, batch=batch)


def make_photographs(folder: pathlib.Path, count: int) -> dict[str, Any]:
  """Writes JPEG files, FOLDER/train/<class>/* and a few in FOLDER/test/<class>/*, in threads.

  Args:
    folder: new.
    count: of training images.

  Returns:
    `kilobytes` of a file, the mean.
  """

  def write(first: int) -> list[int]:
    contents = io.BytesIO()
    _clouds(first).save(contents, 'JPEG', quality=90)
    head, rest = contents.getvalue()[:2], contents.getvalue()[2:]
    sizes = []
    for number in range(first, count + 2 * CLASSES, DISTINCT):
      split, index = ('train', number) if number < count else ('test', number - count)
      path = folder / split / f'class{index % CLASSES:02}' / f'{index:06}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      comment = f'{number:06}'.encode()
      sizes.append(path.write_bytes(head + b'\xff\xfe' + (len(comment) + 2).to_bytes(2) + comment + rest))
    return sizes

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    sizes = [size for made in pool.map(write, range(min(DISTINCT, count + 2 * CLASSES))) for size in made]
  return {'kilobytes': statistics.mean(sizes) / 1e3}


def _clouds(number: int) -> Image.Image:
  """Noise at several scales, whose JPEG is about as large as that of a photograph."""
  random = np.random.default_rng(number)
  total = np.zeros((SIZE[1], SIZE[0], 3), np.float32)
  for cells, strength in ((4, 60.0), (16, 30.0), (64, 16.0), (250, 8.0)):
    noise = random.integers(0, 256, (cells, cells, 3), np.uint8)
    total += (np.asarray(Image.fromarray(noise).resize(SIZE, Image.Resampling.BILINEAR), np.float32) - 127.5) * (
      strength / 73.6
    )
  return Image.fromarray(np.clip(total + 127.5, 0, 255).astype(np.uint8))


def run(
  fields: dict[str, Any], folder: pathlib.Path, batch: int, epochs: int, small: bool, compiling: bool
) -> dict[str, Any]:
  """Trains a ResNet in this process, as `cnn_jax.main` does.

  Args:
    fields: one of `RUNS`.
    folder: of the images.
    batch: images per step.
    epochs: over the images.
    small: a narrow ResNet-18 of 64 pixels in float32 in place of a ResNet-50 of 224 in bfloat16.
    compiling: end after the first steps, when the program is in the cache.

  Returns:
    `images_per_second`, of all steps but the first seven, and `spread`, of each of them; `data_wait_share`, their mean.
  """
  if fields.get('without'):
    sys.modules[fields['without']] = None  # type: ignore[assignment]
  from cnn_jax import config, train, workdirs
  from cnn_jax.data import load_dataset

  command.prepare_backend()
  side = 64 if small else 224
  made = config.vary(
    config.default_config('resnet'),
    {
      'data.source': 'folder', 'data.dir': str(folder), 'data.image_size': side, 'data.channels': 3,
      'data.validation': 0.0, 'data.resident': fields['resident'], 'data.workers': fields.get('workers', 0),
      'model.depth': 18 if small else 50, 'model.width': 4 if small else 64, 'model.dtype': 'float32' if small else 'bfloat16', 'augment.flip': True,
      'batch_size': batch, 'epochs': epochs, 'optimizer.learning_rate': 0.05, 'schedule.warmup_epochs': 0.5,
      'log.every_steps': 1, 'log.tensorboard': False, 'evaluation.batch_size': batch,
    },
  )  # fmt: skip
  config.check(made)
  with tempfile.TemporaryDirectory() as directory:
    workdir = pathlib.Path(directory) / 'run'
    if compiling:
      threading.Thread(target=_end_after_first_steps, args=(workdir / 'timing.jsonl',), daemon=True).start()
    with workdirs.lock(workdir):
      train.train(made, load_dataset(made.data), workdir, evaluate_test=False)
    lines = [json.loads(line) for line in (workdir / 'timing.jsonl').read_text().splitlines()]
  timings = [line for line in lines if 'images_per_second' in line]
  timings = timings[7:] or timings
  rates = [line['images_per_second'] for line in timings]
  return {
    'images_per_second': statistics.harmonic_mean(rates),
    'spread': peers.spread(rates),
    'data_wait_share': statistics.fmean(line['data_wait_share'] for line in timings),
    'decoder': 'Pillow' if fields.get('without') or not importlib.util.find_spec('simplejpeg') else 'simplejpeg',
  }


def _end_after_first_steps(path: pathlib.Path) -> None:
  while not (path.exists() and path.stat().st_size):
    time.sleep(0.1)
  os._exit(0)


def _run_worker(arguments: Sequence[str], output: pathlib.Path, seconds: float) -> dict[str, Any]:
  # A cache of its own, because the run from memory leaves its decoded images there.
  compiled = os.environ.get('JAX_COMPILATION_CACHE_DIR', str(files.cache_dir() / 'compiled'))
  environment = os.environ | {'XDG_CACHE_HOME': f'{output}-cache', 'JAX_COMPILATION_CACHE_DIR': compiled}
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.accelerator.streamed', *arguments],
    cwd=peers.ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=seconds, check=False,
  )  # fmt: skip
  if done.returncode:
    raise UsageError(f'the run ended with status {done.returncode}: {done.stderr[-300:]}')
  return json.loads(output.read_text()) if output.exists() else {}


if __name__ == '__main__':
  command.run(main)
