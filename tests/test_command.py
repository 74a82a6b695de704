import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, run_command

FAULTS = """
import resource
import numpy as np
from cnn_jax import command
command.prepare_backend()
def use():
  for _ in range(20):
    np.ones(4_000_000)  # 32 MB, above what glibc keeps by itself
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(keep):
  environment = os.environ | {'CNN_JAX_KEEP_MEMORY': keep, 'GLIBC_TUNABLES': 'glibc.malloc.mmap_threshold=1048576'}
  done = subprocess.run(
    [sys.executable, '-c', FAULTS], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
  )
  return int(done.stdout)


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux has glibc')
def test_freed_memory_is_kept_unless_switched_off():
  assert 5 * _faults('1') < _faults('0')


def test_help_of_every_command_says_what_it_does():
  for name in ('main', 'evaluate', 'predict', 'report', 'export'):
    done = run_command(f'cnn_jax.{name}', '--help')
    assert done.returncode == 0, done.stderr
    assert '--workdir' in done.stdout


def test_the_reader_of_the_output_may_go(digits_run):
  command = f'"{sys.executable}" -m cnn_jax.evaluate --workdir="{digits_run}" | true'
  done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
  assert 'Traceback' not in done.stderr
