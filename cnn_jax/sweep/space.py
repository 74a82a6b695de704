"""The search space of a sweep: reads and checks a space file, samples it, and makes the config of each trial.

A space file is Python and is executed. It defines `suggest(trial, config)`, which sets fields of the config to values
that Optuna's `trial` suggests. It may define `GRID`, the values that `--sampler=grid` uses of each parameter.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import runpy
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import sqlalchemy.exc
from ml_collections import ConfigDict
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial

from cnn_jax import UsageError
from cnn_jax import config as config_lib
from cnn_jax.sweep.worker import NO_VALIDATION

_DRAWS = 32  # random configs that are checked before the first trial
_MAX_POINTS = 10_000  # of a space that is searched for a new configuration point by point
_MAX_DRAWS = 300  # random points of a larger space that are tried for that


class Space:
  """A space file applied to a config.

  Mistakes are reported before the first trial: the configs at both ends of all ranges and a number of random ones are
  made and checked here.

  Args:
    path: of the space file.
    config: the config of the trials is a copy of it with some fields set.

  Attributes:
    distributions: the distribution of each parameter, by name.

  Raises:
    UsageError: the space file is missing or wrong, which names the file and, if possible, the line; or no config that
      it makes has a validation split.
  """

  def __init__(self, path: str | os.PathLike, config: ConfigDict):
    self._path, self._config = str(path), config
    self._suggest, self._grid = self._load()
    self.distributions: dict[str, BaseDistribution] = {}
    samplers = [_Corner(0), _Corner(-1), *_DRAWS * [optuna.samplers.RandomSampler(seed=0)]]
    storage = optuna.storages.InMemoryStorage()
    configs, validated = [], False
    for sampler in samplers:
      trial = optuna.create_study(storage=storage, study_name='', load_if_exists=True, sampler=sampler).ask()
      made = self.config_of(trial)
      try:
        # A warm-up that is too long for some values of other fields is an outcome of the trial.
        config_lib.check(ConfigDict(made.to_dict() | {'schedule': made.schedule.to_dict() | {'warmup_epochs': 0.0}}))
      except UsageError as error:
        raise UsageError(f'{self._path}: {error}') from error
      # A folder and a TFDS set may have a validation split of their own.
      validated |= made.data.validation > 0 or made.data.source != 'bundled'
      configs.append(_identity(made))
      self.distributions |= trial.distributions
    if not self.distributions:
      raise UsageError(f'{path} suggests nothing; suggest(trial, config) must call trial.suggest_float or similar.')
    if len(set(configs)) == 1 and not all(d.single() for d in self.distributions.values()):
      raise UsageError(
        f'{path} makes the same config from all suggestions; suggest(trial, config) must set fields of the config.'
      )
    if not validated:
      raise UsageError(NO_VALIDATION)
    self.distributions = dict(sorted(self.distributions.items()))
    self._fingerprint = hashlib.sha256(''.join(configs).encode()).hexdigest()

  def config_of(self, trial: optuna.trial.BaseTrial) -> ConfigDict:
    """Makes the config of a trial, which may turn out to be infeasible.

    Raises:
      UsageError: the space file fails, or asks for several seeds.
    """
    config = ConfigDict(self._config.to_dict()).lock()
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        self._suggest(trial, config)
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
      raise
    except (Exception, SystemExit) as error:
      raise self._blame(error) from error
    if config.seeds > 1:
      raise UsageError(
        f'{self._path} sets config.seeds to {config.seeds}, but a trial has one seed; remove it and use --seeds.'
      )
    return config

  def identity(self, params: Mapping[str, Any]) -> str:
    """The config that a trial with these parameters has, as text: equal texts are equal trainings."""
    return _identity(self.config_of(FixedTrial(dict(params))))

  def unseen(self, seen: Collection[str], seed: int) -> dict[str, Any] | None:
    """Parameters whose configuration is new.

    Args:
      seen: the configurations that are not new; see `identity`.
      seed: of the order of the search.

    Returns:
      The parameters; None if a search of the whole space, or of many random points of a large one, finds none.
    """
    for trial in self._points(seed):
      if _identity(self.config_of(trial)) not in seen:
        return trial.params
    return None

  def plan(self) -> dict[str, Any]:
    """Everything of the space that must stay the same during a study, by name; JSON."""
    space = {
      f'the space of {name}': optuna.distributions.distribution_to_json(d) for name, d in self.distributions.items()
    }
    return space | {'the checksum of the configs that the space makes': self._fingerprint}

  @functools.lru_cache(1)  # noqa: B019
  def grid(self, seed: int) -> list[dict[str, Any]]:
    """All points of the grid in random order, so that the first ones are an unbiased sample.

    Of points with equal configs one is used.

    Raises:
      UsageError: a parameter is continuous and not in the file's `GRID`, or `GRID` does not fit the space.
    """
    levels = [self._levels(name, distribution) for name, distribution in self.distributions.items()]
    every = [dict(zip(self.distributions, values, strict=True)) for values in itertools.product(*levels)]
    points = every
    if len(every) <= _MAX_POINTS:
      points = list({self.identity(point): point for point in reversed(every)}.values())[::-1]
    return [points[i] for i in np.random.default_rng(seed).permutation(len(points))]

  def sobol(self, seed: int, index: int) -> dict[str, Any]:
    """One point of a scrambled Sobol sequence."""
    from scipy.stats import qmc  # slow to import

    engine = qmc.Sobol(len(self.distributions), scramble=True, rng=np.random.default_rng(seed))
    if index:
      engine.fast_forward(index)
    point = engine.random(1)[0]
    return {name: _quantile(d, float(u)) for (name, d), u in zip(self.distributions.items(), point, strict=True)}

  def _points(self, seed: int) -> Iterator[optuna.trial.BaseTrial]:
    """The points of a small finite space in random order, or random points of another."""
    if math.prod(map(_num_values, self.distributions.values())) <= _MAX_POINTS:
      points = list(itertools.product(*map(_all_values, self.distributions.values())))
      for i in np.random.default_rng(seed).permutation(len(points)):
        yield FixedTrial(dict(zip(self.distributions, points[i], strict=True)))
    else:
      study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
      for _ in range(_MAX_DRAWS):
        yield study.ask()

  def _load(self) -> tuple[Callable, Mapping[str, Sequence[Any]]]:
    if not os.path.isfile(self._path):
      raise UsageError(
        f'there is no space file {self._path}; those that come with the project are in experiments/spaces/.'
      )
    try:
      names = runpy.run_path(self._path)
    except (Exception, SystemExit) as error:
      raise self._blame(error) from error
    if not callable(names.get('suggest')):
      raise UsageError(f'{self._path} defines no function suggest(trial, config); see experiments/spaces/.')
    return names['suggest'], names.get('GRID', {})

  def _levels(self, name: str, distribution: BaseDistribution) -> Sequence[Any]:
    unknown = set(self._grid) - set(self.distributions)
    if unknown:
      raise UsageError(
        f'{self._path}: GRID has {min(unknown)!r}, but the parameters of suggest() are {", ".join(self.distributions)}.'
      )
    if name in self._grid:
      for value in self._grid[name]:
        if not _allows(distribution, value):
          raise UsageError(
            f'{self._path}: {value!r} of GRID[{name!r}] is outside the range of suggest(): {distribution}.'
          )
      return self._grid[name]
    if math.isinf(_num_values(distribution)):
      raise UsageError(
        f'{self._path}: a grid needs values of {name}; add GRID = {{{name!r}: (...)}}, or a step to suggest_float.'
      )
    return _all_values(distribution)

  def _blame(self, error: BaseException) -> UsageError:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self._path]
    if isinstance(error, SyntaxError) and error.filename == self._path:
      lines = [error.lineno]
    where = f'{self._path}, line {lines[-1]}' if lines else self._path
    return UsageError(f'{where}: {type(error).__name__}: {error}')


def make_sampler(name: str, space: Space, seed: int, index: int, repeats: int = 0) -> optuna.samplers.BaseSampler:
  """Makes the sampler of one trial, seeded by the study's seed and the trial's index.

  Optuna does not store the state of a sampler. A sampler for the whole study would therefore restart from its seed when
  the study is resumed, and differ between processes. Here `random`, `grid` and `qmc` are functions of (seed, index).
  `tpe` and `cmaes` also depend on the trials that are complete at the moment of sampling.

  Args:
    name: tpe | random | grid | qmc | cmaes.
    space: the space to sample.
    seed: the study's seed.
    index: the number of the trial, from 0.
    repeats: how many proposals for this trial repeated an earlier one; each gives another seed.
  """
  own_seed = int(np.random.SeedSequence([seed, index, repeats] if repeats else [seed, index]).generate_state(1)[0])
  if name == 'tpe':
    return optuna.samplers.TPESampler(seed=own_seed)
  if name == 'cmaes':
    return optuna.samplers.CmaEsSampler(seed=own_seed, warn_independent_sampling=False)
  random = optuna.samplers.RandomSampler(seed=own_seed)
  if name == 'random' or repeats:
    return random
  point = space.grid(seed)[index] if name == 'grid' else space.sobol(seed, index)
  return optuna.samplers.PartialFixedSampler(point, random)


def make_pruner(name: str, epochs: int) -> optuna.pruners.BasePruner:
  """Makes a pruner.

  Args:
    name: median | hyperband | none.
    epochs: epochs per trial. The median pruner is inactive during the first quarter of them, while the learning rate
      warms up.
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


