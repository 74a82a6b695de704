"""Ways to change the workdir and the export of a run so that a reader may execute, write, hang or fail.

A mutation takes a random generator, the workdir (or the export) to change, and the path of a canary, a file that exists
afterwards only if something was executed. Checksums are computed anew, so that what lies behind them is exercised.
"""

import hashlib
import json
import os

WORKDIR, EXPORT = {}, {}
_JSON = ('config.json', 'info.json', 'manifest.json', 'result.json', 'environment.json')
DEEP = '[' * 200_000 + ']' * 200_000


class Execute:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def mutation(register):
  def add(function):
    register[function.__name__.strip('_')] = function
    return function

  return add


def checkpoint(workdir):
  """The newest checkpoint of a workdir."""
  return max((workdir / 'checkpoints').iterdir(), key=lambda path: int(path.name))


def seal(path):
  """Makes the manifest of a checkpoint true again."""
  manifest = json.loads((path / 'manifest.json').read_text())
  names = [file.relative_to(path).as_posix() for file in path.rglob('*') if file.is_file()]
  manifest['files'] = {
    name: {
      'sha256': hashlib.sha256((path / name).read_bytes()).hexdigest(),
      'bytes': (path / name).stat().st_size,
    }
    for name in names
    if name != 'manifest.json'
  }
  (path / 'manifest.json').write_text(json.dumps(manifest))


def values(canary):
  """Values that no field expects."""
  touch = f'touch {canary}'
  return [
    None, True, -1, 0, 1, 10**30, -(10**18), 0.5, 1e308, '', 'x' * 10**6, '\x1b]0;title\x07\x1b[2J\r', '../../victim',
    '/dev/zero', '/etc/passwd', 'gs://bucket/x', 'http://127.0.0.1:9/x', [], {}, [[1]], {'a.b': 1}, 'evil.Evil', '\ud800',
    '\0', f'$({touch})', f"__import__('os').system('{touch}')", f"{{{{ cycler.__init__.__globals__.os.popen('{touch}') }}}}",
    '<script>alert(1)</script>', '{0.__class__}', '%n%s', [1e9] * 1000, ['a', 'a'], [100_000, 100_000, 1], [-8, 8, 1],
    [8, 8, 2], 65_536, 2**31, 2**63, list(range(1000)), float('nan'), float('inf'),
  ]  # fmt: skip


def place(rng, value):
  """A random container inside a JSON value, and a key in it."""
  spots = []

  def walk(node):
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
      spots.append((node, key))
      walk(child)

  walk(value)
  return rng.choice(spots)


def _json_file(rng, workdir):
  name = rng.choice(_JSON)
  return checkpoint(workdir) / name if name in ('info.json', 'manifest.json') else workdir / name


def _edit(rng, workdir, change):
  """Changes a random JSON file of a workdir by a function of its value."""
  path = _json_file(rng, workdir)
  value = json.loads(path.read_text())
  text = change(value)
  path.write_text(text if isinstance(text, str) else json.dumps(value))
  if path.name == 'info.json':
    seal(path.parent)


@mutation(WORKDIR)
def another_value(rng, workdir, canary):
  for _ in range(rng.choice((1, 1, 3))):

    def change(value):
      node, key = place(rng, value)
      node[key] = rng.choice(values(canary))

    _edit(rng, workdir, change)


@mutation(WORKDIR)
def a_missing_key(rng, workdir, canary):
  def change(value):
    node, key = place(rng, value)
    del node[key]

  _edit(rng, workdir, change)


@mutation(WORKDIR)
def a_strange_key(rng, workdir, canary):
  def change(value):
    node, _ = place(rng, value)
    if isinstance(node, dict):
      node[rng.choice(('a.b', '', '__class__', '\x1b[2J', 'x' * 10**5, '../x', 'get', 'items'))] = rng.choice(
        values(canary)
      )

  _edit(rng, workdir, change)


@mutation(WORKDIR)
def a_key_twice(rng, workdir, canary):
  _edit(rng, workdir, lambda value: json.dumps(value).replace('{', '{"seed": 1, "seed": 2, ', 1))


@mutation(WORKDIR)
def deep_json(rng, workdir, canary):
  _edit(rng, workdir, lambda value: rng.choice((DEEP, '{"a":' * 100_000 + '1' + '}' * 100_000)))


@mutation(WORKDIR)
def no_object(rng, workdir, canary):
  _edit(rng, workdir, lambda value: rng.choice(('', 'null', '[]', '3', '"x"', '{', '\ufeff{}', 'NaN', '{}')))


