"""Processes and devices in any arrangement take the same steps, each reads its own images, and any of them resumes."""

import collections
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from cnn_jax.data.feed import epoch_indices
from tests.faults import pairs
from tests.faults.tools import ROOT, folder_arguments, run_command, start, stop, wait_for, write_photographs
from tests.hosts_worker import BATCH, EPOCHS, SIZES
from tests.test_launch import runs

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def _train(output, processes, devices, *names):
  """Trains the named runs and returns what each process has counted, and the lines of the first."""
  flags = f'--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}'
  with pairs.free_address() as address:
    started = [
      subprocess.Popen(
        [sys.executable, '-m', 'tests.hosts_worker', output, address, str(processes), str(i), *names],
        cwd=ROOT, env=os.environ | {'XLA_FLAGS': flags}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      )
      for i in range(processes)
    ]  # fmt: skip
    ended = pairs.end(started, 200)
  assert [status for status, _, _ in ended] == [0] * processes, ended
  assert 'epoch' in ended[0][1]
  assert not any('epoch' in stdout for _, stdout, _ in ended[1:])  # only the first one reports
  return [json.loads((output / f'counts-{i}.json').read_text()) for i in range(processes)], ended[0][1]


def _points(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def _check_counts(counts, name, epochs):
  """Every example of the order, and of each evaluation, was read by exactly one process."""
  order = np.concatenate([epoch_indices(SIZES['train'], BATCH, 0, epoch).ravel() for epoch in range(epochs)])
  for split, expected in (('train', order), ('validation', epochs), ('test', 1)):
    total = collections.Counter()
    for process in counts:
      total.update({int(index): count for index, count in process[name][split].items()})
    whole = {index: expected for index in range(SIZES[split])} if isinstance(expected, int) else expected.tolist()
    assert total == collections.Counter(whole), split


def test_any_arrangement_takes_the_same_steps_reads_each_image_once_and_continues_the_run_of_another(tmp_path):
  done, per_epoch = 0, SIZES['train'] // BATCH  # epochs that the runs of `chain` have saved
  for processes, devices, last in ((2, 2, 2), (1, 4, 2), (4, 1, 2), (2, 1, 0)):
    place, chain = f'{processes}x{devices}', f'chain+{last}' if last else 'chain'
    names = (f'{place}/resident', f'{place}/streamed') if last else ()  # other batches per device round differently
    counts, printed = _train(tmp_path, processes, devices, *names, chain)
    if names:
      _check_counts(counts, names[1], EPOCHS)
      assert _points(tmp_path / names[0]) == _points(tmp_path / names[1])

    epochs = counts[0][chain]['epochs']
    assert all(process[chain]['epochs'] == epochs for process in counts)
    assert epochs[0] == done + 1, 'what was saved is lost'
    resumed = re.search(rf'Resuming at step (\d+) of {EPOCHS * per_epoch}\.', printed)
    assert (int(resumed[1]) // per_epoch if resumed else 0) == done  # it is saved within epochs too
    done = epochs[-1] - 1 if last else EPOCHS  # the last validation came before its checkpoint
  whole = _points(tmp_path / '1x4' / 'resident')
  for name in ('2x2/resident', '4x1/resident', 'chain'):
    points = _points(tmp_path / name)
    assert [(p['step'], p['split']) for p in points] == [(p['step'], p['split']) for p in whole]
    for i, (point, other) in enumerate(zip(points, whole, strict=True)):
      # Rounding grows from step to step.
      assert point['loss'] == pytest.approx(other['loss'], rel=1e-5 if i < 10 else 1e-3), (name, point)


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a process that its parent has died')
def test_the_launcher_ends_all_of_them_whatever_happens_and_its_command_continues(tmp_path):
  """Process 0 is stopped; the launcher is killed; then all end as usual."""
  pictures = write_photographs(tmp_path / 'pictures', count=40)
  arguments = folder_arguments(
    pictures, tmp_path / 'w', epochs=30, data__resident='never', checkpoint__every_minutes=1e-9
  )
  command = ['cnn_jax.launch', '--processes=2', '--devices=2', f'--heartbeat_seconds={pairs.HEARTBEAT}', *arguments]

  def steps():
    file = tmp_path / 'w' / 'metrics.jsonl'
    return file.read_text().count('\n') if file.exists() else 0

  launcher, before = start(*command), steps()
  wait_for(lambda: steps() > before + 4)
  children = _children(launcher.pid)
  assert len(children) == 2
  os.kill(children[0], signal.SIGSTOP)
  _, stderr = launcher.communicate(timeout=40)
  assert launcher.returncode == 143, stderr
  assert stderr == '[1] process 0 has ended or does not answer; the same command continues from what was saved last.\n'
  assert not any(map(runs, children))

  launcher, before = start(*command), steps()
  wait_for(lambda: steps() > before + 4)
  children = _children(launcher.pid)
  _, stdout, _ = stop(launcher, signal.SIGKILL)
  assert 'Resuming at step' in stdout
  wait_for(lambda: not any(map(runs, children)), timeout=30)

  done = run_command(*command)
  assert done.returncode == 0, done.stderr
  assert 'Resuming at step' in done.stdout and 'Done: ' in done.stdout
  assert done.stderr == ''
  assert (tmp_path / 'w' / 'result.json').exists()


def _children(pid):
  """The processes that a process has started, in their order."""
  with open(f'/proc/{pid}/task/{pid}/children') as file:
    return [int(word) for word in file.read().split()]
