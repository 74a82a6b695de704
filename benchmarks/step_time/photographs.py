"""Images per second of networks for photographs of 224 pixels, compared with PyTorch and ONNX Runtime.

    python -m benchmarks.step_time.photographs [--networks=NAME,NAME] [--batches=8,32] [--quick]
                                               [--pytorch_python=PATH] [--compiled] [--json=FILE]

Every peer is a process of its own. The peers are measured in interleaved rounds, and those that are not being measured
are stopped. Without PyTorch, or without onnxruntime, their columns stay empty.
"""

import contextlib
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import peers

SIZE = 224
CLASSES = 1000
BATCHES = (8, 32)


@dataclasses.dataclass(frozen=True)
class Network:
  """A network in this project.

  Attributes:
    model: its name, and the fields of `config.model` with their values.
    stages: how many it has.
    frozen: how many are frozen when the last stage is trained.
  """

  model: tuple[Any, ...]
  stages: int
  frozen: int


NETWORKS = {
  'efficientnet_lite0': Network(('efficientnet', ('variant', 'lite0'), ('dropout', 0.0)), 8, 6),
  'resnet18': Network(('resnet', ('depth', 18)), 4, 3),
  'resnet50': Network(('resnet', ('depth', 50)), 4, 3),
}
# What is measured, and what the other programs do for it: they do not keep maps.
WORKS = {
  'inference': 'inference',
  'train': 'train',
  'last stage': 'last stage',
  'last stage, kept maps': 'last stage',
  'head': 'head',
}
PEERS = {'ours': 'ours', 'pytorch': 'PyTorch', 'pytorch_compiled': 'PyTorch compiled', 'onnx': 'ONNX Runtime'}


def timed(run: Callable[[int], object], steps: int) -> dict[str, float]:
  """Times some steps: `ms` per step, and `peak_mb` of this process so far."""
  started = time.perf_counter()
  run(steps)
  return {'ms': 1e3 * (time.perf_counter() - started) / steps, 'peak_mb': peers.peak_mb()}


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  # Here, because the interpreter of a PyTorch peer, which imports this file, need not have JAX.
  from benchmarks import results

  parser = results.parser(__doc__)
  parser.add_argument('--networks', default=','.join(NETWORKS), help='separated by commas (%(default)s)')
  parser.add_argument('--batches', default=','.join(map(str, BATCHES)), help='separated by commas (%(default)s)')
  parser.add_argument('--quick', action='store_true', help='measure EfficientNet-Lite0 at batch 8 alone')
  parser.add_argument('--rounds', type=int, default=3, help='measurements of each peer (%(default)s)')
  parser.add_argument('--seconds', type=float, default=0.5, help='approximate length of a measurement (%(default)s)')
  parser.add_argument('--pytorch_python', help='an interpreter with PyTorch; default: this one, if it has PyTorch')
  parser.add_argument('--compiled', action='store_true', help='also measure torch.compile, which needs a C++ compiler')
  args = parser.parse_args(argv)
  networks, batches = ('efficientnet_lite0', '8') if args.quick else (args.networks, args.batches)
  for name in networks.split(','):
    if name not in NETWORKS:
      parser.error(f'--networks has {name!r}; the networks are {", ".join(NETWORKS)}')
  if not all(batch.isdecimal() and int(batch) for batch in batches.split(',')):
    parser.error(f'--batches is {batches!r}; give numbers of images, separated by commas')
  python = args.pytorch_python or (sys.executable if importlib.util.find_spec('torch') else None)
  peers.check_pytorch(python)
  absent = {name for name in ('pytorch', 'pytorch_compiled') if not python}
  absent |= set() if args.compiled else {'pytorch_compiled'}
  absent |= set() if importlib.util.find_spec('onnxruntime') else {'onnx'}
  names = [name for name in PEERS if name not in absent]
  rows: list[dict[str, Any]] = []
  versions: dict[str, str] = {}
  for network in networks.split(','):
    for batch in map(int, batches.split(',')):
      measured, of_peers = measure(network, batch, names, python, args.rounds, args.seconds)
      rows += measured
      versions |= of_peers
  found = {'photographs': results.describe(versions, rounds=args.rounds, measurements=rows)}
  results.publish(found, {'photographs': table(found['photographs'])}, args.json)


