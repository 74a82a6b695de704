"""The processes that train together: what the first one decides, whether all agree, and what happens if one ends.

All of it goes through the key-value store of JAX's coordinator, which process 0 holds, and needs no device. Without
other processes every function does nothing or calls its argument.

JAX notices a process that has ended after a minute or more, by aborting with a native stack. Here each process writes a
heartbeat, and a thread ends the process with one line if another one is silent for some seconds, or has left its line.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cnn_jax import UsageError, signals

HEARTBEAT_SECONDS = 20.0  # of silence after which a process counts as lost
JOIN_SECONDS = 25.0  # after which a process ends that does not find the others
STALL_SECONDS = 300.0  # that a disk may take, while other processes wait

_PREFIX = 'cnn_jax'
_DAY = 24 * 60 * 60 * 1000  # a wait that the heartbeat bounds, in milliseconds
_CONTINUE = 'the same command continues from what was saved last'
_NOTICE_SECONDS = 30.0  # after which a line says what is waited for


class _Group:
  """The connection of this process to the others.

  Args:
    client: JAX's client of the coordinator.
    me: the number of this process.
    count: of processes.
    seconds: of silence after which a process counts as lost.
    stall: see `deadline`.
  """

  def __init__(self, client: Any, me: int, count: int, seconds: float, stall: float):
    self.client, self.me, self.count, self.seconds, self.stall = client, me, count, seconds, stall
    self.calls = 0  # of `first` and `compare`
    self.work: tuple[str, float] | None = None  # of the main thread, with a deadline, and since when
    self.noticed = 0.0  # since when the work takes that a line was printed about
    self.done = False
    self.reason: tuple[int, str] | None = None  # status and line of a process that has ended
    now = time.monotonic()
    self.answered = now  # when the coordinator last did
    self.beats: dict[str, tuple[str, float]] = {str(other): ('', now) for other in range(count) if other != me}

  def start(self) -> None:
    for work in (self._beat, self._watch):
      threading.Thread(target=work, name=f'peers{work.__name__}', daemon=True).start()

  def tell(self, status: int, line: str) -> None:
    """Leaves the status and the line with which this process ends; waits until the others have read them."""
    if self.done or self.reason is not None:
      return
    with contextlib.suppress(Exception):
      self.client.key_value_set(f'{_PREFIX}/ended/{self.me}', json.dumps([status, line]))
      end = time.monotonic() + 3.0  # a process that is stopped does not read
      while (
        time.monotonic() < end and len(self.client.key_value_dir_get(f'{_PREFIX}/read/{self.me}/')) + 1 < self.count
      ):
        time.sleep(0.05)

  def _beat(self) -> None:
    interval, number = min(0.5, self.seconds / 8), 0
    while not self.done:
      with contextlib.suppress(Exception):  # the coordinator has ended; `_watch` and `_aborted` end this process
        number += 1
        self.client.key_value_set(f'{_PREFIX}/beat/{self.me}', str(number), allow_overwrite=True)
        for other, beat in self._read('beat').items():
          if other in self.beats and self.beats[other][0] != beat:
            self.beats[other] = (beat, time.monotonic())
        for other, ended in self._read('ended').items():
          if other != str(self.me) and self.reason is None:
            status, line = json.loads(ended)
            self.reason = int(status), f'process {other}: {line}'
            self.client.key_value_set(f'{_PREFIX}/read/{other}/{self.me}', '')
        self.answered = time.monotonic()
      time.sleep(interval)

  def _read(self, name: str) -> dict[str, str]:
    found = self.client.key_value_dir_get(f'{_PREFIX}/{name}/')
    return {key.rpartition('/')[2]: value for key, value in found}

  def _watch(self) -> None:
    last = time.monotonic()
    while not self.done:
      time.sleep(0.2)
      now = time.monotonic()
      if now - last > 2.0:  # this process was stopped, or got no time: the others were not silent
        self.answered += now - last
        self.beats = {other: (beat, seen + now - last) for other, (beat, seen) in self.beats.items()}
        self.work = self.work and (self.work[0], self.work[1] + now - last)
      last = now
      if self.reason is not None:
        time.sleep(1.0)  # most often this process ends for the same reason, and has its own line
        signals.leave(*self.reason)
      elif (lost := self.lost()) is not None:
        line = f'process {lost} has ended or does not answer; {_CONTINUE}.'
        signals.leave(signals.STOPPED, line)
      elif work := self.work:
        self._check(*work, now)

  def _check(self, what: str, since: float, now: float) -> None:
    """Ends the process if its work takes too long; says before that it takes long."""
    if now - since > self.stall:
      line = f'{what} has taken more than {self.stall:g} s, which --stall_seconds sets; {_CONTINUE}.'
      signals.leave(signals.STOPPED, line)
    if now - since > min(_NOTICE_SECONDS, self.stall / 4) and self.noticed != since:
      self.noticed = since
      _notice(f'{what} has taken {now - since:.0f} s; the processes end after {self.stall:g} s.')

  def lost(self) -> int | None:
    """The number of a process that has been silent for too long."""
    now = time.monotonic()
    if self.me and now - self.answered > self.seconds:
      return 0
    return next((int(other) for other, (_, seen) in self.beats.items() if now - seen > self.seconds), None)


_group: _Group | None = None
_abort: Any = None  # holds the function that the C library calls


def connect(initialize: Callable[[], None], address: str, join: float, heartbeat: float, stall: float) -> None:
  """Connects this process to the others.

  Args:
    initialize: calls `jax.distributed.initialize`.
    address: of process 0, for messages.
    join: seconds after which a process ends that does not find the others.
    heartbeat: seconds of silence after which a process counts as lost.
    stall: see `deadline`.
  """
  global _group, _abort
  unmet = (
    f'error: the processes of this run did not meet at {address} within {join:g} s; start all of them, '
    'or set --join_seconds.'
  )
  abort = _abort = _Abort(unmet)
  waiting = f'Waiting for the other processes at {address}.\n'
  timers = [
    threading.Timer(10, lambda: os.write(abort.stderr, waiting.encode())),
    threading.Timer(join, lambda: signals.leave(2, unmet)),
  ]
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    initialize()
  finally:
    for timer in timers:
      timer.cancel()
  from jax._src.distributed import global_state

  if global_state.num_processes == 1:
    return
  state = global_state
  _group = abort.group = _Group(state.client, state.process_id, state.num_processes, heartbeat, stall)
  signals.before_exit(_group.tell)
  _group.start()


def first(function: Callable[[], Any]) -> Any:
  """Calls a function in process 0 and returns its value in all processes, which must call this together.

  Args:
    function: returns a JSON value. If it raises, all processes end with its line.
  """
  group = _group
  if group is None:
    return function()
  group.calls += 1
  name = f'{_PREFIX}/first/{group.calls}'
  if group.me == 0:
    value = function()
    group.client.key_value_set(name, json.dumps(value))
    return value
  return json.loads(group.client.blocking_key_value_get(name, _DAY))


def compare(find: Callable[[], Mapping[str, Any]]) -> None:
  """Checks that all processes, which must call this together, agree.

  Args:
    find: returns JSON values by name, such as {'config.seed': 0}; not called without other processes.

  Raises:
    UsageError: in all processes; names the first process and the first fact that differ from those of process 0.
  """
  group = _group
  if group is None:
    return
  group.calls += 1
  name, mine = f'{_PREFIX}/facts/{group.calls}', json.dumps(dict(find()), sort_keys=True)
  group.client.key_value_set(f'{name}/{group.me}', mine)
  notice = threading.Timer(_NOTICE_SECONDS, _notice, ['waiting for the other processes, which still read the data.'])
  notice.daemon = True
  notice.start()
  expected, *others = (
    json.loads(group.client.blocking_key_value_get(f'{name}/{other}', _DAY)) for other in range(group.count)
  )
  notice.cancel()
  for number, found in enumerate(others, 1):
    for fact in sorted({*expected, *found}):
      ours, theirs = (values.get(fact, 'missing') for values in (expected, found))
      if ours != theirs:
        raise UsageError(
          f'{fact} is {theirs!r} in process {number} and {ours!r} in process 0; '
          'start all processes with the same command, on the same data.'
        )


@contextlib.contextmanager
def deadline(what: str) -> Iterator[None]:
  """In this block, in the main thread, a process reads or writes while others wait for it; if it takes too long, all end.

  Their heartbeats go on while a process waits for a disk that does not answer, so they prove nothing. After 30 s a line
  says what takes so long. After `--stall_seconds` the process ends with status 143 and a line, and so do the others. A
  process that is alone waits.

  Args:
    what: of the line, such as 'Reading images'.
  """
  if (group := _group) is None:
    yield
    return
  before, group.work = group.work, (what, time.monotonic())
  try:
    yield
  finally:
    group.work = before


@contextlib.contextmanager
def together(outcome: Callable[[BaseException], tuple[int, str] | None]) -> Iterator[None]:
  """In this block the processes end together: if one of them ends, the others do.

  Args:
    outcome: the status and the line of an exception that ends a command; None if it is a bug.
  """
  try:
    yield
    if _group is not None:
      _group.client.wait_at_barrier(f'{_PREFIX}/end', _DAY)
      _group.done = True
  except BaseException as error:
    if _group is not None:
      _end(_group, error, outcome(error))
    raise


def _end(group: _Group, error: BaseException, ended: tuple[int, str] | None) -> None:
  """Tells the others that this process ends, unless one of them has ended before."""
  if ended is None:
    # Most likely a collective has failed because another process has ended, whose heartbeat has stopped.
    group.seconds = min(group.seconds, 4.0)
    end = time.monotonic() + group.seconds + 1.0
    while time.monotonic() < end:
      time.sleep(0.1)
  signals.claim(*(ended or (1, f'{type(error).__name__}: {error}')))


def _notice(line: str) -> None:
  with contextlib.suppress(OSError, ValueError):
    os.write(sys.stderr.fileno(), f'warning: {line}\n'.encode())


class _Abort:
  """Replaces the native stack of a process whose coordinator has ended by one line.

  JAX's client aborts the process if it does not find process 0, and as soon as process 0 has ended, and cannot be told
  otherwise. What native code writes on standard error goes to a file, which is shown if the process aborts for another
  reason.

  Args:
    unmet: the line if it does not find process 0.
  """

  def __init__(self, unmet: str):
    self.group: _Group | None = None
    sys.stderr.flush()
    self.stderr, self._unmet = os.dup(2), unmet
    self._native = tempfile.TemporaryFile()  # noqa: SIM115 (open until the process ends)
    os.dup2(self._native.fileno(), 2)
    sys.stderr = os.fdopen(self.stderr, 'w', buffering=1, errors='backslashreplace', closefd=False)
    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

  def _aborted(self, number: int) -> None:
    """Runs in the thread that aborts, which goes on to abort if this returns."""
    del number
    status, group = signals.ending(), self.group
    if status is not None or (group and group.done):
      time.sleep(5)  # the main thread ends the process, after its line
      os._exit(status or 0)
    self._native.seek(0)
    text = self._native.read()
    if b'coordination' in text.lower():
      lost = (signals.STOPPED, f'process 0 has ended; {_CONTINUE}.') if group else (2, self._unmet)
      signals.leave(*((group and group.reason) or lost), tell=False)
    os.write(self.stderr, text)
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
