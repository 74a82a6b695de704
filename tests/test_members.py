"""Members of tar files: the same as Python's own reader finds, and one line for whatever else a file may hold."""

import os
import random
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax import UsageError
from cnn_jax.data import decode, members
from tests.datasets import make_tar

SECONDS = 2.0  # for any file of a few kilobytes
FORMATS = {'ustar': tarfile.USTAR_FORMAT, 'gnu': tarfile.GNU_FORMAT, 'pax': tarfile.PAX_FORMAT}


def _scan(path):
  return list(members.scan(str(path), lambda name: name.endswith('.cls')))


def _link(name, target):
  member = tarfile.TarInfo(name)
  member.type, member.linkname = tarfile.SYMTYPE, target
  return member


NAMES = st.one_of(
  st.text('abcü/.', min_size=1, max_size=12),
  st.text('x', min_size=90, max_size=300),
  st.builds('{}/{}.cls'.format, st.text('dir', min_size=1), st.text('xyz', min_size=1)),
)


@settings(max_examples=60, deadline=None)
@given(
  st.sampled_from(sorted(FORMATS)), st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=8), st.booleans()
)
def test_all_members_are_found_where_they_are(tmp_path_factory, form, files, linked):
  path = tmp_path_factory.mktemp('tar') / 'x.tar'
  files = [file for file in files if form != 'ustar' or len(file[0].encode()) <= 90]
  links = [(_link('a/link', 'y' * 150 if form != 'ustar' else 'y'), b'')] if linked else []
  make_tar(path, [*files, *links], format=FORMATS[form])
  found = _scan(path)
  with tarfile.open(path) as archive:
    expected = [member for member in archive if not member.isdir()]
    assert len(found) == len(expected) == len(files) + linked
    for member, other in zip(found, expected, strict=True):
      assert (
        member.name.split('/') == [part for part in other.name.split('/') if part not in ('', '.')] or not member.name
      )
      assert bool(member.problem) == (not other.isreg() or '..' in other.name.split('/'))
      if other.isreg():
        assert (member.offset, member.size) == (other.offset_data, other.size)
        contents = archive.extractfile(other).read()
        reader = members.Reader([str(path)], [decode.stamp(os.stat(path))])
        assert reader.read(0, member.offset, member.size) == contents
        if member.name.endswith('.cls') and not member.problem:
          assert member.contents == contents


def _mutate(whole, rng):
  """Changes some bytes, mostly of headers, moves, repeats or cuts off blocks; mends the checksums of some headers."""
  whole = bytearray(whole)
  for _ in range(rng.randint(1, 6)):
    start = rng.randrange(0, len(whole), 512)
    if rng.random() < 0.3:
      end = rng.randrange(start, len(whole) + 512, 512)
      whole[start:start] = whole[start:end]
    elif rng.random() < 0.2:
      del whole[start : start + 512 * rng.randint(1, 3)]
    else:
      field, size = rng.choice([(0, 100), (124, 12), (156, 1), (257, 8), (345, 155), (482, 1), (0, 512)])
      for _ in range(rng.randint(1, 4)):
        place = start + field + rng.randrange(size)
        if place < len(whole):
          whole[place] = rng.choice(b'\x00\x80\xff 0179xgLKS5\n=') if rng.random() < 0.8 else rng.randrange(256)
    header = whole[start : start + 512]
    if rng.random() < 0.8 and len(header) == 512:
      header[148:156] = b' ' * 8
      whole[start + 148 : start + 156] = b'%06o\0 ' % sum(header)
    whole = whole or bytearray(512)
  return bytes(whole[: rng.randrange(len(whole))] if rng.random() < 0.1 else whole)


def _check(path):
  """Scans a file and returns the number of its members, or the error."""
  start, size = time.monotonic(), os.path.getsize(path)
  try:
    found = _scan(path)
    for member in found:
      assert 0 < member.offset <= member.offset + member.size <= size
      assert member.problem or not {'..', '.', ''} & set(member.name.split('/')) or not member.name
    return len(found)
  except UsageError as error:
    text = str(error)
    assert str(path) in text and '\n' not in text and len(text) < 600
    return text
  finally:
    assert time.monotonic() - start < SECONDS


def _archives(folder):
  files = [('a/b.cls', b'3'), ('n' * 150 + '.jpg', b'x' * 700), ('ü.png', b'y' * 512), (_link('l.png', 'z' * 120), b'')]
  for name, form in FORMATS.items():
    kept = [file for file in files if form != tarfile.USTAR_FORMAT or (isinstance(file[0], str) and len(file[0]) < 90)]
    yield make_tar(folder / f'{name}.tar', kept, format=form).read_bytes()


@pytest.mark.parametrize('seed', range(10))
def test_a_mutated_file_is_read_or_one_line(tmp_path, seed):
  rng = random.Random(seed)
  outcomes = set()
  for whole in _archives(tmp_path):
    for _ in range(20):
      (tmp_path / 'mutated.tar').write_bytes(_mutate(whole, rng))
      outcomes.add(type(_check(tmp_path / 'mutated.tar')))
  assert outcomes == {int, str}  # both happen


