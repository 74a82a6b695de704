"""The estimate of a step's memory, the settings that help, and the line of a device whose memory is exhausted."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from cnn_jax import UsageError, memory, plan
from cnn_jax.config import default_config, vary
from tests.helpers import ROOT


class Sine(nn.Module):
  """A network whose gradient needs two arrays of 64 features."""

  @nn.compact
  def __call__(self, images, train=False, positions=None):
    del train, positions
    x = jnp.sin(nn.Dense(64, use_bias=False)(images))  # keeps the cosine
    x = nn.Dense(2, use_bias=False, name='head')(x)  # keeps its input, the sine
    return x, {}


def test_what_a_network_keeps_by_hand():
  """Neither the images nor the parameters are counted."""
  model = Sine()
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1000)))['params']
  sizes = [memory.saved_bytes(model, {'params': params, 'batch_stats': {}}, (batch, 1000)) for batch in (16, 32)]
  needed = 4 * 16 * 2 * 64
  assert needed <= sizes[0] < 1.1 * needed
  assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.02)


def _made(**fields):
  config = vary(default_config(), {'batch_size': 64, 'model.features': (16, 16, 16), 'model.pool': 'none'} | fields)
  return config, plan.make_plan(config, 128, 3, (16, 16, 1))


def test_the_settings_that_help_are_named():
  config, made = _made()
  needs = memory.estimate(made, (16, 16, 1), 64, 1)
  parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(made.state.params))
  assert needs.gradients == parameters
  assert needs.inputs == 4 * 64 * 16 * 16
  assert needs.state > 2 * parameters
  maps = 3 * 4 * 64 * 16 * 16 * 16
  assert maps < needs.activations < 6 * maps
  assert memory.describe(config, made, (16, 16, 1), needs.step) == ''
  less = memory.estimate(made, (16, 16, 1), 64, 1, rematerialize=True)
  assert needs.activations / 3 < less.activations < needs.activations  # one block, and the inputs of the others
  line = memory.describe(config, made, (16, 16, 1), less.step)
  assert line.endswith(
    'set config.model.rematerialize=True or config.optimizer.accumulate_steps=4 or a smaller config.batch_size.'
  )
  eighth = memory.describe(config, made, (16, 16, 1), needs.step // 7)
  parts = int(eighth.partition('accumulate_steps=')[2].split()[0])
  assert memory.estimate(made, (16, 16, 1), 64, parts).step <= needs.step // 7
  assert memory.estimate(made, (16, 16, 1), 64, parts // 2).step > needs.step // 7
  nothing = memory.describe(config, made, (16, 16, 1), 1000)
  assert nothing.endswith('if it fails, set a smaller config.batch_size.')


def test_a_small_network_is_not_traced(monkeypatch):
  monkeypatch.delattr(memory, 'estimate')
  config, made = _made()
  assert memory.describe(config, made, (16, 16, 1), 10**9) == ''


def test_memory_that_is_exhausted_is_one_line():
  with (
    pytest.raises(
      UsageError, match=r'not enough \(Out of memory .*raise config.optimizer.accumulate_steps, which is 1'
    ),
    memory.explained(default_config()),
  ):
    jnp.zeros(2**50, jnp.uint8).block_until_ready()
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'), memory.explained(default_config()):
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')


def test_the_limit_of_a_container_counts(tmp_path):
  assert memory.free_bytes() > 10**6
  (tmp_path / 'memory.max').write_text('5000\n')
  (tmp_path / 'memory.current').write_text('3000\n')
  (tmp_path / 'memory.stat').write_text('anon 1000\ninactive_file 700\n')
  assert memory._left(tmp_path, 'memory.max', 'memory.current') == 2700
  (tmp_path / 'memory.max').write_text('max\n')
  assert memory._left(tmp_path, 'memory.max', 'memory.current') is None


# A network whose maps take two terabytes, in a process that has 64 GB of addresses.
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
from cnn_jax import command, main
command.run(main.main)
"""


@pytest.mark.faults
def test_a_run_without_enough_memory_is_warned_and_ends_in_one_line(tmp_path):
  fields = ('--config.batch_size=1024', '--config.model.features=(2000000,)', '--config.model.convs_per_block=1')
  done = subprocess.run(
    [sys.executable, '-c', LIMITED, '--config=configs/digits.py', *fields, f'--workdir={tmp_path}'],
    cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 2, done.stderr
  warning, error = done.stderr.splitlines()
  assert warning.startswith('warning: a training step needs about 1712.')
  assert 'config.optimizer.accumulate_steps=' in warning
  assert error.startswith('error: the memory of the device is not enough (')
  assert 'raise config.optimizer.accumulate_steps, which is 1' in error
