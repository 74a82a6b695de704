"""An Optuna study as a list of runs, each of which is finished exactly once, whoever dies meanwhile.

Counting trials and stopping at the last one overshoots as soon as two workers count at the same
time. So the runs of a study are fixed beforehand, each by its name, and any number of
processes on any number of machines take them one by one:

- Trials carry the name of their run. The trial of a run is the one with the lowest number that has
  not failed. Trial numbers are given out under a lock of the database, so whoever sees a
  trial sees all those before it, and all agree which one counts.
- To take a run is to move its trial from WAITING to RUNNING, which the database lets one process do.
- A trial that was interrupted FAILs, and its run gets a new trial with the same parameters, which goes on in
  the same workdir. That is done by whoever looks for work next, not in the moment of failing, so it
  cannot be forgotten by a process that dies in between.
"""

import contextlib
import importlib.util
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from cnn_jax import UsageError

_RUN, _SUGGESTED = 'run', 'suggested'  # user attributes of a trial


class Lost(Exception):
  """The trial was given to another process, which had heard nothing of this one for too long."""


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
  """Turns what a storage raises into one line.

  Raises:
    UsageError: it cannot be reached or used; names it, without its password.
  """
  try:
    yield
  except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
    cause: Any = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    reason = str(getattr(cause, 'orig', None) or cause).strip().splitlines()
    raise UsageError(
      f'cannot use the storage {_shown(url)}: {reason[0] if reason else type(cause).__name__}; '
      'start it or mend --storage, and the same command goes on.'
    ) from error


def open_storage(url: str, heartbeat: int) -> RDBStorage:
  """Opens a database, and makes its tables where they are missing.

  Args:
    url: of a database, as SQLAlchemy has it.
    heartbeat: seconds between two signs of life; a trial without any for three times as long has failed.

  Raises:
    UsageError: there is no such database, or no driver for it.
  """
  with storage_errors(url):
    parsed = sqlalchemy.engine.make_url(url)
    if parsed.drivername == 'postgresql':
      # SQLAlchemy's own choice between the two depends on its version.
      found = [driver for driver in ('psycopg', 'psycopg2') if importlib.util.find_spec(driver)]
      parsed = parsed.set(drivername=f'postgresql+{found[0]}' if found else 'postgresql')
    options: dict[str, Any] = {'pool_pre_ping': True}
    if parsed.get_backend_name() == 'postgresql':
      # The kernel's own limits are minutes.
      options['connect_args'] = {'connect_timeout': 5, 'keepalives_idle': 10, 'tcp_user_timeout': 20_000}
    elif parsed.get_backend_name() == 'sqlite':
      options['connect_args'] = {'timeout': 60}
    try:
      storage = _make_storage(parsed, options, heartbeat)
    except ImportError as error:
      raise UsageError(f"no driver for the storage {_shown(url)} is installed; pip install '.[sweep]'.") from error
    if parsed.get_backend_name() == 'sqlite':
      _serialize(storage.engine)
    return storage


def open_study(storage: RDBStorage, name: str, plan: Mapping[str, Any]) -> optuna.Study:
  """Opens a study, or makes it.

  Args:
    storage: to keep it.
    name: of the study.
    plan: what must not change while the study lasts, by name; JSON.

  Raises:
    UsageError: the study began with another plan; names the first thing that changed.
  """
  plan = json.loads(json.dumps(plan))
  try:
    study = optuna.create_study(storage=storage, study_name=name, direction='maximize')
    study.set_user_attr('plan', plan)
    return study
  except DuplicatedStudyError:
    study = optuna.load_study(storage=storage, study_name=name)
  for _ in range(20):  # who made it may not have written its plan yet
    if 'plan' in study.user_attrs:
      break
    time.sleep(0.1)
  else:
    study.set_user_attr('plan', plan)
  begun = study.user_attrs['plan']
  for field in [*plan, *begun]:
    if plan.get(field) != begun.get(field):
      raise UsageError(
        f'{field} is {plan.get(field, "missing")}, but the study {name!r} began with {begun.get(field, "none")}; '
        'put that back, or take another --study and --workdir.'
      )
  return study


