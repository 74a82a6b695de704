"""Mutations of what is no JSON of a run: its files and folders, the arrays of a checkpoint, and exports; see mutations.py."""

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile

from tests.faults.mutations import DEEP, EXPORT, WORKDIR, Execute, checkpoint, mutation, place, seal, values


@mutation(WORKDIR)
def something_else_in_place_of_a_file(rng, workdir, canary):
  path = rng.choice([path for path in workdir.rglob('*') if path.is_file()])
  path.unlink()
  kind = rng.choice(('pipe', 'zero', 'folder', 'loop', 'dangling', 'outside', 'sparse', 'tty'))
  if kind == 'pipe':
    os.mkfifo(path)
  elif kind == 'folder':
    path.mkdir()
  elif kind == 'sparse':
    with open(path, 'wb') as file:
      file.truncate(2**32)
  else:
    targets = {'zero': '/dev/zero', 'loop': path, 'dangling': '/nowhere/x', 'tty': '/dev/tty'}
    path.symlink_to(targets.get(kind, workdir.parent / 'victim' / 'precious.txt'))


@mutation(WORKDIR)
def a_pipe_in_place_of_a_file(rng, workdir, canary):
  path = rng.choice([path for path in workdir.rglob('*') if path.is_file() and path.suffix != '.html'])
  path.unlink()
  os.mkfifo(path)


@mutation(WORKDIR)
def a_link_in_place_of_a_folder(rng, workdir, canary):
  path = rng.choice([path for path in workdir.rglob('*') if path.is_dir()])
  moved = workdir.parent / 'victim' / 'moved'
  shutil.move(path, moved)
  if rng.random() < 0.5 and (moved / 'd').is_dir():
    os.mkfifo(moved / 'd' / 'pipe')
  path.symlink_to(moved)


@mutation(WORKDIR)
def planted_links(rng, workdir, canary):
  """Where a writer might put its output or its temporary files."""
  victim = workdir.parent / 'victim' / 'precious.txt'
  for name in ('.report.html.tmp', 'report.html.tmp', '.config.json.tmp', '.environment.json.tmp', '.lock'):
    (workdir / name).unlink(missing_ok=True)
    (workdir / name).symlink_to(victim)
  (workdir / 'report.html').unlink(missing_ok=True)
  (workdir / 'report.html').symlink_to(victim)


@mutation(WORKDIR)
def a_manifest_of_other_files(rng, workdir, canary):
  path = checkpoint(workdir) / 'manifest.json'
  manifest = json.loads(path.read_text())
  victim = workdir.parent / 'victim' / 'precious.txt'
  fingerprint = {'sha256': hashlib.sha256(victim.read_bytes()).hexdigest(), 'bytes': victim.stat().st_size}
  name = rng.choice(
    (str(victim), '../../../victim/precious.txt', '../../config.json', '', '.', 'x' * 300, 'a\x1b[2Jb', '/dev/zero')
  )
  manifest['files'][name] = rng.choice((fingerprint, None, 3, {'sha256': 'x' * 10**6}))
  path.write_text(json.dumps(manifest))


@mutation(WORKDIR)
def damaged_bytes(rng, workdir, canary):
  """Cut off or with flipped bits, and the manifest made true again."""
  path = rng.choice(
    [path for path in checkpoint(workdir).rglob('*') if path.is_file() and path.name != 'manifest.json']
  )
  data = bytearray(path.read_bytes())
  if rng.random() < 0.4:
    del data[rng.randrange(len(data)) :]
  else:
    for _ in range(rng.choice((1, 8))):
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)
  seal(checkpoint(workdir))


@mutation(WORKDIR)
def a_file_that_python_would_load(rng, workdir, canary):
  """Pickles in place of files, and modules beside them."""
  state = checkpoint(workdir)
  for folder in (workdir, state, state / 'state'):
    for name in ('evil', 'cnn_jax_config_file', 'sitecustomize', 'conftest', 'numpy', 'json'):
      (folder / f'{name}.py').write_text(f'open({str(canary)!r}, "w")\nclass Evil: pass\n')
  path = rng.choice([path for path in workdir.rglob('*') if path.is_file() and path.suffix != '.py'])
  path.write_bytes(pickle.dumps(Execute(str(canary))))
  if path != state / 'manifest.json':
    seal(state)


