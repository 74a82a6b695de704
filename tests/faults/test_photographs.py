"""Photographs as strangers have them: kept maps over interruptions, devices and processes, and mistakes in the config."""

import functools
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from cnn_jax import checkpoint
from tests import helpers
from tests.faults import pairs
from tests.faults.tools import one_line, read_json, start, stop, wait_for, write_photographs

pytestmark = pytest.mark.faults

run_command = functools.partial(helpers.run_command, timeout=400)  # a convolutional network is compiled twice

# Without published weights, which need the whole width, a run takes seconds.
SMALL = (
  '--config=configs/photographs.py', '--config.init_from=', '--config.model.width=0.05', '--config.model.depth=0.1',
  '--config.data.image_size=32', '--config.model.fixed_statistics=False', '--config.batch_size=4', '--config.adapt_to_data=False', '--config.min_steps=0',
  '--config.epochs=4', '--config.fine_tuning.views=3', '--config.evaluation.batch_size=4', '--config.log.report=False',
  '--config.log.tensorboard=False', '--config.log.every_steps=1',
)  # fmt: skip


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """Arguments of a small run, and the workdir of one that was not interrupted."""
  place = tmp_path_factory.mktemp('photographs')
  write_photographs(place / 'set', count=10, size=(40, 50), suffix='.jpg')
  arguments = (*SMALL, f'--config.data.dir={place / "set"}')
  done = run_command('cnn_jax.main', *arguments, f'--workdir={place / "whole"}')
  assert done.returncode == 0, done.stderr
  assert 'their maps of 3 views of each image are computed once' in done.stdout
  return arguments, place / 'whole'


def _params(workdir):
  return checkpoint.restore(workdir / 'checkpoints')[0]['params']


