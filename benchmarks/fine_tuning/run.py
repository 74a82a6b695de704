"""Training on 20 pictures per class: from the weights of a run on other classes, or from random weights.

    python -m benchmarks.fine_tuning.run --data_dir=DIR [--seeds=3] [--workdir=runs/fine_tuning] [--json=FILE]

The pictures are DIR/train/CLASS/* and DIR/test/CLASS/*. The first half of the classes, by name, trains the run whose
weights are reused. The other half is the new task, with few pictures of each class and all of its test pictures.
`--config.NAME=VALUE` sets a field of all runs.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers, results
from cnn_jax import UsageError, command
from cnn_jax import config as config_lib
from cnn_jax.main import train_and_evaluate
from cnn_jax.tables import format_mean_std, markdown

WAYS: dict[str, dict[str, Any]] = {
  'from random weights': {},
  'fine-tuned': {'optimizer.learning_rate': 0.02},
  'fine-tuned, first two stages frozen': {'optimizer.learning_rate': 0.02, 'model.frozen_stages': 2},
}
_BASE = {'data.validation': 0.05, 'batch_size': 128, 'schedule.warmup_epochs': 1.0, 'min_steps': 0, 'log.report': False}
_NEW = {
  'data.validation': 0.0,
  'batch_size': 50,
  'epochs': 1,
  'schedule.warmup_epochs': 0.5,
  'evaluation.every_epochs': 1000,
  'checkpoint.every_epochs': 1000,
  'log.report': False,
}


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  parser.add_argument('--data_dir', type=Path, required=True, help='the folder of pictures')
  parser.add_argument('--pictures', type=int, default=20, help='per class of the new task (%(default)s)')
  parser.add_argument('--epochs', type=int, default=4, help='of the run whose weights are reused (%(default)s)')
  parser.add_argument('--steps', type=int, default=200, help='of the new task (%(default)s)')
  parser.add_argument('--seeds', type=int, default=3, help='runs of each kind (%(default)s)')
  parser.add_argument('--workdir', type=Path, default=Path('runs/fine_tuning'), help='of all runs (%(default)s)')
  args, overrides = parser.parse_known_args(argv)
  folder = config_lib.vary(
    config_lib.load(str(peers.ROOT / 'configs' / 'image_folder.py')),
    {'model.features': (32, 64, 128), 'adapt_to_data': False},
  )

  def config(pictures: Path, fields: Mapping[str, Any]) -> Any:
    return config_lib.override(config_lib.vary(folder, {'data.dir': str(pictures), **fields}), overrides)

  classes = _classes(args.data_dir)
  half = len(classes) // 2
  pictures = args.workdir / 'pictures'
  base = config(_link(args.data_dir, pictures / 'base', classes[:half]), _BASE | {'epochs': args.epochs})
  few = _link(args.data_dir, pictures / 'few', classes[half:], args.pictures)
  command.prepare_backend()
  trained = train_and_evaluate(base, args.workdir / 'base')

  def run(way: str, seed: int) -> dict[str, Any]:
    fields = _NEW | {'min_steps': args.steps, 'seed': seed} | WAYS[way]
    if WAYS[way]:
      fields['init_from'] = str(args.workdir / 'base')
    name = f'{way}-{seed}'.replace(' ', '-').replace(',', '')
    return train_and_evaluate(config(few, fields), args.workdir / name)

  runs = peers.interleave(run, WAYS, args.seeds, what='runs')
  measurements = [
    {
      'way': way,
      'accuracy': peers.sample([run['test_accuracy'] for run in of_way]),
      'seconds': peers.spread([run['train_seconds'] for run in of_way]),
    }
    for way, of_way in runs.items()
  ]
  found = results.describe(
    data=trained['dataset'], base_accuracy=trained['test_accuracy'], base_classes=half, measurements=measurements
  )
  results.publish(found, tables(found), args.json)


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The table of README.md; see `benchmarks.results`."""
  best = max(row['accuracy']['mean'] for row in found['measurements'])
  rows = []
  for row in found['measurements']:
    accuracy = format_mean_std(row['accuracy']['mean'], row['accuracy']['std'])
    accuracy = f'**{accuracy}**' if row['accuracy']['mean'] == best else accuracy
    rows.append([row['way'], accuracy, peers.show(row['seconds']), str(row['accuracy']['n'])])
  table = markdown(['weights', 'test accuracy, mean ± std', 'training, s', 'n'], rows)
  base = f'{100 * found["base_accuracy"]:.2f} % on its own {found["base_classes"]} classes'
  return {
    'measurements': f'{results.source(found)} Data: {found["data"]}.\n\n{table}\n\n'
    f'The run whose weights are reused has a test accuracy of {base}.'
  }


def _classes(data_dir: Path) -> list[str]:
  try:
    classes = sorted(path.name for path in (data_dir / 'train').iterdir() if path.is_dir())
  except OSError as error:
    raise UsageError(f'cannot read {data_dir / "train"}: {error.strerror}; give a folder of pictures.') from error
  if len(classes) < 4:
    raise UsageError(f'{data_dir / "train"} has {len(classes)} classes; the benchmark needs at least 4.')
  return classes


def _link(source: Path, target: Path, classes: Sequence[str], pictures: int | None = None) -> Path:
  """Makes a folder of links: all test pictures of some classes, and all or the first few of the training pictures."""
  for split, limit in (('train', pictures), ('test', None)):
    for name in classes:
      if not (source / split / name).is_dir():
        raise UsageError(f'there is no folder {source / split / name}; every class needs training and test pictures.')
      (target / split / name).mkdir(parents=True, exist_ok=True)
      for picture in sorted((source / split / name).iterdir())[:limit]:
        link = target / split / name / picture.name
        if not link.exists():
          os.symlink(picture.resolve(), link)
  return target


if __name__ == '__main__':
  command.run(main)
