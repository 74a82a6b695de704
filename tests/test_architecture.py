"""Which parts know which: imports point one way, and files stay small."""

import ast
import functools
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / 'cnn_jax'
SOURCES = [
  path
  for top in ('cnn_jax', 'configs', 'benchmarks', 'experiments', 'examples', 'tests')
  for path in (ROOT / top).rglob('*.py')
]
LINES = {'cnn_jax/main.py': 120, 'cnn_jax/train.py': 380}

# Each module of the package and the modules of ours that it may import at the top of its file or inside functions. A package
# stands for its modules.
ARROWS = {
  'main': {'command', 'config', 'data', 'distribute', 'inspect', 'models', 'peers', 'seeds', 'weights', 'workdirs'},
  'seeds': {
    'checkpoint', 'command', 'config', 'data', 'distribute', 'files', 'peers', 'record', 'report', 'tables', 'train',
    'workdirs',
  },
  'train': {
    'command', 'config', 'data', 'distribute', 'evaluate', 'final_test', 'frozen', 'memory', 'metrics', 'models', 'peers',
    'plan', 'progress', 'record', 'saving', 'signals', 'start', 'state', 'step',
  },
  'memory': {'distribute'},
  'plan': {'config', 'data', 'frozen', 'models', 'optim', 'parts', 'state', 'step'},
  'step': {'data', 'distribute', 'metrics', 'optim', 'parts', 'state'},
  'start': {
    'checkpoint', 'command', 'config', 'data', 'distribute', 'files', 'frozen', 'models', 'record', 'saving', 'state',
    'weights',
  },
  'frozen': {'config', 'data', 'distribute', 'models', 'optim', 'parts', 'progress'},
  'saving': {'checkpoint', 'data', 'distribute', 'evaluate', 'metrics', 'peers'},
  'final_test': {'data', 'distribute', 'files', 'metrics', 'workdirs'},
  'evaluate': {
    'calibration', 'command', 'config', 'data', 'distribute', 'metrics', 'models', 'parts', 'peers', 'pictures', 'run',
  },
  'run': {'checkpoint', 'config', 'data', 'foreign', 'hub', 'models', 'published', 'record', 'rules'},
  'weights': {'foreign', 'hub', 'models', 'published', 'record', 'run'},
  'published': {'config', 'files', 'foreign', 'models'},
  'foreign': {'files', 'models', 'torch_files'},
  'hub': {'files'},
  'torch_files': {'files'},
  'pictures': {'data', 'run'},
  'inspect': {'models', 'ops'},
  'predict': {
    'calibration', 'command', 'config', 'data', 'evaluate', 'inspect', 'models', 'pictures', 'progress', 'run',
  },
  'report': {
    'calibration', 'command', 'config', 'data', 'evaluate', 'files', 'inspect', 'metrics', 'models', 'record',
    'run',
  },
  'export': {'command', 'config', 'data', 'files', 'jaxpr_to_onnx', 'models', 'run'},
  'sweep': {'command', 'config', 'data', 'files', 'main', 'passwords', 'progress', 'record', 'shares', 'tables', 'workdirs'},
  'launch': {'command', 'shares', 'signals'},
  'shares': set(),
  'optim': {'muon'},
  'muon': set(),
  'parts': set(),
  'metrics': set(),
  'calibration': {'metrics'},
  'checkpoint': {'arrays', 'command', 'files'},
  'arrays': set(),
  'record': {'config', 'environment', 'files', 'sinks', 'workdirs'},
  'workdirs': {'files'},
  'environment': {'passwords'},
  'passwords': set(),
  'sinks': {'files', 'passwords'},
  'config': {'data', 'fields', 'files', 'models', 'rules', 'shares', 'small_sets'},
  'fields': {'models'},
  'rules': set(),
  'small_sets': set(),
  'distribute': {'peers'},
  'peers': {'signals'},
  'signals': set(),
  'state': set(),
  'compiled': set(),
  'models': {'ops'},
  'ops': set(),
  'data': {'command', 'distribute', 'files', 'progress', 'signals'},
  'command': {'compiled', 'files', 'passwords', 'signals'},
  'files': set(),
  'progress': set(),
  'tables': set(),
  'jaxpr_to_onnx': set(),
}  # fmt: skip


