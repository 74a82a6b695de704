"""How many images per second are read, decoded and resized for training, beside PyTorch's DataLoader.

    python -m benchmarks.loader.run [--pytorch_python=PATH] [--images=640] [--rounds=5] [--json=FILE]

The pictures are made on the fly. Every program is a process of its own. The programs are measured in interleaved rounds,
and those that are not being measured are stopped.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import peers, results
from benchmarks.loader import pictures
from benchmarks.loader.peer import BATCH
from cnn_jax import UsageError, command
from cnn_jax.tables import markdown

OURS = {'simplejpeg': 'ours, simplejpeg', 'Pillow': 'ours, Pillow'}
PYTORCH = {'Pillow': 'DataLoader, Pillow', 'torchvision': 'DataLoader, torchvision'}
CORES = (1, 2)


class _Asked(NamedTuple):
  program: str
  set: str
  request: str


_REFERENCE = _Asked(PYTORCH['Pillow'], 'folder', 'Pillow')


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  parser.add_argument('--images', type=int, default=640, help='images of a measurement (%(default)s)')
  parser.add_argument('--rounds', type=int, default=5, help='measurements of each program (%(default)s)')
  parser.add_argument('--pytorch_python', help='an interpreter with PyTorch; default: this one, if it has PyTorch')
  args = parser.parse_args(argv)
  if args.images < BATCH:
    raise UsageError(f'--images={args.images} is less than a batch of {BATCH}.')
  count = args.images // BATCH * BATCH
  cores = [number for number in CORES if number <= len(os.sched_getaffinity(0))]
  python = args.pytorch_python or (sys.executable if importlib.util.find_spec('torch') else None)
  peers.check_pytorch(python)
  with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
    sets = pictures.write(Path(directory), min(count, 4 * BATCH))
    names = [name for name in OURS if name != 'simplejpeg' or importlib.util.find_spec('simplejpeg')]
    running = {OURS[name]: stack.enter_context(_start(name, directory, sets)) for name in names}
    asked = {_Asked(OURS[name], of_set, of_set): running[OURS[name]] for name in names for of_set in sets}
    versions = {}
    if python:
      peer = stack.enter_context(peers.Peer('benchmarks.loader.torch_peer', sets['folder']['dir'], python=python))
      asked |= {_Asked(PYTORCH[decoder], 'folder', decoder): peer for decoder in PYTORCH}
      versions = peer.ready
    for key, peer in asked.items():  # what is loaded when it is used first
      peer.ask(key.request, 1, BATCH)

    def measure(thing: tuple[_Asked, int], _: int) -> dict[str, float]:
      key, number = thing
      return asked[key].ask(key.request, number, count)

    measured = peers.interleave(measure, list(itertools.product(asked, cores)), args.rounds)
    size = sum(path.stat().st_size for path in Path(sets['folder']['dir'], 'train').rglob('*.jpg'))
    file_kb = size / min(count, 4 * BATCH) / 1e3
  found = results.describe(
    versions,
    rounds=args.rounds,
    images=count,
    file_kb=file_kb,
    tf_data='not measured' if importlib.util.find_spec('tensorflow') else 'TensorFlow is not installed',
    decoders={name: peer.ready['decoder'] for name, peer in running.items()},
    measurements=summarize(measured),
  )
  results.publish(found, tables(found), args.json)


def summarize(measured: Mapping[tuple[_Asked, int], Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
  """The measurements of results.json.

  Args:
    measured: of each program and set, and number of cores, the answers of `peer.measure`, one per round.

  Returns:
    For each, `images_per_second` and `cpu_ms` per image, and `ratio`: the CPU time of the DataLoader with Pillow, on as
    many cores, divided by its own.
  """
  rows = []
  for (asked, cores), answers in measured.items():
    cpu = [answer['cpu_ms'] for answer in answers]
    reference = measured.get((_REFERENCE, cores))
    rows.append(
      {
        'program': asked.program,
        'set': asked.set,
        'cores': cores,
        'images_per_second': peers.spread([answer['images_per_second'] for answer in answers]),
        'cpu_ms': peers.spread(cpu),
        'ratio': peers.ratio([answer['cpu_ms'] for answer in reference], cpu) if reference else None,
      }
    )
  return rows


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The table of README.md; see `benchmarks.results`."""
  header = ['set', 'program', 'cores', 'images/s', 'CPU time per image, ms', 'CPU time of DataLoader, Pillow / its own']
  rows = [
    [
      row['set'],
      row['program'],
      str(row['cores']),
      peers.show(row['images_per_second'], 0),
      peers.show(row['cpu_ms'], 2),
      '-' if row['ratio'] is None else f'{row["ratio"]:.2f}',
    ]
    for row in found['measurements']
  ]
  decoders = '; '.join(f'{name}: {decoder}' for name, decoder in found['decoders'].items())
  text = (
    f'{results.source(found)} {decoders}. {found["images"]:,} images per measurement, files of {found["file_kb"]:.0f} kB, '
    f'n = {found["rounds"]} rounds, median (minimum-maximum). `tf.data`: {found["tf_data"]}.'
  )
  return {'measurements': f'{text}\n\n{markdown(header, rows)}'}


def _start(name: str, directory: str, sets: Mapping[str, Any]) -> peers.Peer:
  file = Path(directory, 'sets.json')
  file.write_text(json.dumps(sets))
  environment = {'JAX_PLATFORMS': 'cpu', 'XDG_CACHE_HOME': str(Path(directory, 'cache'))}
  return peers.Peer('benchmarks.loader.peer', name, file, environment=environment)


if __name__ == '__main__':
  command.run(main)
