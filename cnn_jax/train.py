"""Training: the state, one pure step, many of them in one compiled call over all devices, and the loop around it.

This is the only file that says `pmap`.
"""

import contextlib
import io
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax import UsageError, checkpoint, evaluate, metrics
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, augment, batches, drawings
from cnn_jax.model import CNN, create_model
from cnn_jax.optim import make_optimizer, make_schedule
from cnn_jax.progress import Progress
from cnn_jax.record import Recorder

# Purposes of randomness, folded into the key of the seed. Keys are derived, never stored.
INIT, AUGMENT, DROPOUT = range(3)

MEASURED = ('loss', 'accuracy', 'count', 'learning_rate', 'gradient_norm', 'parameter_norm', 'update_norm')


class Diverged(Exception):
  """The loss of a step is not a finite number; the message names the step."""


class Stopped(Exception):
  """SIGTERM or Ctrl-C arrived; the state was saved at the step that the message names."""


class TrainState(struct.PyTreeNode):
  """All that changes from step to step, and all that a checkpoint needs."""

  step: jax.Array  # int32 scalar: updates made so far
  params: Any
  batch_stats: Any  # running statistics of batch norm; {} without it
  opt_state: Any
  ema: Any  # averages of {'params', 'batch_stats'} for evaluation; {} where off


def eval_variables(state: TrainState) -> dict[str, Any]:
  """The variables that evaluation uses: the averages where they are kept, else the newest."""
  return state.ema or {'params': state.params, 'batch_stats': state.batch_stats}


def create_state(model: CNN, tx: optax.GradientTransformation, config: Any, image_shape: tuple[int, ...]) -> TrainState:
  """Makes the state before the first step.

  Args:
    model: the network.
    tx: the optimizer.
    config: reads `seed` and `evaluation.ema_decay`.
    image_shape: (height, width, channels).
  """
  key = jax.random.fold_in(jax.random.key(config.seed), INIT)
  variables = jax.jit(model.init)(key, jnp.zeros((1, *image_shape), jnp.float32))
  params, batch_stats = variables['params'], variables.get('batch_stats', {})
  ema = {'params': params, 'batch_stats': batch_stats} if config.evaluation.ema_decay else {}
  # Copies: a donated buffer must not be in the state twice.
  ema = jax.tree.map(jnp.array, ema)
  return TrainState(jnp.int32(0), params, batch_stats, tx.init(params), ema)


