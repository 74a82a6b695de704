"""The time of a training step and of inference on the CPU, beside stock Flax and PyTorch.

    python -m experiments.step_time.run [--quick] [--json=FILE] [--plot=FILE.png] [--pytorch_python=PATH]

Every peer is a process of its own. They are measured in turn, round after round, and all but the one that is
measured are stopped, so that a slow spell of the machine meets all alike and none takes another's cores.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from cnn_jax import UsageError, command

HERE = pathlib.Path(__file__).resolve().parent
NETWORKS: dict[str, tuple[tuple[int, int, int], tuple[int, ...]]] = {
  '28x28x1, 32-64-128': ((28, 28, 1), (32, 64, 128)),
  '32x32x3, 64-128-256': ((32, 32, 3), (64, 128, 256)),
  '8x8x1, 32-64': ((8, 8, 1), (32, 64)),
}
BATCHES = (32, 128, 512)
PEERS = {'ours': 'ours', 'flax': 'stock Flax', 'pytorch': 'PyTorch', 'pytorch_compiled': 'PyTorch compiled'}
COLORS = {'ours': '#1f6f8b', 'flax': '#c9a227', 'pytorch': '#b3452c', 'pytorch_compiled': '#d99a8b'}
MAX_STEPS = 25  # a call of a peer; ours compiles so many steps into one call, as training does on the CPU


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = command.Parser(__doc__)
  parser.add_argument('--quick', action='store_true', help='28x28x1 at batch 128 alone')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=1.0, help='about so long a measurement')
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--plot', type=pathlib.Path)
  parser.add_argument('--pytorch_python', help='an interpreter with PyTorch; default: this one, if it has')
  parser.add_argument('--compiled', action='store_true', help='also torch.compile, which needs a C++ compiler')
  parser.add_argument('--peer', nargs=3, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.peer:
    from experiments.step_time import jax_peer

    return jax_peer.serve(args.peer[0], json.loads(args.peer[1]), int(args.peer[2]))
  if args.rounds < 1:
    raise UsageError(f'--rounds is {args.rounds}; there must be at least one.')
  python = args.pytorch_python or (sys.executable if importlib.util.find_spec('torch') else None)
  if python is not None and not _imports_torch(python):
    raise UsageError(f'--pytorch_python={python} cannot import torch; name an interpreter that can.')
  peers = [name for name in PEERS if python or not name.startswith('pytorch')]
  if not args.compiled:
    peers = [name for name in peers if name != 'pytorch_compiled']
  networks = list(NETWORKS)[:1] if args.quick else list(NETWORKS)
  results = []
  for network in networks:
    for batch in [128] if args.quick else BATCHES:
      results += measure(network, batch, peers, python, args.rounds, args.seconds)
  cpus, load = len(os.sched_getaffinity(0)), os.getloadavg()[2]
  print(f'\n{platform.machine()}, {cpus} CPUs, n = {args.rounds}; load average over 15 minutes: {load:.1f}')
  if load > 1.5 * cpus:
    print('Other programs were running: no number here is one of an idle machine, and ratios lean on the scheduler.')
  print()
  print(table(results))
  if args.json:
    args.json.write_text(json.dumps(results, indent=2) + '\n')
  if args.plot:
    plot(results, args.plot)


def measure(
  network: str, batch: int, names: Sequence[str], python: str | None, rounds: int, seconds: float
) -> list[dict[str, Any]]:
  """Times one network at one batch size, training and then inference.

  Args:
    network: a key of `NETWORKS`.
    batch: images a step.
    names: peers to measure, of `PEERS`, 'ours' first.
    python: interpreter of the PyTorch peers.
    rounds: measurements of each peer.
    seconds: about so long each.

  Returns:
    One object for 'train' and one for 'inference', as `--json` writes them: medians in ms a step, null for a
    peer that is not there; speed-ups are medians of the ratios of each round; `rounds` has all measurements.
  """
  peers = {name: peer for name in names if (peer := _start(name, network, batch, python)) is not None}
  results = []
  try:
    for work in ('train', 'inference'):
      estimate = {name: peer.ask(work, 1)['ms'] for name, peer in peers.items()}
      steps = {name: max(1, min(MAX_STEPS, round(1e3 * seconds / ms))) for name, ms in estimate.items()}
      times: dict[str, list[float]] = {name: [] for name in peers}
      peaks, gemm = {}, []
      for _ in range(rounds):
        for name, peer in peers.items():
          answer = peer.ask(work, steps[name])
          times[name].append(answer['ms'])
          peaks[name] = answer['peak_mb']
        gemm.append(peers['ours'].ask('gemm', 8)['gflops'])
      results.append(_result(network, batch, work, times, peaks, gemm))
      shown = ', '.join(f'{PEERS[name]} {statistics.median(t):.1f} ms' for name, t in times.items())
      print(f'{network}, batch {batch}, {work}: {shown}', file=sys.stderr, flush=True)
  finally:
    for peer in peers.values():
      peer.close()
  return results


def table(results: Sequence[dict[str, Any]]) -> str:
  """A Markdown table of results: milliseconds as median (min-max), ratios as medians over the rounds."""
  lines = [
    '| network | batch | work | ours, ms | stock Flax, ms | PyTorch, ms | ours / Flax, speed | ours / PyTorch, speed '
    '| GFLOP/s of GEMM | peak memory, MB |',
    '| --- ' * 10 + '|',
  ]
  for row in results:
    spread = [_spread(row['rounds'].get(name)) for name in ('ours', 'flax', 'pytorch')]
    ratios = [_ratio(row['speedup_over_flax']), _ratio(row['speedup_over_pytorch'])]
    rate = f'{row["gflops"]:.0f} of {row["gemm_gflops"]:.0f}'
    peaks = ' / '.join(f'{peak:,.0f}' for peak in row['peak_mb'].values())
    lines.append(
      '| ' + ' | '.join([row['network'], str(row['batch']), row['work'], *spread, *ratios, rate, peaks]) + ' |'
    )
    if 'pytorch_compiled' in row['rounds']:
      compiled = _ratio(row['speedup_over_pytorch_compiled'])
      lines.append(f'| | | ... compiled | | | {_spread(row["rounds"]["pytorch_compiled"])} | | {compiled} | | |')
  return '\n'.join(lines)


def plot(results: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws images per second of every peer, one panel a network and kind of work.

  Args:
    results: from `measure`.
    path: of the picture, PNG by its name.
  """
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  networks = list(dict.fromkeys(row['network'] for row in results))
  size = (1.5 + 4 * len(networks), 7)
  figure, grid = plt.subplots(2, len(networks), figsize=size, squeeze=False, layout='constrained')
  for panels, work in zip(grid, ('train', 'inference'), strict=True):
    for axes, network in zip(panels, networks, strict=True):
      rows = [row for row in results if (row['network'], row['work']) == (network, work)]
      _bars(axes, rows)
      axes.set(title=f'{network}: {work}', xlabel='batch', ylabel='images/s' if network == networks[0] else None)
  handles, labels = grid[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=len(labels), frameon=False)
  figure.savefig(path, dpi=120)


