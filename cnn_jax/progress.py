"""What a run shows while it trains: one live line on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Mapping
from typing import Self, TextIO

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
  """Shows how far a run is.

  On a terminal, one line that is drawn over. In a file or a pipe, a line for the end of each epoch
  and, inside longer ones, one every 10 seconds.

  Args:
    total_steps, epochs: of the whole run.
    stream: standard output where not given.
  """

  def __init__(self, total_steps: int, epochs: int, *, stream: TextIO | None = None):
    self._total_steps, self._epochs = total_steps, epochs
    self._stream = stream or sys.stdout
    self._live = self._stream.isatty() and os.environ.get('TERM') != 'dumb'
    self._parts: dict[str, str] = {}  # of the line that stands there, or that is still to be printed
    self._epoch: int | None = None
    self._printed = time.monotonic()
    self._first: tuple[int, float] | None = None  # step and time of the first update, which compiled

  def update(self, step: int, epoch: int, metrics: Mapping[str, float], images_per_second: float) -> None:
    """Shows a step.

    Args:
      step: steps done.
      epoch: that the step belongs to, from 1.
      metrics: `loss`, `accuracy`, `validation_accuracy` (fractions) and `learning_rate` are shown
        where given.
      images_per_second: of training.
    """
    now = time.monotonic()
    if not self._live and epoch != self._epoch:
      self._print_line()
    self._epoch = epoch
    self._parts = self._describe(step, epoch, metrics, images_per_second, now)
    if self._live:
      self._draw()
    elif step >= self._total_steps or now - self._printed >= _SECONDS_BETWEEN_LINES:
      self._print_line()

  def message(self, text: str) -> None:
    """Prints lines that stay, without breaking the live one."""
    if self._live:
      self._stream.write(f'\r\x1b[K{text}\n')
      self._draw()
    else:
      self._print_line()
      self._stream.write(f'{text}\n')
      self._stream.flush()

  def close(self) -> None:
    """Leaves the last line standing; safe to call twice."""
    if self._live and self._parts:
      self._stream.write('\n')
      self._stream.flush()
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
    if 'learning_rate' in metrics:
      parts['learning_rate'] = f'learning rate {metrics["learning_rate"]:.4g}'
    parts['speed'] = f'{images_per_second:,.0f} images/s'
    self._first = self._first or (step, now)
    first_step, first_time = self._first
    if step > first_step:
      parts['left'] = f'{_duration((self._total_steps - step) * (now - first_time) / (step - first_step))} left'
    if self._live:
      filled = 20 * step // self._total_steps
      parts = {'bar': f'[{"=" * filled}{" " * (20 - filled)}]', **parts}
    return parts

  def _draw(self) -> None:
    # One column short of the width: a full line would wrap, and \r would go back to the wrong one.
    columns = (os.get_terminal_size(self._stream.fileno()).columns or 80) - 1
    parts = dict(self._parts)
    for least in ('bar', 'learning_rate', 'speed', 'epoch', 'accuracy'):
      if len('  '.join(parts.values())) > columns:
        parts.pop(least, None)
    self._stream.write(f'\r{"  ".join(parts.values())[:columns]}\x1b[K')
    self._stream.flush()

  def _print_line(self) -> None:
    if self._parts:
      self._stream.write(f'{"  ".join(self._parts.values())}\n')
      self._stream.flush()
      self._parts, self._printed = {}, time.monotonic()


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
