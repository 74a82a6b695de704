"""The package as it is installed: without the checkout."""

import os
import subprocess
import sys
import zipfile

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """A directory with the contents of the wheel and nothing else."""
  directory = tmp_path_factory.mktemp('wheel')
  build = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--no-index']
  # From a copy, since building leaves files in the source tree.
  subprocess.run(
    ['cp', '-r', *(ROOT / name for name in ('pyproject.toml', 'README.md', 'LICENSE', 'cnn_jax')), directory],
    check=True,
  )
  done = subprocess.run([*build, '--wheel-dir', directory, directory], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  (wheel,) = directory.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(directory / 'site')
  return directory / 'site'


def _run(site, cwd, *arguments):
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    cwd=cwd, env=os.environ | {'PYTHONPATH': str(site), 'PYTHONSAFEPATH': '1'},
    capture_output=True, text=True, timeout=120, check=False,
  )  # fmt: skip


def test_every_file_of_the_package_is_in_the_wheel(site):
  wanted = {
    path.relative_to(ROOT)
    for path in (ROOT / 'cnn_jax').rglob('*')
    if path.is_file() and '__pycache__' not in path.parts
  }
  found = {path.relative_to(site) for path in (site / 'cnn_jax').rglob('*') if path.is_file()}
  assert {str(path) for path in wanted} == {str(path) for path in found}


def test_it_trains_and_reports_without_the_checkout(site, tmp_path):
  (tmp_path / 'mine.py').write_text(
    'from cnn_jax.config import default_config\n'
    'def get_config():\n'
    '  config = default_config()\n'
    '  config.data.source, config.data.name = "bundled", "digits"\n'
    '  config.epochs, config.schedule.warmup_epochs, config.model.features = 1, 0.5, (4, 8)\n'
    '  return config\n'
  )
  where = _run(site, tmp_path, '-c', 'import cnn_jax; print(cnn_jax.__file__)')
  assert where.stdout.startswith(str(site)), where.stdout + where.stderr
  done = _run(site, tmp_path, '-m', 'cnn_jax.main', '--config=mine.py', '--workdir=run')
  assert done.returncode == 0, done.stderr
  assert '</html>' in (tmp_path / 'run' / 'report.html').read_text()


def test_the_sweep_is_in_it(site, tmp_path):
  done = _run(site, tmp_path, '-m', 'cnn_jax.sweep', '--help')
  assert done.returncode == 0, done.stderr
  assert '--space' in done.stdout
