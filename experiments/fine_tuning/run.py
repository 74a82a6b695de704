"""Twenty pictures a class: from the weights of a run on other classes, or from nothing?

    python -m experiments.fine_tuning.run --data_dir=DIR [--seeds=3] [--workdir=runs/fine_tuning] [--json=FILE]

`DIR/train/<class>/*` and `DIR/test/<class>/*`. The first half of the classes (by name) trains the run to start from;
the other half is the new task, with few pictures of each class and all of its test pictures.
"""

import argparse
import json
import os
import pathlib
from typing import Any

from cnn_jax import command
from cnn_jax.main import train_and_evaluate
from configs import image_folder
from experiments import runs

WAYS: dict[str, dict[str, Any]] = {
  'from nothing': {},
  'fine-tuned': {'init': True, 'optimizer.learning_rate': 0.02},
  'fine-tuned, first two blocks frozen': {'init': True, 'optimizer.learning_rate': 0.02, 'model.frozen_blocks': 2},
}


def main() -> None:
  """Trains all, in folders of links to the pictures, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_dir', type=pathlib.Path, required=True)
  parser.add_argument('--pictures', type=int, default=20, help='of each class of the new task')
  parser.add_argument('--epochs', type=int, default=4, help='of the run to start from')
  parser.add_argument('--steps', type=int, default=200, help='of the new task')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/fine_tuning'))
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  command.prepare_backend()
  classes = sorted(path.name for path in (args.data_dir / 'train').iterdir() if path.is_dir())
  half = len(classes) // 2
  base = _link(args.data_dir, args.workdir / 'pictures' / 'base', classes[:half], None)
  few = _link(args.data_dir, args.workdir / 'pictures' / 'few', classes[half:], args.pictures)
  trained = train_and_evaluate(_config(base, args.epochs, 0, 128), args.workdir / 'base')
  accuracies: dict[str, list[float]] = {way: [] for way in WAYS}
  for seed in range(args.seeds):
    for way, fields in WAYS.items():
      config = _config(few, 1, args.steps, 50)
      config.seed = seed
      config.schedule.warmup_epochs = 0.5
      config.evaluation.every_epochs = config.checkpoint.every_epochs = 1000
      overrides = {name: value for name, value in fields.items() if name != 'init'}
      config.update_from_flattened_dict(overrides)
      if 'init' in fields:
        config.init_from = str(args.workdir / 'base')
      name = f'{way}-{seed}'.replace(' ', '-').replace(',', '')
      accuracies[way].append(train_and_evaluate(config, args.workdir / name)['test_accuracy'])
  print(f'\nThe run to start from: {trained["test_accuracy"]:.2%} on its own {half} classes.\n')
  rows = [[way, runs.mean_std(values), str(len(values))] for way, values in accuracies.items()]
  print(runs.table(['', 'test accuracy, mean ± std', 'n'], rows))
  if args.json:
    args.json.write_text(json.dumps({'base': trained['test_accuracy'], **accuracies}, indent=2) + '\n')


def _config(folder: pathlib.Path, epochs: int, min_steps: int, batch_size: int) -> Any:
  config = image_folder.get_config()
  config.data.dir = str(folder)
  config.data.validation = 0.0 if min_steps else 0.05
  config.model.features = (32, 64, 128)
  config.epochs, config.min_steps, config.batch_size = epochs, min_steps, batch_size
  config.schedule.warmup_epochs = 1.0
  config.log.report = False
  return config


def _link(source: pathlib.Path, target: pathlib.Path, classes: list[str], pictures: int | None) -> pathlib.Path:
  """A folder of links: all test pictures of some classes, and all or the first few of their training pictures."""
  for split, limit in (('train', pictures), ('test', None)):
    for name in classes:
      (target / split / name).mkdir(parents=True, exist_ok=True)
      for picture in sorted((source / split / name).iterdir())[:limit]:
        link = target / split / name / picture.name
        if not link.exists():
          os.symlink(picture.resolve(), link)
  return target


if __name__ == '__main__':
  main()
