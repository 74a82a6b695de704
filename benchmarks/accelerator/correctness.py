"""A part: whether the device computes what the CPU computes, and an exported program what predict computes.

A value is an error, relative to the largest number of an array or to the norm of an update; a row passes if it is at
most its limit. float32 at full precision is compared everywhere. Rows about JAX's default precision, TF32 on a GPU, say
how much it costs.
"""

import concurrent.futures
import contextlib
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.accelerator import part
from cnn_jax import calibration, command, config, distribute, evaluate, export, models, ops, plan
from cnn_jax import main as training
from cnn_jax.run import Run, load_run

# Limits of: the same products, one operation (TF32 has 1e-3), an update at full precision, an update in TF32.
SAME, EXACT, CLOSE, ROUGH = 1e-5, 1e-4, 1e-3, 0.2

# Name, fields of `config.model`, pixels a side, channels. They have all layers of the large ones.
NETWORKS: tuple[tuple[str, dict[str, Any], int, int], ...] = (
  ('cnn', {}, 28, 1),
  ('resnet', {'depth': 18, 'stem': '3x3', 'width': 16}, 32, 3),
  ('resnet', {'depth': 50, 'width': 16}, 64, 3),
  ('efficientnet', {'width': 0.25, 'dropout': 0.0}, 64, 3),
  ('convnext', {'variant': 'atto', 'width': 16}, 64, 3),
)


def main(argv: Sequence[str]) -> None:
  """Adds a row per operation, network and way of prediction."""
  args = part.parser(__doc__).parse_args(argv)
  rows = part.Rows(args.output, args.seconds)
  command.prepare_backend()
  # In threads, because compiling takes most of the time; a run handles signals and so needs the main thread.
  with (
    concurrent.futures.ThreadPoolExecutor(1 if args.small else 6) as pool,
    tempfile.TemporaryDirectory() as directory,
  ):
    for name, pair in operations().items():
      pool.submit(_check, rows, f'operation: {name}', EXACT, functools.partial(operation_error, *pair))
    for case in NETWORKS[:2] if args.small else NETWORKS:
      pool.submit(_check_updates, rows, *case, 8 if args.small else 64)
    try:
      run = _trained_run(pathlib.Path(directory) / 'run', args.small)
    except Exception as error:
      rows.add(check='training on digits', error=part.one_line(error))
    else:
      for what, limit, find in predictions(run):
        _check(rows, what, limit, find)
    if not args.small and rows.left() > 0:
      run = untrained('resnet', {'depth': 18}, 128)
      _check(rows, 'resnet 18: exported program, predict', SAME, functools.partial(export_error, run, 16))
      _check(rows, 'resnet 18: default precision, predict', None, functools.partial(precision_error, run, 16))


def operations() -> dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array], list[tuple[int, ...]]]]:
  """Ours, the stock operation, and the shapes of the arguments, by name."""
  numbers = ('NHWC', 'HWIO', 'NHWC')
  found: dict[str, Any] = {}
  options: dict[str, Any]
  for kernel, stride, channels, features in (
    (3, 1, 1, 32),
    (3, 1, 64, 64),
    (3, 2, 32, 64),
    (1, 1, 64, 128),
    (7, 2, 3, 64),
  ):
    options = {'window_strides': (stride, stride), 'padding': 'SAME', 'dimension_numbers': numbers}
    ours, stock = (functools.partial(f, **options) for f in (ops.conv_general_dilated, lax.conv_general_dilated))
    shapes = [(8, 32, 32, channels), (kernel, kernel, channels, features)]
    found[f'convolution {kernel}x{kernel}, stride {stride}, {channels} to {features}'] = ours, stock, shapes
  for kernel, stride in ((3, 1), (5, 2)):
    options |= {'window_strides': (stride, stride), 'feature_group_count': 96}
    ours, stock = (functools.partial(f, **options) for f in (ops.conv_general_dilated, lax.conv_general_dilated))
    found[f'depthwise {kernel}x{kernel}, stride {stride}'] = ours, stock, [(8, 28, 28, 96), (kernel, kernel, 1, 96)]
  for window, stride in ((2, 2), (3, 2)):
    options = {'window_shape': (window, window), 'strides': (stride, stride), 'padding': 'SAME'}
    for name in ('max_pool', 'avg_pool'):
      ours, stock = (functools.partial(getattr(module, name), **options) for module in (ops, nn))
      found[f'{name} {window}x{window}, stride {stride}'] = ours, stock, [(8, 32, 32, 16)]
  convolve = functools.partial(
    lax.conv_general_dilated, window_strides=(1, 1), padding='SAME', dimension_numbers=numbers
  )
  found['convolution and max_pool'] = (
    functools.partial(ops.conv_max_pool, window_strides=(1, 1), padding='SAME', dimension_numbers=numbers),
    lambda x, kernel: nn.max_pool(convolve(x, kernel), (2, 2), (2, 2)),
    [(8, 28, 28, 1), (3, 3, 1, 32)],
  )
  return found


