"""How image files lie in a folder: DIR/CLASS/*, or DIR/SPLIT/CLASS/*. What is neither is refused; nothing is guessed.

A directory is a split if its name is that of one (`split_of`) and it holds directories of images. A directory that holds
images itself is a class. Images may lie at any depth below the directory of their class.
"""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence

from cnn_jax import UsageError
from cnn_jax.data import directories, labels, listing, paths
from cnn_jax.data.directories import Directories
from cnn_jax.data.listing import File, Passed, count, text
from cnn_jax.data.paths import Files

SPLITS = ('train', 'validation', 'test')
_EXTRA = '(?:set|data|dataset|images?|imgs?|pictures?|photos?|split|folder|dir)*'
_NAMES = re.compile(
  f'{_EXTRA}(?:(?P<train>train|training)|(?P<validation>val|valid|validation|validate|dev|development)|'
  f'(?P<test>test|testing|eval|evaluation)){_EXTRA}'
)
_RESEMBLES = re.compile(r'(?:^|[^a-z])(?:train|test|valid|eval|holdout|(?:val|dev)(?![a-z]))')
_RUN_FILES = frozenset({'.lock', 'config.json', 'metrics.jsonl', 'manifest.json', 'result.json'})


@dataclasses.dataclass
class Layout:
  """The image files of a folder.

  Attributes:
    class_names: sorted; see `listing.text`.
    parts: for `train`, and for each other split that the folder has, its images, sorted by class and path.
    problems: the entries that cannot be used.
    notes: a line about each kind of thing that is not used.
    promoted: whether the test images have no labels, and validation is the test split; see `splits.by_class`.
  """

  class_names: tuple[str, ...]
  parts: dict[str, Files]
  problems: list[File]
  notes: list[str]
  promoted: bool = False


@dataclasses.dataclass
class _Folder:
  """A directory: the images that lie directly in it, its sub-directories, and what was passed over.

  Of a directory of the second level, all images at any depth count as lying in it.
  """

  path: str
  files: Files = dataclasses.field(default_factory=lambda: paths.make([], []))
  folders: dict[str, '_Folder'] = dataclasses.field(default_factory=dict)
  passed: Passed = dataclasses.field(default_factory=Passed)

  def images(self) -> Files:
    """The images at any depth, sorted by path."""
    return directories.merge([self.files, *(folder.images() for folder in self.folders.values())])

  def holders(self) -> list[str]:
    """The names of the sub-directories that hold images at any depth."""
    return [name for name, folder in self.folders.items() if folder.kind != 'nowhere']

  @property
  def kind(self) -> str:
    """Where its images are: files | folders | both | nowhere."""
    if len(self.files):
      return 'both' if self.holders() else 'files'
    return 'folders' if self.holders() else 'nowhere'

  def total(self) -> Passed:
    """What was passed over at any depth."""
    total = Passed()
    for part in (self.passed, *(folder.total() for folder in self.folders.values())):
      total.add(part)
    return total


def read(root: str, *, skip: bool = False, listed: Directories | None = None) -> Layout:
  """Lists a folder of images and finds its splits and classes.

  Args:
    root: its path.
    skip: whether images that cannot be used are left out; otherwise they are an error.
    listed: lists its directories; None: without an index.

  Raises:
    UsageError: the layout is neither of the two, or could be both, a class is empty, or two class names look alike.
  """
  problems: list[File] = []
  top = _read_top(root, problems, listed or Directories(root))
  listing.check(problems, root, skip=skip)
  named = {name: split for name in top.folders if (split := split_of(name))}
  notes: list[str] = []
  if any(top.folders[name].kind in ('folders', 'both') for name in named) or (named and not top.holders()):
    classes = _read_splits(top, named, notes)
  else:
    classes = {'train': _read_classes(top, named)}
  _check_empty(classes)
  class_names = check_names(list(classes['train']), f'{root} has the classes')
  label_of = {name: label for label, name in enumerate(classes['train'])}
  if len(top.files):
    example = text(os.path.join(root, top.files.paths[0]))
    notes.append(f'Images that lie in no class directory and are not used: {len(top.files):,}, such as {example}.')
  unlabelled = any(split == 'test' and top.folders[name].kind == 'files' for name, split in named.items())
  return Layout(
    class_names,
    {
      split: paths.join([folder.images().labelled(label_of[name]) for name, folder in folders.items()])
      for split, folders in classes.items()
    },
    problems,
    [*notes, *top.total().notes()],
    promoted=unlabelled and 'test' in classes,
  )


