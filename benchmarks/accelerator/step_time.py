"""A part: images per second in training and inference, beside PyTorch, eager and compiled.

The peers are those of benchmarks/step_time, on this device. Those of a case are measured in interleaved rounds. Batch
norms use the statistics of the batch in training. float32 is TF32 in training, the default of JAX, and full precision in
inference, as every command of this project has it; PyTorch is set to the same. `--warm` only fills the caches of
`torch.compile`.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import peers
from benchmarks.accelerator import part
from benchmarks.step_time.run import NETWORKS as CNNS
from cnn_jax import command

WORKS = ('inference', 'train')
ROUNDS = {'cnn': 9, 'photographs': 3}
MOST = {'cnn': 25, 'photographs': 8}  # steps of one request; see the peers


@dataclasses.dataclass(frozen=True)
class Case:
  """A network, its batch, and the dtype of its arithmetic."""

  network: str
  batch: int
  dtype: str
  compiled: bool = False  # whether torch.compile is measured too

  @property
  def kind(self) -> str:
    """Of the peers: cnn | photographs."""
    return 'cnn' if self.network in CNNS else 'photographs'


_GREY, _COLOUR = '28x28x1, 32-64-128', '32x32x3, 64-128-256'
# The most wanted come first, since the time may end before the last.
CASES = (
  Case('resnet50', 256, 'bfloat16', compiled=True),
  Case(_GREY, 128, 'float32', compiled=True),
  Case(_COLOUR, 512, 'bfloat16', compiled=True),
  Case('efficientnet_lite0', 256, 'bfloat16', compiled=True),
  Case('resnet50', 256, 'float32'),
  Case(_GREY, 512, 'float32'),
  Case('resnet18', 256, 'bfloat16', compiled=True),
  Case(_COLOUR, 512, 'float32'),
  Case('resnet18', 256, 'float32'),
  Case('efficientnet_lite0', 256, 'float32'),
  Case(_GREY, 512, 'bfloat16'),
)
SMALL = (Case('8x8x1, 32-64', 32, 'float32'), Case('resnet18', 2, 'bfloat16'))


def main(argv: Sequence[str]) -> None:
  """Adds a row per case and work."""
  parser = part.parser(__doc__)
  parser.add_argument('--device', default='cpu', help='of PyTorch: cpu | cuda (%(default)s)')
  parser.add_argument('--cases', default='', help='numbers of the cases, separated by commas; default: all')
  parser.add_argument('--warm', action='store_true', help='only fill the caches of torch.compile')
  args = parser.parse_args(argv)
  rows = part.Rows(args.output, args.seconds)
  cases: Sequence[Case] = SMALL if args.small else CASES
  cases = tuple(cases[int(number)] for number in args.cases.split(',')) if args.cases else cases
  pytorch = importlib.util.find_spec('torch') is not None
  if args.warm:
    _warm([case for case in cases if case.compiled], args.device, args.small)
    return
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    started = None
    for i, case in enumerate(cases):
      if rows.left() < 5:
        break
      running = started or _start(case, args.device, args.small, pytorch, pool)
      # The next processes start while this case compiles, not while it is measured. Those of the CNN compile at the start.
      following = cases[i + 1] if i + 1 < len(cases) and rows.left() > 30 else None
      started = None
      if following and following.kind == 'photographs':
        started = _start(following, args.device, args.small, pytorch, pool)
      about = dataclasses.asdict(case)
      about.pop('compiled')
      with contextlib.ExitStack() as stack:
        try:
          ready = {name: stack.enter_context(future.result()) for name, future in running.items()}
          _compile(ready, pool)
          if started:
            concurrent.futures.wait(started.values())
        except Exception as error:
          rows.add(**about, error=part.one_line(error))
          continue
        for work in WORKS:
          rows.attempt(functools.partial(_measure, case, ready, work), **about, work=work)
    for future in (started or {}).values():
      with contextlib.suppress(Exception):
        future.result().close()


Starting = dict[str, concurrent.futures.Future[peers.Peer]]


def _start(
  case: Case, device: str, small: bool, pytorch: bool, pool: concurrent.futures.ThreadPoolExecutor
) -> Starting:
  """Starts the processes of a case: ours, and those of PyTorch if it is installed."""
  names = ['pytorch'] * pytorch + ['pytorch_compiled'] * (pytorch and case.compiled)
  ours = pool.submit(_peer, 'ours', case, device, small)

  def after(name: str) -> peers.Peer:
    if case.kind == 'cnn':  # its peers choose their algorithms by measuring when they start
      concurrent.futures.wait([ours])
    return _peer(name, case, device, small)

  return {'ours': ours} | {name: pool.submit(after, name) for name in names}


def _peer(name: str, case: Case, device: str, small: bool) -> peers.Peer:
  library = 'torch' if name.startswith('pytorch') else 'jax'
  module = f'{library}_peer' if case.kind == 'cnn' else f'photographs_{library}_peer'
  network = json.dumps(CNNS[case.network]) if case.kind == 'cnn' else case.network
  options: dict[str, Any] = {'dtype': case.dtype, 'device': device, 'fixed_statistics': False}
  options |= {'size': 64} if small else {}
  # A peer's words must not contain spaces, but its arguments may.
  return peers.Peer(f'benchmarks.step_time.{module}', name, network, case.batch, json.dumps(options))


def _compile(running: dict[str, peers.Peer], pool: concurrent.futures.ThreadPoolExecutor) -> None:
  """Takes a first step of each work. XLA and cuDNN choose their algorithms by measuring, one process after another."""
  background = None
  if 'pytorch_compiled' in running:  # it is busy with Python and its own compiler for most of the time
    background = pool.submit(lambda: [running['pytorch_compiled'].ask(work, 1) for work in WORKS])
  for name in ('ours', 'pytorch'):
    if name in running:
      for work in WORKS:
        running[name].ask(work, 1)
  if background:
    try:
      background.result()
    except Exception as error:
      print(f'torch.compile failed: {error}', file=sys.stderr, flush=True)
      running.pop('pytorch_compiled').close()


def _measure(case: Case, running: dict[str, peers.Peer], work: str) -> dict[str, Any]:
  """`ms` per step, a spread of each peer; `images_per_second`; `speedup` over the others; `device_mb` of training."""
  estimates = {name: peer.ask(work, 2)['ms'] for name, peer in running.items()}
  steps = {name: max(1, min(MOST[case.kind], round(500 / ms))) for name, ms in estimates.items()}
  answers = peers.interleave(
    lambda name, _: running[name].ask(work, steps[name]),
    running,
    ROUNDS[case.kind],
    what=f'{case.network}, {case.dtype}',
  )
  ms = {name: [answer['ms'] for answer in given] for name, given in answers.items()}
  measured = {
    'ms': {name: peers.spread(values) for name, values in ms.items()},
    'images_per_second': {name: 1e3 * case.batch / statistics.median(values) for name, values in ms.items()},
    'speedup': {name: peers.ratio(values, ms['ours']) for name, values in ms.items() if name != 'ours'},
    'torch': running['pytorch'].ready['version'] if 'pytorch' in running else None,
  }
  if work == 'train':  # the peak is that of the process, which has taken steps of both works, so it is that of training
    measured['device_mb'] = {name: given[-1].get('device_mb') for name, given in answers.items()}
  return measured


def _warm(cases: Sequence[Case], device: str, small: bool) -> None:
  def compile_once(case: Case) -> None:
    with _peer('pytorch_compiled', case, device, small) as peer:
      for work in WORKS:
        peer.ask(work, 1)

  with concurrent.futures.ThreadPoolExecutor(len(cases) or 1) as pool:
    for future in [pool.submit(compile_once, case) for case in cases]:
      try:
        future.result()
      except Exception as error:
        print(f'torch.compile failed: {error}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  command.run(main)
