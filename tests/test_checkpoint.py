"""Checkpoints: bit for bit as saved, and whole or not at all."""

import asyncio
import gc
import logging
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from cnn_jax import Diverged, UsageError, checkpoint
from tests.checkpoints import Momentum, assert_same, make_state, restored_step, save
from tests.helpers import largest_file

pytestmark = pytest.mark.usefixtures('no_waiting')


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


def test_nothing_is_pickled(tmp_path, monkeypatch):
  def refuse(*_):
    raise AssertionError('pickle')

  for name in ('dump', 'dumps', 'load', 'loads'):
    monkeypatch.setattr(pickle, name, refuse)
  save(tmp_path, 1)
  assert restored_step(tmp_path) == (1, [])


def test_the_choice_is_last_or_best(two):
  with pytest.raises(UsageError, match="the checkpoint to read is 'first'; it must be last or best"):
    checkpoint.restore(two, which='first')


def test_names_that_are_not_numbers_of_steps_are_ignored(two):
  for name in ('x', '-1', '3.0', '\u0663', '.old-x'):
    shutil.copytree(two / '2', two / name)
  assert restored_step(two) == (2, [])


def test_a_state_of_another_step_is_not_saved(two):
  with pytest.raises(AssertionError, match='saved as step 3, but the state has made 4 steps'):
    save(two, 3, seed=4)
  assert sorted(path.name for path in two.iterdir()) == ['1', '2']


@pytest.mark.parametrize('field', ['params', 'batch_stats', 'ema'])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_not_saved(two, field, value, dtype):
  state = make_state(3).replace(**{field: {'head': {'bias': np.array([0, value], dtype)}}})
  with pytest.raises(
    Diverged, match=f'^{field}/head/bias is not finite after step 3, so that nothing was saved; lower'
  ):
    checkpoint.save(two, 3, state, info={}, keep=1)
  assert sorted(path.name for path in two.iterdir()) == ['1', '2']


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
  assert restored_step(tmp_path, which='best') == (2, [])
  assert restored_step(tmp_path, which='last') == (6, [])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '5', '6']  # of equals, the earliest


def test_an_empty_array_is_refused(two):
  with pytest.raises(ValueError, match='zero'):
    checkpoint.save(two, 3, {'empty': np.zeros(0)}, info={}, keep=1)
  assert restored_step(two) == (2, [])


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


def test_what_a_killed_process_left_is_removed_at_the_next_save(two):
  (two / '.tmp-3' / 'state').mkdir(parents=True)
  (two / '.tmp-3' / 'info.json').write_text('{')
  assert restored_step(two) == (2, [])
  save(two, 3)
  assert sorted(path.name for path in two.iterdir()) == ['2', '3']


def test_all_of_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(checkpoint.files, 'sync', lambda path: synced.append(path.relative_to(tmp_path).as_posix()))
  save(tmp_path, 1)
  written = {path.relative_to(tmp_path / '1').as_posix() for path in (tmp_path / '1').rglob('*')}
  assert {'manifest.json', 'info.json', 'state', 'state/_METADATA'} < written
  assert set(synced[:-1]) == {'.tmp-1', *(f'.tmp-1/{name}' for name in written)}
  assert synced[-1] == '.'  # the new name


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
    watch(checkpoint.arrays, 'write')
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
  expected = r'cannot save the checkpoint of step 3 in .*: File too large'
  with largest_file(100_000), pytest.raises(UsageError, match=expected) as caught:
    checkpoint.save(two, 3, big, info={}, keep=1)
  assert '\n' not in str(caught.value)
  assert 'Traceback' not in capfd.readouterr().err
  assert sorted(path.name for path in two.iterdir()) == ['1', '2']
  assert restored_step(two) == (2, [])


def test_what_asyncio_says_of_other_failed_writes_is_not_shown(two, capfd):
  """TensorStore leaves a future per array that failed; asyncio reports each when it is collected, at any time."""
  handler = logging.StreamHandler()
  logging.getLogger('asyncio').addHandler(handler)
  try:
    with largest_file(100_000), pytest.raises(UsageError):
      checkpoint.save(two, 3, {'kernel': np.random.default_rng(0).normal(size=100_000)}, info={}, keep=1)
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(ValueError('RESOURCE_EXHAUSTED'))
    loop.close()
    gc.collect()
    logging.getLogger('asyncio').error('another line')
  finally:
    logging.getLogger('asyncio').removeHandler(handler)
  error = capfd.readouterr().err
  assert 'never retrieved' not in error
  assert 'another line' in error


def test_a_directory_that_cannot_be_made_or_read_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match='cannot save the checkpoint of step 1'):
    save(tmp_path / 'file', 1)
  with pytest.raises(checkpoint.CheckpointError, match='cannot read the checkpoints in'):
    checkpoint.restore(tmp_path / 'file', make_state())
