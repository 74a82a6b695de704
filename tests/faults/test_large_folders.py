"""A folder of many files: it is listed once, by one process or several at a time, and never mistaken for another."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests.faults import tools
from tests.faults.tools import ROOT, one_line, read_json, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures('offline')]

COUNT, CLASSES = 60_000, 20
LOAD = """
import json, sys, tracemalloc
from cnn_jax.data import identity, listing, load_dataset
from tests.datasets import settings
scan, scanned = listing.scan, []
listing.scan = lambda path, passed: scanned.append(path) or scan(path, passed)
import cnn_jax.data.folder, cnn_jax.data.tfds
tracemalloc.start()
dataset = load_dataset(settings('folder', dir=sys.argv[1], image_size=8, channels=3, resident='never'))
bytes_per_file = tracemalloc.get_traced_memory()[0] / len(dataset.train)
sha256 = identity.identify(dataset)['sha256']
names = list(dataset.train.names)
print(json.dumps([len(scanned), sha256, [len(names), names[0], names[-1]], bytes_per_file]))
"""


@pytest.fixture(scope='module')
def many(tmp_path_factory):
  """60,000 names of four pictures, in twenty classes."""
  root = tmp_path_factory.mktemp('large')
  for i in range(4):
    Image.new('RGB', (10, 8), (60 * i, 0, 90)).save(root / f'{i}.jpg')
  for label in range(CLASSES):
    folder = root / 'set' / f'n{label:08}'
    folder.mkdir(parents=True)
    for number in range(COUNT // CLASSES):
      os.link(root / f'{number % 4}.jpg', folder / f'{folder.name}_{number}.JPEG')
  time.sleep(2.1)  # what has just changed is not trusted
  return root / 'set'


def _load(many):
  return subprocess.Popen([sys.executable, '-c', LOAD, str(many)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _indexes():
  return list(pathlib.Path(os.environ['XDG_CACHE_HOME'], 'cnn_jax').glob('*index-*'))


def test_processes_that_list_at_a_time_find_the_same_and_leave_one_index(many):
  found = [json.loads(process.communicate(timeout=300)[0]) for process in [_load(many) for _ in range(3)]]
  assert [scanned for scanned, *_ in found] == [CLASSES + 1] * 3
  files = _indexes()
  assert len(files) == 2 and all(path.suffix == '.npz' for path in files)
  found.append(json.loads(_load(many).communicate(timeout=300)[0]))
  assert found[-1][0] == 0
  assert len({json.dumps(facts[1:3]) for facts in found}) == 1
  assert max(bytes_per_file for *_, bytes_per_file in found) < 250  # 37 of them are the path


def test_a_process_that_is_killed_while_it_lists_is_no_harm(many):
  for seconds in (0.5, 1.5, 2.5):
    process = _load(many)
    time.sleep(seconds)
    process.kill()
    process.communicate()
  first, second = (json.loads(_load(many).communicate(timeout=300)[0]) for _ in range(2))
  assert first[1:3] == second[1:3]
  assert second[0] == 0


def test_a_run_continues_from_the_index_and_names_files_that_have_gone(many, tmp_path):
  fields = {'data__resident': 'never', 'data__channels': 3, 'data__image_size': 8, 'epochs': 200}
  arguments = ['cnn_jax.main', *tools.folder_arguments(many, tmp_path / 'run', **fields)]
  metrics = tmp_path / 'run' / 'metrics.jsonl'
  for start in range(2):
    before = metrics.stat().st_size if start else 0
    process = tools.start(*arguments)
    wait_for(lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > before), 120)  # noqa: B023
    status, stdout, stderr = tools.stop(process, signal.SIGTERM, 120)
    assert status == 143, (stdout, stderr)
    assert ('Resuming at step' in stdout) == bool(start)
  assert (tmp_path / 'run' / 'data.csv').read_text().count('\n') == COUNT + 1
  assert read_json(tmp_path / 'run' / 'data.json')['identity']['splits']
  gone = many / 'n00000003' / 'n00000003_17.JPEG'
  gone.rename(many.parent / 'gone.JPEG')
  try:
    line = one_line(tools.run_command(*arguments))
  finally:
    (many.parent / 'gone.JPEG').rename(gone)
  assert 'the data set is not the one' in line and 'missing: n00000003/n00000003_17.JPEG' in line
