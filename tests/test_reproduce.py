"""A published result trained again: the criterion, the file of results and the table of README.md, the command."""

import dataclasses
import functools
import importlib.util
import json
import math

import pytest
from scipy import stats

from cnn_jax import models
from experiments import reproduce
from experiments.reproduce import Spread, margin
from tests.helpers import ROOT, call_command, run_command

pytestmark = pytest.mark.usefixtures('quick_compilation')

QUICK = {
  'epochs': 1, 'model.features': [4], 'model.convs_per_block': 1, 'model.norm': 'none',
  'schedule.warmup_epochs': 0.5, 'log.tensorboard': False, 'log.report': False,
}  # fmt: skip


def _file(path, mean, **fields):
  """Writes a file with one result, of a small network on the digits."""
  row = json.loads(reproduce.RESULTS.read_text())['digits']
  row |= {'fields': QUICK, 'test_accuracy': {'mean': mean, 'std': 0.01, 'n': 20}, **fields}
  path.write_text(json.dumps({'quick': row}))
  return path


def test_a_margin_by_hand():
  # Equal n and std: 2 (n - 1) degrees of freedom, for which the tables have t = 2.776.
  assert margin(Spread(0.9, 0.01, 3), Spread(0.8, 0.01, 3), 10**6) == pytest.approx(
    2.776 * 0.01 * math.sqrt(2 / 3), rel=1e-3
  )
  # One more value of a distribution of which three are known: t = 4.303 with 2 degrees of freedom.
  for pair in ((Spread(0.9, 0.01, 3), Spread(0.8, None, 1)), (Spread(0.8, None, 1), Spread(0.9, 0.01, 3))):
    assert margin(*pair, 10**6) == pytest.approx(4.303 * 0.01 * math.sqrt(4 / 3), rel=1e-3)
  with pytest.raises(ValueError, match='single seed'):
    margin(Spread(0.9, None, 1), Spread(0.9, None, 1), 100)


def test_the_margin_is_where_the_p_value_is_five_percent():
  one, other = Spread(0.95, 0.004, 5), Spread(0.95, 0.011, 8)
  far = one.mean + margin(one, other, 10**6)
  found = stats.ttest_ind_from_stats(one.mean, one.std, one.n, far, other.std, other.n, equal_var=False)
  assert found.pvalue == pytest.approx(0.05)


def test_the_margin_is_at_least_one_image():
  assert margin(Spread(0.9, 0.0, 3), Spread(0.9, 0.0, 3), 250) == 1 / 250
  assert margin(Spread(0.9, 1e-6, 3), Spread(0.9, 0.0, 3), 250) == 1 / 250


@pytest.mark.parametrize(
  ('mean', 'passed', 'text'),
  [(0.9800, True, '-0.90 points'), (0.9980, True, '+0.90 points'), (0.9780, False, 'OFF by 0.19 points more')],
)
def test_the_verdict(mean, passed, text):
  row = reproduce.load()['digits']
  row = dataclasses.replace(row, test_accuracy=Spread(0.9890, 0.0040, 3))
  environment = {
    'git': {'commit': 40 * 'a', 'dirty': True}, 'backend': 'cpu', 'cpu': 'an Abacus', 'cpu_cores': 2,
    'versions': {'jax': '1', 'flax': '2', 'optax': '3', 'python': '4'},
  }  # fmt: skip
  report, found = reproduce.report('digits', row, Spread(mean, 0.0040, 3), 10_000, environment)
  assert found is passed
  assert text in report
  assert ('PASS' in report) is passed
  assert '98.90 ± 0.40 % (n = 3)' in report
  assert row.hardware in report and row.versions in report
  assert '2 cores of an Abacus; jax 1, flax 2, optax 3, Python 4; commit aaaaaaa with changes' in report


def test_the_readme_has_the_table():
  readme = (ROOT / 'README.md').read_text()
  assert reproduce.page(readme) == readme
  done = call_command('experiments.reproduce', '--table')
  assert done.stdout.strip() in readme


@pytest.mark.parametrize('name', reproduce.load())
def test_a_result_is_of_the_config_that_it_names(name):
  row = reproduce.load()[name]
  assert (row.test_accuracy.std is None) == (row.test_accuracy.n == 1)
  assert row.config in row.command.replace('make train', '--config=configs/mnist.py')
  config = reproduce.config_of(row, {})
  for field in row.fields:
    value = functools.reduce(lambda section, name: section[name], field.split('.'), config)
    written = f"--config.{field}='{value}'" if isinstance(value, tuple) else f'--config.{field}={value}'
    assert written in row.command or field == 'data.source'  # the command leaves that open
  side, channels = (
    (config.data.image_size, 3)
    if config.data.source == 'folder'
    else {'mnist': (28, 1), 'digits': (8, 1), 'cifar10': (32, 3)}[config.data.name]
  )
  image_shape = (side, side, channels)
  variables = models.init_shapes(models.create(config.model, 10), image_shape)
  assert models.num_parameters(variables['params']) == row.num_parameters


def test_the_command_trains_and_judges(tmp_path):
  command = ('experiments.reproduce', 'quick', '--seeds=3', f'--workdir={tmp_path / "run"}')
  off = _file(tmp_path / 'off.json', 0.99)
  done = run_command(*command, f'--results={off}')
  assert done.returncode == 1, done.stderr
  assert '| OFF by' in done.stdout.splitlines()[-4]
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  assert result['seeds'] == [0, 1, 2]
  again = call_command(*command, f'--results={off}')
  assert again.returncode == 1
  assert 'is complete' in again.stdout
  assert again.stdout.splitlines()[-6:] == done.stdout.splitlines()[-6:]
  passed = call_command(*command, f'--results={_file(tmp_path / "pass.json", result["test_accuracy"]["mean"])}')
  assert passed.returncode == 0, passed.stderr
  assert '| PASS' in passed.stdout.splitlines()[-4]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'which result? give one of mnist, mnist_best, mnist_small, mnist_bundled, digits'),
    (['minst'], "there is no result 'minst'; give one of mnist, mnist_best, mnist_small, mnist_bundled, digits"),
    (['digits', '--seeds=1'], '--seeds is 1'),
    (['digits', '--results=nowhere.json'], 'cannot read nowhere.json'),
    (['digits', '--results=README.md'], 'README.md is not a file of results'),
    (['cifar10_folder'], 'give it as --data_dir=DIR'),
    (['mnist_bundled', '--sedes=3'], '--sedes'),
  ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, arguments, message):
  done = call_command('experiments.reproduce', *arguments, f'--workdir={tmp_path / "run"}')
  assert done.returncode == 2, done.stderr
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / 'run').exists()


@pytest.mark.skipif(importlib.util.find_spec('tensorflow') is not None, reason='TensorFlow would prepare the set')
def test_a_set_that_is_not_there_is_one_line(tmp_path):
  done = call_command('experiments.reproduce', 'mnist', f'--data_dir={tmp_path}', f'--workdir={tmp_path / "run"}')
  assert done.returncode == 2
  assert f"TFDS set 'mnist' is not prepared in {tmp_path}" in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_other_data_than_published_are_refused(tmp_path):
  file = _file(tmp_path / 'results.json', 0.25, images=[1295, 143, 360])
  done = call_command('experiments.reproduce', 'quick', f'--results={file}', f'--workdir={tmp_path / "run"}')
  assert done.returncode == 2
  assert '[1295, 143, 359] training, validation and test images here' in done.stderr
