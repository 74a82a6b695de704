"""A run read back from its workdir: the network, its variables, and what they were trained on."""

import dataclasses
import itertools
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import UsageError, checkpoint, foreign, hub, models, published, record, rules
from cnn_jax import config as config_lib
from cnn_jax.data import MAX_CLASSES, MAX_NAME, Dataset, identity, images, load_dataset

_MAX_TEXT = 10_000  # characters of the name of a data set


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, read back from its workdir."""

  config: Any
  model: nn.Module
  variables: Any  # {'params', 'batch_stats'}, numpy arrays
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # height, width, channels of the images, whose centre may be the model's input
  dataset: str  # the name of what it was trained on
  step: int  # updates behind `variables`
  drawing: dict[str, Any] | None  # how the training images lie in their frame; see `drawings.measure`
  bit_depth: int = 16  # of the levels of 16-bit files; 0 if the training images had none
  workdir: str | os.PathLike = ''
  data: dict[str, Any] | None = None  # the identity of the data; see `data.identity`. None: written by version 0.1
  folder_names: tuple[
    str, ...
  ] = ()  # other names of the classes, which folders of images may have: WordNet identifiers

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of the model's input."""
    return config_lib.input_shape(self.config, self.image_shape)


def load_run(workdir: str | os.PathLike, which: str = 'last') -> Run:
  """Reads a run's config and one of its checkpoints, which anybody may have written. Nothing in them is executed.

  Args:
    workdir: of a run that has saved at least once; or the name of published weights, such as
      `pretrained:efficientnet_lite0`.
    which: `last`, or `best` on validation; published weights are both.

  Raises:
    UsageError: there is no run, or no checkpoint that is whole; its notes or its arrays are not those of a run with
      this config, or hold numbers that are not finite. Or there are no published weights of this name.
  """
  if published.is_name(workdir):
    return _load_published(os.fspath(workdir))
  if hub.is_name(workdir) or foreign.is_file(os.fspath(workdir)):
    raise UsageError(
      f'{workdir} holds weights and not a run, so its classes are not known; train from it with '
      f'--config.init_from={workdir}.'
    )
  config = record.load_config(workdir)
  found: list[nn.Module] = []

  def check(info: Mapping[str, Any], shapes: Any) -> None:
    _check_notes(info, workdir)
    record.check_saved_config(workdir, info.get('config'), config)
    found.append(_check_shapes(config, info, shapes, workdir))

  restored = checkpoint.restore(os.path.join(workdir, 'checkpoints'), None, which=which, check=check)
  if restored is None:
    raise UsageError(f'{workdir} has no checkpoint yet; train it with python -m cnn_jax.main --workdir={workdir}.')
  state, step, info = restored
  variables = _variables(state)
  _check_finite(variables, step, workdir)
  return Run(
    config=config,
    model=found[-1],
    variables=jax.tree.map(jnp.asarray, variables),
    class_names=tuple(info['class_names']),
    image_shape=tuple(info['image_shape']),
    dataset=info['dataset'],
    step=step,
    drawing=info.get('drawing'),
    bit_depth=info.get('bit_depth', 16),
    workdir=workdir,
    data=info.get('data'),
  )


def _load_published(name: str) -> Run:
  """A run with published weights: a classifier of the 1,000 classes of ImageNet."""
  config = published.config(name)
  class_names, identifiers = published.imagenet_classes()
  model = models.create(config.model, len(class_names))
  image_shape = (config.data.image_size, config.data.image_size, config.data.channels)
  variables = published.variables(name, models.init_shapes(model, image_shape))
  return Run(
    config=config,
    model=model,
    variables=jax.tree.map(jnp.asarray, variables),
    class_names=class_names,
    image_shape=image_shape,
    dataset='ImageNet (ILSVRC 2012)',
    step=0,
    drawing=None,
    workdir=name,
    folder_names=identifiers,
  )


def check_has_data(run: Run) -> None:
  """Checks that a run has a record and data of its own, which published weights have not.

  Raises:
    UsageError: says what can be done with published weights.
  """
  if published.is_name(run.workdir):
    raise UsageError(
      f'{run.workdir} comes without its data and without a record of its training; evaluate it on your images by '
      f'evaluate --data_dir=FOLDER, or train from it with --config.init_from={run.workdir}.'
    )


def load_run_dataset(run: Run, directory: str | os.PathLike | None = None) -> Dataset:
  """Loads the data set of a run, and checks that it is the one that the run was trained on.

  Args:
    run: from `load_run`.
    directory: where the data are now; the config's `data.dir` if None.

  Raises:
    UsageError: there are no data at the place, or they are others; the first classes or files that differ are named.
  """
  check_has_data(run)
  config_data = run.config.data.copy_and_resolve_references()
  if directory is not None:
    config_data.dir = os.fspath(directory)
  try:
    dataset = load_dataset(config_data, prepare=False)
  except UsageError as error:
    if directory is not None:
      raise
    raise UsageError(f'{error} If the data of the run are elsewhere, give --data_dir and --split.') from error
  recorded = {'class_names': run.class_names, 'dataset': run.dataset, 'data': run.data}
  identity.check(recorded, dataset, run.workdir)
  return dataset


def check_logits(logits: np.ndarray, run: Run) -> None:
  """Checks that a network computed numbers; finite parameters may still overflow.

  Raises:
    UsageError: a logit is not finite.
  """
  if not np.isfinite(logits).all():
    raise UsageError(
      f'the network of {run.workdir or "the run"} computes numbers that are not finite, because its training diverged; '
      'use --checkpoint=best or train again with a lower learning rate.'
    )