def start_from(run: evaluate.Run, state: TrainState, class_names: Sequence[str]) -> TrainState:
  """Puts the weights of another run into a state that has not been trained yet.

  The head keeps its fresh weights where the classes are not those of the run. A first kernel for one
  channel becomes one for three by a third of it for each, and back by their sum: on grey
  pictures both compute the same.

  Args:
    run: from `evaluate.load_run`; only image size, channels and classes may differ.
    state: from `create_state`.
    class_names: of the data to train on.

  Raises:
    UsageError: the networks differ in more than that.
  """
  new = {'params': state.params, 'batch_stats': state.batch_stats}
  same_classes = tuple(class_names) == run.class_names

  def transfer(path, fresh):
    names = [key.key for key in path]
    if names[1] == 'head' and not same_classes:
      return fresh
    trained = run.variables
    for name in names:
      trained = trained.get(name, {})
    if isinstance(trained, dict):
      raise UsageError(f'the run of config.init_from has no {"/".join(names)}; give both configs the same model.')
    if names[-1] == 'kernel' and trained.ndim == 4 and {trained.shape[2], fresh.shape[2]} == {1, 3}:
      repeated = jnp.broadcast_to(trained / 3, (*trained.shape[:2], 3, trained.shape[3]))
      trained = repeated if fresh.shape[2] == 3 else jnp.sum(trained, axis=2, keepdims=True)
    if trained.shape != fresh.shape:
      raise UsageError(
        f'{"/".join(names)} is {trained.shape} in the run of config.init_from and {fresh.shape} here; '
        'give both configs the same model.'
      )
    return jnp.array(trained)  # a copy: donated buffers must not be shared

  new = jax.tree_util.tree_map_with_path(transfer, new)
  ema = jax.tree.map(jnp.array, new) if state.ema else {}
  return state.replace(params=new['params'], batch_stats=new['batch_stats'], ema=ema)


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  key: jax.Array,
  *,
  model: CNN,
  tx: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  config: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from one device's part of a batch, averaged over the axis `batch`.

  Args:
    state: before the step; the same on all devices.
    batch: `images` uint8 (batch, height, width, channels), `labels` int32 (batch,), `positions`
      int32 (batch,) of the examples in the global batch, and, for mixup and CutMix,
      `partner_images`, `partner_labels` and `partner_positions` of the examples to mix in.
    key: of the seed; augmentation and dropout derive theirs from it.
    model, tx, learning_rate, config: what the step depends on besides, all static.

  Returns:
    The state after the step, and float32 scalars: `loss`, `accuracy` and `count` (sums over the
    global batch), `learning_rate`, and the global norms of gradient, parameters and update.
  """
  images, labels = _augmented(batch, jax.random.fold_in(jax.random.fold_in(key, AUGMENT), state.step), model, config)
  labels = metrics.smooth_labels(labels, config.loss.label_smoothing)
  dropout_key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), state.step)

  def loss_function(params):
    logits, updated = model.apply(
      {'params': params, 'batch_stats': state.batch_stats},
      images,
      train=True,
      positions=batch['positions'],
      mutable=['batch_stats'],
      rngs={'dropout': dropout_key},
    )
    losses = metrics.cross_entropy(logits, labels)
    return jnp.mean(losses), (metrics.training_sums(losses, logits, labels), updated.get('batch_stats', {}))

  gradient, (sums, batch_stats) = jax.grad(loss_function, has_aux=True)(state.params)
  gradient = lax.pmean(gradient, axis_name='batch')  # the axis of make_train_steps' pmap
  sums = lax.psum(sums, axis_name='batch')
  updates, opt_state = tx.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  measured = sums | {
    'learning_rate': learning_rate(state.step),
    'gradient_norm': optax.tree.norm(gradient),
    'parameter_norm': optax.tree.norm(state.params),
    'update_norm': optax.tree.norm(updates),
  }
  state = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
  return state.replace(ema=_averaged(state, config.evaluation.ema_decay)), measured


def make_train_steps(
  *, model: CNN, tx: optax.GradientTransformation, learning_rate: optax.Schedule, config: Any
) -> Callable:
  """Compiles many steps into one call that runs on all devices at once.

  Returns:
    `train_steps(state, images, labels, indices, num_steps) -> (state, metrics)`. `state`,
    `images` uint8 (n, height, width, channels) and `labels` int32 (n,) are replicated;
    `indices`, from `local_indices`, says which examples each device takes at each step; only the
    first `num_steps` steps are taken. `metrics` holds float32 (steps,) of each of
    `train_step`'s. The state is donated.
  """
  # The axis name ties lax.pmean, lax.psum, lax.axis_index and batch norm to this call.
  compiled = jax.pmap(
    partial(take_steps, model=model, tx=tx, learning_rate=learning_rate, config=config),
    axis_name='batch',
    in_axes=(None, None, None, None, 1, None),
    out_axes=(None, None),
    donate_argnums=1,
  )
  # An argument and not a constant: all seeds of a config find one program in the cache of compiled ones.
  return partial(compiled, seed_key(config.seed))


def take_steps(
  key: jax.Array,
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  indices: dict[str, jax.Array],
  num_steps: jax.Array,
  *,
  model: CNN,
  tx: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  config: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One device's part of several steps; what `make_train_steps` compiles.

  Args:
    key: uint32, from `seed_key`.
    state, images, labels, indices, num_steps: see `make_train_steps`; `indices` of this device alone.
    model, tx, learning_rate, config: see `train_step`; nothing here reads `config.seed`.
  """
  step = partial(train_step, model=model, tx=tx, learning_rate=learning_rate, config=config)
  # A length that is not known until run time lets one program serve chunks of every length.
  # Elsewhere it would cost a look from the host at every step, and a chunk is an epoch.
  max_steps = indices['own'].shape[0]
  length = num_steps if jax.default_backend() == 'cpu' else max_steps

  def body(i, carry):
    state, buffers = carry
    batch = _gather(images, labels, jax.tree.map(lambda x: x[i], indices), config)
    state, measured = step(state, batch, jax.random.wrap_key_data(key))
    return state, {name: buffer.at[i].set(measured[name]) for name, buffer in buffers.items()}

  buffers = {name: jnp.zeros(max_steps, jnp.float32) for name in MEASURED}
  return lax.fori_loop(0, length, body, (state, buffers))


