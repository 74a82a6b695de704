"""Images in tar files: splits, classes, and one line for each set of tar files that cannot be used."""

import io
import json
import os
import tarfile

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from cnn_jax import UsageError
from cnn_jax.data import identity, load_dataset, members, opened
from tests.datasets import contents, make_tar, png, set_of_names, settings

pytestmark = pytest.mark.usefixtures('offline')


def _members(first=0, count=20, label=lambda i: str(i % 2), kind='cls'):
  """Images of the levels `first`, ... and their labels."""
  for i in range(first, first + count):
    yield f'{i:04}.png', png(i)
    yield f'{i:04}.{kind}', label(i).encode()


def _load(root, **fields):
  return load_dataset(settings('tar', dir=str(root), **fields))


@pytest.mark.parametrize(
  'names',
  [
    ('train-000000.tar', 'val-000000.tar', 'test-000000.tar'),
    ('imagenet-train-000123.tar', 'imagenet_validation_1.tar', 'imagenet1k-test.tar'),
    ('train/000.tar', 'dev/000.tar', 'test/000.tar'),
    ('a/Training/x/0.tar', 'valid_0.tar', 'eval.0.tar'),
  ],
)
def test_the_names_of_the_files_give_the_splits(tmp_path, names):
  for number, name in enumerate(names):
    make_tar(tmp_path / 'set' / name, _members(50 * number))
  dataset = _load(tmp_path / 'set')
  assert dataset.class_names == ('0', '1')
  for number, split in enumerate((dataset.train, dataset.validation, dataset.test)):
    assert split.images[:, 0, 0, 0].tolist() == list(range(50 * number, 50 * number + 20))
    assert (split.labels == split.images[:, 0, 0, 0] % 2).all()
    assert split.names[3] == f'{names[number]}/{50 * number + 3:04}.png'
    assert split.sizes[3] == len(png(50 * number + 3))
  assert 'carved' not in dataset.provenance


def test_files_without_a_split_are_train_and_the_rest_is_carved_of_each_class(tmp_path):
  for number in range(2):
    make_tar(tmp_path / f'{number}.tar', _members(50 * number))
  dataset = _load(tmp_path)
  assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [32, 4, 4]
  assert np.bincount(dataset.test.labels).tolist() == [2, 2]
  assert len(set_of_names(dataset)) == 40
  assert 'test and validation carved out of train by class and a hash of the name' in dataset.provenance


@pytest.mark.parametrize(
  ('kind', 'label', 'class_names'),
  [
    ('cls', lambda i: f'{10 - i % 2}\n', ('9', '10')),
    ('cls', lambda i: ('dog', 'cat')[i % 2], ('cat', 'dog')),
    ('txt', lambda i: ('dog', 'cat')[i % 2], ('cat', 'dog')),
    ('json', lambda i: json.dumps({'label': 10 - i % 2, 'width': 4}), ('9', '10')),
    ('json', lambda i: json.dumps({'class': ('dog', 'cat')[i % 2]}), ('cat', 'dog')),
    ('CLS', lambda i: ('dog', 'cat')[i % 2], ('cat', 'dog')),
  ],
)
def test_labels_are_numbers_or_names_in_members_of_several_kinds(tmp_path, kind, label, class_names):
  make_tar(tmp_path / 'x.tar', _members(label=label, kind=kind))
  dataset = _load(tmp_path)
  assert dataset.class_names == class_names
  assert (dataset.train.labels == 1 - dataset.train.images[:, 0, 0, 0] % 2).all()


@pytest.mark.parametrize('name', ['classes.txt', 'classnames.txt'])
@pytest.mark.parametrize('label', [lambda i: str(i % 2), lambda i: ('wolf', 'ant')[i % 2]])
def test_a_file_of_classes_gives_their_order(tmp_path, name, label):
  make_tar(tmp_path / 'x.tar', _members(label=label))
  (tmp_path / name).write_text('wolf\nant\n\nbee\n')
  dataset = _load(tmp_path)
  assert dataset.class_names == ('wolf', 'ant', 'bee')
  assert (dataset.train.labels == dataset.train.images[:, 0, 0, 0] % 2).all()
  assert any('Classes without a train image: bee' in note for note in dataset.notes)
  (tmp_path / name).write_text('ant\nwolf\n')  # another order: the index is stale
  assert _load(tmp_path).class_names == ('ant', 'wolf')


@pytest.mark.parametrize('folder', ['{}', './{}', 'pets/{}', '/srv/pets/{}', 'pets/train/{}', '{}/deep/er'])
def test_without_labels_the_directories_are_the_classes(tmp_path, folder):
  names = [f'{folder.format(("cat", "dog")[i % 2])}/my.{i}.png' for i in range(20)]
  make_tar(tmp_path / 'train.tar', [(name, png(i)) for i, name in enumerate(names)] + [('README.txt', b'pets')])
  dataset = _load(tmp_path)
  assert dataset.class_names == ('cat', 'dog')
  assert (dataset.train.labels == dataset.train.images[:, 0, 0, 0] % 2).all()
  assert any('suffix is not that of an image: 1 .txt' in note for note in dataset.notes)


