"""One step of training as a pure function, and many of them as one."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from cnn_jax import distribute, metrics, parts
from cnn_jax.data import augment, feed
from cnn_jax.optim import average
from cnn_jax.state import AUGMENT, DROPOUT, FLIP, TrainState

STEP_METRICS = ('loss', 'accuracy', 'count', 'learning_rate', 'gradient_norm', 'parameter_norm', 'update_norm')


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
  loss_factor: int = 1,
  alternate: int = 0,
  num_parts: int = 1,
  independent: bool = False,
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
    loss_factor: of the mean loss; the size of the global batch makes it the sum.
    alternate: steps per epoch, if epochs mirror each image and leave it in turn; see `augment.alternate`. 0: off.
    num_parts: of the batch of a device, whose gradients are computed one after another and averaged. Batch norm then uses
      the statistics of a part over all devices (ghost batch norm, Hoffer et al. 2017, arXiv 1705.08741), and its running
      statistics change by the mean of the changes that the parts make.
    independent: whether the loss of an example depends on no other; see `parts.count`.

  Returns:
    The state after the step, and float32 scalars: `loss` (weighted), `accuracy` and `count` (sums over the
    global batch), `learning_rate`, and the global norms of gradient, parameters and update.
  """
  one_hot = jax.nn.one_hot(batch['labels'], model.num_classes)
  augment_key = jax.random.fold_in(jax.random.fold_in(key, AUGMENT), state.step)
  mirror = {}
  if alternate:
    chosen = augment.alternate(jax.random.fold_in(key, FLIP), batch['images'], state.step // alternate)
    mirror = {'mirror': chosen}
  images, labels = prepare(augment_key, batch['positions'], batch['images'], one_hot, **mirror)
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
    batch_stats = updated.get('batch_stats', {})
    if num_parts > 1:  # the share in the change: exactly zero where statistics are fixed
      batch_stats = jax.tree.map(lambda new, old: (new - old) / num_parts, batch_stats, state.batch_stats)
    loss = jnp.mean(losses) if loss_factor == 1 else loss_factor * jnp.mean(losses)
    return loss, (metrics.training_sums(losses, logits, labels), batch_stats)

  examples = (images, labels, batch['positions'], weights)
  gradient, (sums, batch_stats) = parts.gradient(
    loss_function, state.params, examples, num_parts, interleaved=not independent
  )
  if num_parts > 1:
    batch_stats = jax.tree.map(jnp.add, state.batch_stats, batch_stats)
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


def take_steps(
  step: Callable,
  key: jax.Array,
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  indices: jax.Array,
  num_steps: jax.Array | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One device's part of several steps; what `compile_steps` compiles.

  The number of steps is dynamic: one program serves calls of any length on every backend, so an interrupted run
  continues with the same program. On a GPU that costs a host round trip per step, which a call of all steps avoids.

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
  return lax.fori_loop(0, len(indices) if num_steps is None else num_steps, body, (state, buffers))