def seed_key(seed: int) -> np.ndarray:
  """The key of a seed as numbers, uint32, in which form it goes to the devices of every process."""
  return np.asarray(jax.random.key_data(jax.random.key(seed)))


def replicate(tree: Any) -> Any:
  """Puts a tree on all local devices, in the form in which `make_train_steps` takes and gives it back."""
  sharding = NamedSharding(Mesh(np.array(jax.local_devices()), ('batch',)), PartitionSpec())
  return jax.device_put(tree, sharding)


def local_indices(indices: np.ndarray) -> dict[str, np.ndarray]:
  """This process's part of the global batches, by device.

  Args:
    indices: int32 (steps, batch) of the examples.

  Returns:
    int32 (steps, local devices, batch / devices): `own`, the examples to train on, and `partner`,
    those that mixup and CutMix mix in, the neighbours in the global batch.
  """

  def part(x: np.ndarray) -> np.ndarray:
    first = jax.process_index() * jax.local_device_count()
    return x.reshape(len(x), jax.device_count(), -1)[:, first : first + jax.local_device_count()]

  return {'own': part(indices), 'partner': part(np.roll(indices, 1, axis=1))}


def train(
  config: Any,
  dataset: Dataset,
  workdir: str | os.PathLike,
  *,
  evaluate_test: bool = True,
  on_validation: Callable[[int, dict[str, float]], None] | None = None,
  profile: bool = False,
  stopping: Callable[[], bool] | None = None,
) -> dict[str, Any]:
  """Trains until the last epoch, from the newest checkpoint where there is one.

  Args:
    config: a checked config.
    dataset: what to train on.
    workdir: locked; takes metrics and checkpoints, from process 0 alone.
    evaluate_test: a run that is one of several to choose from must not look at the test split.
    on_validation: called with the epoch, from 1, and the metrics of each validation, before the
      checkpoint is saved. What it raises ends the run, which can be resumed as if it had been killed.
    profile: write a trace of one call, for TensorBoard or Perfetto, to `workdir`/plugins/profile.
    stopping: from `stop_signal`, where the caller has more to do after this run; else the run has its own.

  Returns:
    What `result.json` holds of the training and of the test, which is evaluated once, at the end.

  Raises:
    Diverged: the loss is not finite.
    Stopped: SIGTERM or Ctrl-C, after saving.
    UsageError: the workdir holds a run on other data, or only damaged checkpoints.
  """
  num_train, image_shape = len(dataset.train), tuple(dataset.train.images.shape[1:])
  steps_per_epoch = config_lib.steps_per_epoch(config, num_train)
  epochs = config_lib.num_epochs(config, num_train)
  total_steps = epochs * steps_per_epoch
  model = create_model(config.model, len(dataset.class_names))
  learning_rate = make_schedule(config.schedule, config.optimizer.learning_rate, total_steps, steps_per_epoch)
  tx = make_optimizer(config.optimizer, learning_rate, config.model.frozen_blocks)
  state = create_state(model, tx, config, image_shape)
  evaluate_split = partial(evaluate.evaluate_split, model, batch_size=config.evaluation.batch_size)

  checkpoints = os.path.join(workdir, 'checkpoints')
  state, step, info = _restore(checkpoints, state, dataset, config)
  if step:
    _say(f'Resuming at step {step:,} of {total_steps:,}.')
  state = replicate(state)
  images, labels = replicate((np.asarray(dataset.train.images), dataset.train.labels))
  train_steps = make_train_steps(model=model, tx=tx, learning_rate=learning_rate, config=config)
  chunk = min(config.log.every_steps, steps_per_epoch) if jax.default_backend() == 'cpu' else steps_per_epoch
  calls, trained_before = 0, info['train_seconds']
  started = saved = time.perf_counter()

  with (
    stop_signal() if stopping is None else contextlib.nullcontext(stopping) as stopping,
    _recorder(workdir, step, config) as recorder,
    Progress(total_steps, epochs, stream=None if _is_primary() else io.StringIO()) as progress,
  ):
    while step < total_steps:
      epoch, offset = divmod(step, steps_per_epoch)
      waiting = time.perf_counter()
      taken = min(chunk, steps_per_epoch - offset)
      order = batches.epoch_indices(num_train, config.batch_size, config.seed, epoch)[offset : offset + taken]
      indices = local_indices(np.pad(order, ((0, chunk - taken), (0, 0))))
      begun = time.perf_counter()
      # The second call is the first that does not compile.
      with jax.profiler.trace(str(workdir)) if profile and calls == 1 else contextlib.nullcontext():
        state, measured = train_steps(state, images, labels, indices, np.int32(taken))
        jax.block_until_ready(measured)
      measured = {name: np.asarray(values)[:taken] for name, values in measured.items()}
      seconds = time.perf_counter() - waiting
      if calls:
        info['step_seconds'] += seconds
        info['timed_images'] += taken * config.batch_size
      calls += 1
      _check_finite(measured['loss'], step)

      images_per_second = taken * config.batch_size / seconds
      timing = {'images_per_second': images_per_second, 'data_wait_share': (begun - waiting) / seconds}
      for first in range(0, taken, config.log.every_steps):
        window = {name: values[first : first + config.log.every_steps] for name, values in measured.items()}
        shown = _summary(window)
        recorder.append(step + first + len(window['loss']), epoch + 1, 'train', shown, timing)
      step += taken

      last, epoch_ends, validated = step == total_steps, step % steps_per_epoch == 0, None
      if epoch_ends and len(dataset.validation) and ((epoch + 1) % config.evaluation.every_epochs == 0 or last):
        begun = time.perf_counter()
        validated = evaluate_split(eval_variables(state), dataset.validation)
        recorder.append(step, epoch + 1, 'validation', validated, {'seconds': time.perf_counter() - begun})
        found = {f'validation_{name}': value for name, value in validated.items()}
        info, shown = info | found, shown | found
      progress.update(step, epoch + 1, shown, images_per_second)
      if on_validation and validated is not None:
        on_validation(epoch + 1, validated)

      due = epoch_ends and (epoch + 1) % config.checkpoint.every_epochs == 0
      late = time.perf_counter() - saved > 60 * config.checkpoint.every_minutes
      stop = stopping()
      if due or late or last or stop:
        info['train_seconds'] = trained_before + time.perf_counter() - started
        if _is_primary():
          recorder.sync()
          checkpoint.save(checkpoints, step, jax.device_get(state), info=info, keep=config.checkpoint.keep)
        saved = time.perf_counter()
      if stop and not last:
        raise Stopped(f'Stopped and saved at step {step:,} of {total_steps:,}; the same command goes on from there.')

  tested = evaluate_split(eval_variables(state), dataset.test) if evaluate_test else {}
  return {
    'dataset': dataset.name,
    'provenance': dataset.provenance,
    'num_train': num_train,
    'num_validation': len(dataset.validation),
    'num_test': len(dataset.test),
    'num_parameters': num_parameters(state.params),
    'epochs': epochs,
    'steps': total_steps,
    'seed': config.seed,
    'train_seconds': info['train_seconds'],
    'images_per_second': info['timed_images'] / info['step_seconds'] if info['timed_images'] else None,
    **{name: value for name, value in info.items() if name.startswith('validation_')},
    **{f'test_{name}': value for name, value in tested.items()},
  }