def operation_error(ours: Callable, stock: Callable, shapes: Sequence[tuple[int, ...]]) -> float:
  """Our operation and its gradients on the device, against the stock ones on the CPU: the largest error."""
  arguments = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)]

  def compute(function: Callable, device: Any) -> Any:
    @jax.jit
    def both(*arguments):
      y, back = jax.vjp(function, *arguments)
      return y, back(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    with jax.default_matmul_precision('highest'):
      return jax.device_get(both(*jax.device_put(arguments, device)))

  return _largest(compute(ours, jax.devices()[0]), compute(stock, jax.devices('cpu')[0]))


def update_error(
  name: str, fields: dict[str, Any], side: int, channels: int, batch: int
) -> Callable[[str | None], float]:
  """One step of training on the device against the same on the CPU: the norm of the difference of the updates.

  Args:
    name, fields: of the network.
    side, channels: of the images.
    batch: images.

  Returns:
    A function of the precision of the device's products, None for JAX's default, that computes the error relative to the
    norm of the update. The CPU has full precision.
  """
  settings = {f'model.{field}': value for field, value in fields.items()} | {'batch_size': batch, 'augment.flip': True}
  random = np.random.default_rng(0)
  examples = {
    'images': random.integers(0, 256, (batch, side, side, channels), np.uint8),
    'labels': random.integers(0, 10, batch).astype(np.int32),
    'positions': np.arange(batch, dtype=np.int32),
  }

  @functools.cache
  def made() -> plan.Plan:
    return plan.make_plan(config.vary(config.default_config(name), settings), 10 * batch, 10, (side, side, channels))

  @functools.cache
  def expected() -> list[np.ndarray]:
    return update(jax.devices('cpu')[0], 'highest')

  def update(device: Any, precision: str | None) -> list[np.ndarray]:
    before = jax.device_get(made().state)
    step = jax.pmap(made().step, axis_name=distribute.AXIS, devices=[device])
    states = jax.tree.map(lambda x: np.asarray(x)[None], (before, examples))
    keys = jax.device_put(jax.random.split(jax.random.key(0), 1), device)
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
      after, _ = step(*states, keys)
    pairs = zip(jax.tree.leaves(jax.device_get(after.params)), jax.tree.leaves(before.params), strict=True)
    return [a[0] - b for a, b in pairs]

  def norm(arrays: Sequence[np.ndarray]) -> float:
    return sum(float(np.sum(np.square(x, dtype=np.float64))) for x in arrays) ** 0.5

  def error(precision: str | None) -> float:
    found = update(jax.devices()[0], precision)
    return norm([a - b for a, b in zip(found, expected(), strict=True)]) / norm(expected())

  return error


def predictions(run: Run) -> Iterator[tuple[str, float | None, Callable[[], float]]]:
  """What is compared about a trained run: its title, the limit, and the error."""
  images = np.random.default_rng(0).integers(0, 256, (64, *run.image_shape), np.uint8)
  yield 'digits: exported program, predict', SAME, functools.partial(export_error, run, 64)
  yield (
    'digits: device, CPU',
    CLOSE,
    lambda: _largest(probabilities(run, images), probabilities(run, images, jax.devices('cpu')[0])),
  )
  yield 'digits: default precision, predict', None, functools.partial(precision_error, run, 64)


def export_error(run: Run, count: int) -> float:
  """The exported program against predict, on the same device."""
  images = np.random.default_rng(1).integers(0, 256, (count, *run.image_shape), np.uint8)
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / 'model.stablehlo'
    path.write_bytes(export.to_stablehlo(run))
    return _largest(export.load(path)(images), probabilities(run, images))


def precision_error(run: Run, count: int) -> float:
  """Inference at JAX's default precision against predict, which has full precision."""
  images = np.random.default_rng(1).integers(0, 256, (count, *run.image_shape), np.uint8)
  levels = config.statistics(run.config.data)
  logits = jax.jit(lambda v, x: run.model.apply(v, evaluate.normalize(x, levels), train=False)[0])(
    run.variables, images
  )
  return _largest(calibration.softmax(np.asarray(logits)), probabilities(run, images))


def probabilities(run: Run, images: np.ndarray, device: Any = None) -> np.ndarray:
  """What predict computes; on a device, if one is given."""
  device = device or jax.devices()[0]
  levels = config.statistics(run.config.data)
  logits = evaluate.eval_step(run.model, *jax.device_put((run.variables, images), device), levels)
  return calibration.softmax(np.asarray(logits))


def untrained(name: str, fields: dict[str, Any], side: int) -> Run:
  """A run of a network with its first weights, for colour images."""
  settings = {f'model.{field}': value for field, value in fields.items()} | {
    'data.channels': 3,
    'data.image_size': side,
  }
  made = config.vary(config.default_config(name), settings)
  model = models.create(made.model, 10)
  variables = models.init(model, jax.random.key(0), (side, side, 3))
  return Run(made, model, variables, tuple('0123456789'), (side, side, 3), 'none', 0, None)


def _trained_run(workdir: pathlib.Path, small: bool) -> Run:
  overrides = [f'--config.epochs={3 if small else 6}', '--config.log.report=False', '--config.log.tensorboard=False']
  training.train_and_evaluate(config.load('configs/digits.py', overrides), workdir)
  return load_run(workdir)


def _check(rows: part.Rows, what: str, limit: float | None, error: Callable[[], float]) -> None:
  def row() -> dict[str, Any]:
    value = error()
    if limit is None and np.isfinite(value):
      return {'error_found': value, 'limit': None, 'passed': None}
    return {'error_found': value, 'limit': limit, 'passed': limit is not None and bool(value <= limit)}

  rows.attempt(row, check=what)


def _check_updates(rows: part.Rows, name: str, fields: dict[str, Any], side: int, channels: int, batch: int) -> None:
  if rows.left() < 0:
    return
  title = f'{name} {" ".join(map(str, fields.values()))}'.strip()
  error = update_error(name, fields, side, channels, batch)
  _check(rows, f'update: {title}, full precision', CLOSE, lambda: error('highest'))
  _check(rows, f'update: {title}, default precision', ROUGH, lambda: error(None))


def _largest(found: Any, expected: Any) -> float:
  """The largest difference of two trees of arrays, relative to the largest number of its array."""
  return part.largest_error(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


if __name__ == '__main__':
  command.run(main)
