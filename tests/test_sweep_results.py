"""What a sweep writes about its trials: their order, the comparison from fresh seeds, and plots of every kind of parameter."""

import csv

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from cnn_jax.sweep import plots, results
from cnn_jax.sweep.trials import Trials

pytestmark = pytest.mark.filterwarnings('ignore::optuna.exceptions.ExperimentalWarning')

SPACE = {
  'batch_size': IntDistribution(16, 256, log=True),
  'dropout': FloatDistribution(0.0, 0.3, step=0.1),
  'learning_rate': FloatDistribution(1e-3, 1.0, log=True),
  'momentum': FloatDistribution(0.5, 0.9),
  'norm': CategoricalDistribution(('batch', 'none')),
  'shift': IntDistribution(0, 40),
}
ENDS = [
  {'batch_size': 16, 'dropout': 0.0, 'learning_rate': 1e-3, 'momentum': 0.5, 'norm': 'batch', 'shift': 0},
  {'batch_size': 256, 'dropout': 0.3, 'learning_rate': 1.0, 'momentum': 0.9, 'norm': 'none', 'shift': 40},
]


def make_trials(outcomes):
  """A study of finished trials, given by run: (state, value, user attributes)."""
  storage = optuna.storages.InMemoryStorage()
  study = optuna.create_study(storage=storage, study_name='s', direction='maximize')
  for i, (run, (state, value, attributes)) in enumerate(outcomes.items()):
    study.add_trial(
      create_trial(
        state=state, value=value, params=ENDS[i % 2], distributions=SPACE, user_attrs={'run': run} | attributes,
        intermediate_values={} if value is None else {1: value},
      )
    )  # fmt: skip
  return Trials(storage, study, list(outcomes), alone=True)


@pytest.fixture
def trials():
  outcomes = {f'run {i:02}': (TrialState.COMPLETE, 0.7 + 0.01 * i, {'validation_loss': 0.5}) for i in range(12)}
  outcomes |= {
    'poor': (TrialState.COMPLETE, 0.1, {'validation_loss': 2.3}),  # below the axes of the plots
    'less': (TrialState.COMPLETE, 0.9, {'validation_loss': 0.2, 'num_parameters': 1234}),
    'more': (TrialState.COMPLETE, 0.9, {'validation_loss': 0.3}),
    'pruned': (TrialState.PRUNED, 0.95, {}),
    'diverged': (TrialState.PRUNED, None, {'diverged': 'the loss of step 3 is nan'}),
    'infeasible': (TrialState.PRUNED, None, {'infeasible': 'too large'}),
  }
  return make_trials(outcomes)


def test_the_best_trial_is_complete_and_of_equals_has_the_lowest_loss(trials):
  assert results.best(trials.finished()).user_attrs['run'] == 'less'
  failed = {run: trial for run, trial in trials.finished().items() if trial.state == TrialState.PRUNED}
  assert results.best(failed) is None
  assert results.best({}) is None


def test_the_table_lists_all_trials_in_order(trials, tmp_path):
  results.write(tmp_path / 'out', trials, None, 'the command')
  rows = list(csv.DictReader((tmp_path / 'out' / 'results.csv').read_text().splitlines()))
  order = ['less', 'more', *(f'run {i:02}' for i in range(11, -1, -1)), 'poor', 'pruned', 'diverged', 'infeasible']
  assert [row['trial'] for row in rows] == order
  assert [row['state'] for row in rows] == 15 * ['complete'] + ['pruned', 'diverged', 'infeasible']
  assert [row['reason'] for row in rows][-3:] == ['', 'the loss of step 3 is nan', 'too large']
  text = (tmp_path / 'out' / 'results.md').read_text()
  assert '| less | complete | 90.00 % | 0.2 | 1 | 1,234 | 256 | 0.3 | 1 | 0.9 | none | 40 |  |' in text
  counts, best = results.summary(trials, None).splitlines()
  assert counts == '18 trials: 15 complete, 1 pruned, 1 diverged, 1 infeasible.'
  assert best.startswith('Best on validation: less, 90.00%: batch_size=256, dropout=0.3')


def test_the_comparison_counts_only_seeds_that_completed(trials, tmp_path):
  def trained(validation, test):
    attributes = {'validation_accuracy': validation, 'validation_loss': 0.5, 'test_accuracy': test}
    return TrialState.COMPLETE, validation, attributes

  failed = (TrialState.PRUNED, None, {'diverged': 'the loss of step 3 is nan'})
  final = make_trials(
    {
      'less_seed_1': trained(0.97, 0.9),
      'less_seed_2': trained(0.99, 0.8),
      'default_seed_1': trained(0.8, 0.7),
      'default_seed_2': failed,
      'default_seed_0': failed,
    },
  )
  results.write(tmp_path, trials, final, 'the command')
  text = (tmp_path / 'results.md').read_text()
  assert '| less | 98.00 ± 1.41 % | 0.5000 ± 0.0000 | 85.00 ± 7.07 % | 2 |' in text
  assert '| default | 80.00 % | 0.5000 | 70.00 % | 1, 1 diverged |' in text
  assert 'the unchanged config nothing (diverged).' in text
  assert 'default: 80.00 % on validation, 70.00 % on test (n = 1, 1 diverged).' in results.summary(trials, final)


def test_plots_of_every_kind_of_parameter(trials, tmp_path, monkeypatch):
  # fANOVA takes seconds; tests/test_sweep_command.py computes it.
  monkeypatch.setattr('optuna.importance.get_param_importances', lambda *_, **__: {'norm': 0.7, 'shift': 0.3})
  plots.draw(tmp_path, trials, SPACE)
  names = {'history', 'importances', 'parallel_coordinates', 'slices'}
  assert {path.stem for path in tmp_path.glob('*.png') if path.stat().st_size > 10_000} == names


def test_one_result_has_no_importances(tmp_path):
  attributes = {'validation_loss': 0.5}
  trials = make_trials({'only': (TrialState.COMPLETE, 0.5, attributes)})
  plots.draw(tmp_path, trials, {'norm': SPACE['norm']})
  assert (tmp_path / 'importances.png').exists()
