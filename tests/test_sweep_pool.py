"""Workers and the loop that keeps them busy: every outcome of a run, and workers that die or fall silent."""

import io
import json
import multiprocessing
import os
import signal
import threading

import optuna
import pytest
from optuna.trial import TrialState

from cnn_jax import Stopped, UsageError, main, record, shares
from cnn_jax.sweep import pool, progress, worker
from cnn_jax.sweep.worker import Task
from tests.sweep_helpers import open_trials, sqlite_url, tiny_config

pytestmark = pytest.mark.filterwarnings('ignore::optuna.exceptions.ExperimentalWarning')


@pytest.fixture
def url(tmp_path):
  return sqlite_url(tmp_path)


class Prune(optuna.pruners.BasePruner):
  """Prunes at the first report."""

  def prune(self, study, trial):
    return True


DIE = object()  # instead of a message


def finish(trials, monkeypatch, *tasks, stopping=lambda: False, pruned=(), deadline=60):
  """Finishes a study with one worker that sends the given messages, a list for each task that it gets.

  Returns what the workers were sent after each validation.
  """
  remaining, replies = list(tasks), []

  class ScriptedWorker:
    def __init__(self, share):
      self.share = share
      self.connection, self._theirs = multiprocessing.Pipe()

    def give(self, task):
      assert task is None
      for message in remaining.pop(0):
        if message is DIE:
          self._theirs.close()
        else:
          self._theirs.send(message)

    def reply(self, prune):
      replies.append(prune)

    def processor_seconds(self):
      return 0.0

    def stop(self):
      self._theirs.send(('stopped',))

    def kill(self):
      self.connection.close()
      return -9

    close = kill

  def task_of(name, trial_id):
    pruner = Prune() if name in pruned else optuna.pruners.NopPruner()
    return trials.open(trial_id, optuna.samplers.RandomSampler(), pruner), None

  monkeypatch.setattr(pool, 'Worker', ScriptedWorker)
  with pool.Pool(1, 1, deadline, stopping) as workers:
    workers.finish(trials, task_of, progress.Progress(trials))
  return replies


BEGAN, DONE = ('began', 'digits'), ('done', {'validation_accuracy': 0.5})


def test_a_run_ends_complete_pruned_diverged_infeasible_or_failed(url, monkeypatch, capsys):
  trials = open_trials(url, ['a', 'b', 'c', 'd', 'e', 'f'])
  outcomes = [
    [BEGAN, ('validation', 1, 0.25), DONE],
    [BEGAN, ('validation', 1, 0.25), ('pruned',)],
    [BEGAN, ('diverged', 'the loss is nan')],
    [('infeasible', 'too large')],
    [BEGAN, ('failed', 'MemoryError')],
    [BEGAN, DONE],
  ]
  assert finish(trials, monkeypatch, *outcomes, pruned=['b']) == [False, True]
  a, b, c, d, e, f = trials.finished().values()
  assert (a.state, a.value) == (TrialState.COMPLETE, 0.5)
  assert (b.state, b.value) == (TrialState.PRUNED, 0.25)
  assert c.user_attrs['diverged'] == 'the loss is nan'
  assert d.user_attrs['infeasible'] == 'too large'
  assert e.user_attrs['failed'] == 'MemoryError'
  assert f.value == 0.5
  output = capsys.readouterr().out
  assert 'a: 50.00% on validation' in output
  assert 'b: pruned after epoch 1: 25.00%' in output
  assert 'c: diverged after started' in output
  assert 'd: infeasible: too large' in output


def test_a_worker_that_dies_is_replaced_twice(url, monkeypatch, capsys):
  trials = open_trials(url)
  finish(trials, monkeypatch, [BEGAN, DIE], [DIE], [DONE], [DIE], [DIE], [DIE], [DONE])
  assert capsys.readouterr().out.count('a: its worker ended by signal 9; another worker continues it') == 2
  a, b, c = trials.finished().values()
  assert (a.value, c.value) == (0.5, 0.5)
  assert b.user_attrs['failed'] == '3 workers were lost while training it, the last one ended by signal 9'


def test_a_silent_worker_is_replaced_once(url, monkeypatch, capsys):
  trials = open_trials(url, ['a', 'b'])
  finish(trials, monkeypatch, [BEGAN], [DONE], [BEGAN], [BEGAN], deadline=0.5)
  assert capsys.readouterr().out.count('its worker was silent for 1 s and was killed; another worker continues it') == 2
  a, b = trials.finished().values()
  assert a.value == 0.5
  assert b.user_attrs['failed'].startswith('2 workers were lost while training it, the last one was silent')