class Trials:
  """The runs of a study; see the module's docstring.

  Args:
    storage, study: from `open_storage` and `open_study`.
    runs: names of the runs that there must be, in the order in which to take them.
    alone: no other process uses this study, so what is RUNNING now was left by one that died.
  """

  def __init__(self, storage: RDBStorage, study: optuna.Study, runs: Sequence[str], *, alone: bool):
    self.study, self.runs = study, list(runs)
    self._storage, self._id = storage, storage.get_study_id_from_name(study.study_name)
    trials = self._read()
    if alone:
      for trial in trials:
        if trial.state == TrialState.RUNNING:
          self._fail(self._trial_id(trial.number))
    if not trials:
      for run in self.runs:  # all at once, so that trial numbers are those of the runs
        self._add(run, None)

  def live(self) -> dict[str, FrozenTrial]:
    """The trial of each run that has one."""
    live: dict[str, FrozenTrial] = {}
    for trial in self._read():
      if trial.state != TrialState.FAIL:
        live.setdefault(trial.user_attrs.get(_RUN, ''), trial)
    return {run: live[run] for run in self.runs if run in live}

  def finished(self) -> dict[str, FrozenTrial]:
    """The trial of each run that is complete or pruned."""
    return {run: trial for run, trial in self.live().items() if trial.state.is_finished()}

  def claim(self) -> tuple[str, int] | None:
    """Takes the next run that nobody has.

    Returns:
      The run's name and the trial's id, to be opened with `open`; None where all are taken or finished.
    """
    while True:
      live = self.live()
      run = next((run for run in self.runs if run not in live or live[run].state == TrialState.WAITING), None)
      if run is None:
        return None
      if run not in live:
        self._add(run, max((t for t in self._read() if t.user_attrs.get(_RUN) == run), key=_number, default=None))
        continue  # another process may have done the same; the lower number counts
      trial_id = self._trial_id(live[run].number)
      # First the sign of life: a trial that had none before its process died would stay RUNNING for ever.
      self._storage.record_heartbeat(trial_id)
      with contextlib.suppress(UpdateFinishedTrialError):
        if self._storage.set_trial_state_values(trial_id, TrialState.RUNNING):
          return run, trial_id

  def open(
    self, trial_id: int, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner
  ) -> optuna.Trial:
    """A trial that was claimed, with a sampler and a pruner of its own."""
    study = optuna.load_study(storage=self._storage, study_name=self.study.study_name, sampler=sampler, pruner=pruner)
    study.get_trials(deepcopy=False)  # the cache wants to know of a trial before it is changed
    return optuna.Trial(study, trial_id)

  def beat(self, trial_ids: Sequence[int]) -> list[int]:
    """Gives a sign of life of one's own trials, and fails those of others that have given none for too long.

    Returns:
      Ids of own trials that are another process's now.
    """
    lost = [i for i in trial_ids if self._storage.get_trial(i).state != TrialState.RUNNING]
    for trial_id in set(trial_ids) - set(lost):
      self._storage.record_heartbeat(trial_id)
    optuna.storages.fail_stale_trials(self.study)
    return lost

  def suggested(self, trial: optuna.Trial) -> None:
    """Notes that all parameters of a trial are there: when it is interrupted, its run keeps them."""
    with _own():
      trial.set_user_attr(_SUGGESTED, True)

  def report(self, trial: optuna.Trial, epoch: int, value: float) -> bool:
    """Reports an intermediate value; returns whether to prune.

    Raises:
      Lost: see there.
    """
    with _own():
      trial.report(value, epoch)
      return trial.should_prune()

  def finish(self, trial: optuna.Trial, value: float | None, attributes: Mapping[str, Any]) -> None:
    """Completes a trial, or, without a value, prunes it.

    Raises:
      Lost: see there.
    """
    with _own():
      for name, attribute in attributes.items():
        trial.set_user_attr(name, attribute)
      trial.study.tell(trial, value, TrialState.PRUNED if value is None else TrialState.COMPLETE)

  def release(self, trial_id: int) -> None:
    """Gives a run back that was not finished."""
    self._fail(trial_id)

  def tidy(self) -> None:
    """Fails the trials that wait for nothing: two processes had made one for the same run."""
    live = {trial.number for trial in self.live().values()}
    for trial in self._read():
      if trial.state == TrialState.WAITING and trial.number not in live and trial.user_attrs.get(_RUN) in self.runs:
        self._fail(self._trial_id(trial.number))

  def _read(self) -> list[FrozenTrial]:
    return sorted(self._storage.get_all_trials(self._id, deepcopy=False), key=_number)

  def _trial_id(self, number: int) -> int:
    return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

  def _fail(self, trial_id: int) -> None:
    with contextlib.suppress(UpdateFinishedTrialError):
      self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

  def _add(self, run: str, failed: FrozenTrial | None) -> None:
    """Adds a trial of a run, with all that is known of the one that failed."""
    new = optuna.create_trial(state=TrialState.WAITING, user_attrs={_RUN: run})
    if failed is not None and failed.user_attrs.get(_SUGGESTED):
      new = optuna.create_trial(
        state=TrialState.WAITING,
        params=failed.params,
        distributions=failed.distributions,
        user_attrs=failed.user_attrs,
        system_attrs=failed.system_attrs,
        intermediate_values=failed.intermediate_values,
      )
    self.study.add_trial(new)


@contextlib.contextmanager
def _own() -> Iterator[None]:
  try:
    yield
  except UpdateFinishedTrialError as error:
    raise Lost from error
  except ValueError as error:
    if 'Cannot tell' in str(error):
      raise Lost from error
    raise


def _make_storage(url: sqlalchemy.URL, options: Mapping[str, Any], heartbeat: int) -> RDBStorage:
  for attempt in range(10):
    try:
      return RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs=dict(options),
        heartbeat_interval=heartbeat,
        grace_period=3 * heartbeat,
      )
    except sqlalchemy.exc.DBAPIError as error:
      # Optuna makes tables that it has found missing. So may another process, in between.
      if attempt == 9 or not any(said in str(error.orig) for said in ('already exists', 'duplicate key', 'UNIQUE')):
        raise
      time.sleep(0.2)
  raise AssertionError


def _number(trial: FrozenTrial) -> int:
  return trial.number


def _serialize(engine: sqlalchemy.Engine) -> None:
  """Lets SQLite's transactions run one after another.

  Python's driver begins a transaction at the first write only. Two processes could both read that
  a trial waits, and both take it.
  """
  engine.dispose()

  @sqlalchemy.event.listens_for(engine, 'connect')
  def _(connection, record):
    connection.isolation_level = None

  @sqlalchemy.event.listens_for(engine, 'begin')
  def _(connection):
    connection.exec_driver_sql('BEGIN IMMEDIATE')


def _shown(url: str) -> str:
  try:
    return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
  except sqlalchemy.exc.ArgumentError:
    return url
