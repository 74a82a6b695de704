"""The peer of `run.py` that reads as training does: `feed.Streamed`.

    python -m benchmarks.loader.peer simplejpeg|Pillow FILE.json

FILE.json maps the name of a set to fields of `config.data`. It answers the requests `SET CORES COUNT`.
"""

import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import peers

SIZE, BATCH = 224, 64
_CORES = sorted(os.sched_getaffinity(0))


def main(argv: Sequence[str]) -> None:
  """Loads the sets, reports the decoder, and answers requests."""
  name, file = argv
  if name == 'Pillow':
    sys.modules['simplejpeg'] = None  # type: ignore[assignment]  # what makes its import fail
  from cnn_jax import command
  from cnn_jax.config import default_config
  from cnn_jax.data import feed, jpeg, load_dataset

  command.prepare_backend()  # as training does
  splits = {}
  for of_set, fields in json.loads(pathlib.Path(file).read_text()).items():
    data = default_config().data
    data.update({'image_size': SIZE, 'channels': 3, 'resident': 'never', 'validation': 0.0} | fields)
    splits[of_set] = load_dataset(data).train

  def read(of_set: str, count: int) -> None:
    """Reads some batches and places them on the device."""
    split = splits[of_set]
    steps = count // BATCH
    per_epoch = len(split) // BATCH
    examples = feed.Streamed(split, BATCH, 0, 4, 'uniform', steps)
    step = 0
    while step < steps:
      epoch, offset = divmod(step, per_epoch)
      (images, *_), taken = examples.take(epoch, offset, per_epoch - offset)
      assert images.dtype == np.uint8 and images.shape[2:] == (SIZE, SIZE, 3)
      step += taken
    examples.close()

  peers.serve(
    lambda of_set, cores, count: measure(lambda: read(of_set, int(count)), int(cores), int(count)),
    decoder=jpeg.decoder(),
  )


def measure(read: Callable[[], object], cores: int, count: int) -> dict[str, float]:
  """Times a function on some cores.

  Args:
    read: ends the processes that it starts.
    cores: that it may use.
    count: of images that it reads.

  Returns:
    `images_per_second`, and `cpu_ms` per image, of this process and of those that it started.
  """
  os.sched_setaffinity(0, _CORES[:cores])  # threads and processes that are started from here on inherit it
  cpu, started = _cpu_seconds(), time.perf_counter()
  read()
  seconds = time.perf_counter() - started
  return {'images_per_second': count / seconds, 'cpu_ms': 1e3 * (_cpu_seconds() - cpu) / count}


def _cpu_seconds() -> float:
  return sum(
    getattr(resource.getrusage(who), field)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    for field in ('ru_utime', 'ru_stime')
  )


if __name__ == '__main__':
  main(sys.argv[1:])