def num_parameters(params: Any) -> int:
  """How many numbers a tree of arrays holds."""
  return sum(p.size for p in jax.tree.leaves(params))


def _is_primary() -> bool:
  """Whether this process writes the record; of several that train together, the first does."""
  return jax.process_index() == 0


def _say(text: str) -> None:
  if _is_primary():
    print(text, flush=True)


def _recorder(workdir: str | os.PathLike, step: int, config: Any) -> Recorder:
  if not _is_primary():
    # What the other processes measure is the same; theirs goes where nobody looks.
    workdir = tempfile.mkdtemp()
  return Recorder(workdir, step=step, tensorboard=config.log.tensorboard and _is_primary())


def _restore(
  checkpoints: str, state: TrainState, dataset: Dataset, config: Any
) -> tuple[TrainState, int, dict[str, Any]]:
  """The newest checkpoint's state, step and notes, or the given state and notes to begin with."""
  restored = checkpoint.restore(checkpoints, state)
  if restored is None:
    info = {
      'dataset': dataset.name,
      'class_names': list(dataset.class_names),
      'image_shape': list(dataset.train.images.shape[1:]),
      'drawing': drawings.measure(dataset.train.images),
      'train_seconds': 0.0,
      'step_seconds': 0.0,  # for `timed_images` images: all calls but those that compiled
      'timed_images': 0,
    }
    if config.init_from:
      state = start_from(evaluate.load_run(config.init_from), state, dataset.class_names)
    return state, 0, info
  if restored[2]['dataset'] != dataset.name:
    raise UsageError(
      f'this run was begun on "{restored[2]["dataset"]}", but its config finds "{dataset.name}" now; '
      'set TFDS_DATA_DIR as it was, or take another --workdir.'
    )
  return restored


