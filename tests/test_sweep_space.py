"""Search spaces and samplers: mistakes are found early, and parameters depend on seed and number alone."""

import json

import optuna
import pytest
from optuna.trial import TrialState

from cnn_jax import UsageError
from cnn_jax.config import default_config
from cnn_jax.sweep.space import Space, make_pruner, make_sampler
from tests.helpers import ROOT
from tests.sweep_helpers import SPACE, importable

pytestmark = pytest.mark.filterwarnings('ignore::optuna.exceptions.ExperimentalWarning')

MIXED = """
GRID = {'learning_rate': (0.01, 0.1)}

def suggest(trial, config):
  config.optimizer.learning_rate = trial.suggest_float('learning_rate', 1e-3, 1.0, log=True)
  config.model.dropout = trial.suggest_float('dropout', 0.0, 0.3, step=0.1)
  config.model.norm = trial.suggest_categorical('norm', ('batch', 'none'))
  config.augment.shift = trial.suggest_int('shift', 0, 2)
"""


def make_space(tmp_path, text, config=None):
  (tmp_path / 'space.py').write_text(text)
  return Space(tmp_path / 'space.py', config or default_config())


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
  return make_space(tmp_path_factory.mktemp('space'), MIXED)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (SPACE.replace('config.data.split_seed', 'config.data.split_sed'), 'space.py, line 3: AttributeError.*split_seed'),
    (SPACE.replace('split_seed =', 'split_seed = "a" +'), 'line 3: TypeError'),
    (SPACE.replace('config.data.split_seed', 'config.epochs'), 'config.epochs is 0'),
    (SPACE.replace('0, 999', '9, 3'), 'line 3: ValueError'),
    (SPACE.replace('trial.suggest_int', 'trial.sugest_int'), 'line 3: AttributeError'),
    (SPACE.replace('config.data.split_seed', 'config.model.pool'), 'line 3: TypeError.*pool'),
    (SPACE.replace('suggest(trial', 'sugest(trial'), 'no function suggest'),
    ('def suggest(trial, config):\n  config.epochs = 3', 'suggests nothing'),
    ("def suggest(trial, config):\n  trial.suggest_int('a', 0, 3)", 'the same config'),
    ('def suggest(trial, config)\n  pass', 'line 1: SyntaxError'),
    ('import no_such_module', 'ModuleNotFoundError'),
    ('raise SystemExit(0)', 'line 1: SystemExit'),
    (
      SPACE.replace('config.data.split_seed', 'config.seeds').replace('0, 999', '2, 9'),
      'sets config.seeds to [0-9]+, but a trial has one seed',
    ),
  ],
)
def test_a_mistake_in_a_space_is_found_before_the_first_trial(tmp_path, text, message):
  with pytest.raises(UsageError, match=message):
    make_space(tmp_path, text)


def test_a_missing_space_file_is_one_line(tmp_path):
  with pytest.raises(UsageError, match='there is no space file .*; those that come with the project are in'):
    Space(tmp_path / 'space.py', default_config())


def test_a_space_does_not_change_the_config(tmp_path):
  config = default_config()
  before = config.to_dict()
  space = make_space(tmp_path, MIXED, config)
  assert config.to_dict() == before
  made = space.config_of(optuna.trial.FixedTrial({'learning_rate': 0.5, 'dropout': 0.1, 'norm': 'none', 'shift': 2}))
  assert (made.optimizer.learning_rate, made.model.norm, made.augment.shift) == (0.5, 'none', 2)


def test_the_spaces_of_the_project():
  spaces = {path.stem: Space(path, default_config()) for path in (ROOT / 'experiments' / 'spaces').glob('*.py')}
  assert len(spaces['learning_rate'].grid(0)) == 45
  assert len(spaces['learning_rate_batch_size'].grid(0)) == 28
  assert len(spaces['regularization'].distributions) == 5


def test_the_plan_of_a_space_holds_its_ranges_and_the_configs_it_makes(tmp_path):
  plan = make_space(tmp_path, SPACE).plan()
  assert plan == make_space(tmp_path, '# another comment\n' + SPACE).plan()
  assert plan != make_space(tmp_path, SPACE.replace('999', '998')).plan()
  assert plan != make_space(tmp_path, SPACE + '  config.epochs = 3\n').plan()


