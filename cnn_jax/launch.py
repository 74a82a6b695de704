"""Starts several processes of a run on this machine, each as if it were a machine of its own.

    python -m cnn_jax.launch --processes=2 [--devices=2] --config=configs/digits.py [arguments of cnn_jax.main]

The processes divide the cores and the GPUs. What process 0 prints is shown as it is, the lines of the others with their
numbers. A signal goes to all of them. If one fails, all end: with its line and its status.
"""

import contextlib
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from cnn_jax import UsageError, command, shares, signals

HEARTBEAT_SECONDS = 20.0  # the default of cnn_jax.main
_SECONDS_TO_END = 10.0  # beside the heartbeat, for processes that end because another one has
_SECONDS_HELD = 0.5  # for which a line of another process is held back, because process 0 may print the same
_SET = ('--coordinator', '--num_processes', '--process_id')  # arguments that each process gets from here


def main(argv: Sequence[str]) -> int:
  """The command; see the module's docstring."""
  parser = command.Parser(__doc__)
  parser.add_argument('--processes', type=int, required=True, help='how many to start')
  parser.add_argument('--devices', type=int, help='of each: GPUs, or parts of the CPU that JAX takes for devices')
  parser.add_argument('--heartbeat_seconds', type=float, default=HEARTBEAT_SECONDS, help='see cnn_jax.main')
  args, rest = parser.parse_known_args([word for word in argv if word != '--'])
  for name, count in (('processes', args.processes), ('devices', args.devices)):
    if count is not None and count < 1:
      raise UsageError(f'--{name} is {count}; it must be at least 1.')
  shares.check_processes('--processes', args.processes)
  if given := [word for word in rest if word.partition('=')[0] in _SET]:
    raise UsageError(f'leave out {given[0]}; cnn_jax.launch sets it for each process.')
  parts = _shares(args.processes, args.devices)
  with _reserved_port() as address:
    variables = {'JAX_COORDINATOR_BIND_ADDRESS': address}  # nobody outside of this machine can join
    if args.devices:
      flags = os.environ.get('XLA_FLAGS', '')
      variables['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count={args.devices}'.strip()
    commands = [
      [
        *(sys.executable, '-m', 'cnn_jax.main', *rest),
        *(f'--heartbeat_seconds={args.heartbeat_seconds}', f'--coordinator={address}'),
        *(f'--num_processes={args.processes}', f'--process_id={i}'),
      ]
      for i in range(args.processes)
    ]
    return supervise(commands, [variables | shares.variables(part) for part in parts], parts, args.heartbeat_seconds)


def supervise(
  commands: Sequence[Sequence[str]],
  variables: Sequence[dict[str, str]],
  parts: Sequence[shares.Share],
  heartbeat_seconds: float,
) -> int:
  """Runs the processes until all have ended; returns the status of the command.

  If one fails, the others have the time of a heartbeat and ten seconds to end, and are then killed. They get SIGTERM if
  this process is killed (Linux only). Call it in the main thread.

  Args:
    commands: of each process.
    variables: of the environment of each, beside those of this process.
    parts: of the machine that each uses.
    heartbeat_seconds: of silence after which the processes take one of them for lost.

  Returns:
    0 if all have succeeded; else the status of the first one that failed: 143 if somebody has killed it, and 128 and the
    number of the signal if another signal has ended it.
  """
  children: list[subprocess.Popen] = []
  arrived: list[int] = []

  def forward(number: int, frame: object) -> None:
    del frame
    arrived.append(number)
    for child in children:
      child.send_signal(number)

  numbers = [n for n in (*signals.ENDING, *signals.ANNOUNCING) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
  before = {number: signal.signal(number, forward) for number in numbers}
  lines = _Lines()
  try:
    for i in range(len(commands)):
      children.append(_start(commands[i], os.environ | variables[i], parts[i], shown=i == 0))
    for number in list(arrived):  # while they were started
      forward(number, None)
    return _wait(children, lines, heartbeat_seconds + _SECONDS_TO_END)
  finally:
    _kill(children)
    lines.flush()
    for number, handler in before.items():
      signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen], lines: '_Lines', seconds: float) -> int:
  """Shows what the processes print until all have ended, or until `seconds` after one has failed."""
  failed: int | None = None
  deadline = float('inf')
  with selectors.DefaultSelector() as selector:
    for i, child in enumerate(children):
      selector.register(child.stderr if i == 0 else child.stdout, selectors.EVENT_READ, i)  # type: ignore[arg-type]
    while True:
      ended = [child.poll() for child in children]
      for key, _ in selector.select(0.05):
        if lines.read(key.data, key.fileobj) is False:  # type: ignore[arg-type]
          selector.unregister(key.fileobj)
      lines.flush(before=time.monotonic() - _SECONDS_HELD)
      if failed is None and any(ended):
        failed, status = next((i, status) for i, status in enumerate(ended) if status)
        deadline = time.monotonic() + seconds
        if status < 0:
          lines.killed(failed, status)
        for child in children:  # one that was stopped can end now
          child.send_signal(signal.SIGCONT)
      if None not in ended or time.monotonic() > deadline:
        break
    for key in selector.get_map().values():  # what was printed last; a worker of a process may keep the pipe open
      while lines.read(key.data, key.fileobj):  # type: ignore[arg-type]
        pass
  if failed is None:
    return 0
  status = children[failed].returncode
  return status if status > 0 else signals.STOPPED if -status in (*signals.ENDING, signal.SIGKILL) else 128 - status