def split_of(name: str) -> str:
  """The split that a name stands for, in any usual spelling; '' if it is none."""
  match = _NAMES.fullmatch(re.sub(r'[\W\d_]', '', name.casefold()))
  return (match.lastgroup or '') if match else ''


def check_names(names: Sequence[str], what: str) -> tuple[str, ...]:
  """Returns class names as text.

  Args:
    names: of directories.
    what: begins the message, such as 'DIR has the classes'.

  Raises:
    UsageError: two names differ by nothing but case, blanks or Unicode normalisation, or are the same whole number.
      Single characters may differ by case: they can be classes of characters.
  """
  found: dict[str, str] = {}
  for name in names:
    plain = fold(name)
    if plain in found:
      raise UsageError(
        f'{what} {found[plain]!a} and {name!a}, which look alike; move the images into one, or rename one.'
      )
    found[plain] = name
  return tuple(map(text, names))


def fold(name: str) -> str:
  """A class name without case, blanks around, differences of Unicode normalisation, and zeros that leave a whole number
  the same; see `check_names`. 1.1 and 1.10 stay apart, because they can be sections or versions."""
  plain = unicodedata.normalize('NFC', ' '.join(text(name).split()))
  if len(plain) == 1:
    return plain
  return labels.whole_number(plain) or unicodedata.normalize('NFC', plain.casefold())


def _read_top(root: str, problems: list[File], listed: Directories) -> _Folder:
  """Lists everything. Only directories of the first two levels are told apart: they are splits or classes."""
  top = _read_level(root, problems, listed)
  seen = dict.fromkeys(listing.surroundings(root), root)
  for folder in list(top.folders.values()):
    if _is_new(folder, top, seen, root):
      _fill(folder, _read_level(folder.path, problems, listed))
      _unwrap(folder, seen, problems, listed)
  for folder in top.folders.values():
    for inner in list(folder.folders.values()):
      _is_new(inner, folder, seen, root, folder.path)
  identities = set(seen)
  for folder in top.folders.values():
    for inner in folder.folders.values():
      inner.files = listed.collect(inner.path, inner.passed, problems, identities)
  listed.keep()
  return top


def _read_level(path: str, problems: list[File], listed: Directories) -> _Folder:
  folder = _Folder(path)
  folder.files, names = listed.scan(path, folder.passed, problems)
  folder.folders = {name: _Folder(os.path.join(path, name)) for name in names}
  return folder


def _fill(folder: _Folder, found: _Folder) -> None:
  folder.path, folder.files, folder.folders = found.path, found.files, found.folders
  folder.passed.add(found.passed)


def _unwrap(folder: _Folder, seen: dict[tuple[int, int], str], problems: list[File], listed: Directories) -> None:
  """Turns training_set/training_set/CLASS, as archives have it, into training_set/CLASS."""
  name = os.path.basename(folder.path)
  inner = folder.folders.get(name)
  alone = len(folder.folders) == 1 and not folder.files
  if inner and alone and split_of(name) and _is_new(inner, folder, seen, folder.path):
    _fill(folder, _read_level(inner.path, problems, listed))


def _is_new(folder: _Folder, parent: _Folder, seen: dict[tuple[int, int], str], *ancestors: str) -> bool:
  """Registers a directory; removes it from its parent if it is a link to an ancestor.

  Raises:
    UsageError: it is a directory that is listed already under another name.
  """
  identity = listing.identify(folder.path)
  other = seen.setdefault(identity, folder.path)
  if other == folder.path:
    return True
  if other not in ancestors:
    raise UsageError(f'{folder.path} and {other} are the same directory, through a link; remove one of them.')
  parent.passed.again.append(folder.path)
  del parent.folders[os.path.basename(folder.path)]
  return False


