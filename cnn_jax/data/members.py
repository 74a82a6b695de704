"""The members of tar files: found once by their headers, then read at random by their offsets.

Anybody may have written the files. Nothing is extracted, and the name of a member is never a path on this machine.
"""

import functools
import os
import tarfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cnn_jax import UsageError, files
from cnn_jax.data import decode, kinds
from cnn_jax.data.opened import Opened

MAX_CONTENTS = 2**16  # bytes of a member that `scan` reads at once
_BLOCK = tarfile.BLOCKSIZE
_WINDOW = 4096  # bytes that are read at a time, which hold a few headers and small members
_MAX_EXTENSION = 2**20  # bytes of the extended headers of a member
_MAX_PADDING = 2**20  # bytes of zeros between joined archives
_COMPRESSED = ('a gzip archive', 'a bzip2 archive', 'an xz archive')
_WITHOUT_DATA = frozenset({
  tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
})  # fmt: skip
_KINDS = {
  tarfile.LNKTYPE: 'is a link, which is not followed',
  tarfile.SYMTYPE: 'is a link, which is not followed',
  tarfile.CHRTYPE: 'is a device, not a file',
  tarfile.BLKTYPE: 'is a device, not a file',
  tarfile.FIFOTYPE: 'is a pipe, not a file',
  tarfile.GNUTYPE_SPARSE: 'is stored with holes, as by tar --sparse',
}


class Member(NamedTuple):
  """A member of a tar file that is not a directory.

  Attributes:
    name: with '/' between its parts, without '.' and '/' at its beginning.
    offset, size: of its data, in bytes.
    problem: why it cannot be used, as the predicate of a sentence; '' if it can.
    contents: its data, if `scan` was asked for them.
  """

  name: str
  offset: int
  size: int
  problem: str
  contents: bytes


def scan(path: str, wants: Callable[[str], bool]) -> Iterator[Member]:
  """Yields the members of a tar file in their order; reads nothing but headers and what is wanted.

  POSIX, GNU and older archives are read, and several that were joined. A later reader finds the members by their offsets.

  Args:
    path: of the file.
    wants: whether the contents of the member of a name are read, if they have at most `MAX_CONTENTS` bytes.

  Raises:
    UsageError: the file cannot be read, is no tar file or a compressed one, is damaged, or ends within a member.
  """
  try:
    with files.open_regular(path) as stream:
      window = _Window(stream.fileno())
      size = os.fstat(stream.fileno()).st_size
      if not size:
        raise UsageError(f'{path} is empty; replace it or remove it.')
      yield from _members(window, size, path, wants)
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}; make it a readable tar file.') from error


class Reader:
  """Reads parts of files at random; it may be called in threads, and in other processes after pickling.

  Args:
    paths: of the files.
    stamps: from `decode.stamp` of each, when their parts were found.
  """

  def __init__(self, paths: Sequence[str], stamps: Sequence[tuple[int, ...]]):
    self._paths, self._stamps = paths, stamps
    self._files = Opened(functools.partial(_open, paths))

  def read(self, number: int, offset: int, size: int) -> bytes:
    """Returns `size` bytes of a file from an offset on.

    Args:
      number: of the file in `paths`.
      offset, size: in bytes.

    Raises:
      UsageError: the file cannot be read, or has changed since its parts were found.
    """
    path = self._paths[number]
    try:
      opened = self._files.get(number)
      # The time of change is left out: a new link to a file, or other permissions, change it too.
      size_now, modified, _, inode = decode.stamp(os.fstat(opened.descriptor))
      size_then, modified_then, _, inode_then = self._stamps[number]
      same = (size_now, modified, inode) == (size_then, modified_then, inode_then)
      found = _read(opened.descriptor, offset, size) if same else b''
    except OSError as error:
      raise UsageError(f'cannot read {path}: {error.strerror}; restore it and start the command again.') from error
    if not same or len(found) != size:
      raise UsageError(f'{path} has changed since the command started; start it again.')
    return found


