"""The record of a run: one owner, one config, the same bytes however often it was interrupted."""

import contextlib
import itertools
import json
import os
import pty
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from cnn_jax import UsageError, record
from cnn_jax import config as config_lib
from cnn_jax import progress as progress_lib


@contextlib.contextmanager
def largest_file(num_bytes):
  """A disk that is nearly full, as far as this process can tell."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- the lock


def test_a_workdir_has_one_owner_until_that_process_dies(tmp_path):
  workdir = tmp_path / 'runs' / 'a'
  code = 'import sys, time; from cnn_jax import record\nwith record.lock(sys.argv[1]): print("held", flush=True); time.sleep(60)'
  with subprocess.Popen([sys.executable, '-c', code, str(workdir)], stdout=subprocess.PIPE, text=True) as owner:
    try:
      assert owner.stdout.readline() == 'held\n'
      with pytest.raises(UsageError, match=f'{workdir} is in use by process {owner.pid}'), record.lock(workdir):
        pass
      owner.send_signal(signal.SIGKILL)
      owner.wait(timeout=30)
      with record.lock(workdir):
        assert (workdir / '.lock').read_text() == f'{os.getpid()}\n'
    finally:
      owner.kill()


def test_the_lock_ends_with_its_context(tmp_path):
  with record.lock(tmp_path), pytest.raises(UsageError, match='in use by process'), record.lock(tmp_path):
    pass
  with pytest.raises(ZeroDivisionError), record.lock(tmp_path):
    raise ZeroDivisionError
  with record.lock(tmp_path):
    pass


def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  for workdir in (tmp_path / 'file', tmp_path / 'file' / 'below', '/proc/none'):
    with pytest.raises(UsageError, match=f'cannot write to {workdir}: .*--workdir'), record.lock(workdir):
      pass


# --- config.json


def changed(**fields):
  config = config_lib.default_config()
  config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return config


def test_a_config_comes_back_as_it_was(tmp_path):
  config = changed(model__features=(8, 16), optimizer__learning_rate=0.1 + 0.2, data__dir='å')
  record.write_config(tmp_path, config)
  loaded = record.load_config(tmp_path)
  assert loaded.to_dict() == config.to_dict()
  assert isinstance(loaded.model.features, tuple)
  with pytest.raises(AttributeError, match='Key "new" does not exist'):  # it is locked
    loaded.model.new = 1


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('epochs', 13, 'config.epochs is 13, but the run in .* began with 12'),
    ('model__features', (32, 64), r'config.model.features is \[32, 64\], but .* \[32, 64, 128\]'),
    ('data__dir', 'x', "config.data.dir is 'x', but .* began with ''"),
  ],
)
def test_resuming_with_another_config_names_the_field(tmp_path, field, value, message):
  record.write_config(tmp_path, config_lib.default_config())
  before = (tmp_path / 'config.json').read_bytes()
  for check in (record.check_config, record.write_config):
    with pytest.raises(UsageError, match=f'{message}; use another --workdir'):
      check(tmp_path, changed(**{field: value}))
  assert (tmp_path / 'config.json').read_bytes() == before


def test_what_is_only_written_down_may_change(tmp_path):
  record.check_config(tmp_path, changed())  # nothing there yet
  record.write_config(tmp_path, changed())
  record.write_config(tmp_path, changed())
  record.write_config(tmp_path, changed(log__every_steps=3, checkpoint__keep=5))
  assert record.load_config(tmp_path).checkpoint.keep == 5


def test_a_field_newer_than_the_run_had_its_default(tmp_path):
  values = changed().to_dict()
  del values['seeds'], values['augment']['cutmix']
  record.write_json(tmp_path / 'config.json', values)
  record.check_config(tmp_path, changed())
  with pytest.raises(UsageError, match='config.seeds is 2, but the run in .* began with 1'):
    record.check_config(tmp_path, changed(seeds=2))


def test_a_config_file_that_is_wrong_is_named(tmp_path):
  with pytest.raises(UsageError, match=r'config.json is missing; give the --workdir of a run'):
    record.load_config(tmp_path)
  file = tmp_path / 'config.json'
  for text, message in (
    ('{"epochs": 12', 'is not JSON'),
    ('[]', 'does not hold a JSON object'),
    ('{"epoch": 12}', 'config.epoch is not a field; did you mean config.epochs'),
    ('{"model": {"head": 3}}', 'config.model.head is 3'),
    ('{"model": 3}', 'config.model is 3'),
  ):
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
      record.load_config(tmp_path)
    assert str(file) in str(caught.value)
  file.write_text('{"epochs": 5}')  # a run from before the other fields were there
  assert record.load_config(tmp_path).to_dict() == changed(epochs=5).to_dict()


# --- environment.json and result.json


def test_the_environment_says_what_ran_and_keeps_earlier_starts(tmp_path):
  record.write_environment(tmp_path)
  first = json.loads((tmp_path / 'environment.json').read_text())
  assert first['runs'] == []
  assert {'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'pillow', 'python', 'cnn_jax'} == set(
    first['versions']
  )
  assert first['versions']['numpy'] == np.__version__
  assert first['command'] == shlex.join(sys.orig_argv)
  assert first['num_devices'] >= 1
  assert first['git'] is None or re.fullmatch('[0-9a-f]{40}', first['git']['commit'])
  record.write_environment(tmp_path)
  record.write_environment(tmp_path)
  third = json.loads((tmp_path / 'environment.json').read_text())
  del first['runs']
  assert len(third['runs']) == 2
  assert third['runs'][0] == first
  assert 'runs' not in third['runs'][1]


def test_without_git_the_environment_has_none(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  record.write_environment(tmp_path)
  assert json.loads((tmp_path / 'environment.json').read_text())['git'] is None


def test_a_result_is_plain_json(tmp_path):
  assert record.read_result(tmp_path) is None
  result = {
    'accuracy': np.float32(0.1), 'loss': float('nan'), 'steps': jnp.int32(7), 'classes': ('a', 'b'),
    'counts': np.arange(3), 'complete': np.True_, 'by_class': {0: float('inf')},
  }  # fmt: skip
  record.write_result(tmp_path, result)
  assert record.read_result(tmp_path) == {
    'accuracy': float(np.float32(0.1)), 'loss': None, 'steps': 7, 'classes': ['a', 'b'],
    'counts': [0, 1, 2], 'complete': True, 'by_class': {'0': None},
  }  # fmt: skip


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  record.write_result(tmp_path, {'a': 1})
  with largest_file(1000), pytest.raises(UsageError, match=r'cannot write to .*result.json: File too large'):
    record.write_result(tmp_path, {'a': list(range(1000))})
  assert record.read_result(tmp_path) == {'a': 1}

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(record.os, 'fsync', killed)
  with pytest.raises(KeyboardInterrupt):
    record.write_result(tmp_path, {'a': 2})
  assert record.read_result(tmp_path) == {'a': 1}


# --- metrics.jsonl, timing.jsonl, TensorBoard


def lines(workdir, name='metrics.jsonl'):
  return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def append(recorder, steps):
  for step in steps:
    values = {'loss': np.float32(1) / step, 'accuracy': 0.1 * step}
    recorder.append(step, 1 + step // 4, 'train', values, {'images_per_second': 1e4})
    if step % 2 == 0:
      recorder.append(step, 1 + step // 4, 'validation', {'accuracy': 1 / step})


def test_a_line_is_what_was_measured_exactly(tmp_path):
  with record.Recorder(tmp_path, tensorboard=False) as recorder:
    loss = np.float32(0.1)
    recorder.append(5, 1, 'train', {'loss': loss, 'norm': float('nan')}, {'seconds': 2.5})
    (line,) = lines(tmp_path)  # there before the file is closed
    assert line == {'step': 5, 'epoch': 1, 'split': 'train', 'loss': float(loss), 'norm': None}
    assert np.float32(line['loss']).tobytes() == loss.tobytes()
    assert lines(tmp_path, 'timing.jsonl') == [{'step': 5, 'epoch': 1, 'split': 'train', 'seconds': 2.5}]
  assert not list(tmp_path.glob('events*'))


@pytest.mark.parametrize('cut', ['', '{"step": 7, "epoch": 2, "spl', '{"step": 3, "split": "train"}', '\0\0\0\n'])
def test_an_interrupted_record_ends_with_the_same_bytes(tmp_path, cut):
  """Steps 1-9 at once, and 1-6, an end without warning, then 4-9 from a checkpoint of step 4."""
  whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
  for workdir, parts in ((whole, [(0, range(1, 10))]), (resumed, [(0, range(1, 7)), (4, range(5, 10))])):
    workdir.mkdir()
    for restored, steps in parts:
      with record.Recorder(workdir, step=restored, tensorboard=False) as recorder:
        if restored:  # the evaluation of the restored step comes again
          recorder.append(restored, 2, 'validation', {'accuracy': 1 / restored})
        append(recorder, steps)
        recorder.sync()
      if workdir == resumed:
        for name in ('metrics.jsonl', 'timing.jsonl'):
          with (workdir / name).open('a') as file:
            file.write(cut if not restored else '')
  assert (resumed / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
  assert (resumed / 'timing.jsonl').read_bytes() == (whole / 'timing.jsonl').read_bytes()
  keys = [(line['step'], line['split']) for line in lines(whole)]
  assert len(keys) == len(set(keys)) == 13


def read_events(file):
  """The events of a TensorBoard file, read as its format has it, with checksums."""
  content, events = file.read_bytes(), []
  while content:
    length, length_sum = struct.unpack_from('<QI', content)
    message = content[12 : 12 + length]
    (message_sum,) = struct.unpack_from('<I', content, 12 + length)
    assert (length_sum, message_sum) == (masked_crc32c(content[:8]), masked_crc32c(message))
    events.append(Event.FromString(message))
    content = content[16 + length :]
  return events


def test_tensorboard_shows_every_number_once_after_a_resume(tmp_path):
  with record.Recorder(tmp_path) as recorder:
    append(recorder, range(1, 5))
    recorder.sync()
  with record.Recorder(tmp_path, step=2) as recorder:
    append(recorder, range(3, 5))
  scalars, purges = [], []
  for file in sorted(tmp_path.glob('events.out.tfevents.*')):  # the order in which TensorBoard reads them
    events = read_events(file)
    assert events[0].file_version == 'brain.Event:2'
    for event in events:
      if event.HasField('session_log'):
        assert event.session_log.status == event.session_log.START
        purges.append(event.step)
        scalars = [scalar for scalar in scalars if scalar[1] < event.step]
      scalars += [(value.tag, event.step) for value in event.summary.value]
  assert purges == [3]
  tags = ('train/loss', 'train/accuracy', 'train/images_per_second')
  expected = [(tag, step) for step in range(1, 5) for tag in tags] + [
    ('validation/accuracy', 2),
    ('validation/accuracy', 4),
  ]
  assert sorted(scalars) == sorted(expected)


def test_tensorboard_events_are_those_of_tensorboardx(tmp_path):
  with SummaryWriter(str(tmp_path / 'theirs'), purge_step=3) as writer:
    writer.add_scalar('train/loss', 0.1, 4, display_name='')
  (tmp_path / 'ours').mkdir()
  with record.Recorder(tmp_path / 'ours', step=2) as recorder:
    recorder.append(4, 1, 'train', {'loss': 0.1})

  def scalars(name):
    (file,) = (tmp_path / name).glob('events.out.tfevents.*')
    return [
      (event.step, event.session_log.status, [(value.tag, value.simple_value) for value in event.summary.value])
      for event in read_events(file)
      if not event.file_version
    ]

  assert scalars('ours') == scalars('theirs') == [(3, 1, []), (4, 0, [('train/loss', np.float32(0.1))])]


@pytest.mark.parametrize('tensorboard', [False, True])
def test_a_full_disk_is_one_line(tmp_path, tensorboard):
  recorder = record.Recorder(tmp_path, tensorboard=tensorboard)
  with largest_file(150):  # enough for one line, but not for its event
    with pytest.raises(UsageError, match=f'cannot write to {tmp_path}: File too large'):
      append(recorder, range(1, 5))
    with pytest.raises(UsageError, match='cannot write to'):
      recorder.close()


# --- progress


def show(stream, messages=True):
  shown = progress_lib.Progress(100, 4, stream=stream)
  for step in range(5, 101, 5):
    metrics = {'loss': 2 / step, 'accuracy': step / 100, 'learning_rate': 0.1, 'other': 3.0}
    shown.update(step, 1 + (step - 1) // 25, metrics, 12345.6)
    if messages and step == 30:
      shown.message('a note')
  shown.close()
  shown.close()


def read_pipe(**arguments):
  reader, writer = os.pipe()
  with os.fdopen(writer, 'w') as stream:
    show(stream, **arguments)
  with os.fdopen(reader) as stream:
    return stream.read().splitlines()


def test_a_pipe_gets_the_last_line_of_each_epoch():
  output = read_pipe(messages=False)
  assert [re.match(r'epoch (\d)/4  step (\d+)/100  ', line).groups() for line in output] == [
    ('1', '25'), ('2', '50'), ('3', '75'), ('4', '100'),
  ]  # fmt: skip
  assert output[0].startswith('epoch 1/4  step 25/100  loss 0.0800  accuracy 25.00 %')
  assert '12,346 images/s' in output[0]
  assert output[-1].endswith('0:00 left')
  assert not any(character in ''.join(output) for character in '\r\x1b')


def test_a_message_comes_after_what_it_follows():
  output = read_pipe()
  assert output[2] == 'a note'
  assert output[1].startswith('epoch 2/4  step 30/100')


def test_a_pipe_gets_a_line_every_ten_seconds_in_a_long_epoch(monkeypatch):
  clock = iter(range(10_000))
  monkeypatch.setattr(progress_lib.time, 'monotonic', lambda: next(clock))
  reader, writer = os.pipe()
  with os.fdopen(writer, 'w') as stream:
    shown = progress_lib.Progress(10_000, 1, stream=stream)
    for step in range(1, 101):
      shown.update(step, 1, {}, 1.0)  # a second each, and one for each line
    shown.close()
  with os.fdopen(reader) as stream:
    steps = [int(re.search(r'step (\d+)', line)[1]) for line in stream.read().splitlines()]
  assert all(9 <= b - a <= 11 for a, b in itertools.pairwise(steps[:-1]))
  assert len(steps) == 10
  assert steps[-1] == 100


def read_terminal(columns, **arguments):
  """What a terminal of so many columns (0: it does not say) is sent."""
  master, slave = pty.openpty()
  termios.tcsetwinsize(slave, (24, columns))
  output = []

  def read():  # at the same time, because a terminal holds back who writes more than 4 KiB ahead
    with contextlib.suppress(OSError):  # how the end looks from this side
      while part := os.read(master, 4096):
        output.append(part)

  reader = threading.Thread(target=read)
  reader.start()
  with os.fdopen(slave, 'w') as stream:
    show(stream, **arguments)
  reader.join(timeout=30)
  os.close(master)
  return b''.join(output).decode()


@pytest.mark.parametrize('columns', [140, 80, 40, 0])
def test_a_terminal_gets_one_live_line(columns, monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  output = read_terminal(columns)
  assert output.count('\n') == 2  # after the message and at the end
  assert '\r\x1b[Ka note\r\n' in output
  drawn = [frame.removesuffix('\x1b[K') for frame in output.rstrip().split('\r') if 'step' in frame]
  assert len(drawn) == 21  # one an update, and once more under the message
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
  output = read_terminal(80, messages=False)
  assert output.count('\n') == 4
  assert '\x1b' not in output
