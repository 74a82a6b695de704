"""What a sweep varies: a space file is read, tried out, and asked for the parameters of each trial.

A space file defines `suggest(trial, config)`, which sets fields of the config to what Optuna's `trial`
suggests, and may define `GRID`, the values that a grid takes of a continuous parameter.
"""

import hashlib
import itertools
import json
import math
import os
import runpy
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import sqlalchemy.exc
from ml_collections import ConfigDict
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from cnn_jax import UsageError
from cnn_jax import config as config_lib

_DRAWS = 32  # how often a space is tried before the first trial


class Space:
  """A space file over a config.

  Everything that can be known of a space before the first trial is checked here: it is asked for the
  configs at both ends of its ranges and for a number of random ones, which are checked as a run would.

  Args:
    path: of the space file.
    config: that it edits copies of.

  Raises:
    UsageError: names the file, where possible the line, and what is wrong.
  """

  def __init__(self, path: str | os.PathLike, config: ConfigDict):
    self._path, self._config = str(path), config
    self._suggest, self._grid = self._load()
    self.distributions: dict[str, BaseDistribution] = {}
    samplers = [_Corner(0), _Corner(-1), *_DRAWS * [optuna.samplers.RandomSampler(seed=0)]]
    storage = optuna.storages.InMemoryStorage()
    made = []
    for sampler in samplers:
      trial = optuna.create_study(storage=storage, study_name='', load_if_exists=True, sampler=sampler).ask()
      made.append(_as_json(self.config_of(trial)))
      self.distributions |= trial.distributions
    if not self.distributions:
      raise UsageError(f'{path} suggests nothing; let suggest(trial, config) call trial.suggest_float and the like.')
    if len(set(made)) == 1 and not all(d.single() for d in self.distributions.values()):
      raise UsageError(
        f'{path} makes the same config whatever is suggested; let suggest(trial, config) set fields of it.'
      )
    self.distributions = dict(sorted(self.distributions.items()))
    self._fingerprint = hashlib.sha256(''.join(made).encode()).hexdigest()

  def config_of(self, trial: optuna.trial.BaseTrial) -> ConfigDict:
    """The config of a trial.

    Raises:
      UsageError: the space file, or what it made, is wrong.
    """
    config = ConfigDict(self._config.to_dict()).lock()
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        self._suggest(trial, config)
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
      raise
    except Exception as error:
      raise self._blame(error) from error
    try:
      config_lib.check(config)
    except UsageError as error:
      raise UsageError(f'{self._path}: {error}') from error
    return config

  def plan(self) -> dict[str, Any]:
    """What must not change while a study lasts, by name; JSON."""
    space = {
      f'the space of {name}': optuna.distributions.distribution_to_json(d) for name, d in self.distributions.items()
    }
    return space | {'what the space makes of its parameters': self._fingerprint}

  def grid(self, seed: int) -> list[dict[str, Any]]:
    """All points of the grid, shuffled, so that the first ones are a fair sample.

    Raises:
      UsageError: a parameter is continuous and not in the file's `GRID`.
    """
    levels = [self._levels(name, distribution) for name, distribution in self.distributions.items()]
    points = [dict(zip(self.distributions, values, strict=True)) for values in itertools.product(*levels)]
    return [points[i] for i in np.random.default_rng(seed).permutation(len(points))]

  def sobol(self, seed: int, index: int) -> dict[str, Any]:
    """One point of a scrambled Sobol sequence."""
    from scipy.stats import qmc  # slow to import

    engine = qmc.Sobol(len(self.distributions), scramble=True, rng=np.random.default_rng(seed))
    if index:
      engine.fast_forward(index)
    point = engine.random(1)[0]
    return {name: _at(d, float(u)) for (name, d), u in zip(self.distributions.items(), point, strict=True)}

  def _load(self) -> tuple[Callable, Mapping[str, Sequence[Any]]]:
    if not os.path.isfile(self._path):
      raise UsageError(
        f'there is no space file {self._path}; those that come with the project are in experiments/spaces/.'
      )
    try:
      names = runpy.run_path(self._path)
    except Exception as error:
      raise self._blame(error) from error
    if not callable(names.get('suggest')):
      raise UsageError(f'{self._path} defines no function suggest(trial, config); see experiments/spaces/.')
    return names['suggest'], names.get('GRID', {})

  def _levels(self, name: str, distribution: BaseDistribution) -> Sequence[Any]:
    unknown = set(self._grid) - set(self.distributions)
    if unknown:
      raise UsageError(
        f'{self._path}: GRID has {min(unknown)!r}, but suggest() asks for {", ".join(self.distributions)}.'
      )
    if name in self._grid:
      for value in self._grid[name]:
        if not _allows(distribution, value):
          raise UsageError(
            f'{self._path}: {value!r} of GRID[{name!r}] is outside of what suggest() allows: {distribution}.'
          )
      return self._grid[name]
    if isinstance(distribution, CategoricalDistribution):
      return distribution.choices
    if isinstance(distribution, IntDistribution | FloatDistribution) and distribution.step:
      return [_step(distribution, i) for i in range(_num_steps(distribution))]
    raise UsageError(
      f'{self._path}: a grid needs values of {name}; add GRID = {{{name!r}: (...)}} or give suggest_float a step.'
    )

  def _blame(self, error: Exception) -> UsageError:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self._path]
    if isinstance(error, SyntaxError) and error.filename == self._path:
      lines = [error.lineno]
    where = f'{self._path}, line {lines[-1]}' if lines else self._path
    return UsageError(f'{where}: {type(error).__name__}: {error}')


