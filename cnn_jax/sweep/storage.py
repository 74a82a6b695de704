"""The database of a study: opening it, with errors of one line, and the plan that a study must keep."""

import contextlib
import importlib.util
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import RDBStorage

from cnn_jax import UsageError, passwords

SECONDS_TO_ANSWER = 30.0  # that a database on another machine has for one transaction


def file_url(path: str | os.PathLike) -> str:
  """The URL of an SQLite file.

  Raises:
    UsageError: SQLite cannot open the file, because its path is not Unicode.
  """
  try:
    os.fspath(path).encode()
  except UnicodeEncodeError as error:
    raise UsageError(f'the path {os.fspath(path)!r} is not UTF-8; use another --workdir.') from error
  return sqlalchemy.URL.create('sqlite', database=str(Path(path).resolve())).render_as_string()


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
  """Turns the exceptions of a storage into one line.

  Raises:
    UsageError: the storage cannot be reached or used; the message names it, without its password.
  """
  try:
    yield
  except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
    cause: Any = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    reason = str(getattr(cause, 'orig', None) or cause).strip().splitlines()
    raise UsageError(
      f'cannot use the storage {passwords.mask(url)}: {reason[0] if reason else type(cause).__name__}; '
      'start it or correct --storage, then the same command continues.'
    ) from error


def open_storage(url: str, heartbeat: int) -> RDBStorage:
  """Opens a database, and creates its tables if they are missing.

  Args:
    url: of a database, in the form of SQLAlchemy.
    heartbeat: seconds between two heartbeats; a trial without any for three times as long has failed.

  Raises:
    UsageError: there is no such database, or no driver for it.
  """
  with storage_errors(url):
    try:
      parsed = sqlalchemy.engine.make_url(url)
    except ValueError as error:  # of the number of the port
      raise UsageError(
        f'the storage {passwords.mask(url)} is not a URL of a database: {error}; correct --storage.'
      ) from error
    if parsed.drivername == 'postgresql':
      # The default driver of SQLAlchemy depends on its version.
      found = [driver for driver in ('psycopg', 'psycopg2') if importlib.util.find_spec(driver)]
      parsed = parsed.set(drivername=f'postgresql+{found[0]}' if found else 'postgresql')
    options: dict[str, Any] = {}
    deadline = _Deadline()
    if parsed.get_backend_name() == 'postgresql':
      options['pool_events'] = deadline.pool_events
      # The kernel's own limits are minutes.
      options['connect_args'] = {'connect_timeout': 5, 'keepalives_idle': 10, 'tcp_user_timeout': 20_000}
    elif parsed.get_backend_name() == 'sqlite':
      options['connect_args'] = {'timeout': 60}
    else:
      options['pool_pre_ping'] = True
    try:
      storage = _create(parsed, options, heartbeat)
    except ImportError as error:
      raise UsageError(
        f"no driver for the storage {passwords.mask(url)} is installed; pip install '.[sweep]'."
      ) from error
    if parsed.get_backend_name() == 'sqlite':
      _serialize(storage.engine)
    elif parsed.get_backend_name() == 'postgresql':
      deadline.explain(storage.engine)
    return storage


def open_study(storage: RDBStorage, name: str, plan: Mapping[str, Any]) -> optuna.Study:
  """Opens a study, or creates it.

  Args:
    storage: holds the study.
    name: of the study.
    plan: everything that must stay the same during the study, by name; JSON.

  Raises:
    UsageError: the study began with another plan; the message names the first difference.
  """
  plan = json.loads(json.dumps(plan))
  try:
    study = optuna.create_study(storage=storage, study_name=name, direction='maximize')
    study.set_user_attr('plan', plan)
    return study
  except DuplicatedStudyError:
    study = optuna.load_study(storage=storage, study_name=name)
  for _ in range(20):  # the process that created the study may not have written the plan yet
    if 'plan' in study.user_attrs:
      break
    time.sleep(0.1)
  else:
    study.set_user_attr('plan', plan)
  first = study.user_attrs['plan']
  for field in [*plan, *first]:
    if plan.get(field) != first.get(field):
      raise UsageError(
        f'{field} is {plan.get(field, "missing")}, but the study {name!r} began with {first.get(field, "none")}; '
        'change it back, or use another --study and --workdir.'
      )
  return study


def _create(url: sqlalchemy.URL, options: Mapping[str, Any], heartbeat: int) -> RDBStorage:
  for attempt in range(10):
    try:
      return RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs=dict(options),
        heartbeat_interval=heartbeat,
        grace_period=3 * heartbeat,
      )
    except sqlalchemy.exc.DBAPIError as error:
      # Optuna creates the tables that it found missing. Another process may have created them in between.
      if attempt == 9 or not any(text in str(error.orig) for text in ('already exists', 'duplicate key', 'UNIQUE')):
        raise
      time.sleep(0.2)
  raise AssertionError


class _Deadline:
  """Cuts the connection of a transaction that takes too long, so that the call which waits for it fails.

  The limits of the driver and of the kernel end with the handshake: a server that is stopped, or a proxy that forwards
  nothing, still acknowledges what it is sent. The drivers have no limit for an answer.
  """

  def __init__(self) -> None:
    self.pool_events = [(self._begin, 'checkout'), (self._end, 'checkin')]
    self._engine: sqlalchemy.Engine | None = None
    self._exceeded = False

  def explain(self, engine: sqlalchemy.Engine) -> None:
    """Tests connections before use, and names the cause in the exceptions of calls that were cut."""
    self._engine = engine
    sqlalchemy.event.listen(engine, 'handle_error', self._name_cause)

  def _begin(self, connection: Any, record: Any, _: Any) -> None:
    record.info['timer'] = timer = threading.Timer(SECONDS_TO_ANSWER, self._cut, [connection])
    timer.daemon = True
    timer.start()
    try:
      if self._engine is not None:
        self._engine.dialect.do_ping(connection)
    except Exception as error:  # of the driver: the connection was lost while it was not in use
      timer.cancel()
      raise sqlalchemy.exc.DisconnectionError from error  # the pool tries a new connection

  def _end(self, _: Any, record: Any) -> None:
    if 'timer' in record.info:
      record.info.pop('timer').cancel()

  def _cut(self, connection: Any) -> None:
    self._exceeded = True
    with contextlib.suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as copy:
      copy.shutdown(socket.SHUT_RDWR)

  def _name_cause(self, context: Any) -> None:
    if self._exceeded:
      raise sqlalchemy.exc.TimeoutError(f'no answer for {SECONDS_TO_ANSWER:.0f} s') from context.original_exception


def _serialize(engine: sqlalchemy.Engine) -> None:
  """Makes the transactions of SQLite run one after another.

  Python's driver begins a transaction at the first write only. Two processes could both read that a trial is waiting,
  and both claim it.
  """
  engine.dispose()

  @sqlalchemy.event.listens_for(engine, 'connect')
  def _(connection, record):
    connection.isolation_level = None

  @sqlalchemy.event.listens_for(engine, 'begin')
  def _(connection):
    connection.exec_driver_sql('BEGIN IMMEDIATE')