@mutation(WORKDIR)
def metadata_of_orbax(rng, workdir, canary):
  path = checkpoint(workdir) / 'state' / '_METADATA'
  metadata = json.loads(path.read_text())
  kind = rng.choice(('path', 'type', 'place', 'place', 'rich', 'files'))
  if kind == 'path':
    metadata['use_ocdbt'] = False
    key = rng.choice(('../../../victim', '/etc', 'file:///etc', 'http://127.0.0.1:9', 'gs://bucket'))
    entry = next(iter(metadata['tree_metadata'].values()))
    entry['key_metadata'] = [{'key': key, 'key_type': 2}]
  elif kind == 'type':
    for entry in metadata['tree_metadata'].values():
      entry['value_metadata']['value_type'] = rng.choice(('evil.Evil', 'string', 'jax.Array', 'scalar', 'None', 'Dict'))
  elif kind == 'rich':
    metadata['value_metadata_tree'] = json.dumps({'category': 'custom', 'module': 'evil', 'clz': 'Evil'})
    metadata['custom_metadata'] = {'module': 'evil', 'class': 'Evil'}
    metadata['pytree_metadata_options'] = {'support_rich_types': True}
  elif kind == 'files':
    text = rng.choice((json.dumps('evil.Evil'), json.dumps({'x': 'gs://bucket'}), DEEP))
    for name in ('_sharding', '_strings.json', 'array_metadatas', '_CHECKPOINT_METADATA'):
      (path.parent / name).write_text(text)
  else:
    node, key = place(rng, metadata)
    node[key] = rng.choice([value for value in values(canary) if value != 'x' * 10**6])
  path.write_text(json.dumps(metadata))
  seal(checkpoint(workdir))


@mutation(WORKDIR)
def arrays_of_other_sizes(rng, workdir, canary):
  """Declares shapes, chunks, codecs and types in the metadata of an array, which TensorStore reads."""
  import tensorstore

  state = checkpoint(workdir) / 'state'
  store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': f'file://{state}/'}).result()
  keys = [key for key in store.list().result() if key.endswith(b'/.zarray')]
  key = rng.choice(keys)
  about = json.loads(store.read(key).result().value)
  changes = (
    {'shape': [10**13]}, {'chunks': [10**12]}, {'shape': [10**6] * 3, 'chunks': [10**6] * 3}, {'shape': [2**62] * 2},
    {'dtype': '|O'}, {'dtype': '<f8'}, {'dtype': '|S1000000000'}, {'compressor': {'id': 'pickle'}}, {'compressor': None},
    {'filters': [{'id': 'evil'}]}, {'fill_value': 'NaN'}, {'shape': [0]}, {'shape': []}, {'order': 'F'}, {'shape': [-1]},
    {'compressor': {'id': 'blosc', 'cname': 'lz4', 'clevel': 9, 'shuffle': 1}}, {'zarr_format': 3},
  )  # fmt: skip
  store.write(key, json.dumps(about | rng.choice(changes)).encode()).result()
  if rng.random() < 0.2:
    store.delete_range(tensorstore.KvStore.KeyRange(key[:-7], key[:-7] + b'\xff')).result()
  seal(checkpoint(workdir))


@mutation(WORKDIR)
def numbers_that_are_not_finite(rng, workdir, canary):
  import tensorstore

  state = checkpoint(workdir) / 'state'
  base = {'driver': 'ocdbt', 'base': f'file://{state}/'}
  keys = tensorstore.KvStore.open(base).result().list().result()
  names = [key[:-8].decode() for key in keys if key.endswith(b'/.zarray') and b'.params.' in key]
  array = tensorstore.open({'driver': 'zarr', 'kvstore': {**base, 'path': rng.choice(names) + '/'}}, open=True).result()
  array.write(rng.choice((float('nan'), float('inf'), 3e38))).result()
  seal(checkpoint(workdir))


