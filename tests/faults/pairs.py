"""Two processes that train together on one machine."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time

from tests.faults.tools import ROOT

# A run of 12 epochs of 20 steps with every kind of state, and a checkpoint and a validation per epoch.
TINY = (
  '--config=configs/digits.py',
  '--config.epochs=12',
  '--config.model.convs_per_block=1',
  '--config.model.features=(4,)',
  '--config.model.dropout=0.2',
  '--config.schedule.warmup_epochs=1.0',
  '--config.evaluation.every_epochs=1',
  '--config.evaluation.ema_decay=0.9',
  '--config.checkpoint.every_epochs=1',
  '--config.log.every_steps=7',
  '--config.log.tensorboard=False',
  '--config.log.report=False',
)
HEARTBEAT = 4
MAIN = 'from cnn_jax import command, main\ncommand.run(main.main)\n'
LIMITED = 'import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n'  # as on a nearly full disk


@contextlib.contextmanager
def free_address():
  """An address on this machine that nobody else gets while the block runs, but JAX's coordinator."""
  with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind(('127.0.0.1', 0))
    yield f'127.0.0.1:{s.getsockname()[1]}'


def start_pair(workdirs, *arguments, devices=1, own=((), ()), code=('', '')):
  """Starts the two processes of a run.

  Args:
    workdirs: of process 0 and 1.
    arguments: of both.
    devices: of each.
    own: arguments of each alone.
    code: that each runs before.
  """
  with free_address() as coordinator:
    pass
  flags = f'--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}'
  commands = [['-c', before + MAIN] if before else ['-m', 'cnn_jax.main'] for before in code]

  return [
    subprocess.Popen(
      [
        sys.executable, *commands[i], *arguments, *own[i], f'--workdir={workdirs[i]}',
        f'--coordinator={coordinator}', '--num_processes=2', f'--process_id={i}', f'--heartbeat_seconds={HEARTBEAT}',
      ],
      cwd=ROOT, env=os.environ | {'XLA_FLAGS': flags}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip


def wait_for_steps(processes, workdir, lines=1, timeout=100):
  """Waits until a run has logged some points; fails if a process ends before."""
  path, end = pathlib.Path(workdir) / 'metrics.jsonl', time.monotonic() + timeout
  while not (path.exists() and path.read_text().count('\n') >= lines):
    ended = [process for process in processes if process.poll() is not None]
    assert not ended and time.monotonic() < end, [(p.returncode, p.communicate()[1][-1000:]) for p in ended]
    time.sleep(0.02)


def end(processes, timeout):
  """Waits for the end of both and returns (status, stdout, stderr) of each; kills them if it takes too long."""
  limit, ended = time.monotonic() + timeout, []
  try:
    for process in processes:
      stdout, stderr = process.communicate(timeout=max(0.1, limit - time.monotonic()))
      ended.append((process.returncode, stdout, stderr))
  finally:
    kill(processes)
  return ended


def kill(processes):
  """Kills what still runs, and closes the pipes."""
  for process in processes:
    process.kill()
    if not process.stdout.closed:
      process.communicate()


def is_one_line(stderr):
  """Whether standard error holds at most one line that is not a warning, and nothing native."""
  lines = [line for line in stderr.splitlines() if not line.startswith(('warning: ', 'Waiting for '))]
  return len(lines) <= 1 and 'Traceback' not in stderr and '***' not in stderr
