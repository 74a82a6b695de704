"""The time of a training step and of inference on the CPU, compared with stock Flax and PyTorch.

    python -m benchmarks.step_time.run [--quick] [--pytorch_python=PATH] [--json=FILE] [--plot=FILE.png]

Every peer is a process of its own. The peers are measured in interleaved rounds, and those that are not being measured
are stopped.
"""

import contextlib
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, peers, results
from benchmarks.step_time import photographs
from cnn_jax import UsageError, command
from cnn_jax.tables import markdown

# Image shape, and features of each convolution.
NETWORKS: dict[str, tuple[tuple[int, int, int], tuple[int, ...]]] = {
  '28x28x1, 32-64-128': ((28, 28, 1), (32, 64, 128)),
  '32x32x3, 64-128-256': ((32, 32, 3), (64, 128, 256)),
  '8x8x1, 32-64': ((8, 8, 1), (32, 64)),
}
BATCHES = (32, 128, 512)
PEERS = {'ours': 'ours', 'flax': 'stock Flax', 'pytorch': 'PyTorch', 'pytorch_compiled': 'PyTorch compiled'}
COLOURS = {'ours': '#1f6f8b', 'flax': '#c9a227', 'pytorch': '#b3452c', 'pytorch_compiled': '#d99a8b'}
MAX_STEPS = 25  # of one request; see jax_peer.py


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  parser.add_argument('--quick', action='store_true', help='measure 28x28x1 at batch 128 alone')
  parser.add_argument('--rounds', type=int, default=5, help='measurements of each peer (%(default)s)')
  parser.add_argument('--seconds', type=float, default=1.0, help='approximate length of a measurement (%(default)s)')
  parser.add_argument('--pytorch_python', help='an interpreter with PyTorch; default: this one, if it has PyTorch')
  parser.add_argument('--compiled', action='store_true', help='also measure torch.compile, which needs a C++ compiler')
  parser.add_argument('--plot', type=Path, metavar='FILE.png', help='draw the images per second')
  args = parser.parse_args(argv)
  python = args.pytorch_python or (sys.executable if importlib.util.find_spec('torch') else None)
  peers.check_pytorch(python)
  names = [name for name in PEERS if name in ('ours', 'flax') or python]
  if not args.compiled and 'pytorch_compiled' in names:
    names.remove('pytorch_compiled')
  measurements: list[dict[str, Any]] = []
  versions: dict[str, str] = {}
  for network in list(NETWORKS)[:1] if args.quick else NETWORKS:
    for batch in [128] if args.quick else BATCHES:
      rows, of_peers = measure(network, batch, names, python, args.rounds, args.seconds)
      measurements += rows
      versions |= of_peers
  found = results.describe(versions, rounds=args.rounds, measurements=measurements)
  print(f'{results.source(found)} Load average over 15 minutes: {found["load_average"]:.1f}.')
  if found['load_average'] > 1.5 * len(os.sched_getaffinity(0)):
    print('Other programs were running, so the times are not those of an idle machine.')
  results.publish(found, tables(found), args.json)
  if args.plot:
    plot(found, args.plot)


