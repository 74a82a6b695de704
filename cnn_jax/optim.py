"""The optimizer and its learning-rate schedule, from a config."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from cnn_jax import muon


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
  config: Any, learning_rate: optax.Schedule, stages: Any = None, frozen_stages: int = 0, steps_per_epoch: int = 1
) -> optax.GradientTransformation:
  """The optax chain: clips the gradient, preconditions it, decays kernels, scales by the learning rate.

  Args:
    config: the section `config.optimizer`.
    learning_rate: from `make_schedule`.
    stages: from `models.trained_by_stage`; needed if `needs_stages`, or if stages or single parameters are frozen.
    frozen_stages: the stages, from the first on, whose parameters are neither updated nor decayed, like those of stage 0.
    steps_per_epoch: turns the epochs of `first_stage_epochs` into steps.

  Returns:
    A gradient transformation. Weight decay is decoupled (Loshchilov and Hutter 2019), multiplied by the learning rate,
    and applied to kernels only, not to biases and scales of norms. With `muon_sgd` it is part of the gradient, and
    applied to all but filters.
  """
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
  rescaled = config.name == 'muon_sgd'
  decay = optax.identity() if rescaled else optax.add_decayed_weights(config.weight_decay, mask=is_kernel)
  group = partial(_groups, config, stages, frozen_stages)
  scale = optax.scale_by_learning_rate(learning_rate)
  if steps := config.first_stage_epochs * steps_per_epoch:
    first = optax.scale_by_learning_rate(_to_zero(config.learning_rate, steps))
    rates = dict.fromkeys(('filter', 'kernel', 'bias'), scale) | {'first_bias': first, 'fixed': optax.set_to_zero()}
    scale = optax.partition(rates, group)
  return optax.chain(
    clip,
    _precondition(config, group),
    decay,
    scale,
    *([_scale_by_stage(config.stage_rates, stages)] if config.stage_rates else []),
    _freeze(stages, frozen_stages),
    *([muon.rescale(lambda params: jax.tree.map(lambda name: name == 'filter', group(params)))] if rescaled else []),
  )


def needs_stages(config: Any) -> bool:
  """Whether `make_optimizer` asks for the stages of the parameters.

  Args:
    config: the section `config.optimizer`.
  """
  return bool(config.stage_rates or config.first_stage_epochs)


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
  frozen = jax.tree.map(lambda stage: stage <= frozen_stages, stages)
  return optax.masked(optax.set_to_zero(), frozen) if any(jax.tree.leaves(frozen)) else optax.identity()


def _to_zero(peak: float, steps: float) -> optax.Schedule:
  """Falls linearly to zero, and stays there."""
  return lambda step: peak * jnp.maximum(0.0, 1 - step / steps)


def _groups(config: Any, stages: Any, frozen_stages: int, params: Any) -> Any:
  """A tree like `params` of what each is to the optimizer.

  `filter`: a tensor (height, width, channels, features) of a layer that is not the head; `kernel`: another one with two
  axes or more; `bias`: the rest. What is in a frozen stage, or in stage 0, is `fixed`. With `first_stage_epochs` the first
  stage has a `first_bias`, and what else it has is `fixed`. So is the bias of the head with `muon_sgd`: it adds to the
  logits directly, unlike any other bias, so the rate of the others makes it oscillate with the sums of the errors.
  """

  def group(path: Any, param: Any, stage: int) -> str:
    first, kernel = stage == 1 and config.first_stage_epochs > 0, np.ndim(param) > 1
    if stage <= frozen_stages or (first and kernel):
      return 'fixed'
    if config.name == 'muon_sgd' and _is_head(path) and not kernel:
      return 'fixed'
    if kernel:
      return 'filter' if np.ndim(param) == 4 and not _is_head(path) else 'kernel'
    return 'first_bias' if first else 'bias'

  stages = jax.tree.map(lambda _: frozen_stages + 1, params) if stages is None else stages
  return jax.tree_util.tree_map_with_path(group, params, stages)


def _precondition(config: Any, group: Callable[[Any], Any]) -> optax.GradientTransformation:
  if config.name == 'muon_sgd':
    biases = _sgd(config, config.bias_rate)
    filters = muon.orthogonalized_momentum(config.momentum, config.nesterov)
    by_group = {'filter': filters, 'kernel': _sgd(config, config.head_rate), 'fixed': optax.set_to_zero()}
    return optax.partition(by_group | {'bias': biases, 'first_bias': biases}, group)
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


def _sgd(config: Any, rate: float) -> optax.GradientTransformation:
  """SGD of `muon_sgd` with a peak rate of its own; the chain multiplies by that of the filters."""
  return optax.chain(
    optax.add_decayed_weights(config.weight_decay / rate),
    optax.trace(decay=config.sgd_momentum, nesterov=True),
    optax.scale(rate / config.learning_rate),
  )


def _filter_dimensions(params: Any) -> Any:
  def dimensions(path, param):
    is_filter = np.ndim(param) == 4 and not _is_head(path)
    return optax.contrib.MuonDimensionNumbers((0, 1, 2), 3) if is_filter else None

  return jax.tree_util.tree_map_with_path(dimensions, params)


def _is_head(path: Any) -> bool:
  return 'head' in jax.tree_util.keystr(path)
