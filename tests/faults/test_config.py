"""Any values in any fields: a checked config that can be trained, or one line."""

import contextlib
import json

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from cnn_jax import UsageError, config, models
from cnn_jax.optim import make_optimizer, make_schedule

SETTINGS = hypothesis.settings(deadline=None, database=None, derandomize=True, max_examples=100)
NETWORKS = ('cnn', 'resnet')
DEFAULTS = {name: value for network in NETWORKS for name, value in config.leaves(config.default_config(network))}
RULES = config.RULES | {f'model.{name}': rule for network in NETWORKS for name, rule in models.rules(network).items()}

integers = st.integers(-2, 9) | st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, -(10**30), 128])
floats = st.floats() | st.floats(0, 1) | st.sampled_from([1e308, 5e-324, 1e39, 0.999999999999])
texts = st.text(max_size=8) | st.sampled_from(['cnn', 'resnet', 'sgd', '../x', 'a.b', 'gs://x', '~x', '\0', '\n', ''])
scalars = st.none() | st.booleans() | integers | floats | texts
anything = st.recursive(
  scalars,
  lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(texts, inner, max_size=2),
  max_leaves=4,
)


def of_its_type(name):
  """Values for a field that its type and its rule allow, mostly; extreme ones among them."""
  default, rule = DEFAULTS[name], RULES.get(name)
  if isinstance(rule, tuple):
    values = st.sampled_from(rule)
  elif isinstance(rule, range) or name in ('model.stride', 'model.width'):
    values = st.integers(1, 3)  # larger networks take long to make
  elif isinstance(default, tuple):
    values = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
  elif isinstance(default, bool):
    values = st.booleans()
  else:
    values = {int: integers, float: floats, str: texts}[type(default)]
  return st.tuples(st.just(name), values)


fields = st.sampled_from(sorted(DEFAULTS))
changes = st.lists(fields.flatmap(of_its_type) | st.tuples(fields, anything), max_size=4).map(dict)


def use(made):
  """Makes everything that is cheap to make for a checked config."""
  config.check_devices(made, 1)
  config.check_data(made, 1000, 10, (16, 16, 3))
  steps = config.steps_per_epoch(made, 1000)
  schedule = make_schedule(made.schedule, made.optimizer.learning_rate, config.num_epochs(made, 1000) * steps, steps)
  assert schedule(0) >= 0
  model = models.create(made.model, 10)
  variables, stages = models.init_shapes(model, (16, 16, 3)), models.parameters_by_stage(model, (16, 16, 3))
  optimizer = make_optimizer(made.optimizer, schedule, stages, made.model.frozen_stages)
  jax.eval_shape(optimizer.init, variables['params'])


@pytest.mark.faults
@SETTINGS
@hypothesis.given(changes)
def test_fields_set_from_python(values):
  with contextlib.suppress(UsageError):  # which a command prints as one line
    use(config.vary(config.default_config(), values))


@pytest.mark.faults
@SETTINGS
@hypothesis.given(st.lists(st.tuples(fields | texts, anything | texts), max_size=3), changes, st.booleans())
def test_fields_set_by_arguments(wild, typed, joined):
  pairs = [(name, str(value)) for name, value in [*wild, *typed.items()]]
  arguments = [f'--config.{name}={value}' for name, value in pairs]
  if not joined:
    arguments = [part for name, value in pairs for part in (f'--config.{name}', value)]
  with contextlib.suppress(UsageError):  # which a command prints as one line
    use(config.override(config.default_config(), arguments))


@SETTINGS
@hypothesis.given(
  st.dictionaries(
    st.sampled_from(list(config.default_config())) | texts,
    anything
    | st.dictionaries(texts | st.sampled_from([name.split('.')[-1] for name in DEFAULTS]), anything, max_size=3),
    max_size=4,
  )
)
def test_a_record_that_anybody_may_have_written(values):
  with contextlib.suppress(UsageError):  # which a command prints as one line
    config.check(config.from_record(json.loads(json.dumps(values))))


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'seed': 2**32}, 'config.seed is 4294967296'),
    ({'seed': 2**63}, 'config.seed is 9223372036854775808'),
    ({'seed': 2**32 - 2, 'seeds': 3}, 'for 3 seeds; the last one must be less than 4294967296'),
  ],
)
def test_seeds_that_jax_cannot_tell_apart_are_refused(values, message):
  made = config.vary(config.default_config(), values)
  with pytest.raises(UsageError, match=message):
    config.check_devices(made, 1)
  config.check_devices(config.vary(made, {'seed': 2**32 - made.seeds}), 1)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('epochs', 2**31, 'must be less than 2147483648'),
    ('model.features', (8, 2**31), 'must be less than 2147483648'),
    ('optimizer.learning_rate', 1e39, 'must be a finite number'),
    ('model.kernel_size', 64, 'must be from 1 to 63'),
    ('data.dir', 'gs://bucket/pictures', 'gs://bucket/pictures is not a path on this machine'),
    ('init_from', 's3://bucket/run', 's3://bucket/run is not a path on this machine'),
  ],
)
def test_values_that_overflow_hang_or_lie_elsewhere_are_refused(field, value, message):
  with pytest.raises(UsageError, match=message):
    config.vary(config.default_config(), {field: value})


def test_more_steps_than_a_counter_holds_are_refused():
  for values in ({'epochs': 2**31 - 1}, {'min_steps': 2**31 - 1, 'epochs': 2**30}):
    with pytest.raises(UsageError, match='a run has less than 2147483648 steps'):
      config.check_data(config.vary(config.default_config(), values), 1000, 10, (16, 16, 1))


def test_of_a_tuple_given_twice_the_last_one_counts():
  arguments = ['--config.model.features=(8,)', '--config.model.features=(16,)']
  assert tuple(config.override(config.default_config(), arguments).model.features) == (16,)
