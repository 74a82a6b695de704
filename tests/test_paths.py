"""Files in arrays: what strings in a list would give."""

import itertools
import os

import numpy as np
import pytest

from cnn_jax.data import listing, paths

NAMES = [
  ['a/1.png', 'a/2.png', 'b c/1.png'],
  ['b/x.png', 'a b/x.png', 'a/x.png', 'a/x.jpg'],
  ['naïve/日本.png', os.fsdecode(b'caf\xe9/1.png'), 'z/1.png', '\U0001f600.png'],
  [''],
  [],
]


@pytest.mark.parametrize('names', NAMES)
@pytest.mark.parametrize('piece', [1, 2, 1000])
def test_paths_are_a_sequence_of_strings(monkeypatch, names, piece):
  monkeypatch.setattr(paths, '_PIECE', piece)
  packed = paths.pack(names)
  assert len(packed) == len(names)
  assert list(packed) == [packed[i] for i in range(len(names))] == names
  assert packed == names and names == packed and packed != [*names, 'x']
  assert list(packed.text()) == [packed.text()[i] for i in range(len(names))] == list(map(listing.text, names))
  assert [names[i] for i in packed.order()] == sorted(names)
  assert paths.from_arrays(*packed.arrays()) == names
  backwards = packed[np.arange(len(names))[::-1]]
  assert backwards == names[::-1]
  assert paths.from_arrays(*backwards.arrays()) == names[::-1]
  assert packed[1:] == names[1:]


@pytest.mark.parametrize('shared', [False, True])
def test_joined_files_are_those_of_the_parts(shared):
  names = [name for some in NAMES for name in some]
  whole = paths.make(names, [(i, 2, 3, 4) for i in range(len(names))], range(len(names)))
  ends = np.cumsum([0, *map(len, NAMES)])
  parts = [whole.part(slice(start, end)) for start, end in itertools.pairwise(ends)]
  if not shared:
    parts = [paths.make(list(part.paths), part.stamps.tolist(), part.labels.tolist()) for part in parts]
  joined = paths.join(parts)
  assert joined.paths == names
  assert joined.sizes.tolist() == joined.labels.tolist() == list(range(len(names)))
  assert joined.fingerprint() == whole.fingerprint()
  assert paths.join(parts[::-1]).fingerprint() != whole.fingerprint()
  assert len(paths.join([])) == 0


def test_the_fingerprint_depends_on_each_path_and_stamp():
  facts = [(['a', 'bc'], [(1, 2, 3, 4), (5, 6, 7, 8)])]
  facts.append((['ab', 'c'], facts[0][1]))
  facts.append((['a', 'bd'], facts[0][1]))
  facts += [(facts[0][0], [(1, 2, 3, 4), tuple(5 + i + (i == place) for i in range(4))]) for place in range(4)]
  assert len({paths.make(*each).fingerprint() for each in facts}) == len(facts)