def draw(space, sampler, seed, indices):
  """Parameters of trials that are made in this order, with nothing kept between them but the study."""
  storage = optuna.storages.InMemoryStorage()
  optuna.create_study(storage=storage, study_name='s', direction='maximize')
  drawn = {}
  for i in indices:
    study = optuna.load_study(storage=storage, study_name='s', sampler=make_sampler(sampler, space, seed, i))
    trial = study.ask()
    space.config_of(trial)
    drawn[i] = trial.params
    study.tell(trial, 0.1 * i)
  return drawn


@pytest.mark.parametrize('sampler', ['random', 'grid', 'qmc'])
def test_parameters_depend_on_seed_and_number_alone(mixed, sampler):
  forwards = draw(mixed, sampler, 3, range(16))
  assert forwards == draw(mixed, sampler, 3, reversed(range(16)))
  assert forwards != draw(mixed, sampler, 4, range(16))
  assert len({json.dumps(params) for params in forwards.values()}) > 12


def test_a_grid_has_each_point_once(mixed):
  points = mixed.grid(0)
  assert len(points) == 2 * 4 * 2 * 3
  assert len({json.dumps(point) for point in points}) == len(points)
  assert {point['dropout'] for point in points} == {0.0, 0.1, 0.2, 0.3}
  assert {point['learning_rate'] for point in points} == {0.01, 0.1}
  assert points != mixed.grid(1)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (MIXED.replace('GRID', 'GRIT'), 'needs values of learning_rate'),
    (MIXED.replace("GRID = {'learn", "GRID = {'yearn"), 'yearning_rate'),
    (MIXED.replace('(0.01, 0.1)', '(0.01, 10.0)'), '10.0 of GRID'),
    (
      MIXED.replace("{'learning_rate': (0.01, 0.1)}", "{'learning_rate': (0.1,), 'norm': ('layer',)}"),
      "'layer' of GRID",
    ),
  ],
)
def test_a_grid_that_does_not_fit_the_space_is_one_line(tmp_path, text, message):
  with pytest.raises(UsageError, match=message):
    make_space(tmp_path, text).grid(0)


def test_a_sobol_sequence_fills_the_space_evenly(mixed):
  points = [mixed.sobol(0, i) for i in range(32)]
  assert sum(point['learning_rate'] < 10**-1.5 for point in points) == 16
  assert sum(point['norm'] == 'batch' for point in points) == 16
  assert {point['shift'] for point in points} == {0, 1, 2}
  assert sorted({point['dropout'] for point in points}) == [0.0, 0.1, 0.2, 0.3]


def test_a_sobol_sequence_is_even_on_the_scale_of_each_parameter(tmp_path):
  text = """
def suggest(trial, config):
  config.batch_size = trial.suggest_int('batch_size', 1, 255, log=True)
  config.augment.mixup = trial.suggest_float('mixup', 0.0, 4.0)
"""
  space = make_space(tmp_path, text)
  points = [space.sobol(0, i) for i in range(32)]
  assert sum(point['mixup'] < 1 for point in points) == 8
  sizes = [point['batch_size'] for point in points]
  assert min(sizes) >= 1 and max(sizes) <= 255
  assert abs(sum(size < 11 for size in sizes) - 16) <= 1  # sqrt(0.5 * 255.5) = 11.3


def test_the_model_based_samplers_suggest(mixed):
  for sampler in ('tpe', 'cmaes') if importable('cmaes') else ('tpe',):
    assert len(draw(mixed, sampler, 0, range(12))) == 12


def pruned(pruner, accuracies):
  """Which trials of constant accuracy are pruned, one after another: (accuracy, the epoch of 8 after which)."""
  study = optuna.create_study(study_name='s', direction='maximize', pruner=pruner)
  found = []
  for accuracy in accuracies:
    trial = study.ask()
    for epoch in range(1, 9):
      trial.report(accuracy, epoch)
      if trial.should_prune():
        found.append((accuracy, epoch))
        study.tell(trial, state=TrialState.PRUNED)
        break
    else:
      study.tell(trial, accuracy)
  return found


def test_pruners_stop_poor_trials():
  accuracies = 10 * (0.9, 0.1)
  assert pruned(make_pruner('median', 8), accuracies)[0] == (0.1, 2)  # not before the end of the first quarter
  assert {accuracy for accuracy, _ in pruned(make_pruner('hyperband', 8), accuracies)} == {0.1}
  assert pruned(make_pruner('none', 8), accuracies) == []
