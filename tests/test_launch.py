"""The launcher: what its processes get and print, and that all of them end; tests/faults/test_hosts.py trains with it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from cnn_jax import UsageError, launch, shares
from tests.helpers import ROOT

WHOLE = shares.Share(None, None, True)


@pytest.fixture
def run(monkeypatch, capfd):
  """Supervises small programs; returns the status and what is printed on both streams."""
  monkeypatch.setattr(launch, '_SECONDS_TO_END', 0.3)

  def run(*programs, heartbeat=0.2):
    commands = [[sys.executable, '-S', '-c', program] for program in programs]
    status = launch.supervise(commands, [{}] * len(programs), [WHOLE] * len(programs), heartbeat)
    return status, *capfd.readouterr()

  return run


SAY = 'import sys, time; print({!r}, file=sys.stderr)'


def test_the_first_process_is_shown_as_it_is_and_the_others_with_their_numbers(run):
  first = 'import sys; print("epoch 1"); print("both", file=sys.stderr)'
  second = 'print("own"); print("both"); print("[Gloo] Rank 1"); print("own"); print("no end", end="")'
  assert run(first, second) == (0, 'epoch 1\n', 'both\n[1] own\n[1] own\n[1] no end\n')


def test_the_line_of_a_failing_process_is_shown_once_and_its_status_returned(run):
  line = 'error: the disk is full.'
  first = f'{SAY.format("process 1: " + line)}; time.sleep(0.2); sys.exit(2)'
  status, _, stderr = run(first, f'{SAY.format(line)}; sys.exit(2)')
  assert status == 2
  assert stderr in (f'process 1: {line}\n', f'[1] {line}\n')


LEFT = 'the same command continues from what was saved last.'


@pytest.mark.parametrize(('name', 'status'), [('SIGKILL', 143), ('SIGTERM', 143), ('SIGABRT', 134)])
def test_a_process_that_a_signal_ends_is_named_and_the_others_end(run, name, status):
  first = f'{SAY.format("process 1 has ended or does not answer; " + LEFT)}; time.sleep(60)'
  second = f'import os, signal, time; time.sleep(0.2); os.kill(os.getpid(), signal.{name})'
  started = time.monotonic()
  found, _, stderr = run(f'import time; time.sleep(0.4); {first}', second)
  assert found == status
  assert stderr == f'process 1 was ended by {name}; {LEFT}\n'
  assert time.monotonic() - started < 5


def test_a_process_that_is_stopped_continues_if_another_one_fails(run):
  stopped = f'import os, signal; os.kill(os.getpid(), signal.SIGSTOP); {SAY.format("awake")}'
  status, _, stderr = run(f'{SAY.format("alone")}; time.sleep(0.3); sys.exit(3)', stopped, heartbeat=5.0)
  assert (status, stderr) == (3, 'alone\n[1] awake\n')


def test_signals_reach_all_processes(run, tmp_path):
  program = f"""
import os, signal, sys, time
def end(number, frame):
  print('stopped by', number, file=sys.stderr)
  sys.exit(143)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
  signal.signal(number, end)
open(f"{tmp_path}/{{os.getpid()}}", "w").close()
time.sleep(60)
"""

  def send(number):
    while len(ready := list(tmp_path.iterdir())) < 2:
      time.sleep(0.05)
    for path in ready:
      path.unlink()
    os.kill(os.getpid(), number)

  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    before = signal.getsignal(number)
    threading.Thread(target=send, args=(number,)).start()
    assert run(program, program, heartbeat=10.0) == (143, '', f'stopped by {int(number)}\n')
    assert signal.getsignal(number) is before


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a process that its parent has died')
def test_nothing_runs_on_if_the_launcher_is_killed(tmp_path):
  program = f'import os, pathlib, time; pathlib.Path(r"{tmp_path}", str(os.getpid())).touch(); time.sleep(60)'
  code = f"""
