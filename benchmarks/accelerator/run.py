"""One command for a GPU or TPU: does it compute what the CPU computes, and how fast is it?

    python -m benchmarks.accelerator [--parts=NAME,NAME:SECONDS] [--minutes=5] [--small] [--json=FILE]

Every part is a process that is ended at its limit of time, so that a part that fails or hangs costs nothing but itself.
The results are written as they come, so nothing is lost if the command is killed. Parts that FILE already has from this
hardware, and that are not measured again, are kept. A CPU runs the parts at reduced size. It needs no network. Parts
whose data are not there run at reduced size, and those whose packages are not there leave them out.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import peers, results
from benchmarks.accelerator import tables as tables_lib
from cnn_jax import command
from cnn_jax.files import write_atomically

tables = tables_lib.tables


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the benchmark.

  Attributes:
    seconds: after which it is ended.
    module: whose `main` measures.
    arguments: of it; {file}, {seconds}, in which it should end by itself, {torch}, the device of PyTorch, and {python}
      are filled in.
    small: further ones at reduced size, and
    large: at full size.
    data: whether it has its full size only if TFDS_DATA_DIR is set.
  """

  seconds: float
  module: str
  arguments: tuple[str, ...] = ('--output={file}', '--seconds={seconds}')
  small: tuple[str, ...] = ('--small',)
  large: tuple[str, ...] = ()
  data: bool = False


_OURS = 'benchmarks.accelerator'
# In the order in which they run. Those of one process each borrow another benchmark.
PARTS: dict[str, Part] = {
  'device': Part(40, f'{_OURS}.device'),
  'correctness': Part(75, f'{_OURS}.correctness'),
  'determinism': Part(75, f'{_OURS}.determinism'),
  'loop': Part(35, f'{_OURS}.loop'),
  'step_time': Part(120, f'{_OURS}.step_time', large=('--device={torch}',)),
  'streamed': Part(60, f'{_OURS}.streamed'),
  'many_seeds': Part(
    35, 'benchmarks.many_seeds.run', ('--json={file}', '--quick'), ('--rounds=1', '--seconds=0.1'), ('--rounds=3',),
  ),
  'mnist_speedrun': Part(
    25, 'benchmarks.mnist_speedrun.run', ('--json={file}',),
    ('--config.data.source=bundled', '--config.data.name=digits', '--seeds=1'),
    ('--seeds=5', '--pytorch_python={python}'), data=True,
  ),
  'start_up': Part(
    30, 'benchmarks.start_up.run', ('--json={file}', '--config=configs/digits.py', '--repeats=1'), (), (),
  ),
  'cifar10_speedrun': Part(
    55, 'benchmarks.cifar10_speedrun.run', ('--json={file}',),
    (
      '--config.data.source=bundled', '--config.data.name=digits', '--config.data.mean=(127.5,)',
      '--config.data.std=(127.5,)', '--config.model.features=(8, 16)', '--config.batch_size=100', '--seeds=1',
    ),
    ('--seeds=10',), data=True,
  ),
}  # fmt: skip
UNTIMED = ('correctness', 'determinism')  # these run at the same time on a GPU
OWN_SHARE = 0.8  # of a part's time, after which it begins nothing new


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  parser.add_argument(
    '--parts', default='', help=f'separated by commas, of {", ".join(PARTS)}; NAME:SECONDS limits one'
  )
  parser.add_argument('--minutes', type=float, default=0, help='that all may take; default: the sum of the limits')
  parser.add_argument('--small', action='store_true', help='reduced sizes, as on a CPU')
  parser.add_argument('--commit', help='of the code, where it is not a checkout')
  args = parser.parse_args(argv)
  asked = dict(word.partition(':')[::2] for word in args.parts.split(',') if word)
  for name, limit in asked.items():
    if name not in PARTS or (limit and not (limit.isdecimal() and int(limit))):
      word = f'{name}:{limit}' if limit else name
      parser.error(f'--parts has {word!r}; the parts are {", ".join(PARTS)}, each with :SECONDS above 0 if wanted')
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # several processes share the device
  with tempfile.TemporaryDirectory() as directory:
    place = pathlib.Path(directory)
    only_about = bool(asked) and 'device' not in asked
    limit = float(asked.get('device') or PARTS['device'].seconds)
    device = _run({'device': limit}, place, 'cpu', small=args.small, only_about=only_about)['device']
    about: dict[str, Any] = device['rows'].pop(0) if device['rows'] else {'platform': 'cpu', 'small': True}
    platform, small = about['platform'], about['small']  # a CPU runs reduced sizes without being asked
    found = _describe(about, small, args.commit)
    kept = _kept(found, args.json)

    def add(measured: Mapping[str, Any]) -> None:
      for name, part in measured.items():
        kept[name] = dict(part) | {'commit': found['commit']}
      found['parts'] = {name: kept[name] for name in PARTS if name in kept}
      _write(found, args.json)

    add({} if only_about else {'device': device})
    names = list(asked) or list(PARTS)
    names = [name for name in PARTS if name in names and name != 'device']
    groups = _groups(names, platform)
    total = sum(max(PARTS[name].seconds for name in group) for group in groups)
    scale = max(60 * args.minutes - device['seconds'], 0) / total if args.minutes and names else 1.0
    limits = {name: float(asked.get(name) or scale * PARTS[name].seconds) for name in names}
    for group in groups:
      add(
        _run({name: limits[name] for name in group}, place, platform, small=small, warm='step_time' in names, add=add)
      )
  results.publish(found, tables(found), args.json)