@pytest.mark.parametrize(
  ('messages', 'error', 'text'),
  [
    ([('usage', 'no such folder')], UsageError, 'a: no such folder'),
    ([BEGAN, ('bug', 'Traceback: KeyError')], RuntimeError, 'a failed:\nTraceback: KeyError'),
    ([('began', 'MNIST'), DONE], UsageError, 'began with the data set "digits", but its config finds "MNIST"'),
  ],
)
def test_an_error_of_a_run_ends_the_sweep_and_releases_the_run(url, monkeypatch, messages, error, text):
  trials = open_trials(url, ['a'])
  trials.study.set_user_attr('dataset', 'digits')
  with pytest.raises(error, match=text):
    finish(trials, monkeypatch, messages)
  assert trials.claim()[0] == 'a'


def test_a_space_that_fails_in_a_trial_ends_the_sweep_and_releases_the_run(url):
  trials = open_trials(url, ['a'])

  def task_of(name, trial_id):
    raise UsageError('space.py, line 3: KeyError')

  with pool.Pool(1, 1, 60, lambda: False) as workers, pytest.raises(UsageError, match='space.py, line 3'):
    workers.finish(trials, task_of, progress.Progress(trials))
  assert trials.claim()[0] == 'a'


def test_a_signal_stops_the_runs_and_releases_them(url, monkeypatch):
  trials = open_trials(url, ['a'])
  with pytest.raises(Stopped):
    finish(trials, monkeypatch, [BEGAN], stopping=lambda: True)
  assert trials.claim()[0] == 'a'


def test_a_run_that_was_reassigned_is_given_up(url, monkeypatch, capsys):
  """This is noticed at the next heartbeat, or earlier if the worker reports something."""
  trials = open_trials(url, ['a', 'b'])
  beat, report, reassigned = trials.beat, trials.report, []

  def beat_too_late(trial_ids):
    if trial_ids and not reassigned:
      reassigned.extend(trial_ids)
      trials.release(trial_ids[0])  # as another process does
    return beat(trial_ids)

  def report_too_late(trial, epoch, value):
    monkeypatch.setattr(trials, 'report', report)
    trials.release(trials.claimed)
    return report(trial, epoch, value)

  claim = trials.claim

  def claim_and_remember():
    claimed = claim()
    trials.claimed = claimed and claimed[1]
    return claimed

  monkeypatch.setattr(trials, 'beat', beat_too_late)
  monkeypatch.setattr(trials, 'report', report_too_late)
  monkeypatch.setattr(trials, 'claim', claim_and_remember)
  finish(trials, monkeypatch, [BEGAN], [BEGAN, DONE], [BEGAN, ('validation', 1, 0.1), DONE], [DONE])
  assert len(reassigned) == 1
  assert 'b: taken over by another process' in capsys.readouterr().out
  assert {run: trial.value for run, trial in trials.finished().items()} == {'a': 0.5, 'b': 0.5}


def test_a_terminal_shows_the_runs_in_progress(url, monkeypatch):
  trials = open_trials(url, ['a', 'b'])

  class Terminal(io.StringIO):
    isatty = lambda self: True  # noqa: E731
    fileno = lambda self: 1  # noqa: E731

  terminal = Terminal()
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setattr('sys.stdout', terminal)
  monkeypatch.setattr(os, 'get_terminal_size', lambda descriptor: os.terminal_size((40, 20)))
  show = progress.Progress(trials)
  for i in range(2):
    show.event('began', f'trial_0000{i}', None, 0.0)
  show.event('validation', 'trial_00000', (3, 0.875), 1.0)
  show.draw()
  show.event('done', 'trial_00001', 0.5, 2.0)
  show.close()
  assert '\rtrial_00000 epoch 3: 87.50%  trial_0000\x1b[K' in terminal.getvalue()
  assert terminal.getvalue().endswith('\r\x1b[Ktrial_00001: 50.00% on validation, 2.0 s; 0 of 2 done\n')


def test_workers_share_the_machine(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(5)), raising=False)
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  assert [share.cores for share in shares.divide(2)] == [(0, 1), (2, 3, 4)]
  assert [share.gpus for share in shares.divide(2)] == [None, None]
  assert [share.cores for share in shares.divide(6)] == [(0,), (1,), (2,), (3,), (4,), (0,)]
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,7')
  assert [share.gpus for share in shares.divide(2)] == [('4',), ('7',)]
  assert all(share.alone_on_gpu for share in shares.divide(2))
  assert [share.gpus for share in shares.divide(3)] == [('4',), ('7',), ('4',)]
  assert not any(share.alone_on_gpu for share in shares.divide(3))
  assert shares.divide(1) == [shares.Share(None, None, True)]


