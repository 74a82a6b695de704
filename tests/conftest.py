"""Settings that every test shares, and the small runs that several of them read."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# One cache of compiled programs for all test processes: most compile the same few.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.pytest_cache' / 'compiled'))


def run_command(*arguments, timeout=120, **environment):
  """Runs a command of the project from its top folder, as a user does."""
  return subprocess.run(
    [sys.executable, '-m', *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {name: str(value) for name, value in environment.items()},
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory):
  """The workdir of a complete short run on the digits."""
  workdir = tmp_path_factory.mktemp('runs') / 'digits'
  done = run_command(
    'cnn_jax.main', '--config=configs/digits.py', '--config.epochs=12', '--config.model.convs_per_block=1',
    f'--workdir={workdir}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return workdir