def _groups(names: Sequence[str], platform: str) -> list[list[str]]:
  """The parts that run at a time."""
  together = [name for name in names if name in UNTIMED] if platform == 'gpu' else []
  return [*([together] if together else []), *([name] for name in names if name not in together)]


def _run(
  limits: Mapping[str, float],
  place: pathlib.Path,
  platform: str,
  *,
  small: bool,
  warm: bool = False,
  only_about: bool = False,
  add: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
  """Runs parts at the same time; `rows`, or `found` of a borrowed benchmark, `seconds`, and an `error` if there was one.

  Args:
    limits: the seconds after which each part is ended.
    place: a directory for their files.
    platform: of JAX.
    small: whether at reduced size.
    warm: whether to compile for PyTorch meanwhile, if the parts are not timed.
    only_about: whether the part `device` only says what the device is.
    add: called with what there is so far, whenever a part has more.
  """
  torch = 'cuda' if platform == 'gpu' else 'cpu'
  started, running = time.monotonic(), dict[str, subprocess.Popen]()
  found: dict[str, dict[str, Any]] = {}
  with contextlib.ExitStack() as stack:
    if warm and not small and set(limits) <= set(UNTIMED) and importlib.util.find_spec('torch'):
      arguments = [f'--output={place}/warm.json', '--warm', f'--device={torch}']
      running['warm'] = _start(f'{_OURS}.step_time', arguments, {'TORCHINDUCTOR_COMPILE_THREADS': '4'})
      stack.callback(_end, running['warm'])
    for name, limit in limits.items():
      print(f'--- {name}, at most {limit:.0f} s', file=sys.stderr, flush=True)
      arguments = _arguments(PARTS[name], place / f'{name}.json', OWN_SHARE * limit, torch, small)
      running[name] = _start(PARTS[name].module, [*arguments, *(['--only-about'] if only_about else [])])
      stack.callback(_end, running[name])
    while running:
      time.sleep(0.1)
      seconds = time.monotonic() - started
      for name, process in list(running.items()):
        limit, status = limits.get(name, max(limits.values())), process.poll()
        over = status is not None or seconds > limit
        if over:
          _end(running.pop(name))
        if name == 'warm':
          continue
        error = None if not status else f'ended with status {status}'
        error = f'not finished in {seconds:.0f} s' if status is None else error
        now = _read(place / f'{name}.json') | {'seconds': seconds, 'error': error}
        more = now['rows'] != found.get(name, {'rows': []})['rows']
        found[name] = now
        if over:
          print(f'--- {name}: {seconds:.0f} s {error or ""}', file=sys.stderr, flush=True)
        if over or more:
          add({name: now})
  return {name: found[name] for name in limits}


def _arguments(part: Part, file: pathlib.Path, seconds: float, torch: str, small: bool) -> list[str]:
  values = {'file': file, 'seconds': seconds, 'torch': torch, 'python': sys.executable}
  reduced = small or (part.data and 'TFDS_DATA_DIR' not in os.environ)
  arguments = [word.format(**values) for word in (*part.arguments, *(part.small if reduced else part.large))]
  torch_here = importlib.util.find_spec('torch') is not None
  return [word for word in arguments if torch_here or 'pytorch_python' not in word]


def _start(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen:
  # A group of its own, so that its children end with it.
  return subprocess.Popen(
    [sys.executable, '-m', module, *arguments],
    cwd=peers.ROOT,
    stdout=subprocess.DEVNULL,
    start_new_session=True,
    env=os.environ | dict(environment or {}),
  )


def _end(process: subprocess.Popen) -> None:
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _read(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {'rows': []}
  contents = json.loads(path.read_text())
  return {'rows': contents} if isinstance(contents, list) else {'rows': [], 'found': contents}


def _describe(about: Mapping[str, Any], small: bool, commit: str | None) -> dict[str, Any]:
  fields = {name: about.get(name) for name in ('hardware', 'versions', 'commit', 'load_average', 'driver', 'packages')}
  words = [re.sub('=/.*', '=PATH', word) for word in sys.argv[1:]]
  fields['commit'] = commit or fields['commit']
  return {'command': shlex.join(['python', '-m', _OURS, *words]), **fields, 'small': small}


def _kept(found: Mapping[str, Any], path: pathlib.Path | None) -> dict[str, Any]:
  """The parts of a file of results, if they are of the same hardware and size."""
  earlier = results.read(path) if path is not None and path.exists() else {}
  same = all(earlier.get(name) == found[name] for name in ('hardware', 'small'))
  return dict(earlier['parts']) if earlier and same else {}


def _write(found: Mapping[str, Any], path: pathlib.Path | None) -> None:
  if path is not None:
    write_atomically(path, json.dumps(found, indent=2, ensure_ascii=False) + '\n')


if __name__ == '__main__':
  command.run(main)
