"""Every command of the README runs, made quick and turned to places of the test's own."""

import ast
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

BLOCKS = re.findall(r'```sh\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
COMMANDS = [line.split('  #')[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
QUICK = (
  " --config.epochs=2 --config.min_steps=0 --config.model.convs_per_block=1 --config.schedule.warmup_epochs=1.0 --config.model.features='(4, 8)'"
  ' --config.log.tensorboard=False --config.log.report=False'
)


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """A folder of pictures and a place for runs."""
  directory = tmp_path_factory.mktemp('readme')
  random = np.random.default_rng(0)
  for split in ('train', 'test'):
    for level, name in ((60, 'night'), (190, 'day')):
      (directory / 'pictures' / split / name).mkdir(parents=True)
      for i in range(100):
        pixels = np.clip(random.normal(level, 30, (40, 36, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(directory / 'pictures' / split / name / f'{i}.png')
  return directory


def test_the_set_up_commands_are_run_by_the_integration_script():
  script = (ROOT / '.ci' / 'run').read_text()
  makefile = (ROOT / 'Makefile').read_text()
  for command in [c for c in COMMANDS if c.startswith('make ')]:
    assert command in script
    assert f'\n{command.split()[1]}:' in makefile
  assert '. .venv/bin/activate' in COMMANDS


def _quick_result(places):
  """A file of results whose digits are of a small network, which two epochs cannot miss."""
  rows = json.loads((ROOT / 'experiments' / 'results.json').read_text())
  fields = (argument.removeprefix('--config.').split('=') for argument in shlex.split(QUICK))
  rows['digits']['fields'] = {name: ast.literal_eval(value) for name, value in fields}
  rows['digits']['test_accuracy'] = {'mean': 0.5, 'std': 0.5, 'n': 3}
  (places / 'results.json').write_text(json.dumps(rows))
  return places / 'results.json'


@pytest.mark.parametrize('command', [c for c in COMMANDS if not c.startswith(('make ', '. '))])
def test_the_command_runs(places, command):
  tfds = os.environ.get('TFDS_DATA_DIR')
  if 'TFDS_DATA_DIR=' in command and not tfds:
    pytest.skip('TFDS_DATA_DIR is not set: there is no prepared TFDS set to train on')
  if '--process_id=' in command:
    other = command.replace('--process_id=0', '--process_id=1')
    command = f'({other}{QUICK} &) ; {command}'  # the other host's
  if 'cnn_jax.main' in command:
    command += QUICK
  if 'experiments.sweep' in command:
    command += QUICK + ' --trials=2 --seeds=1'
  if 'experiments.reproduce' in command:
    command += f' --results={_quick_result(places)} --workdir={places / "reproduced"}'
  if 'TFDS_DATA_DIR=' in command:
    command += ' --config.data.validation=0.95'
  pictures = places / 'pictures'
  for name, place in (
    ('=DIR', f'={pictures}'), (' PICTURES', f' {pictures}'), ('=TFDS ', f'={tfds} '), ('=runs/', f'={places}/'),
  ):  # fmt: skip
    command = command.replace(name, place)
  if 'cnn_jax.main' in command and '--workdir' not in command:
    command += f' --workdir={places / "run"}-{abs(hash(command))}'
  path = f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
  done = subprocess.run(
    command, shell=True, cwd=ROOT, env=os.environ | {'PATH': path},
    capture_output=True, text=True, timeout=240, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout
