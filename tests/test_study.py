"""What experiments share: subsets, selection on validation, results.json, and the tables of the READMEs."""

import argparse
import json

import numpy as np
import pytest

from benchmarks import results as benchmark_results
from cnn_jax import UsageError
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, Split
from experiments import results, study

ENVIRONMENT = {
  'backend': 'cpu', 'cpu': 'an Abacus', 'cpu_cores': 2, 'git': {'commit': 40 * 'a', 'dirty': False},
  'versions': {'python': '1', 'jax': '2', 'flax': '3', 'optax': '4', 'numpy': '5'},
}  # fmt: skip


def _dataset(n=1000):
  random = np.random.default_rng(0)
  labels = random.choice(4, n, p=(0.1, 0.3, 0.3, 0.3)).astype(np.int32)
  images = np.broadcast_to(np.arange(n)[:, None, None, None] % 256, (n, 2, 2, 1)).astype(np.uint8)
  images[:, 0, 0, 0] = labels
  split = Split(images, labels)
  return Dataset('numbers', '', ('a', 'b', 'c', 'd'), split, split, split)


def test_a_subset_is_balanced_seeded_and_nested():
  dataset = _dataset()
  few, more, others = study.subset(dataset, 40, 0), study.subset(dataset, 200, 0), study.subset(dataset, 40, 1)
  assert np.bincount(few.train.labels).tolist() == [10, 10, 10, 10]
  np.testing.assert_array_equal(few.train.images, more.train.images[:40])
  np.testing.assert_array_equal(few.train.images[:, 0, 0, 0], few.train.labels)
  assert not np.array_equal(few.train.images, others.train.images)
  assert few.test is dataset.test
  assert len({few.name, more.name, others.name, dataset.name}) == 4
  # A class that is used up leaves the remaining places to the others; finally each image is there once.
  assert np.bincount(study.subset(dataset, 600, 0).train.labels).min() == np.bincount(dataset.train.labels).min()
  every = study.subset(dataset, 1000, 0).train
  assert sorted(map(bytes, every.images)) == sorted(map(bytes, dataset.train.images))
  with pytest.raises(UsageError, match='1000 training images, fewer than 1001'):
    study.subset(dataset, 1001, 0)


def test_arguments_are_the_experiments_or_overrides():
  parser = study.parser('What it does.', 'head', seeds=3)
  args, overrides = study.parse(parser, ['--config.epochs=2', '--output=there', "--config.model.features='(4, 8)'"])
  assert (args.seeds, str(args.workdir), str(args.output)) == (3, 'runs/head', 'there')
  assert overrides == ['--config.epochs=2', "--config.model.features='(4, 8)'"]
  assert args.command.startswith('python -m experiments.head.run --config.epochs=2 --output=there ')
  with pytest.raises(UsageError, match='--seeds is 0'):
    study.parse(parser, ['--seeds=0'])
  with pytest.raises(UsageError, match="'--epochs=3' is not an argument"):
    config_lib.override(config_lib.default_config(), study.parse(parser, ['--epochs=3'])[1])


def test_a_measurement_is_made_once(tmp_path):
  assert study.cached(tmp_path / 'found.json', lambda: {'accuracy': 0.5}) == {'accuracy': 0.5}
  assert study.cached(tmp_path / 'found.json', lambda: {'accuracy': 0.6}) == {'accuracy': 0.5}


def test_a_summary_by_hand():
  found = results.summary([0.99, 0.97])
  assert found['std'] == pytest.approx(0.01 * 2**0.5)
  assert found == {'mean': 0.98, 'std': found['std'], 'n': 2, 'min': 0.97, 'max': 0.99, 'values': [0.99, 0.97]}
  assert results.show(found) == '98.00 ± 1.41 %'
  assert results.show_range(found) == ['98.00 ± 1.41 %', '97.00 %', '99.00 %', '2']
  assert results.show(results.summary([0.5])) == '50.00 %'
  unknown = results.summary([0.5, None])
  assert (unknown['mean'], unknown['std'], unknown['n'], unknown['values']) == (None, None, 2, [0.5, None])
  assert results.show_range(unknown) == ['-', '-', '-', '2']
  assert results.summary([0.5, float('inf')])['mean'] is None


def test_measurements_become_a_grid():
  rows = [{'size': size, 'rate': rate, 'x': size * rate} for size in (32, 16) for rate in (1, 2)]
  assert results.grid(rows[:3], 'size', 'rate', 'x') == {32: {1: 32, 2: 64}, 16: {1: 16}}