def _read_splits(top: _Folder, named: Mapping[str, str], notes: list[str]) -> dict[str, dict[str, _Folder]]:
  """The class directories of each split of DIR/SPLIT/CLASS/*."""
  of_split: dict[str, _Folder] = {}
  for name, split in named.items():
    if split in of_split:
      raise UsageError(
        f'{of_split[split].path} and {top.folders[name].path} are both the {split} split; merge them or remove one.'
      )
    of_split[split] = top.folders[name]
  if 'train' not in of_split:
    _refuse_without_train(next(iter(of_split.values())), top)
  for name, folder in top.folders.items():
    if name not in named and folder.kind != 'nowhere':
      raise UsageError(
        f'{folder.path} holds images, but its name is not that of a split (train, validation or test), as of '
        f'{of_split["train"].path}; rename it or move it elsewhere.'
      )
    if name not in named:
      notes.append(f'{text(folder.path)} holds no image; it is not used.')
  unlabelled = of_split.get('test')
  if unlabelled and unlabelled.kind == 'files':
    del of_split['test']
    if 'validation' in of_split:
      of_split['test'] = of_split.pop('validation')
    other = 'the test split is carved out of train'
    if 'test' in of_split:
      other = f'{text(of_split["test"].path)} is the test split'
    notes.append(
      f'{text(unlabelled.path)} holds {count(len(unlabelled.files), "image")} without labels, for python -m cnn_jax.predict; '
      f'{other}.'
    )
  for folder in of_split.values():
    if folder.kind == 'nowhere':
      raise UsageError(f'{folder.path} contains no image{_kinds(folder)}; add some or remove it.')
    if folder.kind == 'files':
      _refuse_unlabelled(folder)
    if folder.kind == 'both':
      raise UsageError(
        f'{folder.path} holds class directories, and {count(len(folder.files), "image")} in none of them, such as '
        f'{os.path.basename(folder.files.paths[0])!r}; move them into a class directory or elsewhere.'
      )
  classes = {split: _classes(of_split[split]) for split in SPLITS if split in of_split}
  if len(classes['train']) < 2:
    _refuse_few(of_split['train'], classes['train'])
  for split, folders in classes.items():
    for name in folders.keys() - classes['train'].keys():
      near = [known for known in classes['train'] if fold(known) == fold(name)]
      hint = f'rename it to {near[0]!a}, the name there' if near else 'add it there or remove it here'
      raise UsageError(
        f'{of_split[split].path} has a class {ascii(name) if near else repr(name)} that {of_split["train"].path} '
        f'lacks; {hint}.'
      )
  return classes


def _read_classes(top: _Folder, named: Mapping[str, str]) -> dict[str, _Folder]:
  """The class directories of DIR/CLASS/*."""
  classes = _classes(top)
  flat = [name for name in named if top.folders[name].kind == 'files']
  others = [name for name in top.holders() if name not in named]
  if flat and not others:
    _refuse_unlabelled(top.folders[min(flat, key=lambda name: named[name] != 'train')])
  for name, split in named.items():
    if split != 'train' and others:
      raise UsageError(
        f'{top.folders[name].path} has the name of a split but lies beside the class {others[0]!r}; move it elsewhere '
        '(evaluate and predict take any folder), or rename it if it is a class.'
      )
    if split != 'train':
      _refuse_without_train(top.folders[name], top)
  if len(classes) < 2:
    if len(top.files) and not classes:
      _refuse_unlabelled(top)
    _refuse_few(top, classes)
  _check_levels(top, classes)
  return classes


def _check_levels(top: _Folder, classes: Mapping[str, _Folder]) -> None:
  """Checks that directories that hold directories of images can only be classes."""
  deep = {name: folder for name, folder in classes.items() if folder.kind == 'folders'}
  for name, folder in deep.items():
    if all(map(split_of, folder.holders())):
      inner = folder.holders()[0]
      raise UsageError(f'{folder.path}/{inner} is a split below a class; make it {top.path}/{inner}/{name} instead.')
    if _RESEMBLES.search(re.sub('(?<=[a-z])(?=[A-Z])', '_', name).casefold()):
      raise UsageError(
        f'{folder.path} resembles a split and holds directories of images; name it train, validation or test if it is '
        'a split, or put the images directly into it if it is a class.'
      )
  kinds = {frozenset(folder.holders()) for folder in deep.values()}
  if len(deep) == len(classes) and len(kinds) == 1 and len(*kinds) > 1:
    first, second = list(deep.values())[:2]
    raise UsageError(
      f'{first.path} and {second.path} hold the same directories {listing.shorten(sorted(*kinds), 2)}, so either level '
      'could be the classes; name splits train, validation and test, or put the images of a class directly into its '
      'directory, or list them in a table, config.data.table.'
    )


