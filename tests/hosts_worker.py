"""Trains some runs one after another, as one process of several, on images that it counts; run by tests/faults/test_hosts.py.

python -m tests.hosts_worker OUTPUT COORDINATOR PROCESSES PROCESS NAME... : OUTPUT is a directory.

A NAME is a directory in OUTPUT, such as `2x2/resident`, whose images are kept in memory, or `2x2/streamed`; `chain+2` ends
at its second validation, as if all processes were killed.
"""

import collections
import contextlib
import json
import pathlib
import sys

import numpy as np

from cnn_jax import command, config, distribute, main, peers
from cnn_jax.data import Dataset, Split
from cnn_jax.data.lazy import LazyImages

SIZES = {'train': 130, 'validation': 21, 'test': 35}
EPOCHS, BATCH = 6, 8
FIELDS = {
  'batch_size': BATCH, 'epochs': EPOCHS, 'min_steps': 0, 'model.features': (4,), 'model.convs_per_block': 1,
  'optimizer.learning_rate': 0.02, 'augment.shift': 1, 'evaluation.min_steps': 0, 'evaluation.batch_size': 8,
  'checkpoint.every_minutes': 1e-9, 'log.every_steps': 1, 'log.tensorboard': False, 'log.report': False,
}  # fmt: skip


class Counted(LazyImages):
  """Images that are decoded when they are needed, and counted when training or evaluation reads them."""

  def __init__(self, split):
    self.counts = collections.Counter()
    pixels = np.random.default_rng(len(split)).integers(0, 256, (SIZES[split], 8, 8, 1), np.uint8)
    super().__init__(lambda index: pixels[index], np.arange(SIZES[split]), (8, 8, 1))

  def read(self, indices):
    self.counts.update(np.asarray(indices).tolist())
    return super().read(indices)


class Whole(Counted):
  """Those of a split that is only evaluated."""

  def _decode(self, chosen, counter=None):
    self.counts.update(np.asarray(chosen).tolist())
    return super()._decode(chosen, counter)


def make_dataset():
  splits = {
    name: Split((Counted if name == 'train' else Whole)(name), np.arange(SIZES[name], dtype=np.int32) % 3)
    for name in SIZES
  }
  return Dataset('noise', 'made', ('a', 'b', 'c'), **splits)


def run(output, name):
  workdir, _, stop = name.partition('+')
  fields = FIELDS | {'data.resident': 'always' if workdir.endswith('resident') else 'never'}
  dataset, seen = make_dataset(), []

  def end(epoch, _):
    seen.append(epoch)
    if stop and len(seen) == int(stop):
      raise KeyboardInterrupt

  with contextlib.suppress(KeyboardInterrupt):
    main.train_and_evaluate(
      config.vary(config.default_config(), fields), output / workdir, dataset=dataset, on_validation=end
    )
  return {'epochs': seen} | {split: getattr(dataset, split).images.counts for split in SIZES}


def work(output, coordinator, processes, process, *names):
  command.prepare_backend()
  distribute.join(coordinator, int(processes), int(process), 10.0, 100.0)
  with peers.together(command.outcome):
    found = {name: run(pathlib.Path(output), name) for name in names}
  (pathlib.Path(output) / f'counts-{process}.json').write_text(json.dumps(found))


if __name__ == '__main__':
  sys.exit(command.call(lambda words: work(*words), sys.argv[1:]))
