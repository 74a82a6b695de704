"""What all commands share: exit statuses, one-line errors, signals."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import pytest

from cnn_jax import Diverged, Stopped, UsageError, command
from tests.helpers import ROOT, call_command

FAULTS = """
import resource, sys, types
import numpy as np
sys.modules['jax'] = types.SimpleNamespace(config=types.SimpleNamespace(update=lambda *_: None))  # starts faster
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


@pytest.fixture
def cache_setting(monkeypatch):
  """Restores JAX's settings; returns a function that prepares the backend and returns the directory that is set."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}
  monkeypatch.setenv('CNN_JAX_KEEP_MEMORY', '0')
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)

  def prepare():
    jax.config.update(names[0], None)
    command.prepare_backend()
    return getattr(jax.config, names[0])

  yield prepare
  for name, value in before.items():
    jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_cache_directory(monkeypatch, cache_setting):
  monkeypatch.setenv('XDG_CACHE_HOME', '/a/cache')
  assert cache_setting() == '/a/cache/cnn_jax/compiled'
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '/another')
  assert cache_setting() is None  # JAX reads its own variable


def test_a_cache_whose_path_is_not_utf8_is_left_out(monkeypatch, cache_setting, capsys):
  monkeypatch.setenv('XDG_CACHE_HOME', os.fsdecode(b'/c\xe9'))
  assert cache_setting() is None
  assert 'compiled programs are not kept in' in capsys.readouterr().err
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', os.fsdecode(b'/d\xe9'))
  assert cache_setting() is None
  assert 'its path is not UTF-8' in capsys.readouterr().err


def test_without_a_home_directory_there_is_no_cache(monkeypatch, cache_setting):
  def homeless():
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(pathlib.Path, 'home', homeless)
  assert cache_setting() is None


def test_a_c_library_without_the_setting_is_left_alone(monkeypatch):
  monkeypatch.setenv('CNN_JAX_KEEP_MEMORY', '1')
  monkeypatch.setattr(command.ctypes, 'CDLL', lambda _: object())
  command.prepare_backend()


def test_help_of_every_command():
  for name in ('main', 'evaluate', 'predict', 'report', 'export'):
    done = call_command(f'cnn_jax.{name}', '--help')
    assert done.returncode == 0, done.stderr
    assert '--workdir' in done.stdout


# --- exit statuses


def ends(error):
  """The status and the lines on stderr of a command that ends with an exception."""

  def main(argv):
    assert argv == ['x']
    raise error

  return command.call(main, ['x'])


@pytest.mark.parametrize(
  ('error', 'status', 'line'),
  [
    (UsageError('config.seed is -1;\n  make it  0'), 2, 'error: config.seed is -1; make it 0'),
    (UsageError('no \x1b[31mred\x07, å'), 2, 'error: no \\x1b[31mred\\x07, å'),
    (UsageError('caf\udce9.jpg'), 2, 'error: caf\\udce9.jpg'),
    (Diverged('the loss is nan'), 3, 'error: the loss is nan'),
    (Stopped('Saved at step 3.'), 143, 'Saved at step 3.'),
    (KeyboardInterrupt(), 143, 'stopped'),
  ],
)
def test_an_expected_end_is_a_status_and_one_line(capsys, error, status, line):
  assert ends(error) == status
  assert capsys.readouterr() == ('', f'{line}\n')


def test_the_status_of_a_command_that_returns():
  assert command.call(lambda argv: None, []) == 0
  assert command.call(lambda argv: 2, []) == 2


def test_a_bug_keeps_its_traceback():
  for error in (ZeroDivisionError(), OSError(errno.EACCES, 'Permission denied')):
    with pytest.raises(type(error)):
      ends(error)


def test_a_parser_reports_mistakes_as_one_line():
  parser = command.Parser('does something')
  parser.add_argument('--size', type=int)
  command.add_config(parser)
  with pytest.raises(UsageError, match="argument --size: invalid int value: 'x'; see --help."):
    parser.parse_args(['--size', 'x'])
  args, rest = parser.parse_known_args(['--config', 'a b.py', '--config.seed=1', '--conf=x'])
  assert (args.config, rest) == ('a b.py', ['--config.seed=1', '--conf=x'])  # no abbreviations


PRINTS = 'from cnn_jax import command; command.run(lambda argv: print("x" * 10**6 + "\\n" * 10))'


@pytest.mark.parametrize(
  ('output', 'status', 'errors'),
  [
    ('| true; exit ${PIPESTATUS[0]}', 143, ''),
    ('> /dev/full', 2, 'error: cannot write the output: No space left on device; free some space.\n'),
  ],
)
@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has /dev/full')
def test_output_that_nobody_can_read_is_no_bug(output, status, errors):
  done = subprocess.run(
    ['bash', '-c', f"'{sys.executable}' -c '{PRINTS}' {output}"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stderr) == (status, errors)


_STREAMS = """
import os, sys
from cnn_jax import command

def main(argv):
  print('out', flush=True)
  print('err', file=sys.stderr, flush=True)
  assert sys.stdin.read() == ''
  assert sys.stdout.isatty() is False
  with open(argv[0], 'w') as file:
    assert file.fileno() > 2
    file.write('mine')

command.run(main)
"""


@pytest.mark.parametrize('closed', ['0<&-', '1>&-', '2>&-', '0<&- 1>&- 2>&-', '1>&- 2>&-'])
def test_closed_streams_go_nowhere(tmp_path, closed):
  line = f'exec "$0" -c "$1" "$2" </dev/null {closed}'
  done = subprocess.run(
    ['bash', '-c', line, sys.executable, _STREAMS, tmp_path / 'file'], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.returncode, done.stdout) == (0, '' if '1>' in closed else 'out\n'), done.stderr
  assert done.stderr == ('' if '2>' in closed else 'err\n')
  assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize(('platform', 'message'), [('nothing', "backend 'nothing'"), ('cuda', 'JAX_PLATFORMS=cuda')])
def test_a_platform_that_is_not_there_is_one_line(platform, message):
  program = 'import jax; from cnn_jax import command; command.run(lambda _: print(jax.devices()))'
  environment = os.environ | {'JAX_PLATFORMS': platform}
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=environment, capture_output=True, text=True)
  if platform == 'cuda' and done.returncode == 0:
    pytest.skip('there is a GPU')
  assert done.returncode == command.USAGE, done.stderr
  assert done.stderr.startswith('error: ') and len(done.stderr.splitlines()) == 1
  assert message in done.stderr


def test_a_closed_terminal_leaves_the_status(monkeypatch):
  class Closed:
    def write(self, _):
      raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(sys, 'stderr', Closed())
  assert ends(UsageError('x')) == 2


# --- signals


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_is_a_flag_and_the_second_has_its_usual_effect(number):
  received = []
  before = signal.signal(number, lambda *_: received.append('usual'))
  try:
    with command.stop_signal() as stopping:
      assert not stopping()
      os.kill(os.getpid(), number)
      assert stopping()
      assert received == []
      os.kill(os.getpid(), number)
      assert received == ['usual']
    with command.stop_signal() as stopping:
      assert not stopping()
    os.kill(os.getpid(), number)
    assert received == ['usual', 'usual']
  finally:
    signal.signal(number, before)


def test_an_ignored_signal_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
  try:
    with command.stop_signal() as stopping:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stopping()
  finally:
    signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_signals_alone():
  results = []

  def work():
    with command.stop_signal() as stopping:
      results.append((stopping(), signal.getsignal(signal.SIGTERM)))

  before = signal.getsignal(signal.SIGTERM)
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert results == [(False, before)]