def measure(
  network: str, batch: int, names: Sequence[str], python: str | None, rounds: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
  """Times one network at one batch size, in training and in inference.

  Args:
    network: a key of `NETWORKS`.
    batch: images per step.
    names: the peers, keys of `PEERS`, 'ours' first.
    python: the interpreter of the PyTorch peers.
    rounds: measurements of each peer.
    seconds: the approximate length of a measurement.

  Returns:
    See `summarize`, one for 'train' and one for 'inference'; and the versions of other interpreters.
  """
  made = []
  with contextlib.ExitStack() as stack:
    running = {name: peer for name in names if (peer := _start(name, network, batch, python, stack)) is not None}
    for work in ('train', 'inference'):
      answers = _time(running, work, rounds, seconds, f'{network}, batch {batch}, {work}')
      row = summarize(network, batch, work, answers, running['ours'].ready['operations'][work])
      shown = ', '.join(f'{PEERS[name]} {ms["median"]:.1f} ms' for name, ms in row['ms'].items())
      print(f'{network}, batch {batch}, {work}: {shown}', file=sys.stderr, flush=True)
      made.append(row)
    versions = {'torch': running['pytorch'].ready['version']} if 'pytorch' in running else {}
  return made, versions


def summarize(
  network: str, batch: int, work: str, answers: Mapping[str, Sequence[Mapping[str, float]]], operations: int
) -> dict[str, Any]:
  """One measurement of results.json.

  Args:
    network, batch: see `measure`.
    work: 'train' or 'inference'.
    answers: of each peer and of 'gemm', one per round.
    operations: multiplications and additions per image.

  Returns:
    `ms` per step, a `peers.spread` of each peer; `speedup` over each other peer, the median of the ratios of each
    round; `gflops` of ours, and `gemm_gflops` of a matrix product on the same machine; `peak_mb` of each peer.
  """
  times = {name: [answer['ms'] for answer in values] for name, values in answers.items() if name != 'gemm'}
  spreads = {name: peers.spread(values) for name, values in times.items()}
  return {
    'network': network,
    'batch': batch,
    'work': work,
    'ms': spreads,
    'speedup': {name: peers.ratio(values, times['ours']) for name, values in times.items() if name != 'ours'},
    'gflops': batch * operations / spreads['ours']['median'] / 1e6,
    'gemm_gflops': statistics.median(answer['gflops'] for answer in answers['gemm']),
    'peak_mb': {name: answers[name][-1]['peak_mb'] for name in times},
  }


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md; see `benchmarks.results`."""
  measurements = found['measurements']
  names = [name for name in PEERS if any(name in row['ms'] for row in measurements)]
  others = names[1:]
  header = ['network', 'batch', 'work', *(f'{PEERS[name]}, ms' for name in names)]
  header += [f'speed, ours / {PEERS[name]}' for name in others]
  header += ['GFLOP/s of ours', 'GFLOP/s of GEMM', f'peak memory, MB: {" / ".join(PEERS[name] for name in names)}']
  rows = [
    [
      row['network'],
      str(row['batch']),
      row['work'],
      *(peers.show(row['ms'].get(name)) for name in names),
      *(_ratio(row['speedup'].get(name)) for name in others),
      f'{row["gflops"]:.0f}',
      f'{row["gemm_gflops"]:.0f}',
      ' / '.join(f'{row["peak_mb"][name]:,.0f}' if name in row['peak_mb'] else '-' for name in names),
    ]
    for row in measurements
  ]
  text = f'{results.source(found)} n = {found["rounds"]} rounds, median (minimum-maximum).'
  made = {'measurements': f'{text}\n\n{markdown(header, rows)}'}
  if 'repeats' in found:
    made['repeats'] = _repeats(found['repeats'])
  if 'photographs' in found:
    made['photographs'] = photographs.table(found['photographs'])
  return made


def plot(found: Mapping[str, Any], path: Path) -> None:
  """Draws the images per second of every peer, with a panel for each network and kind of work.

  Args:
    found: the contents of results.json.
    path: of the PNG.
  """
  measurements = found['measurements']
  networks = list(dict.fromkeys(row['network'] for row in measurements))
  works = ('train', 'inference')
  size = (1.5 + 4 * len(networks), 7)
  with figures.figure(path, rows=len(works), widths=[1] * len(networks), size=size) as (figure, grid):
    for panels, work in zip(grid, works, strict=True):
      for axes, network in zip(panels, networks, strict=True):
        _bars(axes, [row for row in measurements if (row['network'], row['work']) == (network, work)])
        axes.set(title=f'{network}: {work}', xlabel='batch', ylabel='images/s' if network == networks[0] else None)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels), frameon=False)


def _start(name: str, network: str, batch: int, python: str | None, stack: contextlib.ExitStack) -> peers.Peer | None:
  pytorch = name.startswith('pytorch')
  module = f'benchmarks.step_time.{"torch" if pytorch else "jax"}_peer'
  arguments = (name, json.dumps(NETWORKS[network]), batch)
  environment = {'JAX_PLATFORMS': 'cpu'}
  try:
    peer = peers.Peer(module, *arguments, python=python if pytorch else None, environment=environment)
  except UsageError as error:
    if name != 'pytorch_compiled':
      raise
    print(f'torch.compile does not work here: {error}', file=sys.stderr)
    return None
  return stack.enter_context(peer)


def _time(
  running: Mapping[str, peers.Peer], work: str, rounds: int, seconds: float, what: str
) -> dict[str, list[dict[str, Any]]]:
  """The answers of each peer, and of 'gemm', one per round."""
  estimates = {name: peer.ask(work, 1)['ms'] for name, peer in running.items()}
  steps = {name: max(1, min(MAX_STEPS, round(1e3 * seconds / ms))) for name, ms in estimates.items()}

  def ask(name: str, _: int) -> dict[str, Any]:
    return running['ours'].ask('gemm', 8) if name == 'gemm' else running[name].ask(work, steps[name])

  return peers.interleave(ask, [*running, 'gemm'], rounds, what=what)


def _ratio(value: float | None) -> str:
  return '-' if value is None else f'{value:.2f}'


def _repeats(repeats: Sequence[Mapping[str, Any]]) -> str:
  """Measurements of the first row at other times, or with other versions."""
  header = ['versions', 'commit', 'machine', 'n']
  header += ['ours, training, ms', 'PyTorch, training, ms', 'ours, inference, ms', 'PyTorch, inference, ms']
  header += ['training, ours / PyTorch', 'training, ours / stock Flax', 'inference, ours / PyTorch']
  rows = [
    [
      results.show_versions(row['versions']),
      row['commit'],
      row['machine'] or '-',
      str(row['rounds']),
      *(peers.show(row[work]['ms'][name]) for work in ('train', 'inference') for name in ('ours', 'pytorch')),
      _ratio(row['train']['speedup']['pytorch']),
      _ratio(row['train']['speedup']['flax']),
      _ratio(row['inference']['speedup']['pytorch']),
    ]
    for row in repeats
  ]
  return markdown(header, rows)


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
  names = [name for name in PEERS if any(name in row['ms'] for row in rows)]
  width = 0.8 / len(names)
  for i, name in enumerate(names):
    places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(rows))]
    rates = [{which: 1e3 * row['batch'] / row['ms'][name][which] for which in ('median', 'min', 'max')} for row in rows]
    medians = [rate['median'] for rate in rates]
    # Whiskers from the slowest to the fastest round; the maximum of a time is the minimum of a rate.
    low = [rate['median'] - rate['max'] for rate in rates]
    high = [rate['min'] - rate['median'] for rate in rates]
    axes.bar(places, medians, width, label=PEERS[name], color=COLOURS[name])
    axes.errorbar(places, medians, (low, high), fmt='none', ecolor='#444444', elinewidth=0.8, capsize=2)
  axes.set_xticks(range(len(rows)), [f'{row["batch"]:,}' for row in rows])
  axes.yaxis.set_major_formatter('{x:,.0f}')
  axes.set_ylim(0, None)


if __name__ == '__main__':
  command.run(main)