@pytest.mark.faults
def test_many_mutated_files_are_read_or_one_line(tmp_path):
  rng = random.Random(99)
  for whole in _archives(tmp_path):
    for _ in range(1500):
      (tmp_path / 'mutated.tar').write_bytes(_mutate(whole, rng))
      _check(tmp_path / 'mutated.tar')


def _header(name=b'x', size=b'00000000000\0', kind=b'0', patches=()):
  block = bytearray(512)
  block[:100] = name.ljust(100, b'\0')
  block[124:136] = size
  block[156:157] = kind
  block[257:265] = b'ustar\x0000'
  for place, data in patches:
    block[place : place + len(data)] = data
  block[148:156] = b' ' * 8
  block[148:156] = b'%06o\0 ' % sum(block)
  return bytes(block)


def _octal(number):
  return b'%011o\0' % number


def _fields(*lines):
  """An extended header of POSIX with these contents, and a file after it."""
  contents = b''.join(lines)
  return (
    _header(kind=b'x', size=_octal(len(contents))) + contents.ljust(-(-len(contents) // 512) * 512, b'\0') + _header()
  )


@pytest.mark.parametrize(
  ('contents', 'outcome'),
  [
    (_header() * 3, 3),
    (_header(size=b'\xff' * 12), 'has no valid header at byte 0'),
    (_header(size=b'\x80' + b'\x7f' * 11), 'ends within its member'),
    (_header(size=_octal(2**33 - 1)), 'ends within its member'),
    (_header(kind=b'x') * 5000, 0),
    (_header(kind=b'L', size=_octal(512)) + b'y' * 512 + _header(), 1),
    (_header(kind=b'L', size=_octal(2**21)) + bytes(2**21), 'has no valid header at byte 0'),
    (_header(kind=b'S', patches=[(482, b'\x01')]) + b'\x01' * 512 * 9000, 'ends within its member'),
    (_header(kind=b'S', patches=[(482, b'\x01')]) + b'\x01' * 512 + bytes(512), 1),
    (_header(kind=b'7'), 1),
    (_header(kind=b'?'), 1),
    (_header(name=b'dir/', kind=b'\0'), 0),
    (_fields(b'9 path=a\n', b'10 size=0\n'), 1),
    (_fields(b'9 path=a'), 'has no valid header'),
    (_fields(b'99999999 path=a\n'), 'has no valid header'),
    (_fields(b'0 path=a\n'), 'has no valid header'),
    (_fields(b'-9 path=a\n'), 'has no valid header'),
    (_fields(b'nonsense'), 'has no valid header'),
    (_fields(b'11 size=-1\n'), 'has no valid header'),
    (_fields(b'29 size=9999999999999999999\n'), 'has no valid header'),
    (_fields(b'16 size=9999999\n'), "ends within its member 'x'"),
    (_fields(b'11 path=a\0b\n'), 'has no valid header'),
    (_fields(b'25 GNU.sparse.major=1\n\n\n'), 'has no valid header'),
    (_fields(b'22 GNU.sparse.major=1\n'), 1),
    (_header() + bytes(2**21), 1),
    (bytes(1024), 0),
    (b'\x89PNG\r\n\x1a\n' + bytes(600), 'is a damaged PNG file, not a tar file'),
    (b'BZh9' + bytes(600), 'is a bzip2 archive; decompress it'),
    (b'path,label\n' * 100, 'is a text file, not a tar file'),
  ],
)  # fmt: skip
def test_each_hostile_file_is_read_or_one_line(tmp_path, contents, outcome):
  (tmp_path / 'x.tar').write_bytes(contents)
  found = _check(tmp_path / 'x.tar')
  assert found == outcome if isinstance(outcome, int) else outcome in found


def test_a_huge_file_of_holes_takes_no_time(tmp_path):
  with open(tmp_path / 'x.tar', 'wb') as stream:
    stream.write(_header())
    stream.truncate(2**40)
  assert _check(tmp_path / 'x.tar') == 1
  with open(tmp_path / 'x.tar', 'wb') as stream:
    stream.write(_header(kind=b'x', size=_octal(2**30)))
    stream.truncate(2**40)
  assert 'has no valid header' in _check(tmp_path / 'x.tar')


def test_large_contents_are_not_read(tmp_path):
  make_tar(tmp_path / 'x.tar', [('a.cls', b'1' * (members.MAX_CONTENTS + 1)), ('b.cls', b'1' * members.MAX_CONTENTS)])
  assert [len(member.contents) for member in _scan(tmp_path / 'x.tar')] == [0, members.MAX_CONTENTS]


def test_a_file_that_changed_before_it_was_opened_is_noticed(tmp_path):
  reader = members.Reader([str(make_tar(tmp_path / 'x.tar', [('a', b'abc')]))], [(1, 2, 3, 4)])
  with pytest.raises(UsageError, match='has changed'):
    reader.read(0, 512, 3)