def _part(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


@functools.cache
def _imports(path):
  """The parts of the package that a file imports, anywhere in it but under TYPE_CHECKING."""
  parts = set()
  tree = ast.parse(path.read_text())
  for branch in ast.walk(tree):
    if isinstance(branch, ast.If) and 'TYPE_CHECKING' in ast.dump(branch.test):
      branch.body = []
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module == 'cnn_jax':
      parts |= {
        alias.name
        for alias in node.names
        if (PACKAGE / alias.name).is_dir() or (PACKAGE / f'{alias.name}.py').is_file()
      }
    elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('cnn_jax.'):
      parts.add(node.module.split('.')[1])
    elif isinstance(node, ast.Import):
      parts |= {alias.name.split('.')[1] for alias in node.names if alias.name.startswith('cnn_jax.')}
  return parts


def test_imports_point_one_way():
  parts = {_part(path) for path in PACKAGE.rglob('*.py')} - {'__init__'}
  assert parts == set(ARROWS)
  for path in PACKAGE.rglob('*.py'):
    if (part := _part(path)) != '__init__':
      extra = _imports(path) - ARROWS[part] - {part}
      assert not extra, f'{path.relative_to(ROOT)} imports {", ".join(sorted(extra))}'


def test_the_arrows_have_no_cycle_and_each_is_used():
  used = {part: set() for part in ARROWS}
  for path in PACKAGE.rglob('*.py'):
    if (part := _part(path)) != '__init__':
      used[part] |= _imports(path) - {part}
  assert used == ARROWS
  done = set()
  while len(done) < len(ARROWS):
    free = {part for part, needs in ARROWS.items() if part not in done and needs <= done}
    assert free, f'a cycle among {sorted(set(ARROWS) - done)}'
    done |= free


def test_data_sources_do_not_import_each_other():
  sources = {'tfds', 'folder', 'tar', 'bundled'}
  for name in sources:
    tree = ast.parse((PACKAGE / 'data' / f'{name}.py').read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    found |= {(node.module or '').split('.')[-1] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not found & (sources - {name}), name


@pytest.mark.parametrize(
  ('module', 'absent'),
  [
    ('cnn_jax', ('jax', 'flax', 'numpy')),
    ('cnn_jax.export', ('flax', 'cnn_jax.models', 'cnn_jax.train')),
    ('cnn_jax.train', ('matplotlib', 'jinja2', 'sklearn', 'tensorflow_datasets', 'cnn_jax.report', 'cnn_jax.predict')),
    ('cnn_jax.predict', ('cnn_jax.train', 'matplotlib', 'tensorflow_datasets')),
    ('cnn_jax.evaluate', ('cnn_jax.train', 'matplotlib', 'tensorflow_datasets')),
    ('cnn_jax.report', ('cnn_jax.train', 'cnn_jax.optim', 'tensorflow_datasets')),
    ('cnn_jax.run', ('cnn_jax.train', 'cnn_jax.evaluate', 'tensorflow_datasets')),
  ],
)
def test_a_module_does_not_pull_in_what_it_does_not_need(module, absent):
  code = f'import {module}, sys; print(*[name for name in {absent!r} if name in sys.modules])'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
  assert done.stdout.split() == []


def test_no_file_is_long():
  for path in SOURCES:
    name = str(path.relative_to(ROOT))
    assert len(path.read_text().splitlines()) <= LINES.get(name, 400), name


def test_pmap_is_called_in_one_file():
  assert [path.name for path in PACKAGE.rglob('*.py') if 'jax.pmap' in path.read_text()] == ['train.py']
