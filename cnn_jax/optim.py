"""The optimizer and its learning-rate schedule, from a config."""

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


def make_optimizer(config: Any, learning_rate: optax.Schedule, frozen_blocks: int = 0) -> optax.GradientTransformation:
  """The optax chain: clip the gradient, precondition it, decay kernels, scale by the learning rate.

  Args:
    config: the section `config.optimizer`.
    learning_rate: from `make_schedule`.
    frozen_blocks: the parameters of `block1` up to this one are not updated, nor decayed.

  Returns:
    A gradient transformation. Weight decay is decoupled (Loshchilov and Hutter 2019), times the
    learning rate, and skips what is not a kernel: biases, scales of norms.
  """
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
  decay = optax.add_decayed_weights(config.weight_decay, mask=is_kernel)
  frozen = {f'block{i + 1}' for i in range(frozen_blocks)}
  freeze = optax.masked(optax.set_to_zero(), lambda params: {name: name in frozen for name in params})
  return optax.chain(
    clip,
    _precondition(config),
    decay,
    optax.scale_by_learning_rate(learning_rate),
    freeze if frozen else optax.identity(),
  )


def is_kernel(params: Any) -> Any:
  """A tree like `params` that is True at kernels, which have two axes or more."""
  return jax.tree.map(lambda p: np.ndim(p) > 1, params)


def _precondition(config: Any) -> optax.GradientTransformation:
  if config.name == 'sgd':
    return optax.trace(decay=config.momentum, nesterov=config.nesterov)
  if config.name == 'adamw':
    return optax.scale_by_adam(b1=config.momentum, b2=config.b2)
  if config.name == 'lion':
    return optax.scale_by_lion(b1=config.momentum, b2=config.b2)
  # Orthogonalised momentum for the filters, each a row of height * width * channels numbers
  # (Jordan et al. 2024); Adam for the head, biases and norms. A rate of -1 leaves the sign and
  # the learning rate to the end of the chain, where every optimizer has them.
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
