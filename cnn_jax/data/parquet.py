"""Rows of a Parquet file as text, as if they were those of a CSV file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cnn_jax import UsageError, files

_MAGIC = b'PAR1'
_MAX_ROWS = 2**24
_MAX_CHARACTERS = 2**17  # of a cell, as in a CSV file
_BATCH = 2**14  # rows that are read at a time


def is_parquet(path: str) -> bool:
  """Whether a file is meant to be Parquet, by its suffix or its first bytes."""
  if path.lower().endswith(('.parquet', '.pq')):
    return True
  try:
    with files.open_regular(path) as stream:
      return stream.read(len(_MAGIC)) == _MAGIC
  except OSError:
    return False


def read(path: str, choose: Callable[[Sequence[str]], Mapping[str, int]]) -> Iterator[tuple[str, dict[str, str]]]:
  """Yields the rows of a Parquet file.

  Args:
    path: of the file.
    choose: maps the names of the columns to the numbers of those to read, by kind.

  Yields:
    The place, as 'row 1', and the cells by kind. An empty cell is ''. A whole number in a column of floats, as of tables
    that lack some values, has no decimals.

  Raises:
    UsageError: the file is no Parquet file or damaged, or a column does not hold text or numbers; and what `choose` raises.
  """
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise UsageError(f'{path} cannot be read ({error}); run: pip install pyarrow, or save it as CSV.') from None
  try:
    with files.open_regular(path) as stream:
      table = pyarrow.parquet.ParquetFile(stream)
      if table.metadata.num_rows > _MAX_ROWS:
        raise UsageError(f'{path} has more than {_MAX_ROWS:,} rows; give a smaller table.')
      columns = choose(table.schema_arrow.names)
      names = {kind: table.schema_arrow.names[number] for kind, number in columns.items()}
      for name in names.values():
        _check_type(path, name, table.schema_arrow.field(name).type)
      number = 0
      for batch in table.iter_batches(_BATCH, columns=list(names.values()), use_threads=False):
        batch.validate(full=True)
        cells = {kind: batch.column(name).to_pylist() for kind, name in names.items()}
        for values in zip(*cells.values(), strict=True):
          number += 1
          place = f'row {number}'
          yield place, {kind: _text(path, place, value) for kind, value in zip(cells, values, strict=True)}
  except UsageError:
    raise
  except Exception as error:  # whatever pyarrow raises for a damaged file
    if isinstance(error, OSError) and error.errno:
      advice = 'give a CSV or Parquet file as config.data.table'
      raise UsageError(f'cannot read {path}: {error.strerror}; {advice}.') from None
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise UsageError(f'{path} is not a readable Parquet file ({reason}); write it again.') from error


def _check_type(path: str, name: str, kind: Any) -> None:
  from pyarrow import types

  plain = kind.value_type if types.is_dictionary(kind) else kind
  text = types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)
  if not (text or types.is_integer(plain) or types.is_floating(plain) or types.is_boolean(plain)):
    raise UsageError(
      f'{path} holds {str(kind)[:80]} in its column {name[:80]!r}; write text or whole numbers, such as the paths of '
      'image files.'
    )


def _text(path: str, place: str, value: Any) -> str:
  if value is None or value != value:
    return ''
  if isinstance(value, float):
    if not value.is_integer():
      raise UsageError(f'{path} has {value} in {place}; write text or whole numbers.')
    value = int(value)
  text = str(value).strip()
  if len(text) > _MAX_CHARACTERS:
    raise UsageError(f'{path} has more than {_MAX_CHARACTERS:,} characters in {place}; correct that.')
  return text