def measure(
  network: str, batch: int, names: Sequence[str], python: str | None, rounds: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
  """Times one network at one batch size in all kinds of work.

  Args:
    network: a key of `NETWORKS`.
    batch: images per step.
    names: the peers, keys of `PEERS`, 'ours' first.
    python: the interpreter of the PyTorch peers.
    rounds: measurements of each peer.
    seconds: the approximate length of a measurement.

  Returns:
    For each of `WORKS`: `images_per_second`, a `peers.spread` of each peer; `speedup` over each other peer, the median
    of the ratios of each round; `peak_mb` of each peer. And the versions of other interpreters.
  """
  rows = []
  with contextlib.ExitStack() as stack:
    running = {}
    for name in names:
      pytorch = name.startswith('pytorch')
      module = f'benchmarks.step_time.photographs_{"torch" if pytorch else "jax"}_peer'
      peer = peers.Peer(
        module, name, network, batch, python=python if pytorch else None, environment={'JAX_PLATFORMS': 'cpu'}
      )
      running[name] = stack.enter_context(peer)
    for work, of_others in WORKS.items():
      times = _time({n: p for n, p in running.items() if n != 'onnx' or work == 'inference'}, work, rounds, seconds)
      rates = {name: [1e3 * batch / answer['ms'] for answer in answers] for name, answers in times.items()}
      ratios = {name: peers.ratio(rates['ours'], values) for name, values in rates.items() if name != 'ours'}
      spreads = {name: peers.spread(values) for name, values in rates.items()}
      peak = {name: answers[-1]['peak_mb'] for name, answers in times.items()}
      about = {'network': network, 'batch': batch, 'work': work, 'work_of_others': of_others}
      rows.append(about | {'images_per_second': spreads, 'speedup': ratios, 'peak_mb': peak})
      shown = ', '.join(f'{PEERS[name]} {rate["median"]:.1f}' for name, rate in spreads.items())
      print(f'{network}, batch {batch}, {work}, images/s: {shown}', file=sys.stderr, flush=True)
    versions = {'torch': running['pytorch'].ready['version']} if 'pytorch' in running else {}
  return rows, versions


def table(found: Mapping[str, Any]) -> str:
  """The table of README.md.

  Args:
    found: the field `photographs` of results.json.
  """
  from benchmarks import results
  from cnn_jax.tables import markdown

  rows = found['measurements']
  names = [name for name in PEERS if any(name in row['images_per_second'] for row in rows)]
  header = ['network', 'batch', 'work', *(f'{PEERS[name]}, images/s' for name in names)]
  header += [f'ours / {PEERS[name]}' for name in names[1:]]
  cells = [
    [
      row['network'],
      str(row['batch']),
      row['work'],
      *(peers.show(row['images_per_second'].get(name)) for name in names),
      *(f'{row["speedup"][name]:.2f}' if name in row['speedup'] else '-' for name in names[1:]),
    ]
    for row in rows
  ]
  text = f'{results.source(found)} n = {found["rounds"]} rounds, median (minimum-maximum).'
  return f'{text}\n\n{markdown(header, cells)}'


def _time(running: Mapping[str, peers.Peer], work: str, rounds: int, seconds: float) -> dict[str, list[dict[str, Any]]]:
  works = {name: work if name == 'ours' else WORKS[work] for name in running}
  estimates = {name: peer.ask(_word(works[name]), 1)['ms'] for name, peer in running.items()}
  steps = {name: max(1, min(8, round(1e3 * seconds / ms))) for name, ms in estimates.items()}

  def ask(name: str, _: int) -> dict[str, Any]:
    return running[name].ask(_word(works[name]), steps[name])

  return peers.interleave(ask, running, rounds, what=work)


def _word(work: str) -> str:
  """A request has no spaces in its words."""
  return work.replace(' ', '_')


if __name__ == '__main__':
  from cnn_jax import command

  command.run(main)