def _gather(images: jax.Array, labels: jax.Array, indices: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
  """Takes one device's part of a batch from the resident data."""
  own, partner = indices['own'], indices['partner']
  positions = lax.axis_index('batch') * own.shape[0] + jnp.arange(own.shape[0], dtype=jnp.int32)
  batch = {'images': images[own], 'labels': labels[own], 'positions': positions}
  if augment.needs_partners(config.augment):
    batch |= {
      'partner_images': images[partner],
      'partner_labels': labels[partner],
      'partner_positions': (positions - 1) % config.batch_size,
    }
  return batch


def _augmented(batch: dict[str, jax.Array], key: jax.Array, model: CNN, config: Any) -> tuple[jax.Array, jax.Array]:
  one_hot = partial(jax.nn.one_hot, num_classes=model.num_classes)
  if not augment.needs_partners(config.augment):
    return augment.augment(config.augment, key, batch['positions'], batch['images'], one_hot(batch['labels']))
  return augment.augment(
    config.augment,
    key,
    batch['positions'],
    batch['images'],
    one_hot(batch['labels']),
    batch['partner_positions'],
    batch['partner_images'],
    one_hot(batch['partner_labels']),
  )


def _averaged(state: TrainState, decay: float) -> Any:
  """The averages after a step; young ones forget faster, so that the first parameters do not linger."""
  if not decay:
    return {}
  step = state.step.astype(jnp.float32)
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  newest = {'params': state.params, 'batch_stats': state.batch_stats}
  return jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), state.ema, newest)


def _summary(measured: dict[str, np.ndarray]) -> dict[str, float]:
  """One log point from the steps of a window: means over examples, means of norms, the last learning rate."""
  sums = {name: measured[name] for name in ('loss', 'accuracy', 'count')}
  norms = {name: float(np.mean(values)) for name, values in measured.items() if name.endswith('_norm')}
  return metrics.divide(sums) | {'learning_rate': float(measured['learning_rate'][-1])} | norms


def _check_finite(losses: np.ndarray, first_step: int) -> None:
  bad = np.flatnonzero(~np.isfinite(losses))
  if len(bad):
    raise Diverged(
      f'the loss of step {first_step + int(bad[0]) + 1:,} is {losses[bad[0]]}; lower config.optimizer.learning_rate, '
      'lengthen config.schedule.warmup_epochs or set config.optimizer.clip_norm, and take another --workdir.'
    )


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
  """Turns the first SIGTERM or Ctrl-C into a flag for the loop to see; a second one acts as it always did.

  Yields:
    A function that says whether any process was told to stop: all save at the same step.
  """
  received = []
  signals = (signal.SIGTERM, signal.SIGINT)
  before = {s: signal.getsignal(s) for s in signals}

  def handler(number, frame):
    del frame
    received.append(number)
    for s in signals:
      signal.signal(s, before[s])

  def stopping() -> bool:
    if jax.process_count() == 1:
      return bool(received)
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(bool(received)))))

  if threading.current_thread() is threading.main_thread():
    for s in signals:
      signal.signal(s, handler)
  try:
    yield stopping
  finally:
    for s in signals if threading.current_thread() is threading.main_thread() else ():
      signal.signal(s, before[s])
