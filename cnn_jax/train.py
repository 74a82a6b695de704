"""Training: many steps in one compiled call over all devices, and the loop around it.

This is the only file that says `pmap`.
"""

import contextlib
import functools
import io
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from cnn_jax import (
  Stopped,
  UsageError,
  command,
  distribute,
  evaluate,
  final_test,
  frozen,
  memory,
  metrics,
  models,
  peers,
  saving,
  start,
)
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, feed, identity
from cnn_jax.plan import make_plan
from cnn_jax.progress import Pace, Progress
from cnn_jax.record import Recorder
from cnn_jax.signals import Stopping
from cnn_jax.state import eval_variables
from cnn_jax.step import take_steps


def compile_steps(step: Callable, seed: int, *, sharded: bool = False) -> Callable:
  """Compiles many steps into one call that runs on all devices at once.

  Args:
    step: see `take_steps`.
    seed: of augmentation and dropout.
    sharded: whether images and labels have a first axis of local devices, each of which gets its own.

  Returns:
    `train_steps(state, images, labels, indices, num_steps) -> (state, metrics)`. `state`, `images` uint8 (n, height,
    width, channels) and `labels` int32 (n,) are replicated, unless they are sharded; `indices`, from `feed`, are the
    examples that each device takes at each step; only the first `num_steps` steps are taken, or all if it is None.
    `metrics` holds float32 (steps,) of each of `train_step`'s. The state is donated.
  """
  # An argument and not a constant, so that all seeds of a config share one compiled program.
  return partial(compile_for_seeds(step, sharded), np.asarray(jax.random.key_data(jax.random.key(seed))))


@functools.lru_cache(1)  # for seeds that follow one another
def compile_for_seeds(step: Callable, sharded: bool) -> Callable:
  """`compile_steps` for all seeds: the result takes the data of a seed's key, uint32 (2,), before the state.

  The last result alone is kept here. A caller that alternates between steps must hold the result of each.
  """
  # The axis name ties the collectives and batch norm to this call.
  return jax.pmap(
    partial(take_steps, step),
    axis_name=distribute.AXIS,
    in_axes=(None, None, 0 if sharded else None, 0 if sharded else None, 1, None),
    out_axes=(None, None),
    donate_argnums=1,
  )