@mutation(WORKDIR)
def strange_checkpoints(rng, workdir, canary):
  folder, path = workdir / 'checkpoints', checkpoint(workdir)
  kind = rng.choice(('huge', 'old', 'empty', 'pipe', 'link', 'file', 'many', 'unreadable name'))
  if kind == 'huge':
    path.rename(folder / ('9' * 200))
  elif kind == 'old':
    path.rename(folder / f'.old-{path.name}')
  elif kind == 'empty':
    (folder / '99999').mkdir()
  elif kind == 'pipe':
    os.mkfifo(folder / '99999')
  elif kind == 'link':
    (folder / '99999').symlink_to(rng.choice(('/', '/proc/self', '/dev', path)))
  elif kind == 'file':
    (folder / '99999').write_bytes(b'x')
  elif kind == 'many':
    for step in range(500):
      (folder / str(step + 10**6)).mkdir()
  else:
    (path / 'state' / os.fsdecode(b'caf\xe9\x1b[2J')).write_bytes(b'x')


# --- exports


def _rewrite(path, change):
  """Changes the members {name: bytes} of an export."""
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  change(members)
  with zipfile.ZipFile(path, 'w') as archive:
    for name, data in members.items():
      archive.writestr(zipfile.ZipInfo(name), data)


@mutation(EXPORT)
def damaged_archive(rng, path, canary):
  data = bytearray(path.read_bytes())
  if rng.random() < 0.4:
    del data[rng.randrange(len(data)) :]
  else:
    for _ in range(rng.choice((1, 8, 64))):
      data[rng.choice((rng.randrange(len(data)), -rng.randrange(1, 200)))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


@mutation(EXPORT)
def damaged_program(rng, path, canary):
  def change(members):
    data = bytearray(members['program.bin'])
    if rng.random() < 0.3:
      del data[rng.randrange(len(data)) :]
    else:
      for _ in range(rng.choice((1, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    members['program.bin'] = bytes(data)

  _rewrite(path, change)


@mutation(EXPORT)
def another_description(rng, path, canary):
  def change(members):
    about = json.loads(members['model.json'])
    if rng.random() < 0.3:
      members['model.json'] = rng.choice((DEEP, '[]', '', '{}', '{"format": 1}', 'NaN')).encode()
      return
    node, key = place(rng, about)
    node[key] = rng.choice(values(canary))
    members['model.json'] = json.dumps(about).encode()

  _rewrite(path, change)


@mutation(EXPORT)
def another_program(rng, path, canary):
  """Not a program, under a description that has its checksum."""

  def change(members):
    data = rng.choice((b'', pickle.dumps(Execute(str(canary))), b'\0' * 1000, b'\x7fELF' * 100, members['model.json']))
    members['program.bin'] = data
    about = json.loads(members['model.json']) | {'sha256': hashlib.sha256(data).hexdigest()}
    members['model.json'] = json.dumps(about).encode()

  _rewrite(path, change)


@mutation(EXPORT)
def another_archive(rng, path, canary):
  kind = rng.choice(('bomb', 'names', 'missing', 'pipe', 'zero', 'folder', 'pickle', 'twice'))
  path.unlink()
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED if kind == 'bomb' else zipfile.ZIP_STORED) as archive:
    if kind == 'bomb':
      archive.writestr('model.json', b' ' * 10**8)
    elif kind == 'names':
      archive.writestr('../../victim/precious.txt', b'x')
      archive.writestr('/etc/evil', b'x')
    elif kind == 'twice':
      for _ in range(2):
        archive.writestr(zipfile.ZipInfo(f'model.json{"" if _ else " "}'), b'{"format": 1}')
  if kind == 'pipe':
    os.mkfifo(path)
  elif kind == 'zero':
    path.symlink_to('/dev/zero')
  elif kind == 'folder':
    path.mkdir()
  else:
    path.write_bytes(pickle.dumps(Execute(str(canary))) if kind == 'pickle' else buffer.getvalue())
