"""Weights from elsewhere: the weights of another run as the start of a new one."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cnn_jax import UsageError
from cnn_jax.run import Run


def graft(run: Run, variables: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
  """Replaces freshly initialised variables by those of a run.

  The head keeps its fresh values if the classes are not those of the run. A first kernel for one channel becomes one
  for three by a third of it for each, and back by their sum: on grey pictures both compute the same.

  Args:
    run: from `run.load_run`; only image size, channels and classes may differ.
    variables: `{'params', 'batch_stats'}` of the new network, freshly initialised.
    class_names: of the data to train on.

  Returns:
    Variables of the same shapes, in new buffers.

  Raises:
    UsageError: the networks differ in more than that; lists what is missing, left over, or has another shape.
  """
  same_classes = tuple(class_names) == run.class_names
  problems = []

  def transfer(path, fresh):
    names = [key.key for key in path]
    if names[1] == 'head' and not same_classes:
      return jnp.array(fresh)
    trained: Any = run.variables
    for name in names:
      trained = trained.get(name, {})
    if isinstance(trained, dict):
      problems.append(f'it has no {"/".join(names)}')
      return fresh
    if names[-1] == 'kernel' and trained.ndim == 4 and {trained.shape[2], fresh.shape[2]} == {1, 3}:
      trained = _change_channels(trained, fresh.shape[2])
    if trained.shape != fresh.shape:
      problems.append(f'{"/".join(names)} is {trained.shape} there and {fresh.shape} here')
      return fresh
    return jnp.array(trained)  # a copy: donated buffers must not be shared

  grafted = jax.tree_util.tree_map_with_path(transfer, variables)
  there, here = (
    {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (run.variables, variables)
  )
  problems += [f'it has {"/".join(names)}, which is left over' for names in sorted(there - here) if names[1] != 'head']
  if problems:
    others = f', and {len(problems) - 3} more' if len(problems) > 3 else ''
    raise UsageError(
      f'the run of config.init_from has another network: {"; ".join(problems[:3])}{others}; '
      'give both configs the same model.'
    )
  return grafted


def _change_channels(kernel: Any, channels: int) -> Any:
  """A first kernel (height, width, 1 or 3, features) for another number of channels, the same on grey pictures."""
  if channels == 1:
    return jnp.sum(kernel, axis=2, keepdims=True)
  return jnp.broadcast_to(kernel / 3, (*kernel.shape[:2], 3, kernel.shape[3]))
