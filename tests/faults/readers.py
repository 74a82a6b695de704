"""Targets of coverage-guided fuzzing: what reads the files of workdirs, exports and prepared sets. See test_atheris.py."""

import functools
import json
import pathlib
import tempfile

from tests.faults.tools import ROOT


@functools.cache
def _folder():
  """A folder of this process that holds a prepared set."""
  from tests.datasets import make_tfds

  folder = pathlib.Path(tempfile.mkdtemp())
  make_tfds(folder, {'train': [0, 1], 'test': [0]})
  return folder


def _file(name, data):
  path = _folder() / name
  path.write_bytes(data)
  return path


def read_json(data):
  """A JSON file of a workdir."""
  from cnn_jax import files

  value = files.read_json(_file('x.json', data))
  assert isinstance(value, dict)
  json.dumps(value)


def read_points(data):
  """The log of a run."""
  from cnn_jax import record

  for point in record.read_points(_file('metrics.jsonl', data).parent):
    assert isinstance(point['step'], int) and isinstance(point['split'], str)


def read_export(data):
  """An exported model up to its program, which XLA reads."""
  from cnn_jax import export

  about, program = export._read(_file('x.stablehlo', data))
  assert all(isinstance(name, str) for name in about['class_names']) and isinstance(program, bytearray)


def read_prepared(data):
  """The description of a prepared set: the first byte chooses the file."""
  from cnn_jax.data import prepared

  directory = _folder() / 'toy' / '1.0.0'
  name = ('features.json', 'dataset_info.json', 'label.labels.txt')[data[0] % 3 if data else 0]
  before = (directory / name).read_bytes()
  try:
    (directory / name).write_bytes(data[1:])
    found = prepared.describe(directory)
    assert found.image and found.label and all(found.class_names) and found.size('train') >= 0
  finally:
    (directory / name).write_bytes(before)


def _json_corpus():
  return [(ROOT / 'tests/references/run-v0.1' / name).read_bytes() for name in ('config.json', 'environment.json')]


def _points_corpus():
  return [(ROOT / 'tests/references/run-v0.1/metrics.jsonl').read_bytes()[:2000]]


def _export_corpus():
  import io
  import zipfile

  with zipfile.ZipFile(ROOT / 'tests/references/export-v0.1.stablehlo') as archive:
    about = archive.read('model.json')
  contents = io.BytesIO()
  with zipfile.ZipFile(contents, 'w') as archive:
    archive.writestr(zipfile.ZipInfo('model.json'), about)
    archive.writestr(zipfile.ZipInfo('program.bin'), b'program')
  return [contents.getvalue()]


def _prepared_corpus():
  directory = _folder() / 'toy' / '1.0.0'
  names = ('features.json', 'dataset_info.json', 'label.labels.txt')
  return [bytes([number]) + (directory / name).read_bytes() for number, name in enumerate(names)]


# For each target: the function of bytes, the modules whose branches guide the search, and the valid inputs to start from.
TARGETS = {
  'json': (read_json, ('cnn_jax.files', 'json'), _json_corpus),
  'points': (read_points, ('cnn_jax.record', 'json'), _points_corpus),
  'export': (read_export, ('cnn_jax.export', 'zipfile'), _export_corpus),
  'prepared': (read_prepared, ('cnn_jax.data.prepared', 'cnn_jax.files'), _prepared_corpus),
}