def test_other_fields_of_a_key_are_passed_over(tmp_path):
  more = [(f'{i:04}.{suffix}', png(200)) for i in range(20) for suffix in ('mask.png', 'npy')]
  junk = [('._0000.png', b'junk'), ('__MACOSX/0000.png', b'junk'), ('a/.hidden/x.png', b'junk')]
  make_tar(tmp_path / 'x.tar', [*_members(), *more, *junk])
  dataset = _load(tmp_path)
  assert len(set_of_names(dataset)) == 20
  assert any('20 .mask.png' in note and '20 .npy' in note for note in dataset.notes)


@pytest.mark.parametrize('splits', [('train', 'test'), ('train', 'val', 'test')])
def test_images_without_labels_are_no_test_split(tmp_path, splits):
  for number, split in enumerate(splits):
    kept = [member for member in _members(50 * number) if split != 'test' or member[0].endswith('.png')]
    make_tar(tmp_path / f'{split}.tar', kept)
  for _ in range(2):  # from the index too
    dataset = _load(tmp_path)
    assert any('20 images of the test split have no label' in note for note in dataset.notes)
    promoted = 'the official validation split is the test split' in dataset.provenance
    if len(splits) == 3:
      assert promoted and dataset.test.images[:, 0, 0, 0].tolist() == list(range(50, 70))
      assert 'validation carved out of train' in dataset.provenance
      assert len(dataset.validation) == 2
    else:
      assert not promoted and len(dataset.test) == 2


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_forms_of_tar_and_long_names_are_read(tmp_path, form):
  folder = 'x' * 90 + '/' + 'y' * 60 if form == tarfile.USTAR_FORMAT else 'ü' * 120 + '/' + 'z' * 120
  make_tar(tmp_path / 'x.tar', [(f'{folder}/{name}', data) for name, data in _members()], format=form)
  dataset = _load(tmp_path)
  assert all(name.startswith(f'x.tar/{folder}/') for name in set_of_names(dataset))
  assert len(set_of_names(dataset)) == 20


def test_joined_archives_are_read_to_the_end(tmp_path):
  one, two = (make_tar(tmp_path / name, _members(first)).read_bytes() for name, first in (('1', 0), ('2', 50)))
  (tmp_path / 'x.tar').write_bytes(one + two)
  assert len(set_of_names(_load(tmp_path))) == 40


def _link(name, kind=tarfile.SYMTYPE, target='/etc/passwd'):
  member = tarfile.TarInfo(name)
  member.type, member.linkname = kind, target
  return member


