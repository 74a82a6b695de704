"""Hostile workdirs and exports on every command that reads them.

No execution, no file written outside, no hang, no traceback. FAULTS_MUTATIONS sets the number of mutations (default: 44),
FAULTS_SEED which ones. Each kind has its turn.
"""

import os
import random
import shutil

import pytest

from tests.faults import mutations, mutations_of_files
from tests.faults.tools import DIGITS, call_command
from tests.faults.warm import Reader

pytestmark = pytest.mark.faults

_COUNT = int(os.environ.get('FAULTS_MUTATIONS', '44'))
_SEED = int(os.environ.get('FAULTS_SEED', '0'))
assert mutations_of_files  # it registers its kinds when it is imported
_KINDS = [*mutations.WORKDIR, *mutations.EXPORT]


@pytest.fixture(scope='module')
def healthy(tmp_path_factory):
  """A folder with a complete run, its export and a picture."""
  folder = tmp_path_factory.mktemp('healthy')
  done = call_command('cnn_jax.main', *DIGITS, '--config.log.report=True', f'--workdir={folder / "run"}')
  assert done.returncode == 0, done.stderr
  output = f'--output={folder / "model.stablehlo"}'
  assert call_command('cnn_jax.export', f'--workdir={folder / "run"}', output).returncode == 0
  from PIL import Image

  Image.new('L', (8, 8), 99).save(folder / 'picture.png')
  return folder


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
  """The process that reads; it may write into one folder and into the caches."""
  base = tmp_path_factory.getbasetemp()
  caches = (os.path.expanduser(f'~/{name}') for name in ('.cache/cnn_jax', '.cache/matplotlib', '.config/matplotlib'))
  reader = Reader([base / 'out', os.environ['JAX_COMPILATION_CACHE_DIR'], *caches])
  yield reader
  reader.close()


def _contents(folder):
  return {
    path.relative_to(folder): path.read_bytes() if path.is_file() and not path.is_symlink() else os.readlink(path)
    for path in sorted(folder.rglob('*'))
    if path.is_symlink() or path.is_file()
  }


def _problem(answer):
  """What is wrong with an answer, or ''."""
  status, stderr = answer['status'], answer['stderr']
  if answer['events']:
    return f'forbidden: {answer["events"]}'
  if status not in (0, 2) or 'Traceback' in stderr:
    return f'status {status}: {stderr[-1500:]}'
  lines = stderr.removesuffix('\n').split('\n')
  if status == 2 and [line for line in lines if line.startswith('error: ')] != lines[-1:]:
    return f'not one line: {stderr[-1500:]}'
  if any(len(line) > 5000 or not line.isprintable() for line in lines):
    return f'a line that is long or not printable: {stderr[:300]!r}'
  return ''


@pytest.mark.parametrize('number', range(_COUNT))
def test_a_mutation_is_harmless(number, healthy, reader, tmp_path, tmp_path_factory):
  kind = _KINDS[number % len(_KINDS)]
  rng = random.Random(f'{_SEED} {number}')
  out = tmp_path_factory.getbasetemp() / 'out'
  shutil.rmtree(out, ignore_errors=True)
  out.mkdir()
  (tmp_path / 'victim').mkdir()
  (tmp_path / 'victim' / 'precious.txt').write_text('precious')
  workdir, model, canary = tmp_path / 'run', tmp_path / 'model.stablehlo', tmp_path / 'canary'
  shutil.copytree(healthy / 'run', workdir)
  shutil.copy(healthy / 'model.stablehlo', model)
  if kind in mutations.WORKDIR:
    mutations.WORKDIR[kind](rng, workdir, canary)
    calls = [
      ('cnn_jax.predict', f'--workdir={workdir}', healthy / 'picture.png'),
      ('cnn_jax.evaluate', f'--workdir={workdir}'),
      ('cnn_jax.load', workdir),
      ('cnn_jax.report', f'--workdir={workdir}', f'--output={out / "page.html"}'),
      ('cnn_jax.export', f'--workdir={workdir}', f'--output={out / "model.stablehlo"}'),
      ('cnn_jax.predict', f'--workdir={workdir}', '--checkpoint=best', '--json', '--tta', healthy / 'picture.png'),
    ]
  else:
    mutations.EXPORT[kind](rng, model, canary)
    calls = [('cnn_jax.export.load', model)]
  before = _contents(tmp_path)
  problems = []
  for call in calls:
    if problem := _problem(reader.call(*call)):
      problems.append(f'{call[0]}: {problem}')
  assert not problems, '\n\n'.join([kind, *problems])
  assert not canary.exists()
  assert _contents(tmp_path) == before
  page = out / 'page.html'
  assert not page.exists() or page.stat().st_size < 5_000_000
  if kind == 'planted_links':  # the default place of the page is a link here
    assert reader.call('cnn_jax.report', f'--workdir={workdir}')['status'] == 0
    assert (tmp_path / 'victim' / 'precious.txt').read_text() == 'precious'


def test_the_observer_notices_what_it_must(tmp_path):
  """Otherwise the tests above could not fail."""
  (tmp_path / 'evil.py').write_text(
    'import os, pickle, sys\ndef main(argv):\n  os.system("true") if argv[0] == "run" else open(argv[0], "w").close()\n'
  )
  os.environ['PYTHONPATH'] = str(tmp_path)
  reader = Reader([tmp_path / 'out'])
  try:
    assert 'os.system' in _problem(reader.call('evil', 'run'))
    assert 'open' in _problem(reader.call('evil', tmp_path / 'x'))
    (tmp_path / 'out').mkdir()
    assert not _problem(reader.call('evil', tmp_path / 'out' / 'x'))
  finally:
    del os.environ['PYTHONPATH']
    reader.close()