class _Open:
  """An open file, closed when it is deleted."""

  def __init__(self, path: str):
    with files.open_regular(path) as stream:
      self.descriptor = os.dup(stream.fileno())
    weakref.finalize(self, os.close, self.descriptor)


def _open(paths: Sequence[str], number: int) -> _Open:
  return _Open(paths[number])


class _Window:
  """Reads pieces of a file, mostly from the last few kilobytes that were read."""

  def __init__(self, descriptor: int):
    self._descriptor, self._start, self._held = descriptor, 0, b''

  def read(self, start: int, size: int) -> bytes:
    """Returns `size` bytes from `start` on; fewer at the end of the file."""
    begin = start - self._start
    if not 0 <= begin <= len(self._held) - size:
      self._start, begin = start, 0
      self._held = _read(self._descriptor, start, max(size, _WINDOW))
    return self._held[begin : begin + size]


def _read(descriptor: int, start: int, size: int) -> bytes:
  """Returns `size` bytes from `start` on; fewer at the end of the file."""
  found = os.pread(descriptor, size, start)
  while len(found) < size and (more := os.pread(descriptor, size - len(found), start + len(found))):
    found += more
  return found


def _members(window: _Window, size: int, path: str, wants: Callable[[str], bool]) -> Iterator[Member]:
  position = 0
  extended: dict[str, str] = {}  # what extended headers state about the next member
  while (position := _skip_zeros(window, position, size)) < size:
    block = window.read(position, _BLOCK)
    if position and len(block) < _BLOCK:
      raise UsageError(f'{path} ends within a header; it was cut off, so copy or download it again.')
    header = _parse(block)
    if header is None:
      raise _refuse(window, path, position)
    start = position + _BLOCK
    if header.kind == tarfile.GNUTYPE_SPARSE:
      start = _skip_sparse(window, start, block[482])
    length = _length(header, extended, path, position)
    end = start + length
    if end > size:
      name = extended.get('path', header.name)
      raise UsageError(
        f'{path} ends within its member {name!r}: {max(size - start, 0):,} of {length:,} bytes are there; it was cut off, so '
        'copy or download it again.'
      )
    if header.kind in _EXTENSIONS:
      if length > _MAX_EXTENSION:
        raise _damaged(path, position)
      _EXTENSIONS[header.kind](extended, window.read(start, length), path, position)
    else:
      if header.kind != tarfile.DIRTYPE:
        yield _member(header, extended, start, length, window, wants)
      extended = {}
    position = end + -length % _BLOCK


class _Header(NamedTuple):
  """What a header states: the name, the type, as of `tarfile.REGTYPE`, and the bytes of data."""

  name: str
  kind: bytes
  size: int


def _parse(block: bytes) -> _Header | None:
  """Reads the fields of a header that matter, in a third of the time of `tarfile.TarInfo`; None if it is not valid."""
  size, checksum = _number(block[124:136]), _number(block[148:156])
  others = block[:148] + block[156:]
  computed = sum(others) + 8 * ord(' ')
  # Some old programs added signed characters.
  if size is None or (checksum != computed and checksum != computed - 256 * sum(byte > 127 for byte in others)):
    return None
  name, prefix, kind = block[:100].partition(b'\0')[0], block[345:500].partition(b'\0')[0], block[156:157]
  if kind == tarfile.AREGTYPE and name.endswith(b'/'):
    kind = tarfile.DIRTYPE
  if prefix and block[257:265] != tarfile.GNU_MAGIC:  # which has other fields there
    name = prefix + b'/' + name
  return _Header(name.decode('utf-8', 'surrogateescape'), kind, size)


def _number(field: bytes) -> int | None:
  """A number in octal digits, or, if it is large, in binary; None if it is negative or no number."""
  if field[:1] == b'\x80':
    return int.from_bytes(field[1:])
  digits = field.partition(b'\0')[0].strip(b' ')
  if digits.isdigit() and not digits.strip(b'01234567'):
    return int(digits, 8)
  return None if digits else 0


