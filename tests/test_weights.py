import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import UsageError, distribute, models, plan, train, weights
from cnn_jax.config import default_config
from cnn_jax.data import Split, feed
from cnn_jax.run import Run
from tests.helpers import call_command

NAMES = ('a', 'b', 'c')


def _config(**model):
  config = default_config()
  config.batch_size = 8
  config.model.update({'features': (4, 8)} | model)
  return config


def _network(config, channels=1, classes=3, seed=0):
  model = models.create(config.model, classes)
  return model, models.init(model, jax.random.key(seed), (8, 8, channels))


def _run(config, channels=1, seed=1):
  model, variables = _network(config, channels, seed=seed)
  return Run(
    config=config, model=model, variables=variables, class_names=NAMES,
    image_shape=(8, 8, channels), dataset='made up', drawing=None, step=0,
  )  # fmt: skip


def _graft(run, fresh, names):
  return weights.graft(run.variables, run.class_names, fresh, names)


def test_the_same_task_starts_where_the_run_ended():
  run = _run(_config())
  _, fresh = _network(_config())
  jax.tree.map(np.testing.assert_array_equal, _graft(run, fresh, NAMES), run.variables)


def test_other_classes_get_a_fresh_head():
  run = _run(_config())
  _, fresh = _network(_config(), classes=5)
  grafted = _graft(run, fresh, 'vwxyz')['params']
  for name, values in grafted.items():
    expected = fresh['params'] if name == 'head' else run.variables['params']
    jax.tree.map(np.testing.assert_array_equal, values, expected[name])
  # The same number of classes under other names: other classes.
  _, fresh = _network(_config())
  grafted = _graft(run, fresh, ('c', 'b', 'a'))
  np.testing.assert_array_equal(grafted['params']['head']['kernel'], fresh['params']['head']['kernel'])


@pytest.mark.parametrize(('before', 'after'), [(1, 3), (3, 1)])
def test_grey_pictures_look_the_same_in_one_channel_and_three(before, after):
  run = _run(_config(), before)
  model, fresh = _network(_config(), after)
  grey = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
  here, _ = model.apply(_graft(run, fresh, NAMES), jnp.repeat(grey, after, axis=3))
  there, _ = run.model.apply(run.variables, jnp.repeat(grey, before, axis=3))
  np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


def test_another_network_is_an_error_that_lists_the_differences():
  _, fresh = _network(_config(features=(4, 16)))
  with pytest.raises(UsageError, match=r'\(4, 8\)|\(8,\) there and \(16,\) here.*; and \d more'):
    _graft(_run(_config()), fresh, NAMES)
  _, fresh = _network(_config(features=(4, 8, 8)))
  with pytest.raises(UsageError, match='it has no .*/block3'):
    _graft(_run(_config()), fresh, NAMES)
  _, fresh = _network(_config())
  with pytest.raises(UsageError, match='it has batch_stats/block1/norm2/mean, which is left over; .*; and 7 more'):
    _graft(_run(_config(convs_per_block=2)), fresh, NAMES)


@pytest.mark.parametrize('optimizer', ['sgd', 'muon'])
def test_frozen_stages_stay_bit_for_bit(optimizer):
  config = _config(frozen_stages=1)
  config.optimizer.name = optimizer
  made = plan.make_plan(config, 16, 3, (8, 8, 1))
  train_steps = train.compile_steps(made.step, config.seed)
  stages = models.parameters_by_stage(made.model, (8, 8, 1))
  before = jax.tree.map(np.array, {'params': made.state.params, 'batch_stats': made.state.batch_stats})
  images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
  examples = feed.Resident(Split(images, np.arange(16, dtype=np.int32) % 3), 8, 0, made.capacity)
  state = distribute.replicate(made.state)
  for epoch in range(2):
    indices = examples.indices(epoch, 0, 2)
    state, _ = train_steps(state, examples.images, examples.labels, indices, np.int32(2))
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before['params'], state.params)
  assert moved == jax.tree.map(lambda stage: stage > 1, stages)
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before['batch_stats'], state.batch_stats)
  assert {name: any(jax.tree.leaves(leaves)) for name, leaves in moved.items()} == {'block1': False, 'block2': True}


def test_fine_tuning_by_the_command(tmp_path, digits_run):
  arguments = [
    '--config=configs/digits.py',
    '--config.epochs=1',
    '--config.schedule.warmup_epochs=0.0',
    '--config.log.report=False',
    '--config.model.convs_per_block=1',
    '--config.model.features=(16, 32)',
  ]
  done = call_command(
    'cnn_jax.main', *arguments, f'--config.init_from={digits_run}', '--config.optimizer.learning_rate=0.001',
    '--config.model.frozen_stages=2', f'--workdir={tmp_path / "tuned"}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  first = (tmp_path / 'tuned' / 'metrics.jsonl').read_text().splitlines()[0]
  assert '"loss": 0.' in first  # not the 2.3 of a network that has learnt nothing
  missing = call_command(
    'cnn_jax.main', *arguments, f'--config.init_from={tmp_path / "no"}', f'--workdir={tmp_path / "x"}'
  )
  assert missing.returncode == 2
  assert len(missing.stderr.splitlines()) == 1
  stages = call_command('cnn_jax.main', *arguments, '--config.model.frozen_stages=3', f'--workdir={tmp_path / "y"}')
  assert stages.returncode == 2
  assert 'frozen_stages is 3 but the network has 2 stages' in stages.stderr