def _sparse(name):
  member = tarfile.TarInfo(name)
  member.pax_headers = {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0'}
  return member


BAD = [
  ('link.png', _link('link.png'), 'is a link'),
  ('hard.png', _link('hard.png', tarfile.LNKTYPE, '0000.png'), 'is a link'),
  ('dev.png', _link('dev.png', tarfile.CHRTYPE), 'is a device'),
  ('pipe.png', _link('pipe.png', tarfile.FIFOTYPE), 'is a pipe'),
  ('holes.png', _sparse('holes.png'), 'is stored with holes'),
  ('up.png', tarfile.TarInfo('a/../../up.png'), "has '..' in its name"),
]


@pytest.mark.parametrize(('name', 'member', 'reason'), BAD)
def test_members_that_cannot_be_used_are_named_or_left_out(tmp_path, name, member, reason):
  make_tar(tmp_path / 'x.tar', [*_members(), (member, png())])
  with pytest.raises(UsageError, match=f'x.tar/.*{name} {reason}') as error:
    _load(tmp_path)
  assert '\n' not in str(error.value)
  dataset = _load(tmp_path, on_bad_image='skip')
  assert len(set_of_names(dataset)) == 20
  assert [(path.endswith(name), said.startswith(reason)) for path, said in dataset.skipped] == [(True, True)]
  assert sorted(os.listdir(tmp_path)) == ['cache', 'x.tar']


def _cut(count):
  return lambda path: path.write_bytes(path.read_bytes()[:count])


def _patch(position, data):
  def patch(path):
    whole = bytearray(path.read_bytes())
    whole[position : position + len(data)] = data
    path.write_bytes(whole)

  return patch


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    (_cut(0), 'x.tar is empty'),
    (_cut(560), "ends within its member '0000.png': 48 of .. bytes are there; it was cut off"),
    (_cut(1024 + 200), 'ends within a header; it was cut off'),
    (_cut(100), 'is something else, not a tar file|is damaged'),
    (_patch(1024, b'\x80'), 'is damaged: it has no valid header at byte 1,024'),
    (_patch(0, b'\x1f\x8b\x08\x00'), 'is a gzip archive; decompress it'),
    (_patch(0, b'PK\x03\x04'), 'is a zip archive, not a tar file'),
    (lambda path: os.rename(path, path.with_suffix('.tar.gz')), 'x.tar.gz is compressed; decompress it'),
    (lambda path: os.rename(path, path.with_suffix('.tgz')), 'x.tgz is compressed; decompress it'),
    (os.remove, 'has no tar file'),
    (lambda path: (os.remove(path), os.mkfifo(path)), 'x.tar is a pipe, not a file'),
    (lambda path: (os.remove(path), os.symlink('/nowhere', path)), 'is a link to something that does not exist'),
    (lambda path: os.rename(path, path.with_name('val.tar')), 'of the split validation, but none of train'),
    (lambda path: os.rename(path, path.with_name('train-val.tar')), 'may be of the split train or validation'),
    (lambda path: os.rename(path, path.with_name('imagenettrain.tar')), r"may be of a split by its name \('imagenett"),
    (lambda path: make_tar(path.with_name('test.tar'), []), 'is of the test split by its name, and the name of .*x.tar'),
    (lambda path: (path.parent / 'classes.txt').write_text('a\n'), 'must hold the names of two or more classes'),
    (lambda path: (path.parent / 'classes.txt').write_bytes(b'\xff\n'), 'is not UTF-8'),
    (lambda path: (path.parent / 'classes.txt').write_text('a\na\n'), 'none twice'),
    (lambda path: (path.parent / 'classes.txt').write_text('1\n0\n'), 'may be indices into its file of classes or na'),
    (lambda path: [(path.parent / n).write_text('a\nb') for n in ('classes.txt', 'classnames.txt')], 'may both name'),
    (lambda path: make_tar(path, _members(label=lambda i: ('cat', '7')[i % 2])), None),
    (lambda path: make_tar(path, [*_members(), ('0000.png', png())]), "holds '0000.png' twice"),
    (lambda path: make_tar(path, [*_members(), ('0000.jpg', png())]), "two images of one key, '0000.png' and '0000.jpg'"),
    (lambda path: make_tar(path, [*_members(), ('x.png', png())]), '1 images of .* have no label, such as x.tar/x.png'),
    (lambda path: make_tar(path, [*_members(), ('x.png', png()), ('x.cls', b'\xff')]), '1 label .*x.cls is not UTF-8;'),
    (lambda path: make_tar(path, [*_members(), ('x.png', png()), ('x.cls', b'-1')]), '1 label .*x.cls holds -1; a la'),
    (lambda path: make_tar(path, _members(kind='json', label=lambda i: '{}')), '0000.json holds no object with label, cl'),
    (lambda path: make_tar(path, [(f'{i}.png', png(i)) for i in range(9)]), 'have 0 classes; they need from 2'),
    (lambda path: make_tar(path, _members(label=lambda i: '9' * 400)), r"have 1 classes \('9{40}'\); they need from 2"),
    (lambda path: make_tar(path, _members(label=lambda i: ('1', '1.0')[i % 2])), "'1' and '1.0', which look alike"),
    (lambda path: make_tar(path, _members(label=lambda i: 'cat')), 'have 1 classes'),
    (lambda path: make_tar(path, _members(label=lambda i: ('cat', 'Cat')[i % 2])), 'which look alike'),
    (lambda path: make_tar(path, [('a.mp4', b'x')]), 'hold no image but files of other kinds .1 .mp4.|but 1 .mp4'),
    (lambda path: make_tar(path, [(f'{s}/{c}/{s}{c}.png', png()) for s in ('train', 'test') for c in 'ab']), 'named as s'),
    (lambda path: make_tar(path, [(f'{c}/{i}.png', png() if i else b'') for c in 'ab' for i in range(9)]), '2 of 18 images .* is empty'),
  ],
)  # fmt: skip
def test_each_unusable_set_is_one_clear_error(tmp_path, change, reason):
  change(make_tar(tmp_path / 'set' / 'x.tar', _members()))
  if reason is None:
    _load(tmp_path / 'set')
    return
  with pytest.raises(UsageError, match=reason) as error:
    _load(tmp_path / 'set')
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 1000


def test_a_huge_image_is_not_read(tmp_path):
  path = make_tar(tmp_path / 'x.tar', [*_members(), ('huge.png', b''), ('last.cls', b'1')])
  whole = bytearray(path.read_bytes())
  start = whole.index(b'huge.png')
  whole[start + 124 : start + 136] = b'\x80' + (2**40).to_bytes(11)
  whole[start + 148 : start + 156] = b' ' * 8
  whole[start + 148 : start + 156] = b'%06o\0 ' % sum(whole[start : start + 512])
  path.write_bytes(whole)
  os.truncate(path, 2**41)
  with pytest.raises(UsageError, match=r'x.tar/huge.png has more than 1,073,741,824 bytes; correct that or remove it'):
    _load(tmp_path)


