"""Training: the state, one pure step, many of them in one compiled call over all devices, and the loop around it.

This is the only file that says `pmap`.
"""

import contextlib
import dataclasses
import io
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from cnn_jax import (
  Stopped,
  command,
  distribute,
  evaluate,
  final_test,
  frozen,
  metrics,
  models,
  parts,
  peers,
  saving,
  start,
)
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, augment, feed, identity
from cnn_jax.optim import average, make_optimizer, make_schedule
from cnn_jax.progress import Pace, Progress
from cnn_jax.record import Recorder
from cnn_jax.signals import Stopping
from cnn_jax.state import AUGMENT, DROPOUT, INIT, TrainState, create_state, eval_variables

STEP_METRICS = ('loss', 'accuracy', 'count', 'learning_rate', 'gradient_norm', 'parameter_norm', 'update_norm')

MAX_STEPS_PER_CALL = 1024  # fewer if they take longer than `Pace` allows


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a config and the shape of its data define."""

  model: nn.Module
  tx: optax.GradientTransformation
  boundary: frozen.Boundary | None  # of the maps that are kept; None: training starts from images
  steps_per_epoch: int
  epochs: int
  total_steps: int
  capacity: int  # the most steps of one call
  state: TrainState  # before the first step
  step: Callable  # `train_step`, with everything bound but the state, the batch and the key
  train_steps: Callable  # see `compile_steps`


def setup(
  config: Any, num_train: int, num_classes: int, image_shape: tuple[int, ...], *, max_steps: int = MAX_STEPS_PER_CALL
) -> Setup:
  """Makes what training needs besides the data; compiles nothing but the initialisation.

  Args:
    config: a checked config.
    num_train: training images.
    num_classes: outputs of the network.
    image_shape: (height, width, channels).
    max_steps: the most steps of one compiled call.
  """
  steps_per_epoch = config_lib.steps_per_epoch(config, num_train)
  epochs = config_lib.num_epochs(config, num_train)
  total_steps = epochs * steps_per_epoch
  model = models.create(config.model, num_classes)
  learning_rate = make_schedule(config.schedule, config.optimizer.learning_rate, total_steps, steps_per_epoch)
  stages = None
  if config.model.frozen_stages or config.optimizer.stage_rates:
    stages = models.parameters_by_stage(model, image_shape)
  tx = make_optimizer(config.optimizer, learning_rate, stages, config.model.frozen_stages)
  boundary = frozen.find_boundary(config, model, num_train, image_shape, epochs)
  prepare = partial(augment.augment, config.augment, config_lib.statistics(config.data))
  if boundary:
    prepare = partial(augment.mix, config.augment)
  key = jax.random.fold_in(jax.random.key(config.seed), INIT)
  variables = models.init(model, key, image_shape, head_only=bool(config.init_from))
  independent = getattr(model, 'fixed_statistics', False) or not variables['batch_stats']
  pixels = image_shape[0] * image_shape[1] if not boundary else 0
  step = partial(
    train_step,
    model=model.clone(skipped_stages=boundary.stages) if boundary else model,
    tx=tx,
    learning_rate=learning_rate,
    prepare=prepare,
    label_smoothing=config.loss.label_smoothing,
    class_weights=tuple(config.loss.class_weights),
    ema_decay=config.evaluation.ema_decay,
    num_parts=parts.count(config.batch_size // jax.device_count(), pixels, independent),
  )
  state = create_state(variables, tx, config.evaluation.ema_decay)
  capacity, train_steps = min(max_steps, steps_per_epoch), compile_steps(step, config.seed)
  return Setup(model, tx, boundary, steps_per_epoch, epochs, total_steps, capacity, state, step, train_steps)


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  key: jax.Array,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  prepare: Callable,
  label_smoothing: float,
  class_weights: tuple[float, ...],
  ema_decay: float,
  num_parts: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from one device's part of a batch, averaged over the axis `batch`.

  Args:
    state: before the step; the same on all devices.
    batch: `images` uint8 (batch, height, width, channels), `labels` int32 (batch,), and `positions` int32 (batch,) of
      the examples in the global batch; from `feed.take`.
    key: of the seed; augmentation and dropout derive theirs from it.
    model: from `models.create`.
    tx: the optimizer.
    learning_rate: its schedule, for the record.
    prepare: makes the network's input, `(key, positions, images, labels) -> (images, labels)`: `augment.augment` of
      images or `augment.mix` of maps, with the config bound.
    label_smoothing: the share of a label that is spread over all classes.
    class_weights: of the classes in the loss; see `metrics.relative_weights`. (): no weights.
    ema_decay: of the averages for evaluation; 0: off.
    num_parts: of the batch, whose gradients are computed one after another; more than 1 leave batch statistics as they are.

  Returns:
    The state after the step, and float32 scalars: `loss` (weighted), `accuracy` and `count` (sums over the
    global batch), `learning_rate`, and the global norms of gradient, parameters and update.
  """
  one_hot = jax.nn.one_hot(batch['labels'], model.num_classes)
  augment_key = jax.random.fold_in(jax.random.fold_in(key, AUGMENT), state.step)
  images, labels = prepare(augment_key, batch['positions'], batch['images'], one_hot)
  weights = metrics.relative_weights(labels, class_weights, distribute.AXIS) if class_weights else None
  labels = metrics.smooth_labels(labels, label_smoothing)
  dropout_key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), state.step)

  def loss_function(params, examples):
    images, labels, positions, weights = examples
    (logits, _), updated = model.apply(
      {'params': params, 'batch_stats': state.batch_stats},
      images,
      train=True,
      positions=positions,
      mutable=['batch_stats'],
      rngs={'dropout': dropout_key},
    )
    losses = metrics.cross_entropy(logits, labels)
    losses = losses if weights is None else losses * weights
    batch_stats = updated.get('batch_stats', {}) if num_parts == 1 else {}
    return jnp.mean(losses), (metrics.training_sums(losses, logits, labels), batch_stats)

  examples = (images, labels, batch['positions'], weights)
  gradient, (sums, batch_stats) = parts.gradient(loss_function, state.params, examples, num_parts)
  batch_stats = batch_stats if num_parts == 1 else state.batch_stats
  gradient = lax.pmean(gradient, axis_name=distribute.AXIS)  # the axis of compile_steps' pmap
  sums = lax.psum(sums, axis_name=distribute.AXIS)
  updates, opt_state = tx.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  measured = sums | {
    'learning_rate': learning_rate(state.step),
    'gradient_norm': optax.tree.norm(gradient),
    'parameter_norm': optax.tree.norm(state.params),
    'update_norm': optax.tree.norm(updates),
  }
  state = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
  newest = {'params': params, 'batch_stats': batch_stats}
  return state.replace(ema=average(state.ema, newest, state.step, ema_decay)), measured