def test_killed_in_training_and_started_again_is_bit_identical(small, tmp_path):
  arguments, whole = small
  frequent = ('--config.checkpoint.every_epochs=1',)
  process = start('cnn_jax.main', *arguments, *frequent, f'--workdir={tmp_path}')
  wait_for(lambda: any((tmp_path / 'checkpoints').glob('[0-9]*')), interval=0.002)
  status, *_ = stop(process, signal.SIGKILL)
  assert status in (0, -signal.SIGKILL)
  done = run_command('cnn_jax.main', *arguments, *frequent, f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr
  jax.tree.map(np.testing.assert_array_equal, _params(tmp_path), _params(whole))
  assert (tmp_path / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def test_stopped_while_maps_are_computed(small, tmp_path):
  """Nothing is saved yet, so the command ends soon, in one line, and the same command starts again."""
  arguments = (
    *small[0],
    '--config.fine_tuning.views=20000',
    '--config.epochs=20000',
    '--config.checkpoint.every_minutes=9',
  )
  process = start('cnn_jax.main', *arguments, f'--workdir={tmp_path}')
  for line in process.stdout:
    if 'views of each image' in line:
      break
  status, _, stderr = stop(process, signal.SIGTERM, timeout=15)
  assert status == 143
  assert pairs.is_one_line(stderr), stderr
  process = start('cnn_jax.main', *arguments, f'--workdir={tmp_path}')
  assert any('views of each image' in line for line in process.stdout)
  stop(process)


def test_a_run_continues_without_the_weights_that_it_started_from(small, tmp_path):
  arguments, whole = small
  weights = tmp_path / 'weights'
  whole.rename(weights)
  try:
    arguments = (
      *arguments,
      f'--config.init_from={weights}',
      '--config.schedule.name=constant',
      f'--workdir={tmp_path / "w"}',
    )
    assert run_command('cnn_jax.main', *arguments, '--config.epochs=1').returncode == 0
  finally:
    weights.rename(whole)
  done = run_command('cnn_jax.main', *arguments, '--config.epochs=2')
  assert done.returncode == 0, done.stderr
  assert 'Resuming at step 4 of 8' in done.stdout


def test_two_devices_and_two_processes_compute_the_same(small, tmp_path):
  arguments, whole = small
  two = {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  done = run_command('cnn_jax.main', *arguments, f'--workdir={tmp_path / "devices"}', **two)
  assert done.returncode == 0, done.stderr
  ended = pairs.end(pairs.start_pair([tmp_path / 'processes'] * 2, *arguments), 150)
  assert [status for status, _, _ in ended] == [0, 0], ended
  for name in ('devices', 'processes'):
    # Adam turns the rounding errors of a few tiny gradients into steps of the full size.
    close = jax.tree.map(lambda a, b: np.isclose(a, b, rtol=1e-2, atol=2e-3), _params(tmp_path / name), _params(whole))
    assert np.mean(np.concatenate([x.ravel() for x in jax.tree.leaves(close)])) > 0.99
    found, expected = (read_json(w / 'result.json')['test_loss'] for w in (tmp_path / name, whole))
    # The loss of this diverging network is in the hundreds, and magnifies the differences of rounding.
    assert found == pytest.approx(expected, rel=5e-2)


def test_pictures_of_every_kind_and_odd_names(tmp_path):
  rng = np.random.default_rng(0)
  for name in ('100%', '-rf', 'Ünï ☃'):
    folder = tmp_path / 'set' / name
    folder.mkdir(parents=True)
    for index, (mode, suffix, size) in enumerate(
      [('RGB', 'jpg', (900, 1200)), ('RGB', 'png', (20, 20)), ('L', 'jpg', (60, 80)), ('RGBA', 'png', (60, 80)),
       ('CMYK', 'jpg', (60, 80)), ('P', 'gif', (60, 80))]
    ):  # fmt: skip
      picture = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
      picture.convert(mode).save(folder / f'{index}.{suffix}')
    Image.fromarray(rng.integers(0, 2**16, (60, 80)).astype(np.uint16)).save(folder / 'deep.png')
  features = ('--config.loss.class_weights=balanced', '--config.augment.mixup=0.2', '--config.augment.cutmix=1.0',
              '--config.augment.trivial=True', '--config.evaluation.ema_decay=0.9', '--config.data.validation=0.2',
              '--config.evaluation.patience=2', '--config.model.frozen_stages=8')  # fmt: skip
  done = run_command(
    'cnn_jax.main', *SMALL, *features, f'--config.data.dir={tmp_path / "set"}', f'--workdir={tmp_path / "w"}'
  )
  assert done.returncode == 0, done.stderr
  assert set(read_json(tmp_path / 'w' / 'result.json')['test_per_class']) == {'100%', '-rf', 'Ünï ☃'}


@pytest.mark.parametrize('count', [1, 2])
def test_one_or_two_pictures_per_class(tmp_path, count):
  for split, number in (('train', count), ('test', 3)):
    write_photographs(tmp_path / 'set' / split, count=number, size=(40, 50), suffix='.jpg', seed=number)
  arguments = [
    argument for argument in SMALL if argument not in ('--config.adapt_to_data=False', '--config.batch_size=4')
  ]
  done = run_command('cnn_jax.main', *arguments, f'--config.data.dir={tmp_path / "set"}', f'--workdir={tmp_path / "w"}')
  assert done.returncode == 0, done.stderr
  assert f'Adapted to {2 * count} training images: batches of' in done.stdout


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (("optimizer.stage_rates=('a',)",), 'give numbers'),
    (('model.variant=lite2', 'init_from=pretrained:efficientnet_lite0', 'model.width=1.0'), 'set --config.model.variant=lite0,'),
    (('evaluation.patience=2',), 'needs a validation split'),
  ],
)  # fmt: skip
def test_mistakes_are_one_line(small, tmp_path, fields, message):
  overrides = (f'--config.{field}' for field in fields)
  assert message in one_line(run_command('cnn_jax.main', *small[0], *overrides, f'--workdir={tmp_path / "w"}'))
  assert not pathlib.Path(os.path.join(tmp_path, 'w', 'checkpoints')).exists()