def train(
  config: Any,
  dataset: Dataset,
  workdir: str | os.PathLike,
  *,
  evaluate_test: bool = True,
  on_start: Callable[[], None] | None = None,
  on_validation: Callable[[int, dict[str, float]], None] | None = None,
  on_test: Callable[[np.ndarray], None] | None = None,
  profile: bool = False,
  stopping: Stopping | None = None,
) -> dict[str, Any]:
  """Trains until the last epoch, from the newest checkpoint if there is one.

  Args:
    config: a checked config.
    dataset: what to train on.
    workdir: locked; metrics and checkpoints are written there, by process 0 alone.
    evaluate_test: whether to evaluate the test split at the end. Pass False when comparing runs, so that selection
      never sees it.
    on_start: called by process 0 when the run is certain to begin: the data and the config are those of its checkpoint,
      and the weights to start from have been read. Nothing has been written by then.
    on_validation: called with the epoch, from 1, and the metrics of each validation, before the
      checkpoint is saved. An exception that it raises ends the run, which can be resumed as if it had been killed.
    on_test: called with the logits of the test split, float32 (n, num_classes).
    profile: whether to write a trace of one call, for TensorBoard or Perfetto, to `workdir`/plugins/profile.
    stopping: from `command.stop_signal`, if the caller has more to do after this run; None: the run has its own.

  Returns:
    The part of `result.json` about training, and about the test split, which is evaluated once, at the end. With
    `config.evaluation.patience`, the state of the run is then the best on validation.

  Raises:
    Diverged: a loss or a norm is not finite; the state is not saved.
    Stopped: SIGTERM or Ctrl-C, after saving.
    UsageError: the workdir holds a run on other data, or only damaged checkpoints.
  """
  asked, config = config, config_lib.adapt(config, len(dataset.train))[0]
  if 'balanced' in config.loss.class_weights:
    balanced = metrics.balanced_weights(dataset.train.labels, len(dataset.class_names))
    config = config_lib.vary(config, {'loss.class_weights': balanced})
  made = make_plan(config, len(dataset.train), len(dataset.class_names), tuple(dataset.train.images.shape[1:]))
  steps_per_epoch, total_steps = made.steps_per_epoch, made.total_steps
  checkpoints = os.path.join(workdir, 'checkpoints')
  saver = saving.Saver(checkpoints, config.checkpoint, save_best=config.evaluation.patience > 0)
  primary = distribute.is_primary()
  # Process 0 alone reads checkpoints, because the others may not find them.
  state, step, info = (
    start.restore(checkpoints, made.state, made.tx, dataset, asked) if primary else (made.state, 0, {})
  )
  step, info = peers.first(lambda: (step, info))
  if primary and on_start:
    on_start()
  if step:
    distribute.say(f'Resuming at step {step:,} of {total_steps:,}.')
  elif primary:
    identity.write_record(workdir, dataset, info['data'])
    state = start.from_data(made, state, dataset, config)
  state = distribute.replicate(distribute.from_first(state))
  peers.compare(lambda: start.facts(step, config, dataset))
  evaluate_split = partial(evaluate.evaluate_split, made.model, config=config)
  validation_epochs = saving.epochs_between_validations(config.evaluation, steps_per_epoch)
  windows = metrics.Windows(config.log.every_steps, steps_per_epoch, info.pop('window', None))
  sample = functools.cache(partial(saving.sample, config, dataset))
  impatient = partial(saving.out_of_patience, config.evaluation, steps_per_epoch)
  last = step >= total_steps or impatient(step, info)

  with (
    command.stop_signal() if stopping is None else contextlib.nullcontext(stopping) as stopping,
    Recorder(workdir, step=step, config=config, primary=primary) as recorder,
    Progress(total_steps, made.epochs, stream=None if primary else io.StringIO()) as progress,
    contextlib.ExitStack() as cleanup,
    memory.explained(config),
  ):
    cleanup.callback(peers.deadline('Saving a checkpoint')(saver.close))
    compiling = partial(progress.compiling, hurry=stopping.nothing_to_save)
    maps = None
    shape = config_lib.input_shape(config, dataset.train.images.shape[1:])
    if line := frozen.describe(config, made.model, len(dataset.train), shape, made.epochs, made.boundary):
      distribute.say(line)
    if made.boundary or (config.fine_tuning.probe and not step):
      with stopping.nothing_to_save():
        maps, state = start.from_frozen_stages(made, state, step, dataset, config)
    examples, line = feed.choose(dataset.train, config, made.capacity, made.total_steps, maps)
    if line:
      distribute.say(line)
    cleanup.callback(peers.deadline('Reading training images')(examples.close))
    memory.warn(config, made, config_lib.input_shape(config, dataset.train.images.shape[1:], training=True))
    train_steps = compile_steps(made.step, config.seed, sharded=examples.sharded)
    pace = Pace(examples.capacity)
    # A call of no steps compiles, so that the clock of training counts training alone.
    with compiling('Compiling the training steps'):
      state, _ = train_steps(state, *examples.nothing(), np.int32(0))
    while not last:
      # 1. The next examples.
      epoch, offset = divmod(step, steps_per_epoch)
      waiting = time.perf_counter()
      try:
        with peers.deadline('Reading training images'):
          batches, count = examples.take(epoch, offset, min(pace.steps, steps_per_epoch - offset))
      except UsageError:  # an image that cannot be read
        if step and jax.process_count() == 1:  # other processes cannot take part in saving now
          saver.save(step, state, info | {'window': windows.pending}, wait=True)
        raise

      # 2. The steps.
      started = time.perf_counter()
      traced = profile and (count >= 8 or step + count == total_steps)
      with jax.profiler.trace(str(workdir)) if traced else contextlib.nullcontext(), compiling('Taking the first step'):
        state, measured = train_steps(state, *batches, np.int32(count))
        jax.block_until_ready(measured)
      measured = {name: np.asarray(values)[:count] for name, values in measured.items()}
      seconds, profile = time.perf_counter() - waiting, profile and not traced
      metrics.check_steps(measured, step)
      info = saving.without_score(info)
      info['train_seconds'] += seconds
      info['trained_images'] += count * config.batch_size

      # 3. The log.
      shown = metrics.summarize(measured)
      images_per_second = count * config.batch_size / seconds
      timing = {'images_per_second': images_per_second, 'data_wait_share': (started - waiting) / seconds}
      with peers.deadline('Writing the record'):
        for done, point in windows.add(step, measured):
          recorder.append(done, epoch + 1, 'train', point, timing)
      step += count

      # 4. Validation, of the state after the step.
      last, epoch_ends, validated = step == total_steps, step % steps_per_epoch == 0, None
      if epoch_ends and len(dataset.validation) and ((epoch + 1) % validation_epochs == 0 or last):
        started = time.perf_counter()
        with compiling('Compiling the evaluation'):
          validated = evaluate_split(eval_variables(state), dataset.validation)
        info = saving.with_score(info, validated, step)
        recorder.append(step, epoch + 1, 'validation', validated, {'seconds': time.perf_counter() - started})
        shown |= {f'validation_{name}': value for name, value in validated.items()}
      progress.update(step, epoch + 1, shown, images_per_second)
      if on_validation and validated is not None:
        on_validation(epoch + 1, validated)

      # 5. The checkpoint. All processes stop at the same step, and take as many steps in the next call.
      wanted = primary and saver.wanted(step, epoch + 1 if epoch_ends else None, info)
      last = last or (primary and impatient(step, info))
      slowest, stop, wanted, last = distribute.largest(np.array([seconds, stopping(), wanted, last], float))
      pace.update(count, float(slowest))
      if wanted or last or stop:
        if validated is None and not stop:
          saving.check_score('training', evaluate_split(eval_variables(state), sample()), step)
        with peers.deadline('Saving a checkpoint') if primary else contextlib.nullcontext():
          if primary:
            recorder.sync()
          saver.save(step, state, info | {'window': windows.pending}, wait=bool(last or stop))
      if stop and not last:
        raise Stopped(f'Stopped and saved at step {step:,} of {total_steps:,}; the same command continues from there.')

  if config.evaluation.patience:
    state, info = saving.restore_best(checkpoints, state, info)

  def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    if on_test:
      on_test(logits)
    return final_test.measure(workdir, dataset, logits, labels)

  tested = evaluate_split(eval_variables(state), dataset.test, measure=measure) if evaluate_test else {}
  return saving.result(config, dataset, made, step, models.num_parameters(state.params), info, tested)
