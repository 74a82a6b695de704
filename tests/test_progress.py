"""Progress lines: on a terminal, in a pipe, and where nobody can read them."""

import contextlib
import io
import itertools
import os
import pty
import re
import termios
import threading

import pytest

from cnn_jax import progress


def show(stream):
  shown = progress.Progress(100, 4, stream=stream)
  for step in range(5, 101, 5):
    metrics = {'loss': 2 / step, 'accuracy': step / 100, 'learning_rate': 0.1, 'other': 3.0}
    shown.update(step, 1 + (step - 1) // 25, metrics, 12345.6)
  shown.close()
  shown.close()


@contextlib.contextmanager
def terminal(columns):
  """A stream to a terminal of so many columns (0: it does not tell), and the list of what it was sent."""
  master, slave = pty.openpty()
  termios.tcsetwinsize(slave, (24, columns))
  output = []

  def read():  # at the same time, because a terminal blocks a writer that is more than 4 KiB ahead
    with contextlib.suppress(OSError):  # how the end looks from this side
      while part := os.read(master, 4096):
        output.append(part.decode())

  reader = threading.Thread(target=read)
  reader.start()
  with os.fdopen(slave, 'w') as stream:
    yield stream, output
  reader.join(timeout=30)
  os.close(master)


def test_a_pipe_gets_the_last_line_of_each_epoch():
  stream = io.StringIO()
  show(stream)
  output = stream.getvalue().splitlines()
  assert [re.match(r'epoch (\d)/4  step (\d+)/100  ', line).groups() for line in output] == [
    ('1', '25'), ('2', '50'), ('3', '75'), ('4', '100'),
  ]  # fmt: skip
  assert output[0].startswith('epoch 1/4  step 25/100  loss 0.0800  accuracy 25.00 %')
  assert '12,346 images/s' in output[0]
  assert output[-1].endswith('0:00 left')
  assert not any(character in stream.getvalue() for character in '\r\x1b')


def test_validation_is_shown():
  stream = io.StringIO()
  with progress.Progress(10, 1, stream=stream) as shown:
    shown.update(10, 1, {'loss': 0.5, 'validation_accuracy': 0.25}, 1.0)
  assert stream.getvalue() == 'epoch 1/1  step 10/10  loss 0.5000  validation 25.00 %  1 images/s\n'


def tick(monkeypatch, seconds=1.0):
  """A clock that is so many seconds later at each look."""
  clock = itertools.count()
  monkeypatch.setattr(progress.time, 'monotonic', lambda: seconds * next(clock))


def test_a_pipe_gets_a_line_every_ten_seconds_in_a_long_epoch(monkeypatch):
  tick(monkeypatch)
  stream = io.StringIO()
  with progress.Progress(10_000, 1, stream=stream) as shown:
    for step in range(1, 101):
      shown.update(step, 1, {}, 1.0)  # takes a second, and one for each line
  steps = [int(re.search(r'step (\d+)', line)[1]) for line in stream.getvalue().splitlines()]
  assert all(9 <= b - a <= 11 for a, b in itertools.pairwise(steps[:-1]))
  assert len(steps) == 10
  assert steps[-1] == 100


@pytest.mark.parametrize('columns', [140, 80, 40, 0])
def test_a_terminal_gets_one_live_line(columns, monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  with terminal(columns) as (stream, output):
    show(stream)
  output = ''.join(output)
  assert output.count('\n') == 1  # at the end
  drawn = [frame.removesuffix('\x1b[K') for frame in output.rstrip().split('\r') if 'step' in frame]
  assert len(drawn) == 20  # one per update
  assert max(map(len, drawn)) < (columns or 80)
  full = 'epoch 4/4  step 100/100  loss 0.0200  accuracy 100.00 %  learning rate 0.1  12,346 images/s  0:00 left'
  expected = {
    140: f'[====================]  {full}',
    80: 'epoch 4/4  step 100/100  loss 0.0200  accuracy 100.00 %  0:00 left',
    40: 'step 100/100  loss 0.0200  0:00 left',
  }
  assert drawn[-1] == expected[columns or 80]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  with terminal(80) as (stream, output):
    show(stream)
  output = ''.join(output)
  assert output.count('\n') == 4
  assert '\x1b' not in output


def test_a_line_that_stays_replaces_the_live_one(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  with terminal(20) as (stream, output):
    line = progress.Line(stream)
    line.draw('a line that is longer than the terminal')
    line.print('stays')
    line.draw('live')
    line.clear()
    line.clear()
    line.keep()  # nothing is drawn
  assert ''.join(output) == '\ra line that is long\x1b[K\r\x1b[Kstays\r\n\rlive\x1b[K\r\x1b[K'


def test_a_counter_on_a_terminal_shows_rate_and_time_left(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  tick(monkeypatch)
  with terminal(80) as (stream, output):
    counter = progress.Counter('images', 3000, progress.Line(stream))
    counter.show(1000)  # a second after the start
    counter.clear()
  assert ''.join(output) == '\rimages: 1,000 of 3,000, 1,000 per second, 0:02 left\x1b[K\r\x1b[K'


def test_a_counter_in_a_file_shows_a_line_every_ten_seconds(monkeypatch):
  tick(monkeypatch)
  stream = io.StringIO()
  counter = progress.Counter('files', line=progress.Line(stream))
  for count in range(25):
    counter.show(2 * count)
  counter.clear()
  assert stream.getvalue() == 'files: 18, 1.8 per second\nfiles: 38, 1.9 per second\n'


@pytest.mark.parametrize('end', ['pipe', 'terminal'])
def test_work_goes_on_if_nobody_can_read_its_progress(end, monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  reader, writer = os.pipe() if end == 'pipe' else pty.openpty()
  stream = os.fdopen(writer, 'w')
  shown = progress.Progress(100, 4, stream=stream)
  assert shown._line.live == (end == 'terminal')
  os.close(reader)
  for step in range(5, 101, 5):
    shown.update(step, 1 + (step - 1) // 25, {'loss': 1.0}, 1.0)
  shown.close()
  with contextlib.suppress(OSError):
    stream.close()


def test_calls_take_about_two_seconds():
  pace = progress.Pace(1024)
  taken = []
  for _ in range(12):
    taken.append(pace.steps)
    pace.update(pace.steps, 0.01 * pace.steps)  # 10 ms per step
  assert taken == [1, 2, 4, 8, 16, 32, 64, 128, 200, 200, 200, 200]
  pace.update(200, 20.0)  # now 100 ms per step
  assert pace.steps == 20
  pace.update(20, 100.0)  # a step that takes longer than a call may
  assert pace.steps == 1
  pace = progress.Pace(3)
  for _ in range(4):
    pace.update(pace.steps, 0.0)
  assert pace.steps == 3


def test_durations():
  assert [progress.duration(seconds) for seconds in (0, 7.4, 59.6, 187, 3599, 3787)] == [
    '0:00', '0:07', '1:00', '3:07', '59:59', '1:03:07',
  ]  # fmt: skip
