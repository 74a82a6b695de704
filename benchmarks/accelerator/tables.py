"""The tables of README.md from the results; a part that is missing has none, and a row that failed says why."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import peers, results
from cnn_jax.tables import markdown

PEERS = {'ours': 'ours', 'pytorch': 'PyTorch', 'pytorch_compiled': 'PyTorch compiled'}


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables, by the name of their marks; see `benchmarks.results`."""
  parts = found['parts']
  text = results.source(found) + (' Reduced sizes.' if found['small'] else '')
  made = {'parts': f'{text}\n\n{_parts(parts)}'}
  for name, table in _TABLES.items():
    rows = parts.get(name, {}).get('rows', [])
    made[name] = table(rows) if rows else 'Not measured yet.'
  made['borrowed'] = _borrowed(parts)
  return made


def _parts(parts: Mapping[str, Any]) -> str:
  rows = [
    [
      name,
      f'{part["seconds"]:.0f}',
      str(sum('error' in row for row in part['rows'])),
      part['error'] or '-',
      part.get('commit') or 'unknown',
    ]
    for name, part in parts.items()
  ]
  return markdown(['part', 'seconds', 'rows without a result', 'error', 'commit'], rows)


def _device(rows: Sequence[Mapping[str, Any]]) -> str:
  cells = [
    [
      row['what'],
      _number(row.get('ms'), 2),
      _number(row.get('tflops'), 1),
      _number(row.get('gb_per_second'), 0),
      row.get('error') or ('-' if row.get('difference') is None else f'difference {row["difference"]:.0e}'),
    ]
    for row in rows
  ]
  return markdown(['what', 'ms', 'TFLOP/s', 'GB/s', 'note'], cells)


def _correctness(rows: Sequence[Mapping[str, Any]]) -> str:
  cells = [
    [
      row['check'],
      row['error'] if 'error' in row else f'{row["error_found"]:.1e}',
      '-' if row.get('limit') is None else f'{row["limit"]:.0e}',
      {True: 'yes', False: '**no**', None: '-'}[row.get('passed')],
    ]
    for row in rows
  ]
  return markdown(['check', 'error', 'limit', 'passed'], cells)


def _determinism(rows: Sequence[Mapping[str, Any]]) -> str:
  cells = []
  for row in rows:
    about = [row['network'], row['run'], row['compared_with']]
    if 'error' in row:
      cells.append([*about, row['error'], '-', '-'])
    else:
      accuracy = ' / '.join(f'{100 * value:.2f}' for value in row['accuracy'])
      cells.append([*about, 'yes' if row['same_bits'] else '**no**', f'{row["difference"]:.0e}', accuracy])
  return markdown(['network', 'run', 'compared with', 'same bits', 'largest difference', 'test accuracy, %'], cells)


def _loop(rows: Sequence[Mapping[str, Any]]) -> str:
  ways = list(dict.fromkeys(way for row in rows for way in row.get('ms', {})))
  cells = []
  for row in rows:
    about = [row['network'], str(row['batch'])]
    if 'error' in row:
      cells.append([*about, *('-' for _ in ways), row['error']])
    else:
      cells.append([*about, *(peers.show(row['ms'][way], 3) for way in ways), f'{row["overhead_us"]:.0f}'])
  header = ['network', 'batch', *(f'{way}, ms' for way in ways), 'dynamic less fixed number, µs per step']
  return markdown(header, cells)


def _step_time(rows: Sequence[Mapping[str, Any]]) -> str:
  names = [name for name in PEERS if any(name in row.get('ms', {}) for row in rows)]
  header = ['network', 'batch', 'dtype', 'work', *(f'{PEERS[name]}, ms' for name in names)]
  header += [f'{PEERS[name]}, images/s' for name in names]
  header += [f'speed, ours / {PEERS[name]}' for name in names[1:]]
  header.append(f'device memory, MB: {" / ".join(PEERS[name] for name in names)}')
  cells = []
  for row in rows:
    about = [row['network'], str(row['batch']), row['dtype'], row.get('work', '-')]
    if 'error' in row:
      cells.append([*about, row['error'], *['-'] * (len(header) - 5)])
      continue
    cells.append([
      *about,
      *(peers.show(row['ms'].get(name), 2) for name in names),
      *(_number(row['images_per_second'].get(name), 0) for name in names),
      *(_number(row['speedup'].get(name), 2) for name in names[1:]),
      ' / '.join(_number(row['device_mb'].get(name), 0) for name in names) if 'device_mb' in row else '-',
    ])  # fmt: skip
  return markdown(header, cells)


def _streamed(rows: Sequence[Mapping[str, Any]]) -> str:
  cells = []
  for row in rows:
    if 'resident' not in row or (row['run'] != 'training' and 'error' not in row):
      continue
    about = [row['resident'], str(row.get('workers', '-'))]
    if 'error' in row:
      cells.append([*about, row['error'], '-', '-'])
    else:
      cells.append([
        *about,
        row['decoder'],
        _number(row['images_per_second'], 0),
        f'{100 * row["data_wait_share"]:.0f} %',
      ])  # fmt: skip
  return markdown(['data.resident', 'data.workers', 'decoder', 'images/s', 'waiting for data'], cells)


def _borrowed(parts: Mapping[str, Any]) -> str:
  """What other benchmarks measured on this device."""
  cells = []
  for row in _found(parts, 'many_seeds'):
    ms = row['ms']
    times = f'{ms["sequential"]["median"]:.2f} / {ms["vmapped"]["median"]:.2f} ms'
    what = f'many_seeds: {row["network"]}, {row["seeds"]} seeds, one after another / vmapped'
    cells.append([what, times, f'{row["speedup"]:.2f} times as fast vmapped'])
  for name, path, what in (('mnist_speedrun', (), 'program'), ('cifar10_speedrun', ('record',), 'recipe')):
    for row in _found(parts, name, *path):
      accuracy = f'{100 * row["accuracy"]["mean"]:.2f} %, n = {row["accuracy"]["n"]}'
      cells.append([f'{name}: {row[what]}', f'{row["seconds"]["median"]:.2f} s', accuracy])
  for row in _found(parts, 'start_up'):
    if row['what'].startswith('first'):
      cells.append([f'start_up: {row["what"]}', f'{row["seconds"]["median"]:.1f} s', '-'])
  return markdown(['what', 'time', 'result'], cells) if cells else 'Not measured yet.'


def _found(parts: Mapping[str, Any], name: str, *path: str) -> Sequence[Mapping[str, Any]]:
  found = functools.reduce(lambda outer, key: outer.get(key, {}), path, parts.get(name, {}).get('found', {}))
  return found.get('measurements', [])


def _number(value: float | None, digits: int) -> str:
  return '-' if value is None else f'{value:,.{digits}f}'


_TABLES: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
  'device': _device,
  'correctness': _correctness,
  'determinism': _determinism,
  'loop': _loop,
  'step_time': _step_time,
  'streamed': _streamed,
}
