"""Progress of long work: one live line on a terminal, a plain line every few seconds elsewhere."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Self, TextIO

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BEFORE_WAITING = 3.0
SECONDS_PER_CALL = 2.0


class Line:
  """A line that is redrawn on a terminal. In a file or a pipe nothing is drawn, and lines are only printed.

  If the stream fails, for example because its reader has ended, the rest is not shown: the work goes on.

  Args:
    stream: where to write; standard error if None.

  Attributes:
    live: whether the stream is a terminal that can redraw a line.
  """

  def __init__(self, stream: TextIO | None = None):
    self._stream = stream or sys.stderr
    self.live = self._stream.isatty() and os.environ.get('TERM') != 'dumb'
    self._drawn = False

  def columns(self) -> int:
    """How many characters fit: one less than the width, since a full line would wrap."""
    with contextlib.suppress(OSError):  # the terminal was closed
      return (os.get_terminal_size(self._stream.fileno()).columns or 80) - 1
    return 79

  def draw(self, text: str) -> None:
    """Replaces the live line; call it only if `live`."""
    self._write(f'\r{text[: self.columns()]}\x1b[K')
    self._drawn = True

  def print(self, text: str) -> None:
    """Clears the live line and prints a line that stays."""
    self.clear()
    self._write(f'{text}\n')

  def clear(self) -> None:
    """Removes the live line."""
    self._end('\r\x1b[K')

  def keep(self) -> None:
    """Leaves the live line as it is and moves below it."""
    self._end('\n')

  def _end(self, text: str) -> None:
    if self._drawn:
      self._write(text)
      self._drawn = False

  def _write(self, text: str) -> None:
    with contextlib.suppress(OSError):
      self._stream.write(text)
      self._stream.flush()


class Counter:
  """Shows how many items are done: on a terminal one live line, elsewhere a line per 10 seconds.

  Args:
    what: names the items, such as 'images'.
    total: the number of items; None if unknown.
    line: where to show the count; a line on standard error if None.
  """

  def __init__(self, what: str, total: int | None = None, line: Line | None = None):
    self._what, self._total, self._line = what, total, line or Line()
    self._started = self._shown = time.monotonic()

  def show(self, count: int) -> None:
    """Shows a count of items done, with the rate and, if the total is known, the time left."""
    now = time.monotonic()
    if now - self._shown < (0.1 if self._line.live else _SECONDS_BETWEEN_LINES):
      return
    self._shown = now
    rate = count / (now - self._started)
    text = (
      f'{self._what}: {count:,}'
      + (f' of {self._total:,}' if self._total else '')
      + f', {rate:,.{0 if rate > 10 else 1}f} per second'
    )
    if self._total and rate > 0:
      text += f', {duration((self._total - count) / rate)} left'
    (self._line.draw if self._line.live else self._line.print)(text)

  def clear(self) -> None:
    """Removes the live line."""
    self._line.clear()


class Progress:
  """Shows how far training is: on a terminal one live line, elsewhere a line per epoch and per 10 seconds.

  Args:
    total_steps: of the whole run.
    epochs: of the whole run.
    stream: where to write; standard output if None.
  """

  def __init__(self, total_steps: int, epochs: int, *, stream: TextIO | None = None):
    self._total_steps, self._epochs = total_steps, epochs
    self._line = Line(stream or sys.stdout)
    self._parts: dict[str, str] = {}  # of the line that is drawn, or that is still to be printed
    self._epoch: int | None = None
    self._compiled: set[str] = set()
    self._printed = time.monotonic()
    self._first: tuple[int, float] | None = None  # step and time of the first update

  def update(self, step: int, epoch: int, metrics: Mapping[str, float], images_per_second: float) -> None:
    """Shows a step.

    Args:
      step: steps done.
      epoch: that the step belongs to, from 1.
      metrics: `loss`, `accuracy`, `validation_accuracy` (fractions) and `learning_rate` are shown if present, and
        `validation_balanced_accuracy` if it differs by more than a point.
      images_per_second: of training.
    """
    now = time.monotonic()
    if not self._line.live and epoch != self._epoch:
      self._print_line()
    self._epoch = epoch
    self._parts = self._describe(step, epoch, metrics, images_per_second, now)
    if self._line.live:
      self._draw()
    elif step >= self._total_steps or now - self._printed >= _SECONDS_BETWEEN_LINES:
      self._print_line()

  @contextlib.contextmanager
  def compiling(self, what: str, hurry: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Shows, from the third second on, what this block, which compiles, is doing; does nothing the next time.

    Args:
      what: a line such as 'Compiling the training steps'.
      hurry: makes the context of the block.
    """
    if what in self._compiled:
      yield
      return
    self._compiled.add(what)
    ended, started = threading.Event(), time.monotonic()

    def show() -> None:
      wait = _SECONDS_BEFORE_WAITING
      while not ended.wait(wait):
        if not self._line.live:
          self._line.print(f'{what} ...')
          return
        self._line.draw(f'{what}, {duration(time.monotonic() - started)}')
        wait = 1.0

    thread = threading.Thread(target=show, name='progress', daemon=True)
    thread.start()
    try:
      with hurry():
        yield
    finally:
      ended.set()
      thread.join()
      self._line.clear()

  def close(self) -> None:
    """Leaves the last line on the screen; a second call does nothing."""
    if self._line.live:
      self._line.keep()
      self._parts = {}
    else:
      self._print_line()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _describe(
    self, step: int, epoch: int, metrics: Mapping[str, float], images_per_second: float, now: float
  ) -> dict[str, str]:
    parts = {'epoch': f'epoch {epoch}/{self._epochs}', 'step': f'step {step:,}/{self._total_steps:,}'}
    if 'loss' in metrics:
      parts['loss'] = f'loss {metrics["loss"]:.4f}'
    if 'accuracy' in metrics:
      parts['accuracy'] = f'accuracy {100 * metrics["accuracy"]:.2f} %'
    if 'validation_accuracy' in metrics:
      parts['validation'] = f'validation {100 * metrics["validation_accuracy"]:.2f} %'
      balanced = metrics.get('validation_balanced_accuracy', metrics['validation_accuracy'])
      if abs(balanced - metrics['validation_accuracy']) > 0.01:  # a class has too few images to count
        parts['balanced'] = f'balanced {100 * balanced:.2f} %'
    if 'learning_rate' in metrics:
      parts['learning_rate'] = f'learning rate {metrics["learning_rate"]:.4g}'
    parts['speed'] = f'{images_per_second:,.0f} images/s'
    self._first = self._first or (step, now)
    first_step, first_time = self._first
    if step > first_step:
      parts['left'] = f'{duration((self._total_steps - step) * (now - first_time) / (step - first_step))} left'
    if self._line.live:
      filled = 20 * step // self._total_steps
      parts = {'bar': f'[{"=" * filled}{" " * (20 - filled)}]', **parts}
    return parts

  def _draw(self) -> None:
    parts = dict(self._parts)
    for least in ('bar', 'learning_rate', 'speed', 'epoch', 'accuracy'):
      if len('  '.join(parts.values())) > self._line.columns():
        parts.pop(least, None)
    self._line.draw('  '.join(parts.values()))

  def _print_line(self) -> None:
    if self._parts:
      self._line.print('  '.join(self._parts.values()))
      self._parts, self._printed = {}, time.monotonic()


class Pace:
  """Chooses the number of steps per call, so that a call takes about two seconds.

  Signals, checkpoints by the clock and checks for divergence wait for the end of a call.

  Args:
    capacity: the largest number of steps per call.

  Attributes:
    steps: of the next call. It at most doubles from call to call, since one measurement may be wrong.
  """

  def __init__(self, capacity: int):
    self._capacity, self.steps = capacity, 1

  def update(self, steps: int, seconds: float) -> None:
    """Adapts `steps` to the duration of a call.

    Args:
      steps: of the call.
      seconds: that it took.
    """
    fitting = int(SECONDS_PER_CALL * steps / max(seconds, 1e-9))
    self.steps = max(1, min(fitting, 2 * self.steps, self._capacity))


def duration(seconds: float) -> str:
  """Formats a duration as 3:07 (minutes, seconds), from an hour on as 1:03:07."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
