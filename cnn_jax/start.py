"""How a run starts: from its newest checkpoint, from the weights of another run, or from random weights."""

import hashlib
import json
import os
from typing import Any

import jax
import numpy as np
import optax

from cnn_jax import checkpoint, command, distribute, files, frozen, models, saving, weights
from cnn_jax import config as config_lib
from cnn_jax.data import Dataset, augment, identity
from cnn_jax.record import check_saved_config, shared_fields
from cnn_jax.state import VIEWS, TrainState, create_state

INITIAL_IMAGES = 5000  # from which a network may compute its first weights


def restore(
  checkpoints: str, state: TrainState, tx: optax.GradientTransformation, dataset: Dataset, config: Any
) -> tuple[TrainState, int, dict[str, Any]]:
  """The newest checkpoint's state, step and notes, or the state and the notes of a new run.

  Args:
    checkpoints: the directory of the run's checkpoints.
    state: with random weights; a new run has these, or those of `config.init_from` where they fit.
    tx: the optimizer.
    dataset: to train on.
    config: of the run, as it was asked for.

  Raises:
    UsageError: the checkpoints are of a run on other data or of another config, or the weights do not fit.
  """

  def check(info, _):
    workdir = os.path.dirname(checkpoints)
    check_saved_config(workdir, info.get('config'), config)
    identity.check(info, dataset, workdir)

  restored = checkpoint.restore(checkpoints, state, check=check)
  identities = {'data': identity.identify(dataset), 'config': files.plain(config.to_dict())}
  if restored is None:
    info = {**identities, **saving.first_notes(dataset)}
    if config.init_from:
      variables = {'params': state.params, 'batch_stats': state.batch_stats}
      variables = weights.start(config, variables, dataset.class_names)
      state = create_state(variables, tx, config.evaluation.ema_decay)
    return state, 0, info
  state, step, info = restored
  return state, step, {**identities, 'trained_images': info.pop('timed_images', 0)} | info  # its name in version 0.1


def from_data(made: Any, state: TrainState, dataset: Dataset, config: Any) -> TrainState:
  """The state of a new run, with the weights that the network computes from training images.

  Args:
    made: `plan.Plan`.
    state: before the first step; that of weights of another run stays as it is.
    dataset: to train on.
    config: of the run, adapted to the data.
  """
  if config.init_from or not models.depends_on_data(config.model):
    return state
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  # From all parts of the split, which may be sorted.
  chosen = np.linspace(0, len(dataset.train) - 1, min(len(dataset.train), INITIAL_IMAGES)).astype(int)
  images = augment.normalize(dataset.train.images[chosen], config_lib.statistics(config.data))
  return create_state(models.initialize(config.model, variables, images), made.tx, config.evaluation.ema_decay)


def facts(step: int, config: Any, dataset: Dataset) -> dict[str, Any]:
  """What all processes of a run must have in common after one of them has restored the state; see `peers.compare`.

  Args:
    step: updates behind the state.
    config: of the run, adapted to the data.
    dataset: that this process has found.
  """
  shared = json.dumps(shared_fields(config), sort_keys=True)
  return {
    'the step': step,
    'the hash of the config': hashlib.sha256(shared.encode()).hexdigest()[:12],
    'the fingerprint of the data': identity.identify(dataset)['sha256'][:12],
    'the number of devices': jax.local_device_count(),
  }


def from_frozen_stages(
  made: Any, state: TrainState, step: int, dataset: Dataset, config: Any
) -> tuple[np.ndarray | None, TrainState]:
  """The maps that are kept of the frozen stages, and the state, whose head is a linear probe if the config asks for one.

  Args:
    made: `plan.Plan`.
    state: on the devices, the same in all processes.
    step: updates behind the state; only a new run gets a probe.
    dataset: to train on.
    config: of the run, adapted to the data.

  Returns:
    See `frozen.compute_maps`; None if no maps are kept.
  """
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  key = jax.random.fold_in(jax.random.key(config.seed), VIEWS)
  maps, features = frozen.compute_maps(made.model, variables, dataset.train, config, key, made.boundary)
  if config.fine_tuning.probe and not step:
    labels = dataset.train.labels[frozen.choose_probed(len(dataset.train), config.seed)]
    probed = frozen.with_probe(jax.device_get(variables), features, labels, config)
    state = distribute.replicate(distribute.from_first(create_state(probed, made.tx, config.evaluation.ema_decay)))
  del features
  command.return_freed_memory()
  return maps if made.boundary else None, state
