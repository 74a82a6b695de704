import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import UsageError, evaluate, train
from cnn_jax.config import default_config
from cnn_jax.model import create_model
from cnn_jax.optim import make_optimizer, make_schedule
from tests.conftest import run_command

NAMES = ('a', 'b', 'c')


def _config(**model):
  config = default_config()
  config.batch_size = 8
  config.model.update({'features': (4, 8)} | model)
  return config


def _state(config, channels=1, classes=3, seed=0):
  config.seed = seed
  model = create_model(config.model, classes)
  tx = make_optimizer(config.optimizer, lambda step: 0.1, config.model.frozen_blocks)
  return model, tx, train.create_state(model, tx, config, (8, 8, channels))


def _run(config, channels=1, seed=1):
  model, _, state = _state(config, channels, seed=seed)
  return evaluate.Run(
    config=config, model=model, variables=train.eval_variables(state), class_names=NAMES,
    image_shape=(8, 8, channels), dataset='made up', drawing=None, step=0,
  )  # fmt: skip


def test_the_same_task_starts_where_the_run_ended():
  run = _run(_config())
  _, _, state = _state(_config())
  state = train.start_from(run, state, NAMES)
  jax.tree.map(np.testing.assert_array_equal, train.eval_variables(state), run.variables)


def test_other_classes_get_a_fresh_head():
  run = _run(_config())
  _, _, fresh = _state(_config(), classes=5)
  state = train.start_from(run, fresh, 'vwxyz')
  np.testing.assert_array_equal(state.params['head']['kernel'], fresh.params['head']['kernel'])
  np.testing.assert_array_equal(
    state.params['block1']['conv1']['kernel'], run.variables['params']['block1']['conv1']['kernel']
  )
  # As many classes of other names are other classes.
  _, _, fresh = _state(_config())
  state = train.start_from(run, fresh, ('c', 'b', 'a'))
  np.testing.assert_array_equal(state.params['head']['kernel'], fresh.params['head']['kernel'])


@pytest.mark.parametrize(('before', 'after'), [(1, 3), (3, 1)])
def test_grey_pictures_look_the_same_in_one_channel_and_three(before, after):
  run = _run(_config(), before)
  model, _, fresh = _state(_config(), after)
  state = train.start_from(run, fresh, NAMES)
  grey = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
  here = model.apply(train.eval_variables(state), jnp.repeat(grey, after, axis=3))
  there = run.model.apply(run.variables, jnp.repeat(grey, before, axis=3))
  np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


def test_another_network_is_an_error():
  _, _, state = _state(_config(features=(4, 16)))
  with pytest.raises(UsageError, match='give both configs the same model'):
    train.start_from(_run(_config()), state, NAMES)
  _, _, state = _state(_config(features=(4, 8, 8)))
  with pytest.raises(UsageError, match='block3'):
    train.start_from(_run(_config()), state, NAMES)


def test_frozen_blocks_stay_bit_for_bit():
  config = _config(frozen_blocks=1)
  model, tx, state = _state(config)
  learning_rate = make_schedule(config.schedule, 0.1, 10, 5)
  steps = train.make_train_steps(model=model, tx=tx, learning_rate=learning_rate, config=config)
  before = jax.tree.map(np.array, {'params': state.params, 'batch_stats': state.batch_stats})
  images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
  data = train.replicate((images, np.arange(16, dtype=np.int32) % 3))
  order = np.arange(24, dtype=np.int32).reshape(3, 8) % 16
  state, _ = steps(train.replicate(state), *data, train.local_indices(order), np.int32(3))
  after = {'params': state.params, 'batch_stats': state.batch_stats}
  for kind in ('params', 'batch_stats'):
    jax.tree.map(np.testing.assert_array_equal, before[kind]['block1'], after[kind]['block1'])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before[kind]['block2'], after[kind]['block2'])
    assert all(jax.tree.leaves(moved))


def test_fine_tuning_by_the_command(tmp_path, digits_run):
  arguments = [
    '--config=configs/digits.py',
    '--config.epochs=1',
    '--config.schedule.warmup_epochs=0.0',
    '--config.log.report=False',
    '--config.model.convs_per_block=1',
  ]
  done = run_command(
    'cnn_jax.main', *arguments, f'--config.init_from={digits_run}', '--config.optimizer.learning_rate=0.001',
    '--config.model.frozen_blocks=2', f'--workdir={tmp_path / "tuned"}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  first = (tmp_path / 'tuned' / 'metrics.jsonl').read_text().splitlines()[0]
  assert '"loss": 0.' in first  # not the 2.3 of a network that has learnt nothing
  missing = run_command(
    'cnn_jax.main', *arguments, f'--config.init_from={tmp_path / "no"}', f'--workdir={tmp_path / "x"}'
  )
  assert missing.returncode == 2
  assert len(missing.stderr.splitlines()) == 1
