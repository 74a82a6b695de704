"""The example files of docs/several_machines.md, as far as they can be checked without the hardware."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from cnn_jax import distribute, main
from tests.faults import pairs
from tests.helpers import ROOT

EXAMPLES = ROOT / 'examples'
SCRIPTS = [*sorted(EXAMPLES.glob('*.sh')), *sorted(EXAMPLES.glob('*.sbatch'))]
QUICK = (
  '--config.epochs=1', '--config.schedule.warmup_epochs=0.5', '--config.model.features=(4,)', '--config.log.tensorboard=False',
  '--config.model.convs_per_block=1', '--config.data.workers=0',
)  # fmt: skip


class Joined(Exception):
  """What `distribute.join` was called with, in place of training."""


@pytest.fixture
def joined(monkeypatch):
  """Calls main with the arguments of an example and returns those of `distribute.join`."""

  def join(*arguments):
    raise Joined(*arguments)

  monkeypatch.setattr(distribute, 'join', join)

  def call(words):
    assert words[:2] == ['-m', 'cnn_jax.main'], words
    with pytest.raises(Joined) as caught:
      main.main(words[2:])  # checks flags and fields
    return caught.value.args

  return call


def _stand_in(directory, name, script):
  """Writes a program in place of the one that has its name."""
  directory.mkdir(exist_ok=True)
  (directory / name).write_text(f'#!/bin/bash\n{script}\n')
  (directory / name).chmod(0o755)


def _run(directory, script, *arguments, **variables):
  path = f'{directory}{os.pathsep}{os.environ["PATH"]}'
  return subprocess.run(
    ['bash', script, *arguments], cwd=ROOT, env=os.environ | {'PATH': path} | variables, capture_output=True, text=True,
    timeout=240, check=False,
  )  # fmt: skip


PRINT = 'printf "%s\\n" "$@"'


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_well_formed(script):
  assert len(SCRIPTS) == 3
  subprocess.run(['bash', '-n', script], check=True, timeout=20)
  if shutil.which('shellcheck'):
    subprocess.run(['shellcheck', '--severity=warning', script], check=True, timeout=60)


def test_one_machine_starts_one_process(tmp_path, joined):
  _stand_in(tmp_path, 'python', PRINT)
  done = _run(tmp_path, EXAMPLES / 'eight_gpus.sh', '--config.seed=3')
  words = done.stdout.splitlines()
  assert words[-1] == '--config.seed=3'
  assert joined(words)[:3] == (None, None, None)


def test_all_hosts_of_a_slice_run_the_command(tmp_path, joined):
  _stand_in(tmp_path, 'gcloud', PRINT)
  _stand_in(tmp_path, 'python3', PRINT)
  done = _run(tmp_path, EXAMPLES / 'tpu_pod.sh', '--config.model.dtype=bfloat16', TPU='slice', ZONE='z', WORKDIR='a b')
  words = done.stdout.splitlines()
  assert words[:5] == ['compute', 'tpus', 'tpu-vm', 'ssh', 'slice'] and '--worker=all' in words
  remote = next(word for word in words if word.startswith('--command=')).removeprefix('--command=cd cnn_jax && ')
  done = subprocess.run(['bash', '-c', f'PATH={tmp_path}:$PATH; {remote}'], capture_output=True, text=True, check=True)
  words = done.stdout.splitlines()
  assert '--workdir=a b' in words and words[-1] == '--config.model.dtype=bfloat16'
  assert joined(words)[:3] == (None, None, None)


def test_the_job_of_kubernetes_starts_numbered_processes_that_find_the_first(joined):
  yaml = pytest.importorskip('yaml')
  service, job = yaml.safe_load_all((EXAMPLES / 'kubernetes.yaml').read_text())
  assert (service['kind'], job['kind']) == ('Service', 'Job')
  name, spec, pod = job['metadata']['name'], job['spec'], job['spec']['template']['spec']
  assert service['spec'] == {'clusterIP': 'None', 'publishNotReadyAddresses': True, 'selector': {'job-name': name}}
  assert spec['completionMode'] == 'Indexed' and spec['completions'] == spec['parallelism']
  assert pod['subdomain'] == service['metadata']['name']
  assert pod['restartPolicy'] == 'Never'  # which podFailurePolicy needs
  [container] = pod['containers']
  assert {mount['name'] for mount in container['volumeMounts']} == {volume['name'] for volume in pod['volumes']}
  for index in range(spec['completions']):
    words = [
      word.replace('$(JOB_COMPLETION_INDEX)', str(index)) for word in (*container['command'], *container['args'])
    ]
    assert words.pop(0) == 'python'
    address, count, number, *_ = joined(words)
    host, _, port = address.partition(':')
    assert (host, count, number) == (f'{name}-0.{service["metadata"]["name"]}', spec['completions'], index)
    assert int(port) == container['ports'][0]['containerPort']


SRUN = """
[ "$1" = --cpus-per-task=64 ] || exit 9
shift
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=0 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 \\
    SLURM_STEP_NUM_NODES=2 "$@" & started[$i]=$!
done
worst=0
for process in "${started[@]}"; do
  wait "$process"; status=$?
  [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
"""


@pytest.mark.faults
def test_the_two_tasks_of_a_slurm_job_train_together(tmp_path):
  programs, workdir = tmp_path / 'programs', tmp_path / 'run'
  _stand_in(programs, 'srun', SRUN)
  _stand_in(programs, 'python', f'exec {sys.executable} "$@"')
  with pairs.free_address() as address:
    done = _run(
      programs, EXAMPLES / 'imagenet.sbatch', *QUICK, CONFIG='configs/digits.py', WORKDIR=str(workdir), SLURM_JOB_ID='7',
      SLURM_CPUS_PER_TASK='64', JAX_COORDINATOR_PORT=address.rpartition(':')[2],
      XLA_FLAGS='--xla_backend_optimization_level=0',
    )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert json.loads((workdir / 'environment.json').read_text())['num_processes'] == 2
  assert (workdir / 'result.json').exists()


@pytest.mark.parametrize(('status', 'queued'), [(0, ''), (2, ''), (3, ''), (143, 'requeue 7\n')])
def test_a_slurm_job_that_can_continue_is_queued_again(tmp_path, joined, status, queued):
  _stand_in(tmp_path, 'srun', f'{PRINT} > {tmp_path}/words; exit {status}')
  _stand_in(tmp_path, 'scontrol', 'echo "$@"')
  done = _run(tmp_path, EXAMPLES / 'imagenet.sbatch', '--config.seed=3', SLURM_JOB_ID='7')
  assert (done.returncode, done.stdout) == (status, queued)
  words = (tmp_path / 'words').read_text().splitlines()
  assert words[:2] == ['--cpus-per-task=1', 'python'] and words[-1] == '--config.seed=3'
  assert joined(words[2:])[:3] == (None, None, None)


def test_every_example_is_named_by_a_page():
  pages = ''.join(page.read_text() for page in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')])
  for path in EXAMPLES.iterdir():
    assert pathlib.Path('examples', path.name).as_posix() in pages