def test_a_directory_is_needed(tmp_path):
  for directory in ('', str(tmp_path / 'none'), str(make_tar(tmp_path / 'x.tar', _members()))):
    with pytest.raises(UsageError, match='not a directory'):
      _load(directory)
  with pytest.raises(UsageError, match=r"config.data.table is set, but config.data.source is 'tar'"):
    _load(tmp_path, table='labels.csv')


def test_the_index_is_made_once(tmp_path, monkeypatch):
  path = make_tar(tmp_path / 'x.tar', _members())
  calls = []
  scan = members.scan
  monkeypatch.setattr(members, 'scan', lambda *a: (calls.append(1), scan(*a))[1])
  first = _load(tmp_path)
  again = _load(tmp_path)
  assert calls == [1]
  assert identity.identify(again) == identity.identify(first)
  make_tar(path, _members(label=lambda i: str((i + 1) % 2)))
  assert (_load(tmp_path).train.labels != first.train.labels).all()
  assert calls == [1, 1]


@pytest.mark.parametrize('decode_one_by_one', [False, True])
def test_a_file_that_changes_is_noticed_while_it_is_read(tmp_path, decode_one_by_one):
  path = make_tar(tmp_path / 'x.tar', _members())
  images = _load(tmp_path, resident='never', channels=1).train.images
  copy = cloudpickle.loads(cloudpickle.dumps(images))  # as it travels to another process
  assert (copy[:] == images[:]).all()
  os.link(path, tmp_path / 'other')  # changes no contents
  assert (images[:] == copy[:]).all()
  os.utime(path, ns=(0, 0))
  with pytest.raises(UsageError, match='x.tar has changed since the command started; start it again'):
    images.read(np.arange(2)) if decode_one_by_one else images[:2]
  os.remove(path)
  with pytest.raises(UsageError, match=r'x.tar: No such file'):
    cloudpickle.loads(cloudpickle.dumps(images))[0]


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(opened, 'MAX_OPEN', 3)
  for number in range(12):
    make_tar(tmp_path / f'{number}.tar', _members(10 * number, 10))
  before = len(os.listdir('/proc/self/fd'))
  dataset = _load(tmp_path, resident='never', channels=1)
  order = np.random.default_rng(0).permutation(np.tile(np.arange(len(dataset.train)), 5))
  found = dataset.train.images[order]  # in threads
  assert len(os.listdir('/proc/self/fd')) <= before + 3
  levels = [int(name.split('/')[1].split('.')[0]) for name in dataset.train.names]
  assert found[:, 0, 0, 0].tolist() == [levels[i] for i in order]


def test_the_same_picture_in_two_splits_is_noted(tmp_path):
  def picture(i):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16), np.uint8)).save(stream, 'PNG')
    return stream.getvalue()

  for split, first in (('train', 0), ('test', 19)):
    make_tar(tmp_path / f'{split}.tar', [(f'{"ab"[i % 2]}/{i}.png', picture(i)) for i in range(first, first + 20)])
  assert any('train.tar/b/19.png' in note and 'test.tar/b/19.png' in note for note in _load(tmp_path).notes)


def test_contents_do_not_depend_on_the_shards(tmp_path):
  make_tar(tmp_path / 'one' / 'test.tar', _members(100))
  make_tar(tmp_path / 'two' / 'test.tar', _members(100))
  make_tar(tmp_path / 'one' / 'train.tar', _members(0, 40))
  for first in (20, 0):
    make_tar(tmp_path / 'two' / f'train-{first}.tar', _members(first))
  one, two = _load(tmp_path / 'one', validation=0.0), _load(tmp_path / 'two', validation=0.0)
  assert contents(one.train) == contents(two.train)


def test_identity_and_record_name_the_members(tmp_path):
  path = make_tar(tmp_path / 'one' / 'x.tar', _members())
  first = _load(tmp_path / 'one')
  identified = identity.identify(first)
  identity.write_record(tmp_path, first, identified)
  rows = (tmp_path / 'data.csv').read_text().splitlines()
  assert len(rows) == 21 and f'x.tar/0000.png,0,train,{len(png(0))}' in rows
  path.parent.rename(tmp_path / 'two')  # another place, the same data
  assert identity.identify(_load(tmp_path / 'two')) == identified
  make_tar(tmp_path / 'two' / 'x.tar', [*_members(), ('new.png', png(9)), ('new.cls', b'1')])
  assert "images of '1'" in (
    said := identity.find_differences(identified, _load(tmp_path / 'two'), tmp_path / 'data.csv')
  )
  assert 'new: x.tar/new.png' in said
