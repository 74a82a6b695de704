"""What processes tell each other, with the store of the coordinator in this process; tests/faults has real ones."""

import json
import time

import pytest

from cnn_jax import UsageError, config, peers, signals, start
from tests.datasets import make_folder, settings


class Store:
  """The coordinator's key-value store."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values, f'ALREADY_EXISTS: {key}'
    self.values[key] = value

  def blocking_key_value_get(self, key, timeout_ms):
    return self.values[key]

  def key_value_dir_get(self, prefix):
    return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


@pytest.fixture
def group(monkeypatch):
  """This process as the first of two that have joined."""
  made = peers._Group(Store(), 0, 2, 4.0, 8.0)
  monkeypatch.setattr(peers, '_group', made)
  return made


def test_processes_compare_facts_more_than_once(group):
  for call, theirs in ((1, {'the step': 3}), (2, {'the step': 3, 'more': 1}), (3, {'the step': 4})):
    group.client.values[f'cnn_jax/facts/{call}/1'] = json.dumps(theirs)
  peers.compare(lambda: {'the step': 3})
  with pytest.raises(UsageError, match="more is 1 in process 1 and 'missing' in process 0; start all processes with"):
    peers.compare(lambda: {'the step': 3})
  with pytest.raises(UsageError, match='the step is 4 in process 1 and 3 in process 0'):
    peers.compare(lambda: {'the step': 3})


def test_a_process_that_is_alone_compares_nothing_and_has_no_deadline(monkeypatch):
  monkeypatch.setattr(peers, '_group', None)
  peers.compare(lambda: pytest.fail('called'))
  with peers.deadline('Reading'):
    pass


def test_what_is_compared_after_restoring_depends_on_the_step_the_config_and_the_data(tmp_path):
  from cnn_jax.data import load_dataset

  def facts(step, fields, count=30):
    root = make_folder(tmp_path / f'{count}', count=count) if not (tmp_path / f'{count}').exists() else None
    dataset = load_dataset(settings('folder', dir=str(root or tmp_path / f'{count}')))
    return start.facts(step, config.vary(config.default_config(), fields), dataset)

  first = facts(3, {})
  own = {'data.dir': '/elsewhere', 'data.workers': 2, 'log.tensorboard': False, 'checkpoint.keep': 5}
  assert facts(3, own) == first
  for others in (facts(4, {}), facts(3, {'seed': 1}), facts(3, {'data.resident': 'never'}), facts(3, {}, 31)):
    assert len([name for name in first if first[name] != others[name]]) == 1


def test_only_work_that_takes_too_long_ends_the_process(group, monkeypatch, capfd):
  left = []
  monkeypatch.setattr(signals, 'leave', lambda *arguments: left.append(arguments))
  now = time.monotonic()
  with peers.deadline('Saving'):
    with peers.deadline('Writing'):
      assert group.work[0] == 'Writing'
    what, since = group.work
    assert what == 'Saving' and since >= now
    for seconds in (1.0, 3.0, 4.0):
      group._check(what, since, since + seconds)
    assert left == []
    assert capfd.readouterr().err == 'warning: Saving has taken 3 s; the processes end after 8 s.\n'
    group._check(what, since, since + 8.1)
  assert group.work is None
  [(status, line)] = left
  assert (status, line.partition(',')[0]) == (143, 'Saving has taken more than 8 s')