def make_sampler(name: str, space: Space, seed: int, index: int) -> optuna.samplers.BaseSampler:
  """A sampler for one trial alone, seeded by the study's seed and the trial's index.

  A sampler's own state is not stored, so one that lived for the whole study would begin anew when
  the study is resumed, and differ from worker to worker. `random`, `grid` and `qmc` are here
  functions of (seed, index); `tpe` and `cmaes` also learn from the trials that are complete
  when they are asked.

  Args:
    name: tpe | random | grid | qmc | cmaes.
    space: to sample.
    seed: of the study.
    index: of the trial, from 0.
  """
  own_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
  if name == 'tpe':
    return optuna.samplers.TPESampler(seed=own_seed)
  if name == 'cmaes':
    return optuna.samplers.CmaEsSampler(seed=own_seed, warn_independent_sampling=False)
  random = optuna.samplers.RandomSampler(seed=own_seed)
  if name == 'random':
    return random
  point = space.grid(seed)[index] if name == 'grid' else space.sobol(seed, index)
  return optuna.samplers.PartialFixedSampler(point, random)


def make_pruner(name: str, epochs: int) -> optuna.pruners.BasePruner:
  """A pruner.

  Args:
    name: median | hyperband | none.
    epochs: of a trial. The median is not asked in the first quarter of them, while the learning
      rate warms up.
  """
  if name == 'median':
    return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=epochs // 4)
  if name == 'hyperband':
    return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs)
  return optuna.pruners.NopPruner()


def _allows(distribution: BaseDistribution, value: Any) -> bool:
  if isinstance(distribution, CategoricalDistribution):
    return value in distribution.choices
  assert isinstance(distribution, IntDistribution | FloatDistribution)
  return distribution.low <= value <= distribution.high


class _Corner(optuna.samplers.RandomSampler):
  """Suggests the first (0) or the last (-1) value of every range."""

  def __init__(self, end: int):
    super().__init__(seed=0)
    self._end = end

  def sample_independent(self, study, trial, param_name, param_distribution):
    if isinstance(param_distribution, CategoricalDistribution):
      return param_distribution.choices[self._end]
    return param_distribution.high if self._end else param_distribution.low


def _at(distribution: BaseDistribution, u: float) -> Any:
  """The value at a fraction 0 <= u < 1 of the way through a distribution."""
  if isinstance(distribution, CategoricalDistribution):
    return distribution.choices[int(u * len(distribution.choices))]
  assert isinstance(distribution, IntDistribution | FloatDistribution)
  low, high = distribution.low, distribution.high
  if distribution.log:
    if isinstance(distribution, IntDistribution):
      value = math.exp(math.log(low - 0.5) + u * (math.log(high + 0.5) - math.log(low - 0.5)))
      return min(max(round(value), low), high)
    return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
  if distribution.step:
    return _step(distribution, int(u * _num_steps(distribution)))
  return low + u * (high - low)


def _num_steps(distribution: IntDistribution | FloatDistribution) -> int:
  assert distribution.step
  return int((distribution.high - distribution.low) / distribution.step + 1.5)


def _step(distribution: IntDistribution | FloatDistribution, i: int) -> int | float:
  assert distribution.step
  value = distribution.low + i * distribution.step
  return value if isinstance(distribution, IntDistribution) else round(value, 12)  # 0.3, not 0.30000000000000004


def _as_json(config: ConfigDict) -> str:
  return json.dumps(config.to_dict(), sort_keys=True)
