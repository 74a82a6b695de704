"""Every benchmark runs at a tiny size, and its README has the tables of its results.json. step_time: test_step_time.py."""

import json
import os
import pathlib
import re
import shutil
import sys
import time
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from benchmarks import peers, results
from benchmarks.accelerator import run as accelerator
from benchmarks.cifar10_speedrun import run as cifar10_speedrun
from benchmarks.fine_tuning import run as fine_tuning
from benchmarks.loader import pictures
from benchmarks.loader import run as loader
from benchmarks.many_seeds import run as many_seeds
from benchmarks.mnist_speedrun import run as mnist_speedrun
from benchmarks.saving import run as saving
from benchmarks.scaling import run as scaling
from benchmarks.start_up import run as start_up
from cnn_jax import UsageError, config
from cnn_jax.data import load_dataset
from tests.datasets import contents
from tests.helpers import call_command

PEER = """
from benchmarks.peers import serve
serve(lambda a, b: {'sum': int(a) + int(b)}, version='1')
"""


# Results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('folder', results.folders(), ids=lambda folder: folder.name)
def test_the_readme_has_the_tables_of_the_results(folder):
  text = (folder / 'README.md').read_text()
  assert results.page(folder) == text, 'run python -m benchmarks.results'
  by_hand = re.sub(r'<!-- (\w+) -->.*?<!-- end of \1 -->', '', text, flags=re.DOTALL)
  assert '| --- |' not in by_hand
  assert {'command', 'hardware', 'versions', 'commit'} <= results.read(folder / 'results.json').keys()


def test_every_benchmark_has_results():
  assert results.folders() == sorted(path.parent for path in results.FOLDER.glob('*/run.py'))


def test_results_of_another_measurement_are_kept(tmp_path):
  file = tmp_path / 'results.json'
  results.publish({'commit': 'a', 'measurements': [1]}, {}, file)
  results.publish({'commit': 'b', 'repeats': [2]}, {}, file)
  assert results.read(file) == {'commit': 'b', 'measurements': [1], 'repeats': [2]}


def test_a_folder_that_does_not_exist_is_found_before_the_measurement(tmp_path):
  done = call_command('benchmarks.many_seeds.run', f'--json={tmp_path / "none" / "results.json"}')
  assert done.returncode == 2
  assert 'there is no folder' in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_hardware_in_words():
  assert results.cpu({'cpu': 'an Abacus', 'cpu_cores': 1}) == '1 core of an Abacus'
  assert results.cpu({'cpu': 'an Abacus', 'cpu_cores': 2}) == '2 cores of an Abacus'


@pytest.mark.parametrize(
  ('name', 'arguments'),
  [
    ('cifar10_speedrun', ['--seeds=0']),
    ('mnist_speedrun', ['--seeds=0']),
    ('fine_tuning', ['--data_dir=none', '--seeds=0']),
    ('fine_tuning', ['--data_dir=none', '--slow_seeds=0']),
  ],
)
def test_no_runs_are_refused_at_the_start(name, arguments):
  done = call_command(f'benchmarks.{name}.run', *arguments)
  assert done.returncode == 2
  assert done.stderr == f'error: {arguments[-1].partition("=")[0]} is 0; it must be at least 1.\n'


# Peers ------------------------------------------------------------------------------------------


def test_a_peer_answers_and_is_stopped_in_between(tmp_path):
  (tmp_path / 'echo_peer.py').write_text(PEER)
  path = os.pathsep.join((str(tmp_path), str(peers.ROOT)))
  with peers.Peer('echo_peer', environment={'PYTHONPATH': path}) as peer:
    assert peer.ready == {'version': '1'}
    assert peer.ask(2, 3) == {'sum': 5}
    deadline = time.monotonic() + 30
    while sys.platform == 'linux' and _state(peer.pid) != 'T':
      assert time.monotonic() < deadline
      time.sleep(0.01)
    with pytest.raises(UsageError, match='echo_peer ended with status 1'):
      peer.ask('two', 3)


def _state(pid):
  """The state of a process on Linux: 'T' if it is stopped."""
  return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]


def test_rounds_are_interleaved():
  order = []
  measured = peers.interleave(lambda name, i: order.append(name) or i, 'ab', 3)
  assert measured == {'a': [0, 1, 2], 'b': [0, 1, 2]}
  assert ''.join(order) == 'ababab'
  with pytest.raises(UsageError, match='0 rounds'):
    peers.interleave(lambda name, i: i, 'ab', 0)


