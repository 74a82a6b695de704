"""The two JAX peers of `run.py`: the training and evaluation of this project, and those of the stock Flax examples.

    python -m benchmarks.step_time.jax_peer ours|flax '[[28, 28, 1], [32, 64, 128]]' 128 [OPTIONS]

The arguments are the peer, the image shape with the features of each convolution, and the images per step. OPTIONS is
JSON: `dtype`, of the arithmetic of ours. Requests are `train STEPS`, `inference STEPS` and `gemm REPEATS`; see
`benchmarks.peers`.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks import peers
from cnn_jax import command, distribute, evaluate, inspect, plan, train
from cnn_jax.config import default_config, statistics, vary
from cnn_jax.state import eval_variables

LEARNING_RATE, MOMENTUM = 0.01, 0.9
MAX_STEPS = 25  # of one request; `ours` takes them in one compiled call, as training does

Runs = dict[str, Callable[[int], Any]]  # for 'train' and 'inference', a function that takes a number of steps


def main(argv: Sequence[str]) -> None:
  """Compiles, reports the number of operations per image, and answers requests."""
  name, network, batch, *rest = argv
  shape, features = json.loads(network)
  options = json.loads(rest[0]) if rest else {}
  if name == 'ours':
    command.prepare_backend()  # as every command of this project does; stock Flax runs with the defaults of JAX
    dtype = options.get('dtype', 'float32')
    runs, operations = ours(tuple(shape), tuple(features), int(batch), dtype)
  else:
    runs, operations = stock_flax(tuple(shape), tuple(features), int(batch)), None
  for run in runs.values():
    run(2)

  def answer(work: str, count: str) -> dict[str, float | None]:
    if work == 'gemm':
      return {'gflops': gemm_rate(int(count))}
    return peers.time_steps(runs[work], int(count)) | {'device_mb': device_mb()}

  peers.serve(answer, operations=operations)


def device_mb() -> float | None:
  """The peak memory of this process on its first device, in MB of 2^20 bytes; None on the CPU."""
  statistics = jax.local_devices()[0].memory_stats()
  return statistics and statistics['peak_bytes_in_use'] / 2**20


def ours(
  shape: tuple[int, ...], features: tuple[int, ...], batch: int, dtype: str = 'float32'
) -> tuple[Runs, dict[str, int]]:
  """Training by `plan.make_plan`, with batches gathered from uint8 images, and `evaluate.eval_step`.

  Returns:
    The functions that take steps, and `operations`.
  """
  config = vary(
    default_config(),
    {
      'batch_size': batch,
      'model.features': features,
      'model.dtype': dtype,
      'optimizer.learning_rate': LEARNING_RATE,
      'optimizer.momentum': MOMENTUM,
      'optimizer.nesterov': False,
      'optimizer.weight_decay': 0.0,
      'schedule.name': 'constant',
      'schedule.warmup_epochs': 0.0,
    },
  )
  made = plan.make_plan(config, MAX_STEPS * batch, 10, shape, max_steps=MAX_STEPS)
  train_steps = train.compile_steps(made.step, config.seed)
  images, labels = _data(shape, 4 * batch)
  data = distribute.replicate((images, labels))
  state = distribute.replicate(made.state)
  variables = jax.tree.map(jnp.array, eval_variables(state))  # copies, because training donates its state
  order = np.random.default_rng(0).integers(0, len(images), (MAX_STEPS, jax.device_count(), batch), np.int32)
  one_batch, levels = jnp.asarray(images[:batch]), statistics(config.data)

  def train_run(count: int) -> None:
    nonlocal state
    state, measured = train_steps(state, *data, order, np.int32(count))
    jax.block_until_ready((state, measured))

  def inference_run(count: int) -> None:
    jax.block_until_ready([evaluate.eval_step(made.model, variables, one_batch, levels) for _ in range(count)])

  return {'train': train_run, 'inference': inference_run}, operations(made.model, shape)


def operations(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
  """Multiplications and additions of the convolutions and dense layers, for one image.

  Args:
    model: from `models.create`.
    shape: (height, width, channels).

  Returns:
    For 'inference', those of the layer table; for 'train', three times as many, because each product has two gradients,
    less the gradient of the images, which nothing needs.
  """
  layers = [layer.operations for layer in inspect.layer_table(model, shape)]
  return {'train': 3 * sum(layers) - layers[0], 'inference': sum(layers)}


class StockCNN(nn.Module):
  """The same network, made of the layers of Flax."""

  features: Sequence[int]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Logits (batch, 10) of float images (batch, height, width, channels)."""
    for i, features in enumerate(self.features):
      x = nn.Conv(features, (3, 3), use_bias=False, name=f'layer{i}_conv')(x)
      if i < len(self.features) - 1:
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
      x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f'layer{i}_norm')(x)
      x = nn.relu(x)
    return nn.Dense(10, name='output')(x.mean((1, 2)))


def stock_flax(shape: tuple[int, ...], features: tuple[int, ...], batch: int) -> Runs:
  """One jitted step per call, with a donated state, on a float batch that is in memory already."""
  model = StockCNN(features)
  tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
  levels, labels = _data(shape, batch)
  images = jnp.asarray(levels / np.float32(127.5) - 1)
  variables = jax.jit(model.init, static_argnames='train')(jax.random.key(0), images[:1], train=False)

  @jax.jit
  def predict(variables, images):
    return model.apply(variables, images, train=False)

  def step(state, images, labels):
    params, batch_stats, opt_state = state

    def loss_function(params):
      logits, updated = model.apply(
        {'params': params, 'batch_stats': batch_stats}, images, train=True, mutable=['batch_stats']
      )
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated['batch_stats']

    (loss, batch_stats), gradient = jax.value_and_grad(loss_function, has_aux=True)(params)
    updates, opt_state = tx.update(gradient, opt_state, params)
    return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

  step = jax.jit(step, donate_argnums=0)
  state = jax.tree.map(jnp.array, (variables['params'], variables['batch_stats'], tx.init(variables['params'])))

  def train_run(count: int) -> None:
    nonlocal state
    for _ in range(count):
      state, _ = step(state, images, labels)
    jax.block_until_ready(state)

  def inference_run(count: int) -> None:
    jax.block_until_ready([predict(variables, images) for _ in range(count)])

  return {'train': train_run, 'inference': inference_run}


def gemm_rate(repeats: int) -> float:
  """The highest rate of a product of two float32 matrices (1024, 1024) in some repeats, in GFLOP/s."""
  a = jnp.ones((1024, 1024), jnp.float32)
  times = []
  for _ in range(repeats):
    started = time.perf_counter()
    jax.block_until_ready(a @ a)
    times.append(time.perf_counter() - started)
  return 2 * 1024**3 / min(times) / 1e9


def _data(shape: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
  random = np.random.default_rng(0)
  return random.integers(0, 256, (count, *shape), np.uint8), random.integers(0, 10, count).astype(np.int32)


if __name__ == '__main__':
  main(sys.argv[1:])
