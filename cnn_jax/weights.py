"""The weights that a new run starts from: of another run, published ones, or those of a file of another library."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import UsageError, foreign, hub, models, published, record
from cnn_jax.run import load_run

Levels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation
# Fields of `config.model` that change how a network is trained, but not which network it is.
_TRAINING = ('dropout', 'drop_path', 'norm_momentum', 'fixed_statistics', 'frozen_stages', 'rematerialize', 'dtype')


def statistics_of(config: Any) -> Levels | None:
  """The mean and the standard deviation, in levels, with which the weights of `config.init_from` expect images.

  Reads no weights, but checks by their name that they are those of the network of `config.model`.

  Args:
    config: of the new run.

  Returns:
    One number each, or one per channel of an RGB image; None if `init_from` is empty.

  Raises:
    UsageError: there is no such run, name or repository; or the network is another one, and the message names the
      overrides that select it.
  """
  place = config.init_from
  if not place:
    return None
  if hub.is_name(place):
    settings = hub.settings(place)
    _check_architecture(place, settings.get('architecture'), config.model)
    return settings.get('levels') or models.foreign_levels(config.model.name)
  if foreign.is_file(place):
    foreign.check_file(place)
    return models.foreign_levels(config.model.name)
  if published.is_name(place):
    network, fields = published.network(place)
    _check_network(place, network, fields, config.model)
    data = published.config(place).data
  else:
    data = record.load_config(place).data
  return tuple(map(float, data.mean)) or (127.5,), tuple(map(float, data.std)) or (127.5,)


def missing_statistics(config: Any, workdir: str | os.PathLike) -> dict[str, tuple[float, ...]]:
  """The fields `data.mean` and `data.std` of a run, from the weights of `config.init_from`; {} if the config sets them.

  Args:
    config: of the run.
    workdir: of the run; one that has begun keeps the numbers that it recorded, so that the weights are not needed again.

  Raises:
    UsageError: see `statistics_of`.
  """
  if config.data.mean or not config.init_from:
    return {}
  if (Path(workdir) / 'config.json').exists():
    recorded = record.load_config(workdir)
    if recorded.init_from == config.init_from and recorded.data.mean:
      return {'data.mean': tuple(recorded.data.mean), 'data.std': tuple(recorded.data.std)}
  mean, std = statistics_of(config) or ((), ())
  if config.data.channels == 1 and len(mean) > 1:  # as weights of three colours are read for grey images; see `graft`
    mean, std = (float(np.mean(mean)),), (float(np.mean(std)),)
  return {'data.mean': mean, 'data.std': std}


def start(config: Any, variables: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
  """The variables that a new run with `config.init_from` starts from; see `graft`.

  Args:
    config: of the new run.
    variables: `{'params', 'batch_stats'}` of its network, freshly initialised.
    class_names: of the data to train on.

  Raises:
    UsageError: the weights cannot be read, or are those of another network.
  """
  place = config.init_from
  if hub.is_name(place) or foreign.is_file(place):
    tensors = foreign.read(hub.fetch(place) if hub.is_name(place) else place)
    # The order of the classes in the file is not known, so that its head is not used.
    return graft(foreign.convert(tensors, config.model, variables, place), (), variables, class_names)
  run = load_run(place)
  try:
    return graft(run.variables, run.class_names, variables, class_names)
  except UsageError as error:
    theirs = run.config.model.copy_and_resolve_references()
    if 'pooled_stages' in theirs and tuple(run.class_names) != tuple(class_names):
      theirs.pooled_stages = config.model.get('pooled_stages', theirs.pooled_stages)  # of the head, which is fresh
    overrides = _overrides(theirs, config.model)
    advice = f'; set {overrides}' if overrides else ''
    raise UsageError(f'the run of config.init_from has another network: {error}{advice}.') from error


def graft(there: Any, their_names: Sequence[str], here: dict[str, Any], our_names: Sequence[str]) -> dict[str, Any]:
  """Replaces freshly initialised variables by trained ones.

  The head keeps its fresh values if the classes are others. A first kernel for one channel becomes one for three by a
  third of it for each, and back by their sum: on grey pictures both compute the same.

  Args:
    there: `{'params', 'batch_stats'}`, trained.
    their_names: the classes of the trained head; empty if they are not known.
    here: `{'params', 'batch_stats'}` of the new network, freshly initialised.
    our_names: the classes of the data to train on.

  Returns:
    Variables of the same shapes as `here`, in new buffers.

  Raises:
    UsageError: lists what is missing, left over, or has another shape, as a clause.
  """
  same_classes = tuple(their_names) == tuple(our_names)
  problems = []

  def transfer(path, fresh):
    names = [key.key for key in path]
    if names[1] == 'head' and not same_classes:
      return jnp.array(fresh)
    trained: Any = there
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

  grafted = jax.tree_util.tree_map_with_path(transfer, here)
  theirs, ours = (
    {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)} for tree in (there, here)
  )
  problems += [f'it has {"/".join(names)}, which is left over' for names in sorted(theirs - ours) if names[1] != 'head']
  if problems:
    raise UsageError('; '.join(problems[:3]) + (f'; and {len(problems) - 3:,} more' if len(problems) > 3 else ''))
  return grafted


def _change_channels(kernel: Any, channels: int) -> Any:
  """A first kernel (height, width, 1 or 3, features) for another number of channels, the same on grey pictures."""
  if channels == 1:
    return jnp.sum(kernel, axis=2, keepdims=True)
  return jnp.broadcast_to(kernel / 3, (*kernel.shape[:2], 3, kernel.shape[3]))


def _check_architecture(place: str, architecture: str | None, config_model: Any) -> None:
  """Checks the name that timm gives to a network, if there is one."""
  if architecture is None:
    return
  known = models.architectures()
  if architecture not in known:
    raise UsageError(
      f'{place} is the network {architecture[:60]!r}; the networks that can be used: {", ".join(known)}.'
    )
  _check_network(place, *known[architecture], config_model)


def _check_network(place: str, network: str, fields: dict[str, Any], config_model: Any) -> None:
  if network != config_model.name or any(config_model[name] != value for name, value in fields.items()):
    theirs = (
      config_model.copy_and_resolve_references() if network == config_model.name else models.default_config(network)
    )
    theirs.update(fields)
    raise UsageError(
      f'{place} is not the network of config.model; set {_overrides(theirs, config_model)}, or choose other weights.'
    )


def _overrides(theirs: Any, ours: Any) -> str:
  """The arguments that make a section `config.model` describe the network of another one."""
  base = ours if theirs.name == ours.name else models.default_config(theirs.name)
  fields = [name for name in theirs if name not in _TRAINING and theirs[name] != base.get(name)]
  if theirs.name != ours.name:
    fields = ['name', *fields]
  return ' '.join(shlex.quote(f'--config.model.{name}={theirs[name]}') for name in fields)
