"""Log points: every point once in every sink, and the same bytes however often the run was interrupted."""

import json
import os
import struct

import numpy as np
import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from cnn_jax import UsageError, record
from tests.helpers import EVERY_POINT, append_points, largest_file, open_recorder

# --- metrics.jsonl and timing.jsonl


def lines(workdir, name='metrics.jsonl'):
  return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_a_line_is_exactly_what_was_measured(tmp_path):
  with open_recorder(tmp_path) as recorder:
    loss = np.float32(0.1)
    recorder.append(5, 1, 'train', {'loss': loss, 'norm': float('nan')}, {'seconds': 2.5})
    (line,) = lines(tmp_path)  # it is there before the file is closed
    assert line == {'step': 5, 'epoch': 1, 'split': 'train', 'loss': float(loss), 'norm': None}
    assert np.float32(line['loss']).tobytes() == loss.tobytes()
    assert lines(tmp_path, 'timing.jsonl') == [{'step': 5, 'epoch': 1, 'split': 'train', 'seconds': 2.5}]
  assert sorted(path.name for path in tmp_path.iterdir()) == ['metrics.jsonl', 'timing.jsonl']


CUTS = [
  b'', b'{"step": 7, "epoch": 2, "spl', b'{"step": 3, "split": "train"}', b'\0\0\0\n', b'\xff\n', b'[' * 9999 + b'\n',
  b'{"step": "x", "split": "train"}\n', b'{"step": null, "split": ["train"]}\n', b'7\n',
  b'{"step": 3, "split": "train", "loss": "high"}\n', b'{"step": 3, "split": "train", "loss": 1' + b'0' * 400 + b'}\n', b'{"step": 3, "split": "train", "loss": NaN}\n',
]  # fmt: skip


@pytest.mark.parametrize('cut', CUTS)
def test_an_interrupted_record_ends_with_the_same_bytes(tmp_path, cut):
  """Steps 1-8 without a break; and 1-6, an end without warning, then 5-8 from a checkpoint of step 4."""
  whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
  for workdir, parts in ((whole, [(0, range(1, 9))]), (resumed, [(0, range(1, 7)), (4, range(5, 9))])):
    workdir.mkdir()
    for restored, steps in parts:
      with open_recorder(workdir, restored) as recorder:
        if restored:  # the evaluation of the restored step is repeated
          recorder.append(restored, 2, 'validation', {'accuracy': 1 / restored})
        append_points(recorder, steps)
        recorder.sync()
      if workdir == resumed and not restored:
        for name in ('metrics.jsonl', 'timing.jsonl'):
          with (workdir / name).open('ab') as file:
            file.write(cut)
  assert (resumed / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
  assert (resumed / 'timing.jsonl').read_bytes() == (whole / 'timing.jsonl').read_bytes()
  points = record.read_points(resumed)
  assert points == lines(whole)
  keys = [(point['step'], point['split']) for point in points]
  assert len(keys) == len(set(keys)) == 12


def test_making_a_recorder_changes_nothing_and_other_processes_write_nothing(tmp_path):
  with open_recorder(tmp_path) as recorder:
    append_points(recorder, range(1, 5))
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  open_recorder(tmp_path, step=2)
  with open_recorder(tmp_path, step=2, tensorboard=True, trackers=('wandb',), primary=False) as recorder:
    append_points(recorder, range(3, 5))
    recorder.sync()
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before
  assert sorted(path.name for path in tmp_path.iterdir()) == ['metrics.jsonl', 'timing.jsonl']


@pytest.mark.parametrize('tensorboard', [False, True])
def test_a_full_disk_is_one_line(tmp_path, tensorboard):
  recorder = open_recorder(tmp_path, tensorboard=tensorboard).__enter__()
  with largest_file(150):  # enough for one line, but not for its event
    with pytest.raises(UsageError, match=f'cannot write to {tmp_path}: File too large'):
      append_points(recorder, range(1, 5))
    with pytest.raises(UsageError, match='cannot write to'):
      recorder.close()


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / 'timing.jsonl').mkdir()
  with pytest.raises(UsageError, match='cannot write to .*: Not a regular file'), open_recorder(tmp_path):
    pass


def test_points_are_read_as_they_were_logged(tmp_path):
  assert record.read_points(tmp_path) == []
  with open_recorder(tmp_path) as recorder:
    recorder.append(5, 1, 'train', {'loss': 0.5, 'norm': float('inf')})
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(b''.join(CUTS))
  assert record.read_points(tmp_path) == [{'step': 5, 'epoch': 1, 'split': 'train', 'loss': 0.5, 'norm': None}]
  (tmp_path / 'metrics.jsonl').unlink()
  os.mkfifo(tmp_path / 'metrics.jsonl')
  with pytest.raises(UsageError, match='cannot read .*metrics.jsonl: Not a regular file'):
    record.read_points(tmp_path)


# --- TensorBoard


def read_events(file):
  """The events of a TensorBoard file, with the checksums of its format checked."""
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
  for step, steps in ((0, range(1, 7)), (4, range(5, 9))):
    with open_recorder(tmp_path, step, tensorboard=True) as recorder:
      append_points(recorder, steps)
      recorder.sync()
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
  assert purges == [1, 5]
  assert sorted(scalars) == EVERY_POINT


def test_tensorboard_events_are_those_of_tensorboardx(tmp_path):
  with SummaryWriter(str(tmp_path / 'theirs'), purge_step=3) as writer:
    writer.add_scalar('train/loss', 0.1, 4, display_name='')
  (tmp_path / 'ours').mkdir()
  with open_recorder(tmp_path / 'ours', step=2, tensorboard=True) as recorder:
    recorder.append(4, 1, 'train', {'loss': 0.1})

  def scalars(name):
    (file,) = (tmp_path / name).glob('events.out.tfevents.*')
    return [
      (event.step, event.session_log.status, [(value.tag, value.simple_value) for value in event.summary.value])
      for event in read_events(file)
      if not event.file_version
    ]

  assert scalars('ours') == scalars('theirs') == [(3, 1, []), (4, 0, [('train/loss', np.float32(0.1))])]
