"""An Optuna study as a list of runs, each of which is finished exactly once, whichever processes die.

Counting trials and stopping at the last one makes too many trials if two workers count at the same time. Therefore the
runs of a study are fixed in advance, each with a name, and any number of processes on any number of machines claim them
one by one:

- Trials carry the name of their run. The trial of a run is the one with the lowest number that has not failed. The
  database assigns trial numbers under a lock, so a process that reads a trial also reads all trials before it, and all
  processes agree on the trial of a run.
- A run is claimed by moving its trial from WAITING to RUNNING, which the database allows one process to do.
- A trial that is interrupted FAILs, and its run gets a new trial with the same parameters, which continues in the same
  workdir. The process that looks for work next creates the new trial, rather than the one that failed the old trial, so
  that no step is lost if a process dies between the two.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

_RUN, _SUGGESTED, _REPEATS = 'run', 'suggested', 'repeats'  # user attributes of a trial


class Lost(Exception):
  """The trial was reassigned to another process, because this one missed its heartbeats."""


class Repeated(Exception):
  """The trial got the configuration of an earlier one; its run gets another trial."""


class Exhausted(Exception):
  """The space has no configuration left that no trial has."""


class Trials:
  """The runs of a study; see the module's docstring.

  Args:
    storage, study: from `open_storage` and `open_study`.
    runs: names of all runs, in the order in which they are claimed.
    alone: whether no other process uses this study, so that a RUNNING trial is one whose process died.
  """

  def __init__(self, storage: RDBStorage, study: optuna.Study, runs: Sequence[str], *, alone: bool):
    self.study, self.runs = study, list(runs)
    self._storage, self._id = storage, storage.get_study_id_from_name(study.study_name)
    trials = self._read()
    if alone:
      for trial in trials:
        if trial.state == TrialState.RUNNING:
          self.release(self._trial_id(trial.number))
    if not trials:
      for run in self.runs:  # all at once, so that the numbers of the trials are those of the runs
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
    """Claims the next free run.

    Returns:
      The run's name and the trial's id, which `open` accepts; None if all runs are claimed or finished.
    """
    while True:
      live = self.live()
      run = next((run for run in self.runs if run not in live or live[run].state == TrialState.WAITING), None)
      if run is None:
        return None
      if run not in live:
        self._add(run, max((t for t in self._read() if t.user_attrs.get(_RUN) == run), key=_number, default=None))
        continue  # another process may have added a trial as well; the lower number counts
      trial_id = self._trial_id(live[run].number)
      # The heartbeat comes first: a trial without any would stay RUNNING for ever if its process died now.
      self._storage.record_heartbeat(trial_id)
      with contextlib.suppress(UpdateFinishedTrialError):
        if self._storage.set_trial_state_values(trial_id, TrialState.RUNNING):
          return run, trial_id

  def open(
    self, trial_id: int, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner
  ) -> optuna.Trial:
    """Opens a claimed trial with a sampler and a pruner of its own."""
    study = optuna.load_study(storage=self._storage, study_name=self.study.study_name, sampler=sampler, pruner=pruner)
    study.get_trials(deepcopy=False)  # Optuna's cache must hold a trial before it is changed
    return optuna.Trial(study, trial_id)

  def beat(self, trial_ids: Sequence[int]) -> list[int]:
    """Records a heartbeat of this process's trials, and fails the trials of others that missed theirs.

    Returns:
      The ids among `trial_ids` that were reassigned to another process.
    """
    lost = [i for i in trial_ids if self._storage.get_trial(i).state != TrialState.RUNNING]
    for trial_id in set(trial_ids) - set(lost):
      self._storage.record_heartbeat(trial_id)
    optuna.storages.fail_stale_trials(self.study)
    return lost

  def suggested(self, trial: optuna.Trial) -> None:
    """Records that a trial has all its parameters: its run keeps them if the trial is interrupted.

    Raises:
      Lost: the trial was reassigned.
    """
    with _lost_if_finished():
      trial.set_user_attr(_SUGGESTED, True)

  def has_parameters(self) -> dict[str, FrozenTrial]:
    """The trial of each run that has all its parameters."""
    return {
      run: trial for run, trial in self.live().items() if trial.state.is_finished() or trial.user_attrs.get(_SUGGESTED)
    }

  def repeat(self, trial: optuna.Trial, earlier: str) -> None:
    """Fails a trial that repeats the configuration of an earlier run; see `num_repeats`.

    Raises:
      Repeated: always.
    """
    with contextlib.suppress(UpdateFinishedTrialError):
      trial.set_user_attr(_REPEATS, earlier)
    self.release(trial._trial_id)
    raise Repeated

  def num_repeats(self, run: str | None = None) -> int:
    """How many trials, of one run or of all, repeated an earlier configuration and were not trained."""
    return sum(
      _REPEATS in t.user_attrs and t.user_attrs.get(_RUN) in ([run] if run else self.runs) for t in self._read()
    )

  def drop_the_rest(self, trial_id: int) -> None:
    """Gives up a claimed run, and all others that nobody has claimed."""
    self.release(trial_id)
    kept = {run for run, t in self.live().items() if t.state != TrialState.WAITING or t.user_attrs.get(_SUGGESTED)}
    for trial in self._read():
      if trial.state == TrialState.WAITING and trial.user_attrs.get(_RUN) in set(self.runs) - kept:
        self.release(self._trial_id(trial.number))
    self.runs = [run for run in self.runs if run in kept]

  def report(self, trial: optuna.Trial, epoch: int, value: float) -> bool:
    """Reports an intermediate value; returns whether to prune.

    Raises:
      Lost: the trial was reassigned.
    """
    with _lost_if_finished():
      trial.report(value, epoch)
      return trial.should_prune()

  def finish(self, trial: optuna.Trial, value: float | None, attributes: Mapping[str, Any]) -> None:
    """Completes a trial, or prunes it if there is no value.

    Raises:
      Lost: the trial was reassigned.
    """
    with _lost_if_finished():
      for name, attribute in attributes.items():
        trial.set_user_attr(name, attribute)
      trial.study.tell(trial, value, TrialState.PRUNED if value is None else TrialState.COMPLETE)

  def release(self, trial_id: int) -> None:
    """Returns an unfinished run, so that it can be claimed again."""
    with contextlib.suppress(UpdateFinishedTrialError):
      self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

  def tidy(self) -> None:
    """Fails the waiting trials that nobody will claim: two processes had added one for the same run."""
    live = {trial.number for trial in self.live().values()}
    for trial in self._read():
      if trial.state == TrialState.WAITING and trial.number not in live and trial.user_attrs.get(_RUN) in self.runs:
        self.release(self._trial_id(trial.number))

  def _read(self) -> list[FrozenTrial]:
    return sorted(self._storage.get_all_trials(self._id, deepcopy=False), key=_number)

  def _trial_id(self, number: int) -> int:
    return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

  def _add(self, run: str, failed: FrozenTrial | None) -> None:
    """Adds a trial of a run, with the parameters and values of the one that failed."""
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
def _lost_if_finished() -> Iterator[None]:
  try:
    yield
  except UpdateFinishedTrialError as error:
    raise Lost from error
  except ValueError as error:
    if 'Cannot tell' in str(error):
      raise Lost from error
    raise


def _number(trial: FrozenTrial) -> int:
  return trial.number