def _num_values(distribution: BaseDistribution) -> float:
  """The number of values of a distribution; infinite if it is continuous."""
  if isinstance(distribution, CategoricalDistribution):
    return len(distribution.choices)
  assert isinstance(distribution, IntDistribution | FloatDistribution)
  if distribution.step:
    return _num_steps(distribution)
  return 1 if distribution.single() else math.inf


def _all_values(distribution: BaseDistribution) -> Sequence[Any]:
  """The values of a distribution that is not continuous."""
  if isinstance(distribution, CategoricalDistribution):
    return distribution.choices
  assert isinstance(distribution, IntDistribution | FloatDistribution)
  return [_step(distribution, i) for i in range(_num_steps(distribution))] if distribution.step else [distribution.low]


def _identity(config: ConfigDict) -> str:
  return json.dumps(config.to_dict(), sort_keys=True, default=str)


class _Corner(optuna.samplers.RandomSampler):
  """Suggests the first (0) or the last (-1) value of every range."""

  def __init__(self, end: int):
    super().__init__(seed=0)
    self._end = end

  def sample_independent(self, study, trial, param_name, param_distribution):
    if isinstance(param_distribution, CategoricalDistribution):
      return param_distribution.choices[self._end]
    return param_distribution.high if self._end else param_distribution.low


def _quantile(distribution: BaseDistribution, u: float) -> Any:
  """The value of a distribution at the fraction 0 <= u < 1 of its range, on its own scale."""
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
