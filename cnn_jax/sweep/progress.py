"""The output of a sweep while it runs: a line per finished run, and on a terminal one live line for those in progress."""

import sys
import time
from typing import Any

from cnn_jax.progress import Line, duration
from cnn_jax.sweep.trials import Trials


class Progress:
  """Shows how far a study is.

  Args:
    trials: the runs to count, including those that other processes finish.
  """

  def __init__(self, trials: Trials):
    self._trials, self._line = trials, Line(sys.stdout)
    self._running: dict[str, str] = {}
    self._started, self._done_before = time.monotonic(), len(trials.finished())
    self._drawn = 0.0

  def event(self, kind: str, name: str, value: Any, seconds: float) -> None:
    """Shows one event of a run; see `pool.Pool`."""
    if kind == 'began':
      self._running[name] = 'started'
    elif kind == 'validation':
      self._running[name] = f'epoch {value[0]}: {value[1]:.2%}'
    elif kind != 'late':
      last = self._running.pop(name, 'started')
      outcome = {
        'done': lambda: f'{value:.2%} on validation',
        'pruned': lambda: f'pruned after {last}',
        'diverged': lambda: f'diverged after {last}',
        'infeasible': lambda: f'infeasible: {value}',
        'stopped': lambda: 'stopped and saved',
        'failed': lambda: f'failed: {value}',
        'died': lambda: f'its worker {value}; another worker continues it',
        'lost': lambda: 'taken over by another process',
      }[kind]()
      self._line.print(f'{name}: {outcome}, {seconds:.1f} s; {self._state()}')

  def say(self, text: str) -> None:
    """Prints a line."""
    self._line.print(text)

  def draw(self) -> None:
    """Shows the runs in progress on a terminal."""
    now = time.monotonic()
    if self._line.live and now - self._drawn > 0.5:
      self._drawn = now
      self._line.draw('  '.join(f'{name} {state}' for name, state in sorted(self._running.items())))

  def close(self) -> None:
    """Removes the live line."""
    self._line.clear()

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
      left = (time.monotonic() - self._started) / (done - self._done_before) * (total - done)
      parts.append(f'{duration(left)} left')
    return ', '.join(parts)
