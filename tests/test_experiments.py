"""The measuring programs run and measure what they say; the figures themselves are in experiments/."""

import json

from experiments.scaling import run as scaling
from experiments.start_up import run as start_up
from tests.conftest import run_command


def test_scaling_measures_a_point():
  point = scaling.BASE | {'batch_size': 16, 'width': 4, 'depth': 2, 'examples': 64, 'devices': 2}
  done = run_command(
    'experiments.scaling.run', '--worker', json.dumps(point), '--seconds', '0.2',
    XLA_FLAGS='--xla_force_host_platform_device_count=2',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['images_per_second'] > 0
  assert found['peak_mb'] > 50


def test_scaling_draws_its_axes(tmp_path):
  rows = [
    {'axis': axis, 'value': value, 'images_per_second': 10.0 * value, 'peak_mb': 300.0, 'n': 1}
    for axis, values in scaling.POINTS.items()
    for value in values
  ]
  scaling._plot(rows, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 10_000


def test_start_up_finds_the_first_step(tmp_path):
  seconds = start_up.first_step('configs/digits.py', tmp_path / 'run', tmp_path / 'cache')
  assert 0.5 < seconds < 120
  line = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[0])
  assert line['step'] == 1


def test_start_up_attributes_imports():
  found = start_up.imports()
  assert found['jax'] > 0.1
  assert found['all'] >= max(found['jax'], found['flax'])
  # What only reports and sources need is not imported before they do.
  assert not {'matplotlib', 'sklearn', 'tensorflow_datasets'} & set(found)
