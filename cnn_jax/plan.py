"""What a config and the shape of its data define: the network, the optimizer, the steps, the state before the first."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import optax

from cnn_jax import config as config_lib
from cnn_jax import frozen, models, optim, parts
from cnn_jax.data import augment
from cnn_jax.state import INIT, TrainState, create_state
from cnn_jax.step import train_step

MAX_STEPS_PER_CALL = 1024  # fewer if they take longer than `progress.Pace` allows


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a config and the shape of its data define."""

  model: nn.Module
  tx: optax.GradientTransformation
  boundary: frozen.Boundary | None  # of the maps that are kept; None: training starts from images
  steps_per_epoch: int
  epochs: int
  total_steps: int
  capacity: int  # the most steps of one call
  state: TrainState  # before the first step
  step: Callable  # `step.train_step`, with everything bound but the state, the batch and the key


def make_plan(
  config: Any, num_train: int, num_classes: int, image_shape: tuple[int, ...], *, max_steps: int = MAX_STEPS_PER_CALL
) -> Plan:
  """Makes what training needs besides the data; compiles nothing but the initialisation.

  Args:
    config: a checked config.
    num_train: training images.
    num_classes: outputs of the network.
    image_shape: (height, width, channels) of the images of the data set.
    max_steps: the most steps of one compiled call.
  """
  steps_per_epoch = config_lib.steps_per_epoch(config, num_train)
  epochs = config_lib.num_epochs(config, num_train)
  total_steps = epochs * steps_per_epoch
  model = models.create(config.model, num_classes)
  learning_rate = optim.make_schedule(config.schedule, config.optimizer.learning_rate, total_steps, steps_per_epoch)
  shape, trained = (config_lib.input_shape(config, image_shape, training=training) for training in (False, True))
  stages = None
  if config.model.frozen_stages or optim.needs_stages(config.optimizer) or models.fixed_parameters(model):
    stages = models.trained_by_stage(model, shape)
  tx = optim.make_optimizer(config.optimizer, learning_rate, stages, config.model.frozen_stages, steps_per_epoch)
  boundary = frozen.find_boundary(config, model, num_train, shape, epochs)
  prepare = partial(augment.augment, config.augment, config_lib.statistics(config.data))
  if boundary:
    prepare = partial(augment.mix, config.augment)
  key = jax.random.fold_in(jax.random.key(config.seed), INIT)
  variables = models.init(model, key, shape, head_only=bool(config.init_from))
  independent = getattr(model, 'fixed_statistics', False) or not variables['batch_stats']
  pixels = trained[0] * trained[1] if not boundary else 0
  step = partial(
    train_step,
    model=model.clone(skipped_stages=boundary.stages) if boundary else model,
    tx=tx,
    learning_rate=learning_rate,
    prepare=prepare,
    label_smoothing=config.loss.label_smoothing,
    class_weights=tuple(config.loss.class_weights),
    ema_decay=config.evaluation.ema_decay,
    loss_factor=config.batch_size if config.loss.reduction == 'sum' else 1,
    alternate=steps_per_epoch if config.augment.flip and config.augment.alternate and not boundary else 0,
    num_parts=max(
      config.optimizer.accumulate_steps, parts.count(config.batch_size // jax.device_count(), pixels, independent)
    ),
    independent=independent,
  )
  state = create_state(variables, tx, config.evaluation.ema_decay)
  return Plan(model, tx, boundary, steps_per_epoch, epochs, total_steps, min(max_steps, steps_per_epoch), state, step)