def compile_steps(step: Callable, seed: int) -> Callable:
  """Compiles many steps into one call that runs on all devices at once.

  Args:
    step: see `take_steps`.
    seed: of augmentation and dropout.

  Returns:
    `train_steps(state, images, labels, indices, num_steps) -> (state, metrics)`. `state`, `images` uint8 (n, height,
    width, channels) and `labels` int32 (n,) are replicated; `indices`, from `feed.Resident.indices`, are the examples
    that each device takes at each step; only the first `num_steps` steps are taken. `metrics` holds float32 (steps,)
    of each of `train_step`'s. The state is donated.
  """
  # The axis name ties the collectives and batch norm to this call.
  compiled = jax.pmap(
    partial(take_steps, step),
    axis_name=distribute.AXIS,
    in_axes=(None, None, None, None, 1, None),
    out_axes=(None, None),
    donate_argnums=1,
  )
  # An argument and not a constant, so that all seeds of a config share one compiled program.
  return partial(compiled, np.asarray(jax.random.key_data(jax.random.key(seed))))


def take_steps(
  step: Callable,
  key: jax.Array,
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  indices: jax.Array,
  num_steps: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One device's part of several steps; what `compile_steps` compiles.

  The number of steps is dynamic: one program serves calls of any length on every backend, so an interrupted run
  continues with the same program. On a GPU that costs a host round trip per step.

  Args:
    step: of `Setup`.
    key: uint32, the data of the key of the seed.
    state, images, labels, indices, num_steps: see `compile_steps`; `indices` of this device alone.
  """

  def body(i, carry):
    state, buffers = carry
    state, measured = step(state, feed.take(images, labels, indices[i]), jax.random.wrap_key_data(key))
    return state, {name: buffer.at[i].set(measured[name]) for name, buffer in buffers.items()}

  buffers = {name: jnp.zeros(indices.shape[0], jnp.float32) for name in STEP_METRICS}
  return lax.fori_loop(0, num_steps, body, (state, buffers))


def train(
  config: Any,
  dataset: Dataset,
  workdir: str | os.PathLike,
  *,
  evaluate_test: bool = True,
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
  made = setup(config, len(dataset.train), len(dataset.class_names), tuple(dataset.train.images.shape[1:]))
  steps_per_epoch, total_steps = made.steps_per_epoch, made.total_steps
  checkpoints = os.path.join(workdir, 'checkpoints')
  saver = saving.Saver(checkpoints, config.checkpoint, save_best=config.evaluation.patience > 0)
  primary = distribute.is_primary()
  # Process 0 alone reads checkpoints, because the others may not find them.
  state, step, info = (
    start.restore(checkpoints, made.state, made.tx, dataset, asked) if primary else (made.state, 0, {})
  )
  step, info = peers.first(lambda: (step, info))
  if step:
    distribute.say(f'Resuming at step {step:,} of {total_steps:,}.')
  elif primary:
    identity.write_record(workdir, dataset, info['data'])
  state = distribute.replicate(distribute.from_first(state))
  evaluate_split = partial(evaluate.evaluate_split, made.model, config=config)
  validation_epochs = saving.epochs_between_validations(config.evaluation, steps_per_epoch)
  windows = metrics.Windows(config.log.every_steps, steps_per_epoch, info.pop('window', None))
  pace = Pace(made.capacity)
  impatient = partial(saving.out_of_patience, config.evaluation, steps_per_epoch)
  last = step >= total_steps or impatient(step, info)

  with (
    command.stop_signal() if stopping is None else contextlib.nullcontext(stopping) as stopping,
    Recorder(workdir, step=step, config=config, primary=primary) as recorder,
    Progress(total_steps, made.epochs, stream=None if primary else io.StringIO()) as progress,
  ):
    compiling = partial(progress.compiling, hurry=stopping.nothing_to_save)
    maps = None
    image_shape = tuple(dataset.train.images.shape[1:])
    if line := frozen.describe(config, made.model, len(dataset.train), image_shape, made.epochs, made.boundary):
      distribute.say(line)
    if made.boundary or (config.fine_tuning.probe and not step):
      with stopping.nothing_to_save():
        maps, state = start.from_frozen_stages(made, state, step, dataset, config)
    examples = feed.Resident(dataset.train, config.batch_size, config.seed, made.capacity, config.data.sampling, maps)
    # A call of no steps compiles, so that the clock of training counts training alone.
    with compiling('Compiling the training steps'):
      state, _ = made.train_steps(state, examples.images, examples.labels, examples.indices(0, 0, 0), np.int32(0))
    while not last:
      # 1. The next examples.
      epoch, offset = divmod(step, steps_per_epoch)
      count = min(pace.steps, steps_per_epoch - offset)
      waiting = time.perf_counter()
      indices = examples.indices(epoch, offset, count)

      # 2. The steps.
      started = time.perf_counter()
      traced = profile and (count >= 8 or step + count == total_steps)
      with jax.profiler.trace(str(workdir)) if traced else contextlib.nullcontext(), compiling('Taking the first step'):
        state, measured = made.train_steps(state, examples.images, examples.labels, indices, np.int32(count))
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
          saving.check_score('training', evaluate_split(eval_variables(state), saving.sample(config, dataset)), step)
        if primary:
          recorder.sync()
        saver.save(step, state, info | {'window': windows.pending})
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
