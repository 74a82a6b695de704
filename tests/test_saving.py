"""Checkpoints are written while training goes on, from a copy; an error comes out, and nothing is written after the end."""

import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import Diverged, UsageError, checkpoint, main, saving, train
from cnn_jax.config import default_config
from cnn_jax.data import Dataset, Split


@pytest.fixture
def writer(monkeypatch):
  """A slow disk: each write begins, and goes on when `go` is set; it fails if `error` is."""

  class Writer:
    go, steps, info, error, kept = threading.Event(), [], [], None, 0

  save = checkpoint.save

  def slow(directory, step, state, *, info, keep):
    Writer.steps.append(step)
    assert Writer.go.wait(20)
    if Writer.error:
      raise Writer.error
    save(directory, step, state, info=info, keep=keep)
    Writer.info.append(dict(info))

  monkeypatch.setattr(checkpoint, 'save', slow)
  return Writer


def _saver(directory, **fields):
  settings = default_config().checkpoint
  settings.update(fields)
  return saving.Saver(directory, settings)


def _state(step):
  return {'step': jnp.int32(step), 'params': {'head': {'kernel': jnp.full((300, 400), float(step))}}}


def test_training_goes_on_and_changes_the_state_while_a_copy_is_written(tmp_path, writer):
  saver, state, info = _saver(tmp_path), _state(1), {'window': {'loss': [1.0]}}
  saver.save(1, state, info, wait=False)
  advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  for _ in range(3):
    state = advance(state)
  info['window']['loss'].append(2.0)
  assert checkpoint.restore(tmp_path) is None
  assert not saver.wanted(4, 2, {})  # an epoch has ended, but the last save has not
  assert saver.wanted(4, 2, {'best_step': 4})
  writer.go.set()
  saver.save(4, state, info, wait=True)
  assert writer.info == [{'window': {'loss': [1.0]}}, {'window': {'loss': [1.0, 2.0]}}]
  for step in (4, 1):
    found, at, _ = checkpoint.restore(tmp_path)
    assert at == found['step'] == step
    np.testing.assert_array_equal(found['params']['head']['kernel'], step)
    shutil.rmtree(tmp_path / str(step))
  saver.close()


def test_a_second_save_waits_for_the_first(tmp_path, writer):
  saver = _saver(tmp_path)
  saver.save(1, _state(1), {}, wait=False)
  threading.Timer(0.3, writer.go.set).start()
  started = time.monotonic()
  saver.save(2, _state(2), {}, wait=False)
  assert time.monotonic() - started > 0.2
  saver.close()
  assert writer.steps == [1, 2]
  assert checkpoint.restore(tmp_path)[1] == 2


@pytest.mark.parametrize('when', ['looking', 'saving', 'waiting'])
def test_the_error_of_a_write_comes_out_once(tmp_path, writer, when):
  writer.error = UsageError('cannot save: the disk is full; free some space.')
  writer.go.set()
  saver = _saver(tmp_path)
  if when == 'waiting':
    with pytest.raises(UsageError, match='the disk is full'):
      saver.save(1, _state(1), {}, wait=True)
  else:
    saver.save(1, _state(1), {}, wait=False)
    while not saver._writing.done():
      time.sleep(0.01)
    with pytest.raises(UsageError, match='the disk is full'):
      saver.wanted(2, None, {}) if when == 'looking' else saver.save(2, _state(2), {}, wait=False)
  writer.error = None
  saver.save(3, _state(3), {}, wait=True)
  saver.close()
  assert checkpoint.restore(tmp_path)[1] == 3


def test_what_is_not_finite_stops_training_at_once(tmp_path, writer):
  state = _state(1)
  state['params']['head']['kernel'] = state['params']['head']['kernel'].at[3, 4].set(jnp.nan)
  with pytest.raises(Diverged, match='params/head/kernel is not finite after step 1'):
    _saver(tmp_path).save(1, state, {}, wait=False)
  assert writer.steps == []


# The loop ---------------------------------------------------------------------------------------


def _config(**fields):
  config = default_config()
  config.batch_size, config.epochs = 8, 4
  config.model.features = (4,)
  config.schedule.warmup_epochs = 0.5
  config.evaluation.min_steps = 0
  config.log.tensorboard = config.log.report = False
  config.update(fields)
  return config


def _dataset():
  random = np.random.default_rng(0)

  def split(n):
    return Split(random.integers(0, 256, (n, 6, 6, 1), np.uint8), (np.arange(n) % 3).astype(np.int32))

  return Dataset('made up', 'for a test', ('a', 'b', 'c'), split(16), split(6), split(6))


def _threads():
  return [thread for thread in threading.enumerate() if thread.name.startswith('saving')]


def test_an_exception_waits_for_the_write_and_nothing_is_written_later(tmp_path, writer):
  def validated(epoch, _):
    if epoch == 2:
      threading.Timer(0.3, writer.go.set).start()
      raise KeyError('a sweep prunes this run')

  with pytest.raises(KeyError):
    train.train(_config(), _dataset(), tmp_path, on_validation=validated)
  assert writer.steps == [2]
  assert not _threads()
  assert checkpoint.restore(tmp_path / 'checkpoints')[1] == 2
  assert not list((tmp_path / 'checkpoints').glob('.*'))


def test_the_end_of_training_waits_for_the_last_write(tmp_path, writer):
  threading.Timer(0.5, writer.go.set).start()
  result = train.train(_config(epochs=1), _dataset(), tmp_path)
  assert not _threads()
  assert checkpoint.restore(tmp_path / 'checkpoints')[1] == result['steps'] == 2


def test_a_failed_write_ends_the_run_though_it_would_go_on(tmp_path, monkeypatch):
  calls = []

  def fails(directory, step, state, **_):
    calls.append(step)
    raise UsageError(f'cannot save the checkpoint of step {step}')

  monkeypatch.setattr(checkpoint, 'save', fails)
  with pytest.raises(UsageError, match='cannot save the checkpoint of step 2'):
    main.train_and_evaluate(_config(epochs=200), tmp_path, dataset=_dataset())
  assert calls == [2]
  assert not (tmp_path / 'result.json').exists()