def forward_flops(network: str) -> tuple[int, int]:
  """Multiplications and additions of the products of one image forwards: of all layers, and of the first alone."""
  (height, width, channels), features = NETWORKS[network]
  layers = []
  for out in features:
    layers.append(2 * height * width * 9 * channels * out)
    height, width, channels = height // 2, width // 2, out
  return sum(layers) + 2 * channels * 10, layers[0]


@dataclasses.dataclass
class Peer:
  """A process that times steps on request and is stopped in between."""

  process: subprocess.Popen

  def ask(self, *request: object) -> dict[str, float]:
    """Sends a request, its words in one line, and waits for the answer."""
    assert self.process.stdin is not None
    self.process.send_signal(signal.SIGCONT)
    self.process.stdin.write(' '.join(map(str, request)) + '\n')
    self.process.stdin.flush()
    answer = self._read()
    self.process.send_signal(signal.SIGSTOP)
    return answer

  def wait_until_ready(self) -> None:
    """Waits for the first answer, which says that everything is compiled."""
    self._read()
    self.process.send_signal(signal.SIGSTOP)

  def close(self) -> None:
    """Ends the process."""
    self.process.kill()
    self.process.communicate()

  def _read(self) -> dict[str, float]:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      raise EOFError(f'a peer ended with status {self.process.wait()}; its message is above')
    return json.loads(line)


