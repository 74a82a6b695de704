"""Checkpoints: bit for bit as saved, whole or not at all, damage always noticed."""

import pickle
import resource
import shutil
from typing import Any, NamedTuple

import flax
import jax
import ml_dtypes
import numpy as np
import pytest

from cnn_jax import UsageError, checkpoint


class Momentum(NamedTuple):
  count: Any
  trace: Any


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  kernel = rng.normal(size=(3, 3, 2, 4)).astype(np.float32)
  kernel.flat[:3] = -0.0, np.nan, np.inf
  params = {'block1': {'kernel': kernel, 'bias': rng.normal(size=4).astype(ml_dtypes.bfloat16)}}
  trace = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
  return State(
    step=np.int32(seed),
    params=params,
    batch_stats={},
    opt_state=(Momentum(np.uint32(7), trace), (), [np.array([True, False])]),
    ema=None,
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def save(directory, step, seed=None, keep=2, **info):
  checkpoint.save(directory, step, make_state(step if seed is None else seed), info=info, keep=keep)


def restored_step(directory, **arguments):
  """The step restored, after checking that the state is the one saved then; and the warnings."""
  warnings = []
  state, step, _ = checkpoint.restore(directory, make_state(), warn=warnings.append, **arguments)
  assert_same(state, make_state(step))
  return step, warnings


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Checkpoints of steps 1 and 2, to be copied."""
  directory = tmp_path_factory.mktemp('saved') / 'checkpoints'
  save(directory, 1, validation_accuracy=0.5)
  save(directory, 2, validation_accuracy=0.6)
  return directory


@pytest.fixture
def two(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'checkpoints')


def test_roundtrip_is_bit_exact_with_a_template_of_shapes(tmp_path):
  state = make_state(3)
  on_device = jax.tree.map(jax.numpy.asarray, state)
  checkpoint.save(tmp_path, 3, on_device, info={'train_seconds': 1.1, 'class_names': ['a']}, keep=1)
  template = jax.eval_shape(lambda: on_device)
  restored, step, info = checkpoint.restore(tmp_path, template)
  assert_same(restored, state)
  assert isinstance(restored.opt_state[0], Momentum)
  assert restored.ema is None
  assert restored.batch_stats == {}
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
  assert (step, info) == (3, {'train_seconds': 1.1, 'class_names': ['a']})


def test_without_a_template_the_state_is_nested_dicts(two):
  state, step, _ = checkpoint.restore(two)
  expected = make_state(step)
  assert_same(state['params'], expected.params)
  assert_same(state['opt_state']['0']['trace'], expected.opt_state[0].trace)
  assert state['ema'] is None
  assert state['batch_stats'] == {}


def test_a_relative_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save('checkpoints', 1)
  assert restored_step('checkpoints') == (1, [])


def test_nothing_saved_is_none_and_not_an_error(tmp_path):
  assert checkpoint.restore(tmp_path / 'missing', make_state()) is None
  (tmp_path / '.tmp-5').mkdir()
  (tmp_path / 'notes.txt').write_text('not a checkpoint')
  assert checkpoint.restore(tmp_path, make_state()) is None
  assert checkpoint.steps(tmp_path) == []


def test_nothing_is_pickled(tmp_path, monkeypatch):
  def refuse(*_):
    raise AssertionError('pickle')

  for name in ('dump', 'dumps', 'load', 'loads'):
    monkeypatch.setattr(pickle, name, refuse)
  save(tmp_path, 1)
  assert restored_step(tmp_path) == (1, [])


FILES = ('manifest.json', 'info.json', 'state/_METADATA', 'state/manifest.ocdbt', 'state/ocdbt.process_0/d/*')


def truncate(file):
  file.write_bytes(file.read_bytes()[:-1])


def empty(file):
  file.write_bytes(b'')


def flip_a_bit(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def remove(file):
  file.unlink()


@pytest.mark.parametrize('damage', [truncate, empty, flip_a_bit, remove])
@pytest.mark.parametrize('name', FILES)
def test_damage_to_any_file_falls_back_with_one_warning(two, name, damage):
  file = max((two / '2').glob(name), key=lambda path: path.stat().st_size)
  damage(file)
  if damage is truncate and name == 'manifest.json':
    file.write_bytes(file.read_bytes()[:-1])  # the first byte cut off was only a line break
  step, warnings = restored_step(two)
  assert step == 1
  assert len(warnings) == 1
  assert str(two / '2') in warnings[0]
  if not (damage is flip_a_bit and name == 'manifest.json'):  # which may then accuse any file
    assert file.name in warnings[0]


def test_an_extra_file_or_a_renamed_checkpoint_is_damage(two):
  (two / '2' / 'state' / 'extra').write_bytes(b'x')
  step, warnings = restored_step(two)
  assert step == 1
  assert 'extra' in warnings[0]
  shutil.rmtree(two / '2')
  shutil.copytree(two / '1', two / '9')
  step, warnings = restored_step(two)
  assert step == 1
  assert 'manifest.json is of step 1' in warnings[0]


def test_all_damaged_is_an_error_and_nothing_is_removed(two):
  truncate(two / '1' / 'info.json')
  remove(two / '2' / 'manifest.json')
  before = sorted(two.rglob('*'))
  with pytest.raises(checkpoint.CheckpointError, match='all checkpoints are damaged') as caught:
    checkpoint.restore(two, make_state(), warn=lambda _: None)
  assert str(two) in str(caught.value)
  assert isinstance(caught.value, UsageError)
  assert sorted(two.rglob('*')) == before


def test_a_step_asked_for_by_number_has_no_substitute(two):
  assert restored_step(two, which=1) == (1, [])
  with pytest.raises(checkpoint.CheckpointError, match='no checkpoint of step 3; it has: 1, 2'):
    checkpoint.restore(two, make_state(), which=3)
  truncate(two / '2' / 'info.json')
  with pytest.raises(checkpoint.CheckpointError, match=r'info.json is not as it was written.*ask for another step: 1'):
    checkpoint.restore(two, make_state(), which=2)


def test_a_state_of_another_shape_is_an_error_that_names_the_array(two):
  state = make_state()
  wider = state.replace(params={'block1': {**state.params['block1'], 'bias': np.zeros(5, ml_dtypes.bfloat16)}})
  with pytest.raises(checkpoint.CheckpointError, match=r'params/block1/bias is bfloat16\[4\] there and bfloat16\[5\]'):
    checkpoint.restore(two, wider)
  with pytest.raises(checkpoint.CheckpointError, match='ema is missing there'):
    checkpoint.restore(two, state.replace(ema=np.zeros(1)))
  with pytest.raises(checkpoint.CheckpointError, match=r'opt_state/2/0 is bool\[2\] there and missing here'):
    checkpoint.restore(two, state.replace(opt_state=state.opt_state[:2]))


def test_the_newest_and_the_best_are_kept(tmp_path):
  for step, accuracy in enumerate([0.1, 0.9, 0.9, 0.3, float('nan'), None], start=1):
    save(tmp_path, step, keep=2, **({} if accuracy is None else {'validation_accuracy': accuracy}))
  assert checkpoint.steps(tmp_path) == [2, 5, 6]  # of equals, the earliest
  assert restored_step(tmp_path, which='best') == (2, [])
  assert restored_step(tmp_path, which='last') == (6, [])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '5', '6']


def test_a_damaged_best_falls_back_to_the_next_best(tmp_path):
  for step, accuracy in enumerate([0.7, 0.9, 0.8, 0.1], start=1):
    save(tmp_path, step, keep=4, validation_accuracy=accuracy)
  truncate(tmp_path / '2' / 'manifest.json')
  flip_a_bit(next((tmp_path / '2').glob('state/ocdbt.process_0/d/*')))
  step, warnings = restored_step(tmp_path, which='best')
  assert step == 3
  assert len(warnings) == 1


def test_best_without_a_validation_split_is_the_last(tmp_path):
  save(tmp_path, 1)
  save(tmp_path, 2)
  step, warnings = restored_step(tmp_path, which='best')
  assert step == 2
  assert len(warnings) == 1


def test_saving_a_step_again_replaces_it(two):
  save(two, 2, validation_accuracy=0.75)
  assert checkpoint.restore(two)[2] == {'validation_accuracy': 0.75}
  assert sorted(path.name for path in two.iterdir()) == ['1', '2']


def test_saving_over_a_damaged_step_mends_it(two):
  for file in (two / '2').rglob('*.json'):
    file.unlink()
  save(two, 2)
  assert restored_step(two) == (2, [])


def test_a_damaged_later_step_does_not_displace_a_sound_one(two):
  truncate(two / '2' / 'info.json')
  shutil.move(two / '2', two / '20')
  save(two, 10, keep=1)
  assert checkpoint.steps(two) == [1, 10]  # the best, and the newest
  assert restored_step(two) == (10, [])


def test_what_a_killed_process_left_is_removed_at_the_next_save(two):
  (two / '.tmp-3' / 'state').mkdir(parents=True)
  (two / '.tmp-3' / 'info.json').write_text('{')
  assert restored_step(two) == (2, [])
  save(two, 3)
  assert sorted(path.name for path in two.iterdir()) == ['2', '3']


class Killed(BaseException):
  pass


@pytest.mark.parametrize('step', [2, 3])
def test_killed_at_any_moment_of_a_save_leaves_a_whole_checkpoint(saved, tmp_path, monkeypatch, step):
  """Stops a save, of a new step and of one that is there, before its n-th change to the disk, for every n."""

  def count_down(left):
    def watch(owner, name):
      original = getattr(owner, name)

      def act(*arguments, **keywords):
        if left[0] == 0:
          raise Killed
        left[0] -= 1
        return original(*arguments, **keywords)

      patch.setattr(owner, name, act)

    watch(checkpoint.Path, 'mkdir')
    watch(checkpoint.Path, 'rename')
    watch(checkpoint.Path, 'write_text')
    watch(checkpoint.shutil, 'rmtree')
    watch(checkpoint, '_write_arrays')
    watch(checkpoint, '_sync_tree')

  found = set()
  for n in range(100):
    directory = shutil.copytree(saved, tmp_path / str(n) / 'checkpoints')
    with monkeypatch.context() as patch:
      count_down([n])
      try:
        save(directory, step, keep=1, again=True)
        done = True
      except Killed:
        done = False
    state, at, info = checkpoint.restore(directory, make_state(), warn=pytest.fail)
    assert_same(state, make_state(at))
    found.add((at, 'again' in info))
    save(directory, step, keep=1, again=True)
    assert restored_step(directory) == (step, [])
    assert not list(directory.glob('.*'))
    shutil.rmtree(directory)
    if done:
      break
  assert done
  assert found == {(2, False), (step, True)}


def test_a_reader_looks_again_when_the_writer_removes_what_it_reads(two, monkeypatch):
  verify = checkpoint._verify

  def prune_then_verify(path, step):
    if step == 2 and not (two / '3').exists():
      save(two, 3)
      shutil.rmtree(two / '2')
    verify(path, step)

  monkeypatch.setattr(checkpoint, '_verify', prune_then_verify)
  assert restored_step(two) == (3, [])


def test_a_full_disk_is_one_line_and_leaves_the_previous_checkpoint(two, capfd):
  big = {'kernel': np.random.default_rng(0).normal(size=100_000)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    with pytest.raises(UsageError, match=r'cannot save the checkpoint of step 3 in .*: File too large') as caught:
      checkpoint.save(two, 3, big, info={}, keep=1)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert '\n' not in str(caught.value)
  assert 'Traceback' not in capfd.readouterr().err
  assert sorted(path.name for path in two.iterdir()) == ['1', '2']
  assert restored_step(two) == (2, [])


def test_a_directory_that_cannot_be_made_or_read_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match='cannot save the checkpoint of step 1'):
    save(tmp_path / 'file', 1)
  with pytest.raises(checkpoint.CheckpointError, match='cannot read the checkpoints in'):
    checkpoint.restore(tmp_path / 'file', make_state())
