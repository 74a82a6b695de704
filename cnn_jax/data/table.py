"""Labels in a CSV or Parquet file: a path, a label and, if there is such a column, a split in each row."""

import collections
import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cnn_jax import UsageError, files
from cnn_jax.data import labels, layout, listing, parquet, paths
from cnn_jax.data.listing import File, Passed, text

_MAX_BYTES = 2**29
_DELIMITERS = ',;\t|'
# Usual names of the columns, in lower case without blanks and plurals. Of each kind, a name of an earlier group counts
# if several are there.
_COLUMNS = {
  'path': (
    ('path', 'file', 'filename', 'filepath', 'imagepath', 'imagefile', 'imagefilename', 'imgpath', 'relativepath'),
    ('image', 'img', 'picture', 'photo', 'imagename', 'imgname'),
    ('imageid', 'imgid', 'id', 'name'),
  ),
  'label': (
    ('label', 'classname', 'labelname', 'classlabel'),
    ('class', 'category', 'target', 'species', 'breed', 'diagnosis'),
    ('y',),
  ),
  'split': (('split', 'set', 'subset', 'partition', 'dataset'),),
}
# Words of names of other columns that state a split, and words beside the name of one: fold_id, is_test, train_or_val.
_SPLIT_WORDS = re.compile('(?:k|cv)?folds?|cv|splits?|subsets?|partitions?|holdout')
_BESIDE = re.compile('is|in|for|or|and|set|data|images?|rows?|samples?')


class Row(NamedTuple):
  """A row of a table: an image below `base`, its class, its split ('' if the table has none), and where it is, as 'line 2'."""

  path: str
  label: str
  split: str
  place: str


def read(path: str, base: str, *, skip: bool = False) -> layout.Layout:
  """Lists the images of a table.

  Args:
    path: of the file: Parquet, or CSV in UTF-8 with a header and columns separated by a comma, semicolon, tab or bar.
    base: the directory that paths are relative to. A path may lack its suffix or its directory if one file fits.
    skip: whether images that cannot be used are left out; otherwise they are an error.

  Raises:
    UsageError: the file is not such a table, files are missing, or rows contradict each other; names the first lines.
  """
  notes: list[str] = []
  rows = list(_parse(path, notes))
  unlabelled = [row for row in rows if not _has_label(row) and layout.split_of(row.split) == 'test']
  rows = [row for row in rows if _has_label(row) or layout.split_of(row.split) != 'test']
  bare = [row for row in rows if not _has_label(row)]
  places = [f'{row.place} ({row.label!r})' if row.label else row.place for row in bare]
  rename = ', or rename the class if it is one' if any(row.label for row in bare) else ''
  _check(path, 'have no label', places, f'give it or remove them{rename}')
  wrong = [f'{row.split!r} ({row.place})' for row in rows if row.split and not layout.split_of(row.split)]
  _check(path, 'have an unknown split', wrong, 'the splits are train, validation and test')
  if any(row.split for row in rows):
    _check(path, 'have no split', [row.place for row in rows if not row.split], 'give it to all or to none')
  if unlabelled:
    notes.append(
      f'{len(unlabelled):,} rows of {text(path)} are of the test split and have no label; they are not used.'
    )
  promoted = bool(unlabelled) and {layout.split_of(row.split) for row in rows} == {'train', 'validation'}
  found, problems = _find(path, base, rows)
  listing.check(problems, base, skip=skip)
  kept = _unique(path, rows, found, notes)
  names = sorted({row.label for row, _ in kept})
  class_names = layout.check_names(names, f'{path} has the classes')
  label_of = {name: label for label, name in enumerate(names)}
  parts: dict[str, list[tuple[int, File]]] = {'train': []}
  for row, file in kept:
    parts.setdefault(layout.split_of(row.split) or 'train', []).append((label_of[row.label], file))
  trained = {label for label, _ in parts['train']}
  missing = [name for name in names if label_of[name] not in trained]
  if missing or len(names) < 2:
    raise UsageError(
      f'{path} has no training image of the class {missing[0]!r}; add one, or remove the class.'
      if missing
      else f'{path} has {len(names)} classes; it needs at least two.'
    )
  if promoted:
    parts['test'] = parts.pop('validation')
  prefix = os.path.join(base, '')
  ordered = {split: _pack(sorted(parts[split]), prefix) for split in layout.SPLITS if split in parts}
  return layout.Layout(class_names, ordered, problems, notes, promoted)


