"""The benchmark for accelerators: its parts as rows, its limits of time, and its tables. Its measurements: test_parts."""

import concurrent.futures
import json
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from benchmarks import results
from benchmarks.accelerator import correctness, determinism, loop, part, run, step_time, streamed, tables
from cnn_jax import UsageError, config
from tests.helpers import call_command


def _part(tmp_path, monkeypatch, source, seconds=20.0, add=lambda _: None):
  """Runs a part of which the module has this source, and returns what the benchmark records."""
  (tmp_path / 'made_part.py').write_text(source)
  monkeypatch.setenv('PYTHONPATH', str(tmp_path), prepend=':')
  monkeypatch.setitem(run.PARTS, 'made', run.Part(seconds, 'made_part', small=()))
  return run._run({'made': seconds}, tmp_path, 'cpu', small=True, add=add)['made']


ROWS = """
import sys, time, pathlib
from benchmarks.accelerator import part
args = part.parser('').parse_args(sys.argv[1:])
rows = part.Rows(args.output, args.seconds)
rows.attempt(lambda: {'value': 1}, what='good')
rows.attempt(lambda: 1 / 0, what='bad')
"""


def test_a_row_that_fails_is_recorded_with_its_error(tmp_path, monkeypatch):
  found = _part(tmp_path, monkeypatch, ROWS)
  assert found['rows'] == [
    {'what': 'good', 'value': 1},
    {'what': 'bad', 'error': 'ZeroDivisionError: division by zero'},
  ]
  assert found['error'] is None


def test_a_part_that_fails_keeps_its_rows(tmp_path, monkeypatch):
  seen = []
  found = _part(tmp_path, monkeypatch, f'{ROWS}\ntime.sleep(1)\nsys.exit(7)', add=seen.append)
  assert seen[0]['made']['rows'][0]['what'] == 'good'
  assert seen[0]['made']['error'].startswith('not finished')  # its rows are known before it ends
  assert (len(found['rows']), found['error']) == (2, 'ended with status 7')


def test_a_part_whose_time_is_over_ends_with_its_children_and_keeps_its_rows(tmp_path, monkeypatch):
  child = "import subprocess\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])"
  started = time.monotonic()
  found = _part(tmp_path, monkeypatch, f'{ROWS}\n{child}', seconds=4.0)
  assert time.monotonic() - started < 60
  assert (len(found['rows']), found['error']) == (2, 'not finished in 4 s')


def test_errors_are_one_plain_sentence():
  timeout = subprocess.TimeoutExpired(['/a/path/python', '-m', 'any'], 12.4)
  assert part.one_line(timeout) == 'not finished in 12 s'
  assert part.one_line(UsageError('not measured,\nbecause it is late')) == 'not measured, because it is late'
  assert part.one_line(ValueError('no')) == 'ValueError: no'


def test_earlier_parts_are_kept_if_they_are_of_the_same_hardware_and_size(tmp_path):
  file = tmp_path / 'results.json'
  about = {'hardware': 'a GPU', 'small': False}
  assert run._kept(about, file) == run._kept(about, None) == {}
  file.write_text(json.dumps(about | {'parts': {'loop': {'rows': []}}}))
  assert run._kept(about, file) == {'loop': {'rows': []}}
  assert run._kept(about | {'small': True}, file) == {}
  assert run._kept(about | {'hardware': 'another'}, file) == {}


def test_untimed_parts_run_at_the_same_time_on_a_gpu_alone():
  names = ['correctness', 'determinism', 'loop']
  assert run._groups(names, 'gpu') == [['correctness', 'determinism'], ['loop']]
  assert run._groups(names, 'tpu') == [['correctness'], ['determinism'], ['loop']]


def test_an_unknown_part_is_refused():
  done = call_command('benchmarks.accelerator.run', '--parts=all')
  assert done.returncode == 2
  assert "--parts has 'all'" in done.stderr


def test_an_unusable_limit_of_a_part_is_refused():
  for limit in ('0', '-1', 'x'):
    done = call_command('benchmarks.accelerator.run', f'--parts=loop:{limit}')
    assert done.returncode == 2
    assert f"--parts has 'loop:{limit}'" in done.stderr


def test_errors_by_hand():
  zeros, numbers, nan = np.zeros(2), np.array([1.0, -4.0]), np.array([0.0, np.nan])
  assert part.largest_error([(zeros, zeros), (numbers + 1, numbers)]) == 0.25
  assert part.largest_error([(numbers, zeros)]) == 4.0  # zeros have no scale
  for pairs in ([(numbers, numbers), (nan, numbers)], [(nan, numbers), (numbers, numbers)], [(numbers, nan)]):
    assert np.isnan(part.largest_error(pairs))