def test_medians_and_ratios_by_hand():
  assert peers.show(peers.spread([4.0, 1.0, 3.0])) == '3.0 (1.0-4.0)'
  assert peers.show({'median': 1234.0, 'min': None, 'max': None}, 0) == '1,234'
  assert peers.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0  # of 2, 3 and 1
  sample = peers.sample([0.99, 0.97])
  assert (sample['mean'], sample['std']) == pytest.approx((0.98, 0.01 * 2**0.5))
  assert peers.sample([0.5])['std'] is None


# The benchmarks ---------------------------------------------------------------------------------


def _run(name, tmp_path, *arguments):
  """Runs a benchmark and returns the results that it wrote, after a look at what it printed."""
  file = tmp_path / 'results.json'
  done = call_command(f'benchmarks.{name}.run', f'--json={file}', *arguments)
  assert done.returncode == 0, done.stderr
  found = json.loads(file.read_text())
  program = __import__(f'benchmarks.{name}.run', fromlist=['run'])
  for table in program.tables(found).values():
    assert table in done.stdout
  return found


def test_scaling(monkeypatch, tmp_path):
  base = {'batch_size': 8, 'width': 2, 'depth': 1, 'devices': 1, 'processes': 1, 'examples': 32}
  monkeypatch.setattr(scaling, 'BASE', base)
  monkeypatch.setattr(scaling, 'POINTS', {'devices': [2]})
  picture = tmp_path / 'plot.png'
  found = _run('scaling', tmp_path, '--rounds=1', '--seconds=0.05', f'--plot={picture}')
  (point,) = found['measurements']
  assert (point['axis'], point['value']) == ('devices', 2)
  assert point['images_per_second']['median'] > 0
  assert point['peak_mb']['median'] > 50
  assert picture.read_bytes().startswith(b'\x89PNG')