def _member(
  header: _Header,
  extended: dict[str, str],
  start: int,
  length: int,
  window: _Window,
  wants: Callable[[str], bool],
) -> Member:
  problem = _KINDS.get(header.kind, '')
  name = extended.get('GNU.sparse.name') or extended.get('path') or header.name
  if any(field.startswith('GNU.sparse.') for field in extended):
    problem = _KINDS[tarfile.GNUTYPE_SPARSE]
  parts = [part for part in name.split('/') if part not in ('', '.')]
  if '..' in parts:
    problem = "has '..' in its name"
  name = '/'.join(parts)
  wanted = not problem and length <= MAX_CONTENTS and wants(name)
  return Member(name, start, length, problem, window.read(start, length) if wanted else b'')


def _length(header: _Header, extended: dict[str, str], path: str, position: int) -> int:
  """The bytes of the data of a member. Links, directories and devices have none, whatever their size is."""
  length = header.size
  if header.kind in _WITHOUT_DATA:
    return 0
  if header.kind not in _EXTENSIONS and 'size' in extended:
    if not (extended['size'].isdecimal() and extended['size'].isascii() and len(extended['size']) < 20):
      raise _damaged(path, position)
    length = int(extended['size'])
  return length


def _skip_zeros(window: _Window, position: int, size: int) -> int:
  """The position of the next header; the size of the file if only zeros follow, or more of them than pad an archive."""
  first = position
  while position < size and not window.read(position, _BLOCK).strip(b'\0'):
    position += _BLOCK
    if position - first > _MAX_PADDING:
      return size
  return position


def _skip_sparse(window: _Window, start: int, more: int) -> int:
  """Where the data of a member with holes begin, after the blocks that list the holes."""
  while more:
    block = window.read(start, _BLOCK)
    start += _BLOCK
    more = block[504] if len(block) == _BLOCK else 0
  return start


def _take_name(extended: dict[str, str], contents: bytes, path: str, position: int) -> None:
  extended['path'] = contents.split(b'\0')[0].decode('utf-8', 'surrogateescape')


def _take_fields(extended: dict[str, str], contents: bytes, path: str, position: int) -> None:
  """Reads an extended header of POSIX: lines 'LENGTH FIELD=VALUE', where LENGTH counts the whole line."""
  while contents.strip(b'\0'):
    digits, _, _ = contents[:10].partition(b' ')
    length = int(digits) if digits.isdigit() else 0
    field, separator, value = contents[len(digits) + 1 : length - 1].partition(b'=')
    if not separator or length > len(contents) or contents[length - 1 : length] != b'\n' or b'\0' in field:
      raise _damaged(path, position)
    name = field.decode('utf-8', 'surrogateescape')
    if name in ('path', 'size') or name.startswith('GNU.sparse.'):
      if b'\0' in value:
        raise _damaged(path, position)
      extended[name] = value.decode('utf-8', 'surrogateescape')
    contents = contents[length:]


def _pass_over(extended: dict[str, str], contents: bytes, path: str, position: int) -> None:
  """Ignores the target of a link, and what is stated about all members, which is a comment in practice."""


_EXTENSIONS: dict[bytes, Callable[[dict[str, str], bytes, str, int], None]] = {
  tarfile.GNUTYPE_LONGNAME: _take_name,
  tarfile.GNUTYPE_LONGLINK: _pass_over,
  tarfile.XHDTYPE: _take_fields,
  tarfile.SOLARIS_XHDTYPE: _take_fields,
  tarfile.XGLTYPE: _pass_over,
}


def _refuse(window: _Window, path: str, position: int) -> UsageError:
  """The error of a block that is no header."""
  kind = kinds.describe(window.read(0, kinds.BYTES))
  if position or kind == 'a tar archive':
    return _damaged(path, position)
  if kind in _COMPRESSED:
    return UsageError(f'{path} is {kind}; decompress it: members of a compressed tar file cannot be read at random.')
  return UsageError(f'{path} is {kind or "something else"}, not a tar file; replace it or remove it.')


def _damaged(path: str, position: int) -> UsageError:
  return UsageError(f'{path} is damaged: it has no valid header at byte {position:,}; copy or download it again.')
