"""Comparing programs: a process per program, measurements in interleaved rounds, medians and ratios.

This module needs the standard library alone, because the interpreter of a PyTorch peer need not have JAX.
"""

import json
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

from cnn_jax import UsageError
from cnn_jax.progress import Counter

ROOT = pathlib.Path(__file__).resolve().parents[1]

Name = TypeVar('Name')
Value = TypeVar('Value')


class Peer:
  """A process that measures on request. It is stopped between requests, so that it takes no core from the others.

  The process runs a module that calls `serve`.

  Args:
    module: such as 'benchmarks.step_time.torch_peer'.
    arguments: of the module.
    python: the interpreter; this one if None.
    environment: variables that are set for the process.

  Attributes:
    pid: of the process.
    ready: what the process reported when it was ready.

  Raises:
    UsageError: the process ended; its own message is on stderr.
  """

  def __init__(
    self,
    module: str,
    *arguments: object,
    python: str | None = None,
    environment: Mapping[str, str] | None = None,
  ):
    self._module = module
    self._process = subprocess.Popen(
      [python or sys.executable, '-m', module, *map(str, arguments)],
      cwd=ROOT,
      env=os.environ | dict(environment or {}),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.pid = self._process.pid
    try:
      self.ready = self._read()
      self._process.send_signal(signal.SIGSTOP)
    except BaseException:
      self.close()
      raise

  def ask(self, *request: object) -> dict[str, Any]:
    """Sends a request, whose words must not contain spaces, and waits for the answer."""
    assert self._process.stdin is not None
    self._process.send_signal(signal.SIGCONT)
    try:
      self._process.stdin.write(' '.join(map(str, request)) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # the process has ended, which `_read` reports
    answer = self._read()
    self._process.send_signal(signal.SIGSTOP)
    return answer

  def close(self) -> None:
    """Ends the process. A stopped process would not notice that its input has ended."""
    self._process.kill()
    self._process.communicate()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise UsageError(
        f'the process of {self._module} ended with status {self._process.wait()}; see its message above.'
      )
    return json.loads(line)


def serve(answer: Callable[..., Mapping[str, Any]], **ready: Any) -> None:
  """The main loop of a peer's process: answers requests until the input ends.

  Args:
    answer: called with the words of each request; returns what can be written as JSON.
    ready: reported as `Peer.ready`.
  """
  print(json.dumps(ready), flush=True)
  for line in sys.stdin:
    print(json.dumps(answer(*line.split())), flush=True)


def time_steps(run: Callable[[int], object], steps: int) -> dict[str, float]:
  """Times a function that takes a number of steps, after one untimed step.

  Returns:
    `ms` per step, and `peak_mb`, the peak memory of this process so far.
  """
  run(1)
  started = time.perf_counter()
  run(steps)
  return {'ms': 1e3 * (time.perf_counter() - started) / steps, 'peak_mb': peak_mb()}


def peak_mb() -> float:
  """The peak memory of this process so far, in MB of 2^20 bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def interleave(
  measure: Callable[[Name, int], Value], names: Iterable[Name], rounds: int, *, what: str = 'measurements'
) -> dict[Name, list[Value]]:
  """Measures several things in rounds, each of which measures everything once, so that the load affects all alike.

  Args:
    measure: called with a name and the round, from 0.
    names: of the things, in the order of each round.
    rounds: at least one.
    what: the name of the counter on stderr.

  Returns:
    The results for each name, in the order of the rounds.

  Raises:
    UsageError: there are no rounds.
  """
  if rounds < 1:
    raise UsageError(f'{rounds} rounds were asked for; there must be at least one.')
  measured: dict[Name, list[Value]] = {name: [] for name in names}
  counter = Counter(what, rounds * len(measured))
  for i in range(rounds):
    for name in measured:
      measured[name].append(measure(name, i))
      counter.show(sum(map(len, measured.values())))
  counter.clear()
  return measured


def spread(values: Sequence[float]) -> dict[str, Any]:
  """Median, minimum, maximum, n, and the values in the order of the rounds."""
  return {
    'median': statistics.median(values),
    'min': min(values),
    'max': max(values),
    'n': len(values),
    'values': list(values),
  }


def sample(values: Sequence[float]) -> dict[str, Any]:
  """Mean, standard deviation of the sample (n - 1; None for a single value), minimum, maximum, n, and the values."""
  return {
    'mean': statistics.mean(values),
    'std': statistics.stdev(values) if len(values) > 1 else None,
    'min': min(values),
    'max': max(values),
    'n': len(values),
    'values': list(values),
  }


def show(measured: Mapping[str, Any] | None, digits: int = 1) -> str:
  """Formats a `spread`: 5.7 (5.5-6.0). Without minimum and maximum the median alone, and '-' for None."""
  if measured is None:
    return '-'
  median, least, most = (
    None if measured[name] is None else f'{measured[name]:,.{digits}f}' for name in ('median', 'min', 'max')
  )
  return f'{median}' if least is None else f'{median} ({least}-{most})'


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
  """The median of the ratios within each round, in which the load was the same for both."""
  return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def check_pytorch(python: str | None) -> None:
  """Checks that an interpreter, if one is given, can import PyTorch.

  Raises:
    UsageError: it cannot.
  """
  if python is None:
    return
  try:
    found = subprocess.run([python, '-c', 'import torch'], capture_output=True, check=False).returncode == 0
  except OSError:
    found = False
  if not found:
    raise UsageError(f'--pytorch_python={python} cannot import torch; give an interpreter that can.')
