"""Settings that every test shares, and the short run that several of them read."""

import os
import pathlib
import shutil
import signal

import pytest

# One cache of compiled programs for all test processes: most compile the same few. JAX reads it when it is imported.
_CACHE = pathlib.Path(__file__).resolve().parent.parent / '.pytest_cache' / 'compiled'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

# A shell ignores SIGINT in what it starts in the background, nohup ignores SIGHUP, and the programs of the tests would inherit
# that. They do not inherit a function.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
  signal.signal(signal.SIGHUP, lambda *_: None)

from tests.helpers import call_command  # noqa: E402


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory):
  """The workdir of a complete short run on the digits."""
  workdir = tmp_path_factory.mktemp('runs') / 'digits'
  done = call_command(
    'cnn_jax.main', '--config=configs/digits.py', '--config.epochs=12', '--config.model.convs_per_block=1',
    '--config.model.features=(16, 32)',
    f'--workdir={workdir}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.fixture
def offline(monkeypatch, tmp_path):
  """Hides the user's data, the user's cache and the network from the data sources."""
  from cnn_jax.data import tfds

  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'no_tfds'))
  monkeypatch.setattr(tfds, 'network_is_up', lambda: False)


@pytest.fixture
def strict():
  """Makes implicit promotion of dtypes and of ranks an error."""
  import jax

  with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
    yield


@pytest.fixture(scope='module')
def quick_compilation():
  """Compiles without most optimisations, which takes a third of the time for a deep network."""
  import jax

  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Checkpoints of steps 1 and 2, to be copied."""
  from tests.checkpoints import save

  directory = tmp_path_factory.mktemp('saved') / 'checkpoints'
  save(directory, 1, validation_accuracy=0.5)
  save(directory, 2, validation_accuracy=0.6)
  return directory


@pytest.fixture
def two(saved, tmp_path):
  """A copy of `saved`."""
  return shutil.copytree(saved, tmp_path / 'checkpoints')


@pytest.fixture
def no_waiting(monkeypatch):
  """What a process writes survives its end; waiting for the disk is for power cuts."""
  from cnn_jax import files

  monkeypatch.setattr(files, 'sync', lambda _: None)