def _imports_torch(python: str) -> bool:
  try:
    return subprocess.run([python, '-c', 'import torch'], capture_output=True, check=False).returncode == 0
  except OSError:
    return False


def _start(name: str, network: str, batch: int, python: str | None) -> Peer | None:
  description = json.dumps(NETWORKS[network])
  if name.startswith('pytorch'):
    arguments = [str(python), str(HERE / 'torch_peer.py'), name, description, str(batch)]
  else:
    arguments = [sys.executable, '-m', 'experiments.step_time.run', '--peer', name, description, str(batch)]
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  peer = Peer(
    subprocess.Popen(
      arguments, cwd=HERE.parents[1], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
  )
  try:
    peer.wait_until_ready()
  except EOFError as error:
    peer.close()
    if name == 'pytorch_compiled':
      print(f'torch.compile does not work here: {error}.', file=sys.stderr)
      return None
    raise
  except BaseException:
    peer.close()
    raise
  return peer


def _result(network: str, batch: int, work: str, times: dict[str, list[float]], peaks, gemm) -> dict[str, Any]:
  forward, first = forward_flops(network)
  # Backwards each product takes two of its size, but nobody needs the gradient of the images.
  flops = batch * (3 * forward - first if work == 'train' else forward)
  result: dict[str, Any] = {'network': network, 'batch': batch, 'work': work}
  for name in PEERS:
    result[f'{name}_ms'] = statistics.median(times[name]) if name in times else None
  for name in list(PEERS)[1:]:
    ratios = [theirs / ours for theirs, ours in zip(times.get(name, []), times['ours'], strict=False)]
    result[f'speedup_over_{name}'] = statistics.median(ratios) if ratios else None
  return result | {
    'gflops': flops / result['ours_ms'] / 1e6,
    'gemm_gflops': statistics.median(gemm),
    'peak_mb': peaks,
    'rounds': times,
  }


def _spread(times: Sequence[float] | None) -> str:
  return f'{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})' if times else '-'


def _ratio(value: float | None) -> str:
  return '-' if value is None else f'{value:.2f}'


def _bars(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
  present = [name for name in PEERS if any(row[f'{name}_ms'] for row in rows)]
  width = 0.8 / len(present)
  for i, name in enumerate(present):
    places = [x + (i - (len(present) - 1) / 2) * width for x in range(len(rows))]
    rates = [1e3 * row['batch'] / row[f'{name}_ms'] for row in rows]
    # Whiskers from the slowest to the fastest round.
    low = [rate - 1e3 * row['batch'] / max(row['rounds'][name]) for rate, row in zip(rates, rows, strict=True)]
    high = [1e3 * row['batch'] / min(row['rounds'][name]) - rate for rate, row in zip(rates, rows, strict=True)]
    axes.bar(places, rates, width, label=PEERS[name], color=COLORS[name])
    axes.errorbar(places, rates, (low, high), fmt='none', ecolor='#444444', elinewidth=0.8, capsize=2)
  axes.set_xticks(range(len(rows)), [f'{row["batch"]:,}' for row in rows])
  axes.yaxis.set_major_formatter('{x:,.0f}')
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_ylim(0, None)


if __name__ == '__main__':
  command.run(main)
