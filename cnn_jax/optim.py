"""The optimizer and its learning-rate schedule, from a config."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib


def make_schedule(config: Any, peak: float, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
  """The learning rate of every step.

  Args:
    config: the section `config.schedule`.
    peak: the largest learning rate.
    total_steps: of the run; the decay ends there.
    steps_per_epoch: turns the warm-up's epochs into steps.

  Returns:
    A function from the step (0 for the first update) to the learning rate. Warm-up rises
    linearly from zero, its first step being peak / warmup_steps, except in `one_cycle`, which
    rises along a cosine from peak / 25 (Smith and Topin 2018).
  """
  warmup = round(config.warmup_epochs * steps_per_epoch)
  decay = max(1, total_steps - warmup)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum((step + 1) / max(1, warmup), 1.0)
    fall = jnp.clip((step - warmup) / decay, 0.0, 1.0)
    if config.name == 'constant':
      factor = rise
    elif config.name == 'linear':
      factor = jnp.where(step < warmup, rise, 1 + (config.end - 1) * fall)
    else:
      cosine = config.end + (1 - config.end) * (1 + jnp.cos(jnp.pi * fall)) / 2
      if config.name == 'one_cycle':
        start = 1 / 25
        rise = start + (1 - start) * (1 - jnp.cos(jnp.pi * jnp.minimum(step / max(1, warmup), 1.0))) / 2
      factor = jnp.where(step < warmup, rise, cosine)
    return peak * factor

  return schedule


def make_optimizer(
  config: Any, learning_rate: optax.Schedule, stages: Any = None, frozen_stages: int = 0
) -> optax.GradientTransformation:
  """The optax chain: clips the gradient, preconditions it, decays kernels, scales by the learning rate.

  Args:
    config: the section `config.optimizer`.
    learning_rate: from `make_schedule`.
    stages: from `models.parameters_by_stage`; needed if stages are frozen or have rates of their own.
    frozen_stages: the stages, from the first on, whose parameters are neither updated nor decayed.

  Returns:
    A gradient transformation. Weight decay is decoupled (Loshchilov and Hutter 2019), multiplied by the learning rate,
    and applied to kernels only, not to biases and scales of norms.
  """
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
  decay = optax.add_decayed_weights(config.weight_decay, mask=is_kernel)
  return optax.chain(
    clip,
    _precondition(config),
    decay,
    optax.scale_by_learning_rate(learning_rate),
    *([_scale_by_stage(config.stage_rates, stages)] if config.stage_rates else []),
    _freeze(stages, frozen_stages) if frozen_stages else optax.identity(),
  )


def is_kernel(params: Any) -> Any:
  """A tree like `params` that is True at kernels, which have two axes or more."""
  return jax.tree.map(lambda p: np.ndim(p) > 1, params)


def average(averages: Any, newest: Any, step: Any, decay: float) -> Any:
  """The exponential averages after a step.

  Args:
    averages: before the step; a tree like `newest`, or {} if `decay` is 0.
    newest: the values after the step.
    step: int32, steps done.
    decay: at most this; the first averages decay faster, so that the initial values are soon forgotten. 0: off.
  """
  if not decay:
    return {}
  step = step.astype(jnp.float32)
  bounded = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda old, new: old + (1 - bounded) * (new - old), averages, newest)


def _scale_by_stage(rates: Sequence[float], stages: Any) -> optax.GradientTransformation:
  """Multiplies the updates of the last stages by `rates`, the head's last; earlier stages have the first of them."""
  head = max(jax.tree.leaves(stages))
  factors = jax.tree.map(lambda stage: float(rates[max(0, len(rates) - 1 - (head - stage))]), stages)
  return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


def _freeze(stages: Any, frozen_stages: int) -> optax.GradientTransformation:
  return optax.masked(optax.set_to_zero(), jax.tree.map(lambda stage: stage <= frozen_stages, stages))


def _precondition(config: Any) -> optax.GradientTransformation:
  if config.name == 'sgd':
    return optax.trace(decay=config.momentum, nesterov=config.nesterov)
  if config.name == 'adamw':
    return optax.scale_by_adam(b1=config.momentum, b2=config.b2)
  if config.name == 'lion':
    return optax.scale_by_lion(b1=config.momentum, b2=config.b2)
  # Orthogonalised momentum for the filters, each a row of height * width * channels numbers (Jordan et al. 2024); Adam
  # for the head, biases and norms. A rate of -1 leaves the sign and the learning rate to the end of the chain.
  return optax.contrib.muon(
    learning_rate=-1.0,
    beta=config.momentum,
    nesterov=config.nesterov,
    adam_b2=config.b2,
    muon_weight_dimension_numbers=_filter_dimensions,
  )


def _filter_dimensions(params: Any) -> Any:
  def dimensions(path, param):
    is_filter = np.ndim(param) == 4 and 'head' not in jax.tree_util.keystr(path)
    return optax.contrib.MuonDimensionNumbers((0, 1, 2), 3) if is_filter else None

  return jax.tree_util.tree_map_with_path(dimensions, params)