def _variables(state: Any) -> dict[str, Any]:
  """The variables to predict with, of a state or of its shapes: the averages if there are any."""
  variables = state.get('ema') or {name: state.get(name) for name in ('params', 'batch_stats')}
  return {'params': variables.get('params'), 'batch_stats': variables.get('batch_stats') or {}}


def _check_notes(info: Mapping[str, Any], workdir: str | os.PathLike) -> None:
  """Checks the notes of a checkpoint that every command uses."""
  names, shape, drawing = info.get('class_names'), info.get('image_shape'), info.get('drawing')
  problem = ''
  if not isinstance(names, list) or not 1 <= len(names) <= MAX_CLASSES:
    problem = f'class_names is not a list of 1 to {MAX_CLASSES:,} names'
  elif not all(isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in names) or len(set(names)) < len(names):
    problem = f'class_names are not different strings of 1 to {MAX_NAME:,} characters'
  elif not isinstance(shape, list) or len(shape) != 3 or any(type(side) is not int or side < 1 for side in shape):
    problem = 'image_shape is not three positive integers'
  elif shape[2] not in (1, 3) or shape[0] * shape[1] > images.MAX_PIXELS:
    problem = f'image_shape is not height, width and 1 or 3 channels with at most {images.MAX_PIXELS:,} pixels'
  elif not isinstance(info.get('dataset'), str) or len(info['dataset']) > _MAX_TEXT:
    problem = f'dataset is not a string of at most {_MAX_TEXT:,} characters'
  elif drawing is not None and not _is_drawing(drawing):
    problem = 'drawing is not null or a longer_side and a centre'
  if problem:
    raise UsageError(
      f'the notes of a checkpoint in {workdir} are not those of a run: {problem}; restore a copy or use another workdir.'
    )


def _is_drawing(drawing: Any) -> bool:
  centre = drawing.get('centre') if isinstance(drawing, Mapping) else None
  if not isinstance(centre, list) or len(centre) != 2:
    return False
  return all(isinstance(x, int | float) and 0 <= x <= images.MAX_PIXELS for x in (drawing.get('longer_side'), *centre))


def _check_shapes(config: Any, info: Mapping[str, Any], shapes: Any, workdir: str | os.PathLike) -> nn.Module:
  """Checks the arrays of a checkpoint, before they are read, against the network of its config, which is returned."""
  saved = shapes if isinstance(shapes, Mapping) else {}
  count = len(jax.tree.leaves(shapes))
  try:
    rules.check_statistics(config.data, info['image_shape'][2])
    model = models.create(config.model, len(info['class_names']))
    with nn.intercept_methods(_limit_calls(100 + 4 * count)):
      expected = models.init_shapes(model, config_lib.input_shape(config, info['image_shape']))
  except UsageError:
    raise
  except Exception as error:  # whatever Flax and JAX raise for numbers that make no network
    reason = ' '.join(str(error).split())[:200]
    raise UsageError(f'the config in {workdir} describes no network ({reason}); restore a copy of it.') from error
  parts = [saved, *([saved['ema']] if saved.get('ema') else [])]
  for part in parts:
    problems = describe_differences(_variables(part) if isinstance(part, Mapping) else {}, expected)
    if problems:
      raise UsageError(
        f'a checkpoint in {workdir} does not fit the network of its config: {problems}; restore a copy of both.'
      )
  size, needed = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (shapes, expected))
  # No optimizer keeps more than two arrays per parameter, and the averages are one more.
  if size > 8 * needed + 2**20:
    raise UsageError(
      f'a checkpoint in {workdir} has {size:,} bytes of arrays for {needed:,} of variables; use another.'
    )
  return model


def _limit_calls(limit: int) -> Any:
  """Stops the construction of a network that has far more layers than the checkpoint has arrays."""
  calls = itertools.count(1)

  def intercept(call, args, kwargs, context):
    del context
    if next(calls) > limit:
      raise ValueError('it has more layers than the checkpoint has arrays')
    return call(*args, **kwargs)

  return intercept


def describe_differences(saved: Any, expected: Any) -> str:
  """Describes how one tree of arrays or shapes differs from another, as a clause; '' if it does not.

  Args:
    saved: nested dicts with arrays, or shapes and types, as leaves.
    expected: the same.
  """
  there, here = (_leaves(tree) for tree in (saved, expected))
  clauses = [
    f'{name} is {there.get(name, "missing")} there and {here.get(name, "missing")} here'
    for name in sorted({*there, *here})
    if there.get(name) != here.get(name)
  ]
  return '; '.join(clauses[:3]) + (f'; and {len(clauses) - 3:,} more' if len(clauses) > 3 else '')


def _leaves(tree: Any) -> dict[str, str]:
  """{'params/head/bias': 'float32[10]', ...}"""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {'/'.join(str(key.key) for key in path): f'{leaf.dtype}{list(leaf.shape)}' for path, leaf in leaves}


def _check_finite(variables: Any, step: int, workdir: str | os.PathLike) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    if not np.isfinite(leaf).all():
      raise UsageError(
        f'{"/".join(str(key.key) for key in path)} of step {step:,} in {workdir} holds numbers that are not finite, '
        'because its training diverged; use --checkpoint=best or train again with a lower learning rate.'
      )
