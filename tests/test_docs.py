"""Every command and every example of the README and of docs/ runs, made quick and turned to directories of the test."""

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

from cnn_jax import config as config_lib
from cnn_jax import main, models
from cnn_jax.config import default_config
from experiments import reproduce
from tests.datasets import make_noisy_folder
from tests.helpers import ROOT, call_command

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
QUICK = (
  '--config.epochs=1', '--config.min_steps=0', '--config.schedule.warmup_epochs=0.5',
  '--config.log.tensorboard=False', '--config.log.report=False',
)  # fmt: skip
SMALL = {
  'cnn': ('--config.model.features=(4, 8)', '--config.model.convs_per_block=1'),
  'resnet': ('--config.model.width=4',),
  'plain': ('--config.model.features=(4, 8)',),
  'imagenet': (
    '--config.model.depth=18',
    '--config.model.width=4',
    '--config.data.canvas_size=32',
    '--config.data.image_size=24',
    '--config.augment.image_size=16',
    '--config.batch_size=8',
    '--config.evaluation.batch_size=8',
  ),
  'efficientnet': ('--config.fine_tuning.views=1', '--config.model.frozen_stages=8', '--config.data.image_size=32'),
}
pytestmark = pytest.mark.usefixtures('quick_compilation')

QUICK_COMPILATION = '--xla_backend_optimization_level=0'

# These start several processes or devices, or need the environment that the line sets.
IN_A_SHELL = ('XLA_FLAGS=', 'TFDS_DATA_DIR=', '--coordinator=', 'cnn_jax.launch', 'cnn_jax.sweep', 'python examples/')


def _blocks(page, language):
  return re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.DOTALL)


def _commands():
  for page in PAGES:
    for block in _blocks(page, 'sh'):
      for line in block.splitlines():
        if command := line.partition('  #')[0].strip():
          yield command


SET_UP = [c for c in _commands() if c.startswith(('make ', '. ', 'pip ', 'initdb ', 'optuna-dashboard '))]
CLUSTERS = [c for c in _commands() if re.search(r' examples/\w+\.(sh|sbatch|yaml)$', c)]  # see test_examples.py
COMMANDS = [c for c in dict.fromkeys(_commands()) if c not in (*SET_UP, *CLUSTERS)]


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """A folder of images, the network of docs/adding.md, and room for runs."""
  directory = tmp_path_factory.mktemp('docs')
  make_noisy_folder(directory / 'pictures', 80, (40, 36), 30)
  (directory / 'networks').mkdir()
  network = next(block for block in _blocks(ROOT / 'docs' / 'adding.md', 'python') if 'def create(' in block)
  (directory / 'networks' / 'plain.py').write_text(network)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(models, '__path__', [*models.__path__, str(directory / 'networks')])
    yield directory


def test_the_set_up_commands_are_run_by_the_integration_script():
  script, makefile = (ROOT / '.ci' / 'run').read_text(), (ROOT / 'Makefile').read_text()
  for command in [c for c in SET_UP if c.startswith('make ') and 'ARGS' not in c]:
    assert command.partition(' DIR=')[0] in script
    assert f'\n{command.split()[1]}:' in makefile
  assert '. .venv/bin/activate' in SET_UP


def test_the_examples_of_clusters_exist():
  assert len(CLUSTERS) == 4
  assert all((ROOT / command.split()[-1]).exists() for command in CLUSTERS)


def test_the_extras_exist():
  extras = re.search(r'\[project.optional-dependencies\]\n(.*?)\n\n', (ROOT / 'pyproject.toml').read_text(), re.DOTALL)
  text = '\n'.join(page.read_text() for page in PAGES)
  named = set(re.findall(r"'\.\[([a-z0-9]+)\]'", text))
  assert named
  for name in named:
    assert f'\n{name} = ' in f'\n{extras[1]}'


def _quick_results(places):
  """A file of results whose digits are of a small network, which one epoch cannot miss."""
  rows = json.loads((ROOT / 'experiments' / 'results.json').read_text())
  fields = {'epochs': 1, 'schedule.warmup_epochs': 0.5, 'model.features': [4, 8], 'model.convs_per_block': 1}
  rows['digits']['fields'] = fields
  rows['digits']['test_accuracy'] = {'mean': 0.5, 'std': 0.5, 'n': 3}
  (places / 'results.json').write_text(json.dumps(rows))
  return places / 'results.json'


