"""Signals that end a command: one line, status 143, in time, whatever the process is doing.

Python runs signal handlers in the main thread, between two operations. While that thread compiles, or waits for another
process, a handler waits too. So a thread reads the number of each signal from a pipe that the C handler of Python fills.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

STOPPED = 143


def _numbers(*names: str) -> tuple[signal.Signals, ...]:
  """Signals by name; Windows, where commands are refused in one line, has few."""
  return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


ENDING = _numbers('SIGINT', 'SIGTERM', 'SIGHUP')
# Schedulers announce the end of a job with these. By default they kill; a program that handles them keeps its handler.
ANNOUNCING = _numbers('SIGUSR1', 'SIGUSR2', 'SIGXCPU')

_SECONDS_TO_END = 8.0  # from a signal to the end of a process that has nothing to save
# A closed terminal, `timeout` and several schedulers send a signal twice at once.
_SECONDS_BETWEEN_SIGNALS = 1.0


class _Watch:
  """What the thread, the handlers and the blocks of a process share."""

  def __init__(self) -> None:
    self.thread: threading.Thread | None = None
    self.arrived: float | None = None  # time of the first signal
    self.keeps = 0  # blocks that end by themselves after a signal, to save
    self.hurries = 0  # blocks within those that may take long and have nothing to save
    self.before_exit: list[Callable[[int, str], Any]] = []
    self.ended = threading.Lock()  # held from the first decision to end
    self.status = STOPPED  # of a process that is ending
    self.at_once = False  # whether it must end without waiting for other processes


_watch = _Watch()


def end_at_once() -> None:
  """Makes the first signals end the process with one line; for the time in which a command is imported."""
  for number in _deadly(ENDING):
    signal.signal(number, lambda *_: _exit(STOPPED, 'stopped'))


def start() -> None:
  """Makes a signal raise KeyboardInterrupt in the main thread, and end the process if that does not end it.

  A second signal, more than a second after the first, ends the process at once.
  """
  if _watch.thread is not None:
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  _watch.thread = threading.Thread(target=_read, args=(reader,), name='signals', daemon=True)
  _watch.thread.start()
  for number in _deadly(ENDING):
    signal.signal(number, _interrupt)
  # An interrupt inside a destructor or a thread of a library is printed there and lost; the thread above remains.
  sys.unraisablehook, threading.excepthook = _quieted(sys.unraisablehook), _quieted(threading.excepthook)


def finish(status: int) -> None:
  """Makes further signals end the process with the status that it has reached, as does the end of another process."""
  if not _watch.ended.acquire(blocking=False) and not _watch.at_once:
    time.sleep(60)  # another thread has printed its line and ends the process
  _watch.status = status
  for number in (*ENDING, *ANNOUNCING):
    if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL, None):
      signal.signal(number, lambda *_: os._exit(status))
  if _watch.at_once:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    os._exit(status)


def leave(status: int, line: str, *, tell: bool = True) -> None:
  """Ends the process from any thread, with one line, unless it is ending already.

  Args:
    status: of the process.
    line: for standard error.
    tell: whether to call the functions of `before_exit`.
  """
  if _watch.ended.acquire(blocking=False):
    _watch.status = status
    if tell:
      _tell(status, line)
    _exit(status, line)


class Stopping:
  """Whether a signal has arrived; see `command.stop_signal`."""

  def __init__(self) -> None:
    self.received: list[int] = []

  def __call__(self) -> bool:
    return bool(self.received)

  @contextlib.contextmanager
  def nothing_to_save(self) -> Iterator[None]:
    """In this block, such as compilation, the process of a command ends 8 s after a signal."""
    _watch.hurries += 1
    try:
      yield
    finally:
      _watch.hurries -= 1


@contextlib.contextmanager
def stop_signal() -> Iterator[Stopping]:
  """Turns a signal into a flag: SIGTERM, Ctrl-C, SIGHUP (a closed terminal), and those by which schedulers announce the
  end of a job, SIGUSR1, SIGUSR2 and SIGXCPU.

  In a command, a second SIGTERM or Ctrl-C ends the process at once; elsewhere it has its usual effect. A signal that
  the process ignores, such as SIGHUP under nohup, stays ignored. Outside the main thread, where Python delivers no
  signals, the flag is never set.

  Yields:
    A function that returns whether a signal has arrived.
  """
  stopping = Stopping()
  if threading.current_thread() is not threading.main_thread():
    yield stopping
    return
  numbers = _deadly(ENDING) + [number for number in ANNOUNCING if signal.getsignal(number) is signal.SIG_DFL]
  before = {number: signal.getsignal(number) for number in numbers}

  def restore() -> None:
    for number, handler in before.items():
      signal.signal(number, handler)

  def handle(number, frame):
    del frame
    stopping.received.append(number)
    if _watch.thread is None:
      restore()

  for number in before:
    signal.signal(number, handle)
  _watch.keeps += 1
  try:
    yield stopping
  finally:
    _watch.keeps -= 1
    restore()


def before_exit(function: Callable[[int, str], Any]) -> None:
  """Adds a function of the status and the line, called before a signal ends the process."""
  _watch.before_exit.append(function)


def claim(status: int, line: str) -> None:
  """Declares that the main thread ends the process, without waiting for other processes; they get the line."""
  if not _watch.ended.acquire(blocking=False):
    time.sleep(60)  # another thread has declared it before, and ends the process
  _watch.status, _watch.at_once = status, True
  _tell(status, line)


def ending() -> int | None:
  """The status of a process that is ending; None if it is not."""
  return _watch.status if _watch.ended.locked() else None


def _deadly(numbers: tuple[signal.Signals, ...]) -> list[signal.Signals]:
  return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _interrupt(number, frame):
  del number, frame
  if _watch.thread is not None and not _watch.ended.locked():
    raise KeyboardInterrupt


def _quieted(show: Callable[[Any], Any]) -> Callable[[Any], Any]:
  def hook(what: Any) -> None:
    if not (what.exc_type and issubclass(what.exc_type, KeyboardInterrupt)):
      show(what)

  return hook


def _read(reader: int) -> None:
  while True:
    ready, _, _ = select.select([reader], [], [], None if _watch.arrived is None else 0.1)
    now = time.monotonic()
    for number in os.read(reader, 64) if ready else b'':
      if number not in (*ENDING, *ANNOUNCING) or signal.getsignal(number) in (signal.SIG_IGN, signal.SIG_DFL):
        continue
      if _watch.arrived is None:
        _watch.arrived = now
      elif number in (signal.SIGINT, signal.SIGTERM) and now - _watch.arrived > _SECONDS_BETWEEN_SIGNALS:
        leave(STOPPED, 'stopped at once; what was saved last remains.')
    hurried = not _watch.keeps or _watch.hurries
    if _watch.arrived is not None and hurried and now - _watch.arrived > _SECONDS_TO_END:
      leave(STOPPED, 'stopped; the same command continues from what was saved last, if anything.')


def _exit(status: int, line: str) -> None:
  with contextlib.suppress(OSError, ValueError):
    # Not through `sys.stderr`, whose lock another thread may hold.
    os.write(sys.stderr.fileno(), f'{line}\n'.encode())
  os._exit(status)


def _tell(status: int, line: str) -> None:
  """Calls the functions of `before_exit`, in a thread, because they may wait for a process that is stopped."""

  def work() -> None:
    for function in _watch.before_exit:
      with contextlib.suppress(Exception):
        function(status, line)

  if _watch.before_exit:
    thread = threading.Thread(target=work, name='before exit', daemon=True)
    thread.start()
    thread.join(2.0)
