"""Damaged and hostile checkpoints: always noticed, one line each, and a sound one is used instead."""

import hashlib
import json
import os
import shutil

import pytest

from cnn_jax import UsageError, checkpoint
from tests.checkpoints import make_state, restored_step, save

pytestmark = pytest.mark.usefixtures('no_waiting')


FILES = ('manifest.json', 'info.json', 'state/_METADATA', 'state/manifest.ocdbt', 'state/ocdbt.process_0/d/*')


def truncate(file):
  file.write_bytes(file.read_bytes()[:-1])


def empty(file):
  file.write_bytes(b'')


def flip_a_bit(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def remove(file):
  file.unlink()


@pytest.mark.parametrize('damage', [truncate, empty, flip_a_bit, remove])
@pytest.mark.parametrize('name', FILES)
def test_damage_to_any_file_falls_back_with_one_warning(two, name, damage):
  file = max((two / '2').glob(name), key=lambda path: path.stat().st_size)
  damage(file)
  if damage is truncate and name == 'manifest.json':
    file.write_bytes(file.read_bytes()[:-1])  # the first byte cut off was only a line break
  step, warnings = restored_step(two)
  assert step == 1
  assert len(warnings) == 1
  assert str(two / '2') in warnings[0]
  if not (damage is flip_a_bit and name == 'manifest.json'):  # which may then accuse any file
    assert file.name in warnings[0]


def test_an_extra_file_or_a_renamed_checkpoint_is_damage(two):
  (two / '2' / 'state' / 'extra').write_bytes(b'x')
  step, warnings = restored_step(two)
  assert step == 1
  assert 'extra' in warnings[0]
  shutil.rmtree(two / '2')
  shutil.copytree(two / '1', two / '9')
  step, warnings = restored_step(two)
  assert step == 1
  assert 'manifest.json is of step 1' in warnings[0]


def test_all_damaged_is_an_error_and_nothing_is_removed(two):
  truncate(two / '1' / 'info.json')
  remove(two / '2' / 'manifest.json')
  before = sorted(two.rglob('*'))
  with pytest.raises(checkpoint.CheckpointError, match='all checkpoints are damaged') as caught:
    checkpoint.restore(two, make_state(), warn=lambda _: None)
  assert str(two) in str(caught.value)
  assert isinstance(caught.value, UsageError)
  assert sorted(two.rglob('*')) == before


@pytest.mark.parametrize(
  'manifest', ['[]', '{"step": 2}', '{"step": 2, "files": 3}', '{"step": "2", "files": {}}', '{"files": {}}']
)
def test_a_manifest_of_another_form_is_damage(two, manifest):
  (two / '2' / 'manifest.json').write_text(manifest)
  step, warnings = restored_step(two)
  assert step == 1
  assert 'manifest.json' in warnings[0]


@pytest.mark.parametrize('name', ['manifest.json', 'info.json', 'state/_METADATA'])
@pytest.mark.parametrize('plant', [os.mkfifo, lambda path: path.symlink_to('/dev/zero')])
def test_a_pipe_or_a_device_in_place_of_a_file_is_damage(two, name, plant):
  (two / '2' / name).unlink()
  plant(two / '2' / name)
  step, warnings = restored_step(two)
  assert step == 1
  assert name in warnings[0]
  assert 'Not a regular file' in warnings[0]


def forge(directory, name, contents):
  """Replaces a file of a checkpoint and its line of the manifest."""
  (directory / name).write_bytes(contents)
  manifest = json.loads((directory / 'manifest.json').read_text())
  manifest['files'][name] = {'sha256': hashlib.sha256(contents).hexdigest(), 'bytes': len(contents)}
  (directory / 'manifest.json').write_text(json.dumps(manifest))


@pytest.mark.parametrize('name', ['info.json', 'state/_METADATA'])
@pytest.mark.parametrize('contents', [b'', b'[]', b'{"a":' * 100_000 + b'1' + b'}' * 100_000])
def test_a_checkpoint_that_matches_its_manifest_and_cannot_be_read_is_damage(two, name, contents):
  forge(two / '2', name, contents)
  step, warnings = restored_step(two)
  assert step == 1
  assert len(warnings) == 1


def test_a_damaged_best_falls_back_to_the_next_best(tmp_path):
  for step, accuracy in enumerate([0.7, 0.9, 0.8, 0.1], start=1):
    save(tmp_path, step, keep=4, validation_accuracy=accuracy)
  truncate(tmp_path / '2' / 'manifest.json')
  flip_a_bit(next((tmp_path / '2').glob('state/ocdbt.process_0/d/*')))
  step, warnings = restored_step(tmp_path, which='best')
  assert step == 3
  assert len(warnings) == 1


@pytest.mark.parametrize(
  'info', ['{}', '', '{"validation_accuracy": "high"}', '{"validation_accuracy": ' + '9' * 400 + '}']
)
def test_a_score_that_is_no_share_is_not_the_best(two, info):
  forge(two / '2', 'info.json', info.encode())
  assert restored_step(two, which='best') == (1, [])


def test_saving_over_a_damaged_step_mends_it(two):
  for file in (two / '2').rglob('*.json'):
    file.unlink()
  save(two, 2)
  assert restored_step(two) == (2, [])


def test_a_damaged_later_step_does_not_displace_a_sound_one(two):
  truncate(two / '2' / 'info.json')
  shutil.move(two / '2', two / '20')
  save(two, 10, keep=1)
  assert sorted(path.name for path in two.iterdir()) == ['1', '10']  # the best, and the newest
  assert restored_step(two) == (10, [])