class _Lines:
  """What the processes print, on standard error, each line once, even if several processes print it."""

  def __init__(self) -> None:
    self._partial: dict[int, bytes] = {}
    self._held: list[tuple[float, int, str]] = []
    self._shown: dict[str, int] = {}  # the process whose line it was

  def read(self, process: int, stream: BinaryIO) -> bool | None:
    """Reads what a process has printed. Returns whether there was something; None: not now."""
    try:
      read = os.read(stream.fileno(), 2**16)
    except BlockingIOError:
      return None
    *whole, rest = (self._partial.get(process, b'') + read).split(b'\n')
    self._partial[process] = rest
    if not read and rest:
      whole.append(self._partial.pop(process))
    for line in whole:
      text = line.decode(errors='backslashreplace').rstrip('\r')
      if process == 0:
        self._show(0, text)
      else:
        self._held.append((time.monotonic(), process, text))
    return bool(read)

  def flush(self, before: float = float('inf')) -> None:
    """Shows the lines of the other processes that were read before a time."""
    while self._held and self._held[0][0] < before:
      _, process, text = self._held.pop(0)
      self._show(process, text)

  def killed(self, process: int, status: int) -> None:
    """Says that a signal has ended a process, which the other processes can only suppose."""
    name = signal.Signals(-status).name
    self._print(f'process {process} was ended by {name}; the same command continues from what was saved last.')
    for supposed in (f'process {process} has ended or does not answer', f'process {process} has ended'):
      self._shown[f'{supposed}; the same command continues from what was saved last.'] = process

  def _show(self, process: int, text: str) -> None:
    if text.startswith('[Gloo] '):  # JAX's own, about its collectives on the CPU
      return
    bare = re.sub(r'^process \d+: ', '', text)  # the line of another process
    if self._shown.setdefault(bare, process) == process:
      self._print(text if process == 0 else f'[{process}] {text}')

  def _print(self, text: str) -> None:
    with contextlib.suppress(OSError):  # nobody can read it; training goes on
      print(text, file=sys.stderr, flush=True)


def _start(
  arguments: Sequence[str], environment: dict[str, str], share: shares.Share, *, shown: bool
) -> subprocess.Popen:
  """Starts a process in a session of its own: Ctrl-C in a terminal reaches this process alone, which forwards it."""
  cores = ','.join(map(str, share.cores or ()))
  child = subprocess.Popen(
    [sys.executable, '-I', '-S', '-c', _PREPARATION, str(os.getpid()), cores, *arguments],
    env=environment,
    stdin=subprocess.DEVNULL,
    stdout=None if shown else subprocess.PIPE,
    stderr=subprocess.PIPE if shown else subprocess.STDOUT,
    start_new_session=True,
  )
  os.set_blocking((child.stderr if shown else child.stdout).fileno(), False)  # type: ignore[union-attr]
  return child


# The first program of each process, which becomes the one with the arguments. PR_SET_PDEATHSIG is 1 in prctl.h.
_PREPARATION = """
import ctypes, os, signal, sys
parent, cores, *arguments = sys.argv[1:]
if cores:
  os.sched_setaffinity(0, map(int, cores.split(',')))
if sys.platform == 'linux':
  ctypes.CDLL(None).prctl(1, signal.SIGTERM)
  if os.getppid() != int(parent):  # it has ended before the line above
    sys.exit(143)
os.execv(arguments[0], arguments)
"""


def _kill(children: Sequence[subprocess.Popen]) -> None:
  """Kills what still runs, with its own processes; one that waits for a disk that does not answer may remain."""
  for child in children:
    if child.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
  end = time.monotonic() + 5.0
  for child in children:
    with contextlib.suppress(subprocess.TimeoutExpired):
      child.wait(max(0.1, end - time.monotonic()))
    for stream in (child.stdout, child.stderr):
      if stream:
        stream.close()


def _shares(processes: int, devices: int | None) -> list[shares.Share]:
  """The part of the machine that each process uses.

  Raises:
    UsageError: there are GPUs, but too few; several processes cannot train on one.
  """
  parts = shares.divide(processes)
  gpus = () if os.environ.get('JAX_PLATFORMS') == 'cpu' else shares.find_gpus()
  if not gpus:
    return parts
  if len(gpus) < processes * (devices or 1):
    raise UsageError(
      f'{processes} processes with {devices or 1} GPUs each need {processes * (devices or 1)}, but there are '
      f'{len(gpus)}; start fewer, or set JAX_PLATFORMS=cpu to train on the CPU.'
    )
  if devices is None:
    return parts
  return [shares.Share(part.cores, gpus[i * devices : (i + 1) * devices], True) for i, part in enumerate(parts)]


@contextlib.contextmanager
def _reserved_port() -> Iterator[str]:
  """The address of a free port, which the system gives to nobody while the block runs, but to process 0, which asks for it."""
  with socket.socket() as reserved:
    if hasattr(socket, 'SO_REUSEPORT'):  # as JAX's coordinator does, so that both may have the port
      reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(('127.0.0.1', 0))
    host, port = reserved.getsockname()
    yield f'{host}:{port}'


if __name__ == '__main__':
  if sys.platform == 'win32':
    command.run(main)  # says that Windows is not supported
  sys.exit(command.call(main, sys.argv[1:]))
