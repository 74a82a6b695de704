"""What a sweep shows while it runs: a line for each trial that ends, and on a terminal one for those that run."""

import os
import sys
import time
from typing import Any

from experiments.sweeps.trials import Trials


class Progress:
  """Shows how far a study is.

  Args:
    trials: whose runs to count, those that other processes finish too.
  """

  def __init__(self, trials: Trials):
    self._trials = trials
    self._live = sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'
    self._running: dict[str, str] = {}
    self._begun, self._done_before = time.monotonic(), len(trials.finished())
    self._drawn = 0.0

  def event(self, kind: str, name: str, value: Any, seconds: float) -> None:
    """Takes note of something that happened to a run; see `pool.Pool`."""
    if kind == 'began':
      self._running[name] = 'begun'
    elif kind == 'validation':
      self._running[name] = f'epoch {value[0]}: {value[1]:.2%}'
    elif kind != 'late':
      last = self._running.pop(name, '')
      said = {
        'done': lambda: f'{value:.2%} on validation',
        'pruned': lambda: f'pruned after {last}',
        'diverged': lambda: f'diverged after {last}',
        'stopped': lambda: 'stopped and saved',
        'died': lambda: f'its worker ended {value}; another one goes on with it',
        'lost': lambda: 'taken over by another process',
      }[kind]()
      self._print(f'{name}: {said}, {seconds:.1f} s; {self._state()}')

  def draw(self) -> None:
    """Shows the runs in progress, on a terminal."""
    now = time.monotonic()
    if self._live and now - self._drawn > 0.5:
      self._drawn = now
      text = '  '.join(f'{name} {what}' for name, what in sorted(self._running.items()))
      columns = (os.get_terminal_size(sys.stdout.fileno()).columns or 80) - 1
      sys.stdout.write(f'\r{text[:columns]}\x1b[K')
      sys.stdout.flush()

  def close(self) -> None:
    """Leaves nothing unfinished on the terminal."""
    if self._live:
      sys.stdout.write('\r\x1b[K')
      sys.stdout.flush()

  def _state(self) -> str:
    finished = self._trials.finished()
    done, total = len(finished), len(self._trials.runs)
    completed = {name: t.value for name, t in finished.items() if t.state.name == 'COMPLETE' and t.value is not None}
    parts = []
    if completed:
      best = max(completed, key=lambda name: completed[name])
      parts.append(f'best {completed[best]:.2%} ({best})')
    parts.append(f'{done} of {total} done')
    if done > self._done_before and done < total:
      left = (time.monotonic() - self._begun) / (done - self._done_before) * (total - done)
      parts.append(f'{int(left) // 60}:{int(left) % 60:02} left')
    return ', '.join(parts)

  def _print(self, line: str) -> None:
    sys.stdout.write(f'\r\x1b[K{line}\n' if self._live else f'{line}\n')
    sys.stdout.flush()