@pytest.mark.parametrize('command', COMMANDS)
def test_the_command_runs(places, command):
  tfds = os.environ.get('TFDS_DATA_DIR')
  if 'TFDS_DATA_DIR=' in command and not tfds:
    pytest.skip('TFDS_DATA_DIR is not set: there is no prepared TFDS set to train on')
  pictures = places / 'pictures'
  for name, place in (
    ('=DIR', f'={pictures}'), (' PICTURES', f' {pictures / "test" / "day"}'),
    ('$HOME/tensorflow_datasets', f'{tfds}'), ('runs/', f'{places}/'),
  ):  # fmt: skip
    command = command.replace(name, place)
  words = shlex.split(command)
  if {'cnn_jax.main', 'cnn_jax.launch', 'cnn_jax.sweep'} & {*words}:
    network = next((w.partition('=')[2] for w in words if w.startswith('--config.model.name=')), 'cnn')
    network = 'efficientnet' if '--config=configs/photographs.py' in words else network
    network = 'imagenet' if '--config=configs/imagenet.py:fast' in words else network
    words += [*QUICK, *SMALL[network]]
    if not any(word.startswith('--workdir') for word in words):
      words.append(f'--workdir={places / "run"}-{abs(hash(command))}')
  if 'TFDS_DATA_DIR=' in command:
    words.append('--config.data.validation=0.95')
  if 'cnn_jax.sweep' in words:
    words += ['--trials=2', '--seeds=1']
  if 'experiments.reproduce' in words:
    words += [f'--results={_quick_results(places)}', f'--workdir={places / "reproduced"}']
  if any(sign in command for sign in IN_A_SHELL):
    variables = {'XLA_FLAGS': ''}
    while re.match('[A-Z_]+=', words[0]):
      name, _, value = words.pop(0).partition('=')
      variables[name] = value
    variables['XLA_FLAGS'] += f' {QUICK_COMPILATION}'
    line = shlex.join(words)
    if '--process_id=' in line:
      line = f'({line.replace("--process_id=0", "--process_id=1")} &) ; {line}'  # the other process
    path = f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(
      line, shell=True, cwd=ROOT, env=os.environ | variables | {'PATH': path},
      capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
  else:
    assert words[:2] == ['python', '-m']
    done = call_command(*words[2:])
  assert done.returncode == 0, done.stderr
  assert done.stdout


@pytest.mark.parametrize('page', [ROOT / 'README.md', ROOT / 'docs' / 'adding.md'], ids=lambda page: page.name)
def test_the_python_examples_run(places, page, monkeypatch, capsys):
  """In one namespace per example, on a run that the commands above, or this test, have left."""
  monkeypatch.chdir(places)
  run = places / 'runs' / 'digits'
  if not run.exists():
    config = config_lib.load(f'{ROOT}/configs/digits.py', [*QUICK, *SMALL['cnn']])
    main.train_and_evaluate(config, run)
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(places / 'photograph.jpg')
  examples = [block for block in _blocks(page, 'python') if 'def create(' not in block]
  assert examples
  for example in examples:
    capsys.readouterr()
    exec(compile(example, page.name, 'exec'), {'__name__': '__main__'})
    assert capsys.readouterr().out


def test_links_lead_somewhere():
  for page in [
    *PAGES,
    ROOT / 'CHANGELOG.md',
    *(ROOT / 'experiments').rglob('*.md'),
    *(ROOT / 'benchmarks').rglob('*.md'),
  ]:
    for link in re.findall(r'\]\(([^)#\s]+)', page.read_text()):
      assert link.startswith('https://') or (page.parent / link).exists(), (page, link)


def test_the_results_are_those_of_the_record():
  page = (ROOT / 'README.md').read_text()
  assert reproduce.page(page) == page


def test_every_field_that_the_pages_name_exists():
  fields = {field for field, _ in config_lib.leaves(default_config())} | {
    f'model.{field}' for name in models.names() for field in models.default_config(name)
  }
  for page in PAGES:
    for field in re.findall(r'--config\.([a-z_.0-9]+)=', page.read_text()):
      assert field in fields, (page, field)
