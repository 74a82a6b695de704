"""The ImageNet recipe from JPEG files to the report, stopped in the middle, with a narrow ResNet-50 at 64 pixels."""

import functools
import json
import re
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from cnn_jax import checkpoint
from tests import helpers
from tests.faults.tools import start, stop, wait_for

pytestmark = pytest.mark.faults

run_command = functools.partial(helpers.run_command, timeout=600)  # a deep network is compiled

CLASSES = {
  'n01440764': (150, 90, 60),
  'n02102040': (60, 150, 90),
  'n03000684': (90, 60, 150),
  'n03417042': (120, 120, 40),
}
RECIPE = (
  '--config=configs/imagenet.py:fast', '--config.data.source=folder', '--config.data.resident=never',
  '--config.data.image_size=64', '--config.data.canvas_size=72', '--config.augment.image_size=56', '--config.data.validation=0.1',
  '--config.batch_size=16', '--config.epochs=10', '--config.optimizer.learning_rate=0.05', '--config.model.width=8',
  '--config.evaluation.batch_size=40', '--config.evaluation.every_epochs=5', '--config.log.every_steps=10',
  '--config.log.tensorboard=False', '--config.log.report=False',
)  # fmt: skip


def _write(root, counts):
  """Writes photographs of 375 x 500 and 500 x 375 pixels, blotches in colours of their class."""
  rng = np.random.default_rng(0)
  for split, count in counts.items():
    for name, colour in CLASSES.items():
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        height, width = (375, 500) if i % 3 else (500, 375)
        blotches = np.clip(rng.normal(colour, 50, (height // 25, width // 25, 3)), 0, 255).astype(np.uint8)
        picture = Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(root / split / name / f'{name}_{i}.JPEG', quality=90)


@pytest.fixture(scope='module')
def arguments(tmp_path_factory):
  place = tmp_path_factory.mktemp('imagenet')
  _write(place / 'set', {'train': 90, 'test': 10})
  return (*RECIPE, f'--config.data.dir={place / "set"}')


@pytest.mark.timeout(1200)
def test_the_recipe_from_the_files_to_the_report(arguments, tmp_path):
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  done = run_command('cnn_jax.main', *arguments, f'--workdir={whole}')
  assert done.returncode == 0, done.stderr
  assert "config.data.resident is 'never', so they are read during training" in done.stdout
  result = json.loads((whole / 'result.json').read_text())
  assert (result['steps'], result['num_train'], result['num_test']) == (200, 324, 40)
  assert result['test_accuracy'] > 0.5

  process = start('cnn_jax.main', *arguments, f'--workdir={stopped}')
  metrics = stopped / 'metrics.jsonl'
  wait_for(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count('\n') >= 5), 300)
  status, stdout, stderr = stop(process, signal.SIGTERM, 120)
  assert status == 143, stderr
  step = int(re.search(r'saved at step (\d+) of 200', stdout + stderr)[1])
  assert 40 <= step < 200
  done = run_command('cnn_jax.main', *arguments, f'--workdir={stopped}')
  assert done.returncode == 0, done.stderr
  assert f'Resuming at step {step}' in done.stdout
  states = [checkpoint.restore(workdir / 'checkpoints')[0] for workdir in (whole, stopped)]
  jax.tree.map(np.testing.assert_array_equal, *states)
  assert metrics.read_bytes() == (whole / 'metrics.jsonl').read_bytes()

  done = run_command('cnn_jax.evaluate', f'--workdir={stopped}')
  measured = json.loads(done.stdout)
  assert measured['accuracy'] == result['test_accuracy']
  assert measured['loss'] == pytest.approx(result['test_loss'], abs=1e-6)
  done = run_command('cnn_jax.report', f'--workdir={stopped}', f'--output={tmp_path / "report.html"}')
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'report.html').stat().st_size > 10_000
