"""A config that adapts to a small set."""

import pytest

from cnn_jax import UsageError, config

FIELDS = {'batch_size': 128, 'epochs': 10, 'min_steps': 1000, 'adapt_to_data': True}


def _config(**fields):
  return config.vary(config.default_config(), FIELDS | {k.replace('__', '.'): v for k, v in fields.items()})


@pytest.mark.parametrize(
  ('num_train', 'batch_size', 'epochs'),
  [
    (1, 1, 1000),
    (3, 2, 1000),
    (6, 4, 1000),
    (31, 4, 143),
    (32, 4, 125),
    (160, 16, 100),
    (1000, 64, 67),
    (1023, 64, 67),
  ],
)
def test_a_small_set_has_smaller_batches_rates_in_proportion_and_a_warm_up_of_a_tenth(num_train, batch_size, epochs):
  adapted, (line,) = config.adapt(_config(), num_train)
  assert adapted.batch_size == batch_size
  assert adapted.optimizer.learning_rate == pytest.approx(0.1 * batch_size / 128)
  assert config.num_epochs(adapted, num_train) == epochs
  assert adapted.schedule.warmup_epochs == pytest.approx(epochs / 10)
  assert f'batches of {batch_size} instead of 128' in line
  config.check(adapted)
  config.check_data(_config(), num_train, 2, (32, 32, 3))


def test_the_rate_of_an_optimizer_that_scales_updates_changes_by_the_root():
  adapted, _ = config.adapt(_config(optimizer__name='adamw'), 160)
  assert adapted.optimizer.learning_rate == pytest.approx(0.1 * (16 / 128) ** 0.5)


def test_nothing_else_changes_and_adapting_twice_changes_nothing():
  given = _config(augment__shift=3)
  adapted, _ = config.adapt(given, 100)
  before, after = dict(config.leaves(given)), dict(config.leaves(adapted))
  assert {name for name in before if before[name] != after[name]} == {
    'adapt_to_data', 'batch_size', 'optimizer.learning_rate', 'schedule.warmup_epochs',
  }  # fmt: skip
  assert config.adapt(adapted, 100) == (adapted, [])
  assert given.adapt_to_data
  assert config.steps_per_epoch(given, 100) == config.steps_per_epoch(adapted, 100) == 12
  assert config.num_epochs(given, 100) == config.num_epochs(adapted, 100)


def test_a_large_set_and_a_config_that_does_not_ask_are_left_alone():
  adapted, lines = config.adapt(_config(), 1024)
  assert (adapted.batch_size, lines) == (128, [])
  assert adapted.schedule.warmup_epochs == 2.0
  plain = _config(adapt_to_data=False)
  assert config.adapt(plain, 6) == (plain, [])
  with pytest.raises(UsageError, match='there are 6 training images'):
    config.check_data(plain, 6, 2, (32, 32, 3))


@pytest.mark.parametrize('num_train', [1, 2, 5, 10, 100, 1000, 10_000, 100_000])
def test_photographs_have_sensible_steps(num_train):
  given = config.load('configs/photographs.py', ['--config.data.dir=x'])
  adapted, _ = config.adapt(given, num_train)
  assert adapted.batch_size <= min(num_train, 64)
  assert adapted.schedule.warmup_epochs <= config.num_epochs(adapted, num_train) / 10
  steps = config.num_epochs(adapted, num_train) * config.steps_per_epoch(adapted, num_train)
  assert max(200, 5 * num_train // 64 - 5) <= steps <= max(300, 5 * num_train // 64)


@pytest.mark.parametrize('rates', [('a',), (True,), ((1,),)])
def test_rates_of_stages_are_numbers(rates):
  with pytest.raises(UsageError, match='give numbers'):
    _config(optimizer__stage_rates=rates)


def test_there_are_no_more_rates_than_stages():
  given = _config(optimizer__stage_rates=8 * (1.0,), model__features=(4, 4))
  with pytest.raises(UsageError, match='2 stages and a head; give at most 3'):
    config.check_data(given, 100, 2, (32, 32, 3))


def test_no_warm_up_stays_none():
  assert config.adapt(_config(schedule__warmup_epochs=0.0), 100)[0].schedule.warmup_epochs == 0