def test_without_a_choice_nvidia_smi_lists_the_gpus(tmp_path, monkeypatch):
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  monkeypatch.setenv('PATH', str(tmp_path))
  assert {share.gpus for share in shares.divide(2)} == {None}
  tool = tmp_path / 'nvidia-smi'
  tool.write_text('#!/bin/sh\necho "GPU 0: H100 (UUID: x)"\necho "  MIG 1g.10gb"\necho "GPU 1: H100 (UUID: y)"\n')
  tool.chmod(0o755)
  assert [share.gpus for share in shares.divide(2)] == [('0',), ('1',)]
  tool.write_text('#!/bin/sh\nexit 9\n')  # the driver does not answer
  assert {share.gpus for share in shares.divide(2)} == {None}


# The training of a task.


def test_a_worker_process_reports_its_outcome_and_ends_when_it_is_closed(tmp_path):
  (tmp_path / 'file').write_text('')
  share = shares.Share(cores=tuple(os.sched_getaffinity(0))[:1], gpus=('0',), alone_on_gpu=False)
  process = worker.Worker(share)
  process.give(Task({}, str(tmp_path / 'file' / 'run'), evaluate_test=False))
  kind, message = process.connection.recv()
  assert kind == 'usage'
  assert message.startswith(f'cannot write to {tmp_path}/file/run/log.txt: Not a directory; correct that')
  process.close()
  assert process.kill() == 0  # it had ended by itself


@pytest.fixture
def serve(monkeypatch):
  """Trains a task in a thread, and returns its messages but the validations; `prune` answers those."""
  monkeypatch.setattr('jax.clear_caches', lambda: None)
  connection, theirs = multiprocessing.Pipe()
  failures = []

  def before_task(task):
    if failures:
      raise failures.pop()

  thread = threading.Thread(target=worker.serve, args=(theirs, before_task))
  thread.start()

  def run(config, workdir, prune=lambda epoch: False, failure=None):
    failures.extend([failure] if failure else [])
    connection.send(Task(config.to_dict(), str(workdir), evaluate_test=False))
    messages = []
    while not messages or messages[-1][0] == 'began':
      message = connection.recv()
      if message[0] == 'validation':
        connection.send(prune(message[1]))
      else:
        messages.append(message)
    return messages

  yield run
  connection.close()
  thread.join(60)
  assert not thread.is_alive()


def test_every_outcome_of_a_task(serve, tmp_path):
  began = ('began', 'Digits, 1,797 images bundled with scikit-learn')
  assert serve(tiny_config(epochs=2), tmp_path / 'pruned', prune=lambda epoch: epoch == 1) == [began, ('pruned',)]
  first, (kind, result) = serve(tiny_config(), tmp_path / 'done')
  assert (first, kind) == (began, 'done')
  assert result == record.read_result(tmp_path / 'done')
  assert 'test_accuracy' not in result

  config = tiny_config()
  config.optimizer.learning_rate = 1e30
  _, (kind, message) = serve(config, tmp_path / 'diverged')
  assert kind == 'diverged' and 'step' in message

  [(kind, message)] = serve(tiny_config(batch_size=2000), tmp_path / 'too_large')
  assert kind == 'infeasible' and message.startswith('config.batch_size is 2000 but there are 1295 training images')
  config = tiny_config()
  config.schedule.name = 'cosine'
  [(kind, message)] = serve(config, tmp_path / 'warm_up')
  assert kind == 'infeasible' and message.startswith('config.schedule.warmup_epochs is')

  config = tiny_config()
  config.data.validation = 0.0
  [(kind, message)] = serve(config, tmp_path / 'unvalidated')
  assert (kind, message[:30]) == ('infeasible', 'there is no validation split t')
  [(kind, message)] = serve(tiny_config(), tmp_path / 'bug', failure=KeyError('x'))
  assert kind == 'bug' and message.startswith('Traceback') and "KeyError: 'x'" in message


def test_a_run_that_its_callback_pruned_can_be_resumed(tmp_path):
  """An exception of the callback ends the run cleanly; the run continues as if it had been killed there."""

  class Pruned(Exception):
    pass

  validations = []

  def prune_at(epoch_to_prune):
    def on_validation(epoch, metrics):
      validations.append((epoch, metrics['accuracy']))
      if epoch == epoch_to_prune:
        raise Pruned

    return on_validation

  config = tiny_config(epochs=3)
  handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  with pytest.raises(Pruned):
    main.train_and_evaluate(config, tmp_path / 'run', evaluate_test=False, on_validation=prune_at(2))
  assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
  assert record.read_result(tmp_path / 'run') is None
  result = main.train_and_evaluate(config, tmp_path / 'run', evaluate_test=False, on_validation=prune_at(0))
  assert [epoch for epoch, _ in validations] == [1, 2, 2, 3]
  assert validations[1] == validations[2]
  assert result['validation_accuracy'] == validations[-1][1]
  assert json.loads((tmp_path / 'run' / 'result.json').read_text()) == result
  assert 'test_accuracy' not in result
  assert main.train_and_evaluate(config, tmp_path / 'run') == result  # the run is complete