def test_the_best_candidate_is_bold():
  def candidate(name, accuracy, loss):
    one = {'candidate': name, 'parameters': 1234, 'images_per_second': results.summary([1500.0])}
    return one | {'validation_accuracy': results.summary([accuracy]), 'validation_loss': results.summary([loss])}

  selection = {
    'epochs': 3, 'num_validation': 5999, 'seeds': [0], 'hardware': None, 'versions': None, 'commit': 'abcdef0',
    'candidates': [candidate('a', 0.98, 0.1), candidate('b', 0.99, 0.3), candidate('c', 0.99, 0.2)],
  }  # fmt: skip
  first, _, *rows = study.selection_table(selection).splitlines()
  assert first == 'commit abcdef0; seed 0. 5,999 validation images, 3 epochs:'
  assert rows[2:] == [
    '| a | 1,234 | 1,500 | 98.00 % | 0.1000 | 1 |',
    '| b | 1,234 | 1,500 | 99.00 % | 0.3000 | 1 |',
    '| **c** | 1,234 | 1,500 | 99.00 % | 0.2000 | 1 |',
  ]


def test_results_name_machine_versions_and_commits(tmp_path):
  for seed, changes in enumerate(({}, {'git': {'commit': 40 * 'b', 'dirty': True}}, {'git': None})):
    (tmp_path / f'seed_{seed}').mkdir()
    (tmp_path / f'seed_{seed}' / 'environment.json').write_text(json.dumps(ENVIRONMENT | changes))
  args = argparse.Namespace(workdir=tmp_path, seeds=3, command='python -m x')
  found = study.found(args, _dataset(), accuracy=0.5)
  assert found == {
    'command': 'python -m x', 'dataset': 'numbers', 'seeds': [0, 1, 2], 'hardware': '2 cores of an Abacus',
    'versions': {'python': '1', 'jax': '2', 'flax': '3', 'optax': '4'}, 'accuracy': 0.5,
    'commit': 'aaaaaaa, bbbbbbb with changes, unknown',
  }  # fmt: skip
  assert results.source(found).startswith('2 cores of an Abacus; python 1, jax 2, flax 3, optax 4; commit aaaaaaa, ')
  assert results.source(found).endswith('; seeds 0 to 2.')
  gpus = ENVIRONMENT | {'backend': 'gpu', 'num_devices': 8, 'device_kind': 'Nonesuch'}
  assert results.hardware(gpus) == '8 Nonesuch (gpu)'


def test_publishing_keeps_the_other_results_and_updates_the_page(tmp_path, capsys):
  def tables(found):
    return {name: f'| {value} |' for name, value in sorted(found.items())}

  results.publish({'accuracy': 1}, tables, tmp_path)
  (tmp_path / 'README.md').write_text(
    'A\n<!-- accuracy -->\nold\n<!-- end of accuracy -->\n<!-- selection -->\n<!-- end of selection -->\n'
  )
  results.publish({'selection': 2}, tables, tmp_path, lambda path: path.write_text('figure'))
  assert capsys.readouterr().out == '\n| 1 |\n\n| 2 |\n'
  assert json.loads((tmp_path / 'results.json').read_text()) == {'accuracy': 1, 'selection': 2}
  assert (tmp_path / 'README.md').read_text() == (
    'A\n<!-- accuracy -->\n| 1 |\n<!-- end of accuracy -->\n<!-- selection -->\n| 2 |\n<!-- end of selection -->\n'
  )
  assert (tmp_path / 'figure.png').read_text() == 'figure'
  (tmp_path / 'results.json').write_text('{')
  with pytest.raises(UsageError, match='cannot read .*results.json'):
    benchmark_results.read(tmp_path / 'results.json')


def test_every_experiment_has_its_evidence():
  for name in ('run.py', 'README.md', 'figure.png'):
    assert sorted(path.parent for path in results.FOLDER.glob(f'*/{name}')) == results.folders()


@pytest.mark.parametrize('folder', results.folders(), ids=lambda folder: folder.name)
def test_the_readme_agrees_with_the_results(folder):
  assert benchmark_results.page(folder) == (folder / 'README.md').read_text()
  found = benchmark_results.read(folder / 'results.json')
  assert {'command', 'dataset', 'seeds', 'hardware', 'versions', 'commit'} <= found.keys()