import sys
from cnn_jax import launch, shares
part = shares.Share(None, None, True)
launch.supervise([[sys.executable, '-c', {program!r}]] * 2, [{{}}] * 2, [part] * 2, 20)
"""
  launcher = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
  end = time.monotonic() + 30
  while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
    time.sleep(0.05)
  launcher.kill()
  launcher.wait()
  pids = [int(path.name) for path in tmp_path.iterdir()]
  assert len(pids) == 2
  while any(map(runs, pids)) and time.monotonic() < end:
    time.sleep(0.05)
  assert not any(map(runs, pids))


def runs(pid):
  """Whether a process runs; one that has ended may still be listed."""
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rpartition(')')[2].split()[0] not in 'ZX'  # nobody may wait for it here
  except FileNotFoundError:
    return False


def test_the_port_is_reserved_for_the_coordinator():
  with launch._reserved_port() as address:
    host, _, port = address.rpartition(':')
    with socket.socket() as other, pytest.raises(OSError, match='in use'):
      other.bind((host, int(port)))
    with socket.socket() as coordinator:
      coordinator.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
      coordinator.bind((host, int(port)))
      coordinator.listen()
      with socket.create_connection((host, int(port)), timeout=5):
        pass


@pytest.fixture
def started(monkeypatch):
  """What the command starts."""
  found = []
  monkeypatch.setattr(launch, 'supervise', lambda *arguments: found.append(arguments) or 0)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 3}, raising=False)
  for name in ('XLA_FLAGS', 'JAX_PLATFORMS', 'XLA_PYTHON_CLIENT_PREALLOCATE'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  return found


def test_processes_get_their_numbers_and_divide_the_cores(started, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_x=1')
  assert (
    launch.main(['--processes=2', '--devices=3', '--', '--config=c.py', '--workdir=w', '--heartbeat_seconds=5']) == 0
  )
  [(commands, variables, parts, heartbeat)] = started
  assert heartbeat == 5.0
  address = variables[0]['JAX_COORDINATOR_BIND_ADDRESS']
  for i, words in enumerate(commands):
    assert words[1:5] == ['-m', 'cnn_jax.main', '--config=c.py', '--workdir=w']
    assert {*words[5:]} == {
      '--heartbeat_seconds=5.0', f'--coordinator={address}', '--num_processes=2', f'--process_id={i}',
    }  # fmt: skip
  assert {v['XLA_FLAGS'] for v in variables} == {'--xla_x=1 --xla_force_host_platform_device_count=3'}
  assert [part.cores for part in parts] == [(0, 1), (2, 3)]
  assert not any('CUDA_VISIBLE_DEVICES' in v for v in variables)


def test_processes_divide_the_gpus(started, monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1,2,3,4')
  launch.main(['--processes=2'])
  launch.main(['--processes=2', '--devices=1'])
  found = [[part['CUDA_VISIBLE_DEVICES'] for part in variables] for _, variables, _, _ in started]
  assert found == [['0,1', '2,3,4'], ['0', '1']]
  assert not any('XLA_PYTHON_CLIENT_PREALLOCATE' in part for _, variables, _, _ in started for part in variables)
  with pytest.raises(
    UsageError, match='2 processes with 3 GPUs each need 6, but there are 5; start fewer, or set JAX_'
  ):
    launch.main(['--processes=2', '--devices=3'])
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert launch.main(['--processes=2', '--devices=3']) == 0


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--processes'),
    (['--processes=0'], '--processes is 0; it must be at least 1'),
    (['--processes=100000'], r'--processes is 100000, but this machine has \d+ cores?; make it at most \d+'),
    (['--processes=2', '--devices=-1'], '--devices is -1; it must be at least 1'),
    (['--processes=2', '--process_id=1'], 'leave out --process_id=1; cnn_jax.launch sets it'),
    (['--processes=2', '--coordinator', 'a:1'], 'leave out --coordinator; cnn_jax.launch sets it'),
  ],
)
def test_wrong_arguments_are_one_line(started, arguments, message):
  with pytest.raises(UsageError, match=message):
    launch.main(arguments)
  assert started == []