def _pack(labelled: Sequence[tuple[int, File]], prefix: str) -> paths.Files:
  names = [file.path.removeprefix(prefix) for _, file in labelled]
  return paths.make(names, [file.stamp for _, file in labelled], [label for label, _ in labelled])


def _parse(path: str, notes: list[str]) -> Iterator[Row]:
  def choose(header: Sequence[str]) -> dict[str, int]:
    return _columns(path, header, notes)

  rows = parquet.read(path, choose) if parquet.is_parquet(path) else _read_csv(path, choose)
  for place, values in rows:
    if not values['path']:
      raise UsageError(f'{path} has no file name in {place}; correct that.')
    yield Row(values['path'], values['label'], values.get('split', ''), place)


def _has_label(row: Row) -> bool:
  return bool(row.label) and not labels.is_missing(row.label)


def _read_csv(path: str, choose: Callable[[Sequence[str]], dict[str, int]]) -> Iterator[tuple[str, dict[str, str]]]:
  """Yields the line and the cells of each row, by the kinds of the columns."""
  lines = _read(path)
  header = re.split('[\r\n]', lines, maxsplit=1)[0]
  delimiter = max(_DELIMITERS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
  reader = csv.reader(io.StringIO(lines, newline=''), delimiter=delimiter, skipinitialspace=True)
  try:
    columns = choose(next(reader, []))
    for cells in reader:
      if not any(map(str.strip, cells)):
        continue
      if len(cells) <= max(columns.values()):
        raise UsageError(f'{path} has {len(cells)} columns in line {reader.line_num}; correct that line.')
      yield f'line {reader.line_num}', {name: cells[column].strip() for name, column in columns.items()}
  except csv.Error as error:
    raise UsageError(f'{path} is not a CSV file (line {reader.line_num}: {error}); correct it.') from None


def _read(path: str) -> str:
  try:
    with files.open_regular(path) as file:
      contents = file.read(_MAX_BYTES + 1)
  except OSError as error:
    raise UsageError(
      f'cannot read {path}: {error.strerror}; give a CSV or Parquet file as config.data.table.'
    ) from None
  if len(contents) > _MAX_BYTES:
    raise UsageError(f'{path} has more than {_MAX_BYTES:,} bytes; give a smaller table.')
  try:
    lines = contents.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = contents.count(b'\n', 0, error.start) + 1
    raise UsageError(f'{path} is not UTF-8 (line {line}); save it as CSV with the encoding UTF-8.') from None
  if '\0' in lines:
    raise UsageError(f'{path} is not a CSV file; save it as CSV with the encoding UTF-8.')
  return lines


def _columns(path: str, header: Sequence[str], notes: list[str]) -> dict[str, int]:
  """The numbers of the columns `path`, `label` and, if there is one, `split`; notes the others."""
  plain = [re.sub(r'[\W_]', '', cell.lower()) for cell in header]
  chosen = {}
  for kind, groups in _COLUMNS.items():
    for group in groups:
      matching = [i for i, cell in enumerate(plain) if cell in group or (cell[-1:] == 's' and cell[:-1] in group)]
      if len(matching) > 1:
        raise UsageError(
          f'{path} has the columns {header[matching[0]]!r} and {header[matching[1]]!r}, either of which may be the '
          f'{kind}; rename one to {kind} and the other to something else.'
        )
      if matching:
        chosen[kind] = matching[0]
        break
  for kind in ('path', 'label'):
    if kind not in chosen:
      shown = listing.shorten([repr(cell[:40]) for cell in header], 10) or 'nothing'
      raise UsageError(
        f'{path} has no column for the {kind} in its header ({shown}); name the columns path, label and, if the '
        'splits are given, split.'
      )
  others = [cell for i, cell in enumerate(header) if i not in chosen.values()]
  for cell in others:
    if 'split' not in chosen and _resembles_split(cell):
      raise UsageError(
        f'{path} has the column {cell[:40]!r}, which may state the split; name it split and write train, validation or '
        'test into each row, or remove it.'
      )
  if others:
    shown = listing.shorten([repr(cell[:40]) for cell in others], 10)
    notes.append(f'Columns of {text(path)} that are not used: {shown}.')
  return chosen


def _resembles_split(name: str) -> bool:
  """Whether a column may state the split in another way: `is_valid` may also mean usable, and `is_train` leaves open
  whether the others are validation or test."""
  words = re.findall(r'[^\W\d_]+', re.sub('(?<=[a-z])(?=[A-Z])', '_', name).lower())
  stated = [word.removeprefix('is') for word in words if not _BESIDE.fullmatch(word)]
  return any(map(_SPLIT_WORDS.fullmatch, words)) or (bool(stated) and all(map(layout.split_of, stated)))


def _find(path: str, base: str, rows: Sequence[Row]) -> tuple[dict[str, File], list[File]]:
  """The file of each path of the rows, and the entries that cannot be used."""
  found: dict[str, File] = {}
  problems, missing = [], []
  index: dict[str, list[File]] | None = None
  for row in rows:
    if row.path in found:
      continue
    file = listing.look(os.path.join(base, os.path.normpath(row.path)))
    if file is None and '\\' in row.path:  # written on Windows
      file = listing.look(os.path.join(base, _plain(row.path)))
    if file is None:
      index = _index(base) if index is None else index
      fitting = index.get(_plain(row.path), [])
      if len(fitting) > 1:
        raise UsageError(
          f'{path} has {row.path!r} in {row.place}, which {fitting[0].path} and {fitting[1].path} fit; give the '
          'path with its directory and suffix, or set config.data.dir.'
        )
      file = fitting[0] if fitting else None
    if file is None:
      missing.append(f'{row.path!r} ({row.place})')
      continue
    found[row.path] = file
    if file.problem:
      problems.append(file)
  _check(path, f'name files that do not exist below {base}', missing, 'correct them, or set config.data.dir')
  return found, problems


def _index(base: str) -> dict[str, list[File]]:
  """The files below a directory by the ends of their paths, with and without suffix."""
  index: dict[str, list[File]] = collections.defaultdict(list)
  for file in listing.walk(base, Passed()):
    plain = _plain(os.path.relpath(file.path, base))
    ends = [plain]
    while '/' in ends[-1]:
      ends.append(ends[-1].partition('/')[2])
    for end in ends:
      index[end].append(file)
      index[os.path.splitext(end)[0]].append(file)
  return index


def _plain(path: str) -> str:
  return os.path.normpath(path.replace('\\', '/'))


def _unique(path: str, rows: Sequence[Row], found: dict[str, File], notes: list[str]) -> list[tuple[Row, File]]:
  """One row for each file; checks that the rows of a file agree."""
  first: dict[str, Row] = {}
  kept, contradictions, repeated = [], [], 0
  for row in rows:
    file = found[row.path]
    if file.problem:
      continue
    other = first.setdefault(file.path, row)
    if other is row:
      kept.append((row, file))
    elif (other.label, layout.split_of(other.split)) == (row.label, layout.split_of(row.split)):
      repeated += 1
    else:
      contradictions.append(f'{row.path!r} ({other.place} and {row.place})')
  _check(path, 'contradict an earlier row of the same file', contradictions, 'give each file one label and one split')
  if repeated:
    notes.append(f'{repeated:,} rows of {text(path)} repeat an earlier row; they are not used.')
  return kept


def _check(path: str, what: str, examples: list[str], remedy: str) -> None:
  if examples:
    raise UsageError(f'{len(examples):,} rows of {path} {what}: {listing.shorten(examples)}; {remedy}.')
