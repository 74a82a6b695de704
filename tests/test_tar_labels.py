"""Labels in tar files that cannot be used: which member, what it holds, and what may stand in their place."""

import json

import pytest

from cnn_jax import UsageError
from cnn_jax.data import load_dataset
from tests.datasets import make_tar, png, settings

pytestmark = pytest.mark.usefixtures('offline')


def load(root):
  return load_dataset(settings('tar', dir=str(root)))


def labelled(first=0, label=lambda i: str(i % 2), kind='cls'):
  """Twenty images of the levels `first`, ... and their labels."""
  for i in range(first, first + 20):
    yield f'{i:04}.png', png(i)
    yield f'{i:04}.{kind}', label(i).encode()


UNUSABLE = [
  ('cls', '-1', 'holds -1'),
  ('cls', ' ', 'is empty'),
  ('cls', 'nan', 'holds nan'),
  ('txt', 'None', 'holds None'),
  ('cls', 'a\nb', 'holds more than a line of up to 1,000 characters'),
  ('cls', 'x' * 1001, 'holds more than a line of up to 1,000 characters'),
  ('cls', 'x' * 70_000, 'has more than 65,536 bytes'),
  ('json', '{"label": {"a": 1}}', 'holds {"a": 1} as its label'),
  ('json', '{"cls": NaN}', 'holds NaN as its label'),
  ('json', '{"label": null, "class": true}', 'holds true as its label'),
  ('json', '{"label": 1.5}', 'holds 1.5 as its label'),
  ('json', '{"label": ""}', 'is empty'),
  ('json', '{"label": -3}', 'holds -3'),
  ('json', '[' * 9999, 'is not readable JSON'),
  ('json', '[' * 100_000, 'has more than 65,536 bytes'),
  ('json', '{"label": ' + '9' * 5000 + '}', 'is not readable JSON'),
  ('json', '[1]', 'holds no object with label, class or cls'),
]


@pytest.mark.parametrize('every', [False, True])
@pytest.mark.parametrize(('kind', 'label', 'reason'), UNUSABLE)
def test_a_label_that_cannot_be_used_is_named_but_may_stand_for_none_in_the_test_split(
  tmp_path, kind, label, reason, every
):
  def mixed(i):
    return label if every or i == 7 else json.dumps({'label': i % 2}) if kind == 'json' else str(i % 2)

  make_tar(tmp_path / 'set' / 'train.tar', labelled(label=mixed, kind=kind))
  with pytest.raises(UsageError) as error:
    load(tmp_path / 'set')
  start = '20 labels cannot be used: ' if every else '1 label cannot be used: '
  assert str(error.value).startswith(start)
  assert f'train.tar/{0 if every else 7:04}.{kind} {reason}' in str(error.value)
  assert '\n' not in str(error.value) and len(str(error.value)) < 1000
  make_tar(tmp_path / 'set' / 'train.tar', labelled())
  make_tar(tmp_path / 'set' / 'test.tar', labelled(50, label=lambda i: mixed(i - 50), kind=kind))
  if every:
    assert any('20 images of the test split have no label' in note for note in load(tmp_path / 'set').notes)
  else:
    with pytest.raises(UsageError, match=f'test.tar/0057.{kind} '):
      load(tmp_path / 'set')


def test_a_class_may_be_called_none_if_a_file_of_classes_lists_it(tmp_path):
  make_tar(tmp_path / 'x.tar', labelled(label=lambda i: ('None', '-1')[i % 2]))
  (tmp_path / 'classes.txt').write_text('None\n-1\n')
  assert load(tmp_path).class_names == ('None', '-1')


@pytest.mark.parametrize(
  ('kind', 'text'), [('txt', 'two\nlines'), ('json', '{"width": 4}'), ('json', '[1]'), ('json', '{')]
)
def test_captions_and_other_json_do_not_hide_the_directories(tmp_path, kind, text):
  made = [
    (f'{"ab"[i % 2]}/{i}.{suffix}', data)
    for i in range(20)
    for suffix, data in (('png', png(i)), (kind, text.encode()))
  ]
  make_tar(tmp_path / 'x.tar', made)
  assert load(tmp_path).class_names == ('a', 'b')
