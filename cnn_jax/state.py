"""The state of training, as a pytree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

# Purposes of randomness, folded into the key of the seed. Keys are derived, never stored.
INIT, AUGMENT, DROPOUT, VIEWS, FLIP = range(5)


class TrainState(struct.PyTreeNode):
  """All that changes from step to step, and all that a checkpoint needs."""

  step: jax.Array  # int32 scalar: updates made so far
  params: Any
  batch_stats: Any  # running statistics of batch norm; {} without it
  opt_state: Any
  ema: Any  # averages of {'params', 'batch_stats'} for evaluation; {} if off


def create_state(variables: dict[str, Any], tx: optax.GradientTransformation, ema_decay: float) -> TrainState:
  """The state before the first step, from `{'params', 'batch_stats'}`; with averages unless `ema_decay` is 0."""
  # Copies: a donated buffer must not be in the state twice.
  ema = jax.tree.map(jnp.array, variables) if ema_decay else {}
  return TrainState(jnp.int32(0), variables['params'], variables['batch_stats'], tx.init(variables['params']), ema)


def eval_variables(state: TrainState) -> dict[str, Any]:
  """The variables that evaluation uses: the averages if they are kept, otherwise the newest."""
  return state.ema or {'params': state.params, 'batch_stats': state.batch_stats}