def test_scaling_draws_every_axis(tmp_path):
  scaling.plot(results.read(results.FOLDER / 'scaling' / 'results.json'), tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 10_000


def test_many_seeds_takes_the_same_steps_in_both_ways(monkeypatch, tmp_path):
  monkeypatch.setattr(many_seeds, 'NETWORKS', {'tiny': ((4, 4, 1), (2,), 4)})
  (row,) = _run('many_seeds', tmp_path, '--quick', '--rounds=2', '--seconds=0.01')['measurements']
  assert row['seeds'] == 2
  assert row['difference'] < 1e-5
  assert [len(row['ms'][name]['values']) for name in many_seeds.WAYS] == [2, 2]


def test_mnist_speedrun(monkeypatch, tmp_path):
  monkeypatch.setattr(
    mnist_speedrun, 'RECIPE', mnist_speedrun.RECIPE | {'data.source': 'bundled', 'data.name': 'digits'}
  )
  found = _run('mnist_speedrun', tmp_path, '--seeds=2', '--first_seed=5', '--config.model.features=(2,)')
  (ours,) = found['measurements']
  assert (ours['program'], ours['accuracy']['n'], found['first_seed'], found['split']) == ('ours', 2, 5, 'test')
  assert all(0.05 < accuracy < 1 for accuracy in ours['accuracy']['values'])
  assert len(set(ours['accuracy']['values'])) == 2  # of two seeds
  assert ours['seconds']['min'] > 0


# The data and the size of which a CPU trains.
_SMALL_SPEEDRUN = [word for word in accelerator.PARTS['cifar10_speedrun'].small if word.startswith('--config.')]


def test_cifar10_speedrun(tmp_path):
  record = _run('cifar10_speedrun', tmp_path, *_SMALL_SPEEDRUN, '--seeds=2', '--first_seed=5')['record']
  (row,) = record['measurements']
  assert (row['recipe'], row['accuracy']['n'], record['first_seed']) == (cifar10_speedrun.RECIPE, 2, 5)
  assert all(0.2 < accuracy < 1 for accuracy in row['accuracy']['values'])
  assert len(set(row['accuracy']['values'])) == 2  # of two seeds
  assert row['seconds']['min'] > 0


@pytest.mark.faults
def test_cifar10_speedrun_without_an_ingredient(tmp_path):
  found = _run('cifar10_speedrun', tmp_path, *_SMALL_SPEEDRUN, '--seeds=1', '--ablate')
  recipes = [row['recipe'] for row in found['ablation']['measurements']]
  assert recipes == [cifar10_speedrun.RECIPE, *cifar10_speedrun.ABLATIONS]
  again = _run('cifar10_speedrun', tmp_path, *_SMALL_SPEEDRUN, '--seeds=1')
  assert again['ablation'] == found['ablation']  # another part of the same file
  assert 'record' in again


@pytest.mark.faults
def test_cifar10_speedrun_to_96(tmp_path):
  (row,) = _run('cifar10_speedrun', tmp_path, *_SMALL_SPEEDRUN, '--seeds=1', '--accurate')['accurate']['measurements']
  assert 0.2 < row['accuracy']['mean'] < 1


@pytest.fixture
def photographs(tmp_path):
  """A folder of four classes: eight training and two test pictures of each."""
  random = np.random.default_rng(0)
  for split, count in (('train', 8), ('test', 2)):
    for level, name in enumerate('abcd'):
      folder = tmp_path / 'photographs' / split / name
      folder.mkdir(parents=True)
      for i in range(count):
        Image.fromarray(random.integers(60 * level, 60 * level + 60, (8, 8, 3), np.uint8)).save(folder / f'{i}.png')
  return tmp_path / 'photographs'


class _FakePeer:
  """In place of PyTorch: names a class right in recipes of SGD only."""

  ready: ClassVar = {'version': '0'}

  def __init__(self, decoded, *_):
    self._decoded = np.load(decoded)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def ask(self, recipe, seed, fold):
    if fold >= 0:  # the test pictures are not even there
      assert set(self._decoded.files) == {'images', 'labels', 'folds'}
    n = len(self._decoded['test_labels']) if fold < 0 else int((self._decoded['folds'] == fold).sum())
    return {'correct': n if json.loads(recipe)['optimizer'] == 'sgd' else 0, 'n': n}


@pytest.fixture
def fake_peer(monkeypatch):
  monkeypatch.setattr(peers, 'check_pytorch', lambda python: None)
  monkeypatch.setattr(fine_tuning, '_start_peer', _FakePeer)


def test_fine_tuning(photographs, fake_peer, monkeypatch, tmp_path):
  tiny = (
    '--config=configs/image_folder.py', '--config.data.image_size=8', '--config.model.features=(2,)',
    '--config.model.convs_per_block=1', '--config.epochs=1', '--config.min_steps=1', '--config.data.validation=0.0',
    '--config.augment.shift=0', '--config.augment.flip=False', '--config.log.tensorboard=False',
    '--config.log.report=False',
  )  # fmt: skip
  monkeypatch.setattr(fine_tuning, 'WAYS', {'ours': tiny})
  monkeypatch.setattr(fine_tuning, 'CHOSEN', 'SGD 0.002')
  found = _run(
    'fine_tuning', tmp_path, f'--data_dir={photographs}', f'--workdir={tmp_path / "runs"}', '--pictures=3',
    '--seeds=1', '--pytorch_python=any',
  )  # fmt: skip
  ours, pytorch = found['measurements']
  assert (ours['way'], ours['set'], ours['pictures'], ours['accuracy']['n']) == ('ours', 'photographs', 3, 1)
  assert (pytorch['way'], pytorch['accuracy']['mean'], found['versions']['torch']) == ('PyTorch', 1.0, '0')
  assert ours['seconds']['median'] > 1 > pytorch['seconds']['median']
  for split, count in (('train', 3), ('test', 2)):
    for name in 'abcd':
      assert len(list(tmp_path.glob(f'runs/*/pictures-0/{split}/{name}/*'))) == count
  assert 'Time of PyTorch / time of ours' in fine_tuning.tables(found)['measurements']


def test_the_recipe_of_pytorch_is_chosen_on_training_pictures(photographs, fake_peer, tmp_path):
  choice = _run(
    'fine_tuning', tmp_path, f'--data_dir={photographs}', f'--workdir={tmp_path / "runs"}', '--choose',
    '--pytorch_python=any', '--config.data.image_size=8',
  )['choice']  # fmt: skip
  counts = {row['recipe']: row['sets']['photographs'] for row in choice['measurements']}
  assert counts['SGD 0.005'] == {'correct': 32, 'n': 32}  # each training picture is held out once
  assert counts['AdamW 1e-4'] == {'correct': 0, 'n': 32}


def test_folds_have_as_many_of_each_class():
  labels = np.repeat(np.arange(3), 7)
  folds = fine_tuning.split_folds(labels, 3)
  for label in range(3):
    assert sorted(np.bincount(folds[labels == label])) == [2, 2, 3]
  assert len(set(map(tuple, folds.reshape(3, 7)))) == 3


@pytest.mark.parametrize('way', fine_tuning.WAYS)
def test_the_ways_of_fine_tuning_are_configs(way):
  file, *overrides = fine_tuning.WAYS[way]
  config.check(config.load(str(peers.ROOT / file.removeprefix('--config=')), overrides))


def test_fine_tuning_leaves_an_old_workdir_alone(photographs, tmp_path):
  done = call_command('benchmarks.fine_tuning.run', f'--data_dir={photographs}', f'--workdir={tmp_path}')
  assert (done.returncode, photographs.is_dir()) == (2, True)
  assert 'exists; remove it' in done.stderr


def test_start_up(digits_run, monkeypatch, tmp_path):
  monkeypatch.setattr(start_up, 'train_digits', lambda workdir, cache: shutil.copytree(digits_run, workdir))
  monkeypatch.setattr(start_up, 'TIMES', start_up.TIMES[1:3])  # one of training, one of prediction
  found = _run(
    'start_up', tmp_path, '--repeats=1', '--config=configs/digits.py', '--config.model.features=(2,)',
    '--config.model.convs_per_block=1', '--config.augment.shift=0', '--config.log.tensorboard=False',
  )  # fmt: skip
  seconds = {row['what']: row['seconds']['median'] for row in found['measurements']}
  assert all(0.5 < seconds[what] < 120 for what in start_up.TIMES)
  assert seconds['import jax'] > 0.1
  assert seconds['import all'] >= max(seconds['import jax'], seconds['import flax'])
  # Only reports and data sources need these, so training imports them later.
  assert not {f'import {name}' for name in ('matplotlib', 'sklearn', 'tensorflow_datasets')} & set(seconds)


@pytest.mark.faults
def test_start_up_on_a_folder(tmp_path):
  found = _run(
    'start_up', tmp_path, '--repeats=1', '--files=40', '--config.model.features=(2,)', '--config.model.convs_per_block=1',
    '--config.batch_size=8', '--config.log.tensorboard=False',
  )['files']  # fmt: skip
  assert [row['what'] for row in found['measurements']] == list(start_up.files.STARTS)
  assert all(0.5 < row['seconds']['median'] < 120 for row in found['measurements'])
  assert all(100 < row['peak_mb']['median'] < 4000 for row in found['measurements'])


@pytest.mark.faults
def test_loader(tmp_path):
  found = _run('loader', tmp_path, '--images=64', '--rounds=1')
  rows = {(row['program'], row['set'], row['cores']): row for row in found['measurements']}
  assert {(name, of_set) for name, of_set, _ in rows} >= {
    ('ours, Pillow', form) for form in ('folder', 'tar', 'ArrayRecord')
  }
  assert all(row['images_per_second']['median'] > 1 and 0.5 < row['cpu_ms']['median'] < 100 for row in rows.values())
  assert 60 < found['file_kb'] < 140


def test_the_pictures_of_the_loader_are_one_set_in_three_forms(monkeypatch, tmp_path):
  monkeypatch.setattr(pictures, 'HEIGHT', 24)
  monkeypatch.setattr(pictures, 'WIDTH', 32)
  found = []
  for fields in pictures.write(tmp_path / 'sets', 4).values():
    data = config.default_config().data
    data.update({'validation': 0.0, 'megabytes': 1} | fields)
    found.append(contents(load_dataset(data).train))
  assert len(found) == 3 and len(found[0]) == 4
  assert found[0] == found[1] == found[2]


def test_the_loader_is_compared_with_the_data_loader_on_as_many_cores():
  def answers(*values):
    return [{'images_per_second': 1e3 / value, 'cpu_ms': value} for value in values]

  ours, theirs = loader._Asked('ours, Pillow', 'tar', 'tar'), loader._REFERENCE
  rows = loader.summarize({(ours, 1): answers(2.0, 4.0), (theirs, 1): answers(4.0, 4.0), (ours, 2): answers(1.0, 1.0)})
  assert [row['ratio'] for row in rows] == [1.5, 1.0, None]  # of 2 and 1; of itself; of nothing


def test_saving(monkeypatch, tmp_path):
  tiny = ({'batch_size': 8, 'model.features': (2,)}, (6, 6, 1), 2)
  monkeypatch.setattr(saving, 'NETWORKS', {'tiny': tiny})
  found = _run('saving', tmp_path, '--saves=1')
  (row,) = found['measurements']
  # Kernels and biases of the convolution, the norm and the head, with their momentum; running statistics; two counts.
  assert row['megabytes'] * 1e6 == pytest.approx(4 * (2 * (3 * 3 * 2 + 2 * 2 + 2 * 10 + 10) + 2 * 2 + 2))
  assert 0 < row['background']['stall_ms']['median'] < row['waits']['stall_ms']['median']
