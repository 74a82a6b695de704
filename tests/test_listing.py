"""The listing of a folder: which files, in which order, and what is passed over or refused."""

import errno
import inspect
import os
import sys

import pytest

from cnn_jax import UsageError
from cnn_jax.data import listing
from cnn_jax.data.listing import Passed


def _touch(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def _walk(root, passed=None):
  return [os.path.relpath(file.path, root) for file in listing.walk(str(root), passed or Passed())]


def test_images_are_listed_in_the_order_of_their_names(tmp_path):
  _touch(tmp_path, 'b/2.png', 'b/10.PNG', 'b/c/x.jpg', 'a.png', 'z.png', '.hidden/x.png', '.x.png', 'e/n.txt')
  (tmp_path / 'linked.png').symlink_to(tmp_path / 'a.png')
  assert _walk(tmp_path) == ['a.png', 'b/10.PNG', 'b/2.png', 'b/c/x.jpg', 'linked.png', 'z.png']


def test_a_file_has_the_size_and_the_stamp_of_what_a_link_leads_to(tmp_path):
  (tmp_path / 'a.png').write_bytes(b'12345')
  (tmp_path / 'b.png').symlink_to('a.png')
  one, other = listing.walk(str(tmp_path), Passed())
  assert one.size == other.size == 5
  assert one.stamp == other.stamp != ()
  assert listing.look(str(tmp_path / 'b.png')) == other


def test_entries_that_cannot_be_used_are_listed_with_the_reason(tmp_path):
  (tmp_path / 'lost.png').symlink_to('missing')
  (tmp_path / 'class').symlink_to('missing')  # was it a folder?
  (tmp_path / 'self.png').symlink_to('self.png')
  (tmp_path / 'zero.png').symlink_to('/dev/zero')
  (tmp_path / 'notes.txt').symlink_to('missing')
  os.mkfifo(tmp_path / 'pipe.png')
  passed = Passed()
  found = {os.path.basename(file.path): file.problem for file in listing.walk(str(tmp_path), passed)}
  assert found == {
    'lost.png': 'is a link to something that does not exist',
    'class': 'is a link to something that does not exist',
    'self.png': 'cannot be read: Too many levels of symbolic links',
    'zero.png': 'is a device, not a file',
    'pipe.png': 'is a pipe, not a file',
  }
  assert passed.suffixes == {'.txt': 1}


def test_links_to_folders_are_followed_and_no_folder_is_listed_twice(tmp_path):
  _touch(tmp_path, 'all/a/1.png', 'elsewhere/2.png', 'elsewhere/deep/3.png')
  (tmp_path / 'all' / 'up').symlink_to('..')
  (tmp_path / 'all' / 'a' / 'self').symlink_to('.')
  (tmp_path / 'all' / 'b').symlink_to('../elsewhere')
  (tmp_path / 'all' / 'c').symlink_to('../elsewhere')
  (tmp_path / 'elsewhere' / 'back').symlink_to('../all')
  passed = Passed()
  listed = {os.path.realpath(path) for path in map(str, tmp_path.rglob('*.png'))}
  found = [file.path for file in listing.walk(str(tmp_path / 'all'), passed)]
  assert len(found) == len(listed) == 3
  assert {os.path.realpath(path) for path in found} == listed
  assert len(passed.again) == 4


def test_folders_of_links_to_each_other_take_no_longer_than_their_number(tmp_path):
  for one in range(12):
    _touch(tmp_path, f'{one}/x.png')
    for other in range(12):
      (tmp_path / str(one) / f'to{other}').symlink_to(f'../{other}')
  passed = Passed()
  assert len(_walk(tmp_path, passed)) == 12
  assert len(passed.again) == 144


def test_what_is_passed_over_is_counted(tmp_path):
  _touch(tmp_path, 'a.heic', 'b.HEIC', 'c.xml', 'README', 'Thumbs.db', 'x/desktop.ini', '.DS_Store', 'ok.png')
  _touch(tmp_path, '__MACOSX/._ok.png', 'x/@eaDir/ok.png/thumb.jpg', 'LOST+FOUND/1.png')
  passed = Passed()
  assert _walk(tmp_path, passed) == ['ok.png']
  assert passed.suffixes == {'.heic': 2, '.xml': 1, '': 1}
  assert passed.kinds() == '2 .heic, 1 .xml, 1 without a suffix'
  first, second = passed.notes()
  assert '2 .heic' in first
  assert '__MACOSX' in second
  assert '@eaDir' in second
  assert Passed().notes() == []


def test_a_folder_that_cannot_be_listed_is_listed_with_the_reason(tmp_path, monkeypatch):
  _touch(tmp_path, 'a/1.png', 'b/1.png')
  real = os.scandir

  def refuse(path):
    if str(path).endswith('a'):
      raise PermissionError(errno.EACCES, 'Permission denied', path)
    return real(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  first, second = listing.walk(str(tmp_path), Passed())
  assert first.problem == 'cannot be listed: Permission denied'
  assert second.path.endswith('b/1.png')


def test_anything_but_a_folder_with_images_is_expanded_to_itself(tmp_path):
  (tmp_path / 'empty' / 'deeper').mkdir(parents=True)
  for path in (tmp_path / 'missing', tmp_path / 'file.txt', tmp_path / 'empty'):
    assert list(listing.expand(str(path), Passed())) == [str(path)]
  _touch(tmp_path, 'empty/deeper/x.png')
  assert list(listing.expand(str(tmp_path / 'empty'), Passed())) == [str(tmp_path / 'empty/deeper/x.png')]


def test_a_folder_is_listed_only_when_it_is_reached(tmp_path):
  _touch(tmp_path, 'a/1.png', 'b/1.png')
  walked = listing.expand(str(tmp_path), Passed())
  assert next(walked) == str(tmp_path / 'a/1.png')
  _touch(tmp_path, 'b/0.png')
  assert next(walked) == str(tmp_path / 'b/0.png')


def test_a_walk_goes_deeper_than_python_calls(tmp_path):
  deep = '/'.join(['d'] * 100)
  _touch(tmp_path, f'{deep}/x.png')
  limit = sys.getrecursionlimit()
  sys.setrecursionlimit(len(inspect.stack(0)) + 60)
  try:
    found = _walk(tmp_path)
  finally:
    sys.setrecursionlimit(limit)
  assert found == [f'{deep}/x.png']


def test_names_that_are_not_utf8_become_text(tmp_path):
  (tmp_path / os.fsdecode(b'caf\xe9.png')).touch()
  ((file),) = listing.walk(str(tmp_path), Passed())
  assert os.path.exists(file.path)
  name = os.path.basename(file.path)
  assert listing.text(name) == 'caf\\xe9.png'
  assert listing.text('naïve 日本') == 'naïve 日本'
  assert listing.shorten([name] * 7, 2) == 'caf\\xe9.png, caf\\xe9.png and 5 more'


def test_all_problems_are_named_at_once():
  many = [listing.File(f'/d/{i:02}.png', problem='is a pipe, not a file') for i in range(25)]
  with pytest.raises(UsageError, match=r'^/d/00\.png is a pipe, not a file; correct that or remove it\.$'):
    listing.check(many[:1], '/d', skip=False)
  with pytest.raises(UsageError, match=r'25 entries of /d cannot be used: 00.png is .*19.png is a pipe.* and 5 more'):
    listing.check(many, '/d', skip=False)
  listing.check(many, '/d', skip=True)
  with pytest.raises(UsageError, match=r'^/d/cat cannot be listed: Permission denied; correct'):
    listing.check([*many, listing.File('/d/cat', problem='cannot be listed: Permission denied')], '/d', skip=True)