@mutation(WORKDIR)
def an_image_shape(rng, workdir, canary):
  path = checkpoint(workdir) / 'info.json'
  info = json.loads(path.read_text())
  shapes = ([100_000, 100_000, 1], [-8, -8, 1], [8, 8], [8, 8, 3], [0, 0, 1], [2**40, 1, 1], ['8', 8, 1], [8.0, 8, 1])
  info['image_shape'] = rng.choice(shapes)
  path.write_text(json.dumps(info))
  seal(path.parent)


@mutation(WORKDIR)
def class_names(rng, workdir, canary):
  path = checkpoint(workdir) / 'info.json'
  info = json.loads(path.read_text())
  names = info['class_names']
  choices = (
    ['x' * 10**6, *names[1:]], names[:-1], [*names, 'more'], ['\x1b[2J\x07' + name for name in names], [1, 2], [], ['a'],
    ['<b onmouseover=alert(1)>' + name for name in names], [f'c{i}' for i in range(10**6)], ['same'] * len(names),
    ['\ud800' + name for name in names], ['$x^{' + name for name in names],
  )  # fmt: skip
  info['class_names'] = rng.choice(choices)
  path.write_text(json.dumps(info))
  seal(path.parent)


@mutation(WORKDIR)
def another_network(rng, workdir, canary):
  """In the config and in the notes of the checkpoint alike, as one who wants to deceive would write it."""
  fields = rng.choice((
    {'features': [8, 17]}, {'features': [10**9]}, {'features': [8] * 10**5}, {'convs_per_block': 10**9},
    {'convs_per_block': 65_536}, {'kernel_size': 10**30}, {'kernel_size': 4096}, {'stride': 10**6}, {'norm': 'none'},
    {'features': []}, {'name': 'resnet'}, {'name': '../../evil'}, {'name': 'layers'}, {'aggregate': 'flatten'},
    {'dtype': 'object'}, {'norm_momentum': 1e-300}, {'features': [-1]}, {'frozen_stages': 10**20}, {'head': 'conv1x1'},
  ))  # fmt: skip
  for path in (workdir / 'config.json', checkpoint(workdir) / 'info.json'):
    value = json.loads(path.read_text())
    section = value if path.name == 'config.json' else value.get('config')
    if section:
      section['model'].update(fields)
    path.write_text(json.dumps(value))
  seal(checkpoint(workdir))


@mutation(WORKDIR)
def data_from_elsewhere(rng, workdir, canary):
  fields = rng.choice((
    {'source': 'tfds', 'name': 'mnist', 'dir': '/proc'}, {'source': 'folder', 'dir': '/etc'}, {'source': 'folder', 'dir': '/'},
    {'source': 'tfds', 'name': 'evil/x', 'dir': str(workdir)}, {'source': 'tfds', 'name': 'http://127.0.0.1:9/x'},
    {'source': 'folder', 'dir': '/dev'}, {'source': 'folder', 'dir': str(workdir / 'checkpoints')}, {'table': '/dev/zero'},
  ))  # fmt: skip
  for path in (workdir / 'config.json', checkpoint(workdir) / 'info.json'):
    value = json.loads(path.read_text())
    section = value if path.name == 'config.json' else value.get('config')
    if section:
      section['data'].update(fields)
    path.write_text(json.dumps(value))
  seal(checkpoint(workdir))


@mutation(WORKDIR)
def log_points(rng, workdir, canary):
  choices = (
    b'{"step": "x", "split": "train", "loss": "y"}\n', b'{"step": 1, "epoch": 1, "split": "train", "loss": -5}\n',
    b'{"step": 1e400, "split": "train"}\n', b'{"step": -1, "epoch": 1, "split": "train", "accuracy": 7}\n', b'\xff\xfe\n',
    b'{"step": 1, "split": "train", "loss": ' + b'9' * 4000 + b'}\n', DEEP.encode() + b'\n', b'\0' * 10**6,
    b'{"step": 99999999999999999999, "epoch": 1, "split": "validation", "loss": 1e299}\n', b'x' * 10**7,
    b'{"step": true, "epoch": null, "split": "train", "loss": 0, "learning_rate": 1e299}\n',
    b'{"step": 3, "epoch": 1, "split": "train", "accuracy": -1e200}\n{"step": 3, "split": "validation", "loss": 0}\n',
  )  # fmt: skip
  lines = (workdir / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
  for _ in range(3):
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(choices))
  (workdir / rng.choice(('metrics.jsonl', 'metrics.jsonl', 'timing.jsonl'))).write_bytes(b''.join(lines))