def test_a_check_of_numbers_that_are_not_finite_fails(tmp_path):
  rows = part.Rows(tmp_path / 'rows.json', 10)
  for limit, value in ((0.1, 0.05), (0.1, np.nan), (None, 0.05), (None, np.nan)):
    correctness._check(rows, 'a check', limit, lambda value=value: value)
  assert [row['passed'] for row in rows.rows] == [True, False, None, False]
  assert tables._correctness(rows.rows).count('| nan | ') == 2


def test_runs_with_nan_are_not_the_same(tmp_path):
  files = []
  for name, last in (('a', 1.0), ('b', np.nan)):
    files.append(concurrent.futures.Future())
    np.savez(tmp_path / name, np.ones(3), np.array([last]), np.ones(3), accuracy=0.5)
    files[-1].set_result(tmp_path / f'{name}.npz')
  found = determinism._compare(*files)
  assert not found['same_bits']
  assert np.isnan(found['difference'])


def test_the_loop_fails_if_its_parameters_are_not_finite(monkeypatch):
  monkeypatch.setattr(loop, 'vary', lambda base, fields: config.vary(base, fields | {'optimizer.learning_rate': 1e30}))
  with pytest.raises(UsageError, match='the parameters after 8 steps are not finite'):
    loop.measure('28x28x1, 32-64-128', 8, 8)


class _FakePeer:
  """In place of a process of `step_time`."""

  def __init__(self, **ready):
    self.ready = ready

  def ask(self, work, steps):
    return {'ms': 1.0, 'device_mb': 100.0}


def test_the_peak_of_memory_is_that_of_training():
  case, running = step_time.SMALL[0], {'ours': _FakePeer(), 'pytorch': _FakePeer(version='1')}
  about = {'network': case.network, 'batch': case.batch, 'dtype': case.dtype}
  rows = [{**about, 'work': work, **step_time._measure(case, running, work)} for work in step_time.WORKS]
  inference, train = tables._step_time(rows).splitlines()[2:]
  assert inference.endswith('| - |')
  assert train.endswith('| 100 / 100 |')


def test_tables_of_rows_that_failed_say_why():
  error = {'error': 'RuntimeError: no algorithm'}
  parts = {
    'device': [{'what': 'copy'} | error],
    'correctness': [{'check': 'operation'} | error, {'check': 'b', 'error_found': 0.5, 'limit': 0.1, 'passed': False}],
    'determinism': [{'network': 'cnn', 'run': 'again', 'compared_with': 'first'} | error],
    'loop': [{'network': 'cnn', 'batch': 8} | error],
    'step_time': [{'network': 'cnn', 'batch': 8, 'dtype': 'float32'} | error],
    'streamed': [{'run': 'training', 'resident': 'never', 'workers': 2} | error],
  }
  found = results.describe(
    small=True, parts={name: {'rows': rows, 'seconds': 1.0, 'error': None} for name, rows in parts.items()}
  )
  made = tables.tables(found)
  for name in parts:
    assert 'RuntimeError: no algorithm' in made[name]
  assert '| b | 5.0e-01 | 1e-01 | **no** |' in made['correctness']
  assert made['borrowed'] == 'Not measured yet.'


def test_photographs_are_made(tmp_path, monkeypatch):
  monkeypatch.setattr(streamed, 'CLASSES', 2)
  monkeypatch.setattr(streamed, 'DISTINCT', 3)
  found = streamed.make_photographs(tmp_path, 4)
  assert 20 < found['kilobytes'] < 200
  assert len(list(tmp_path.glob('train/*/*.jpg'))) == 4
  assert len(list(tmp_path.glob('test/*/*.jpg'))) == 4
  assert len({path.read_bytes() for path in tmp_path.glob('*/*/*.jpg')}) == 8  # no two files are the same
  assert len({Image.open(path).tobytes() for path in tmp_path.glob('*/*/*.jpg')}) == 3


@pytest.mark.faults
def test_parts(tmp_path):
  """All parts that a CPU runs, at reduced size: every row is a measurement, and every check passes."""
  file = tmp_path / 'results.json'
  done = call_command('benchmarks.accelerator.run', '--small', '--minutes=20', f'--json={file}')
  assert done.returncode == 0, done.stderr
  found = json.loads(file.read_text())
  assert list(found['parts']) == list(run.PARTS)
  assert found['commit']
  for name, measured in found['parts'].items():
    assert measured['commit'] == found['commit'], name
    assert measured['rows'] or measured['found'], name
    assert measured['error'] is None, name
    assert not [row for row in measured['rows'] if 'error' in row], name
  assert all(row['passed'] is not False for row in found['parts']['correctness']['rows'])
  assert all(row['same_bits'] for row in found['parts']['determinism']['rows'])
  for table in tables.tables(found).values():
    assert table in done.stdout
