"""Folders of any shape and size: used in full, or refused in one line, within seconds."""

import itertools
import os
import pathlib
import shutil
import tempfile
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnn_jax import UsageError
from cnn_jax.data import layout, load_dataset
from tests import datasets

pytestmark = pytest.mark.usefixtures('offline')

_NAMES = st.sampled_from(
  ['train', 'Train', 'test', 'val', 'dev', 'cat', 'dog', 'Cat', 'a', 'b', 'annotations', '__MACOSX', 'runs', 'set1']
)
_LEAVES = st.fixed_dictionaries({'.png': st.integers(0, 4), '.xml': st.integers(0, 1)})
_TREES = st.recursive(
  _LEAVES,
  lambda inner: (
    st.dictionaries(_NAMES, inner, max_size=4) | st.tuples(_LEAVES, st.dictionaries(_NAMES, inner, max_size=3))
  ),
  max_leaves=14,
)


def _build(path, tree, picture, numbers):
  path.mkdir(exist_ok=True)
  leaf, folders = tree if isinstance(tree, tuple) else ({}, tree) if '.png' not in tree else (tree, {})
  for suffix, count in leaf.items():
    for _ in range(count):
      (path / f'{next(numbers)}{suffix}').write_bytes(picture)
  for name, inner in folders.items():
    _build(path / name, inner, picture, numbers)


@settings(max_examples=60, deadline=None)
@given(_TREES)
def test_any_shape_is_used_in_full_or_refused_in_one_line(tree):
  with tempfile.TemporaryDirectory() as folder:
    picture = pathlib.Path(folder, 'picture.png')
    Image.new('L', (8, 8)).save(picture)
    root = pathlib.Path(folder, 'root')
    _build(root, tree, picture.read_bytes(), itertools.count())
    try:
      dataset = load_dataset(datasets.settings('folder', dir=str(root), image_size=8))
    except UsageError as error:
      refusal = str(error)
    else:
      refusal = ''
    if refusal:
      assert '\n' not in refusal
      assert 'root' in refusal
      return
    names = datasets.set_of_names(dataset)
    notes = ' '.join(dataset.notes)
    present = {str(path.relative_to(root)) for path in root.rglob('*.png') if '__MACOSX' not in path.parts}
    missing = {name for name in present - names if os.path.dirname(name)}
    # Only a flat test directory may be left out, and that is noted.
    assert all(name.split('/')[0] == 'test' and 'without labels' in notes for name in missing)
    assert names <= present
    split = {name.split('/')[0] for name in names} & {'train', 'Train'}
    depth = 1 if split and not {name.split('/')[0] for name in names} - {'train', 'Train', 'test', 'val', 'dev'} else 0
    for name, label in zip(dataset.train.names, dataset.train.labels, strict=True):
      assert name.split('/')[depth] == dataset.class_names[label]
    assert set(np.unique(dataset.train.labels)) == set(range(len(dataset.class_names)))


@pytest.mark.faults
def test_a_hundred_thousand_files_are_listed_in_three_seconds(tmp_path):
  for name in range(100):
    (tmp_path / 'set' / f'{name:02}').mkdir(parents=True)
    for i in range(1000):
      (tmp_path / 'set' / f'{name:02}' / f'{i}.jpg').touch()
  seconds = []
  for _ in range(3):
    start = time.process_time()
    found = layout.read(str(tmp_path / 'set'))
    seconds.append(time.process_time() - start)
  assert len(found.parts['train']) == 100_000
  assert min(seconds) < 3
  shutil.rmtree(tmp_path / 'set')