def _classes(folder: _Folder) -> dict[str, _Folder]:
  """The class directories of a folder, sorted; directories of runs are not classes."""
  for name, inner in list(folder.folders.items()):
    if inner.kind == 'nowhere' and _holds_run(inner.path):
      folder.passed.junk.append(inner.path)
      del folder.folders[name]
  return dict(sorted(folder.folders.items()))


def _holds_run(path: str, depth: int = 3) -> bool:
  """Whether files that a run writes lie in a directory or not far below."""
  try:
    with os.scandir(path) as entries:
      found = list(entries)
    return any(entry.name in _RUN_FILES for entry in found) or (
      depth > 1 and any(entry.is_dir() and _holds_run(entry.path, depth - 1) for entry in found)
    )
  except OSError:
    return False


def _check_empty(classes: Mapping[str, Mapping[str, _Folder]]) -> None:
  empty = [folder for folders in classes.values() for folder in folders.values() if folder.kind == 'nowhere']
  if empty:
    some = listing.shorten([f'{folder.path}{_kinds(folder)}' for folder in empty])
    raise UsageError(f'a class directory contains no image: {some}; add images, or remove it if it is not a class.')


def _kinds(folder: _Folder) -> str:
  kinds = folder.total().kinds()
  return f' but files of other kinds ({kinds})' if kinds else ''


def _refuse_without_train(folder: _Folder, top: _Folder) -> None:
  raise UsageError(
    f'{folder.path} has the name of a split, but {top.path} has no train directory; add {os.path.join(top.path, "train")}.'
  )


def _refuse_few(folder: _Folder, classes: Mapping[str, _Folder]) -> None:
  """Raises the error of a folder with fewer than two classes."""
  hint = ''
  for name, inner in classes.items():
    if inner.kind == 'folders':
      hint = f'; if the classes are in there, give that directory as config.data.dir={folder.path}/{name}'
  found = f'only the directory {next(iter(classes))!r}' if classes else f'no directory{_kinds(folder)}'
  raise UsageError(
    f'{folder.path} has {found}; it needs one directory of images for each of at least two classes{hint}.'
  )


def _refuse_unlabelled(folder: _Folder) -> None:
  """Raises the error of images that are in no class directory; says how to give their labels in a table."""
  names = list(map(os.path.basename, folder.files.paths))
  begin = re.compile(r'([^\W\d_]{2,})[\W\d_]')
  words = {match[1] for name in names if (match := begin.match(name))}
  near = [folder.path] + ([os.path.dirname(folder.path)] if split_of(os.path.basename(folder.path)) else [])
  tables = [
    os.path.join(path, name) for path in near for name in _names(path) if name.lower().endswith(('.csv', '.parquet'))
  ]
  tables.sort(key=lambda path: not re.search('train|label', os.path.basename(path).lower()))
  if tables:
    way = f'if {tables[0]} gives the labels, use it: --config.data.table={tables[0]} --config.data.dir={folder.path}'
  elif 2 <= len(words) <= len(names) / 2:
    suffix = os.path.splitext(names[0])[1]
    way = (
      f'if file names begin with the class, as in {names[0]!r}, make a table: (echo path,label; ls {folder.path} | '
      rf"sed -nE 's/^([A-Za-z]+)[^A-Za-z].*\{suffix}$/&,\1/p') > labels.csv, then give --config.data.table=labels.csv "
      f'--config.data.dir={folder.path}'
    )
  else:
    way = 'make a directory for each class, or give the labels in a CSV file, config.data.table'
  raise UsageError(f'{folder.path} holds {count(len(names), "image")} and no class directories; {way}.')


def _names(path: str) -> list[str]:
  try:
    return sorted(os.listdir(path))
  except OSError:
    return []
