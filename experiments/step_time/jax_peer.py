"""The two JAX peers of `run.py`: this project's training and evaluation, and what stock Flax examples do.

Both answer a line `<train | inference | gemm> <steps>` with one JSON object: milliseconds a step and the peak memory
of the process so far, or the rate of a matrix product.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from cnn_jax import command, evaluate, train
from cnn_jax.config import default_config
from cnn_jax.model import create_model
from cnn_jax.optim import make_optimizer
from experiments.step_time.run import MAX_STEPS

LEARNING_RATE, MOMENTUM = 0.01, 0.9


def serve(name: str, network: tuple[Sequence[int], Sequence[int]], batch: int) -> None:
  """Answers requests until the input ends.

  Args:
    name: 'ours' or 'flax'.
    network: image shape (height, width, channels), and the features of each block.
    batch: images a step.
  """
  if name == 'ours':
    command.prepare_backend()  # as every command of the project does; stock Flax has JAX's defaults
  runs = (ours if name == 'ours' else stock_flax)(tuple(network[0]), tuple(network[1]), batch)
  for run in runs.values():
    run(2)  # compiles
  print('{}', flush=True)
  for line in sys.stdin:
    work, steps = line.split()
    if work == 'gemm':
      answer = {'gflops': gemm_rate(int(steps))}
    else:
      runs[work](1)
      started = time.perf_counter()
      runs[work](int(steps))
      answer = {'ms': 1e3 * (time.perf_counter() - started) / int(steps)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(answer | {'peak_mb': peak}), flush=True)


def ours(shape: tuple[int, ...], features: tuple[int, ...], batch: int) -> dict[str, Callable[[int], Any]]:
  """Training by `train.make_train_steps`, gathering from uint8 images and all, and `evaluate.eval_step`.

  Returns:
    For 'train' and 'inference', a function that takes so many steps.
  """
  config = default_config()
  config.batch_size = batch
  config.model.features = features
  config.optimizer.update({'momentum': MOMENTUM, 'nesterov': False, 'weight_decay': 0.0})
  learning_rate = optax.constant_schedule(LEARNING_RATE)
  model = create_model(config.model, 10)
  tx = make_optimizer(config.optimizer, learning_rate)
  images, labels = _data(shape, 4 * batch)
  data = train.replicate((images, labels))
  state = train.replicate(train.create_state(model, tx, config, shape))
  variables = jax.tree.map(jnp.array, train.eval_variables(state))  # copies, which training does not donate
  steps = train.make_train_steps(model=model, tx=tx, learning_rate=learning_rate, config=config)
  order = np.random.default_rng(0).integers(0, len(images), (MAX_STEPS, batch), np.int32)
  indices = train.local_indices(order)
  one_batch = jnp.asarray(images[:batch])

  def train_run(count: int) -> None:
    nonlocal state
    state, measured = steps(state, *data, indices, np.int32(count))
    jax.block_until_ready((state, measured))

  def inference_run(count: int) -> None:
    jax.block_until_ready([evaluate.eval_step(model, variables, one_batch) for _ in range(count)])

  return {'train': train_run, 'inference': inference_run}


class StockCNN(nn.Module):
  """The same network out of Flax's own layers."""

  features: Sequence[int]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Logits (batch, 10) of float images (batch, height, width, channels)."""
    for i, features in enumerate(self.features):
      x = nn.Conv(features, (3, 3), use_bias=False, name=f'block{i}_conv')(x)
      if i < len(self.features) - 1:
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
      x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f'block{i}_norm')(x)
      x = nn.relu(x)
    return nn.Dense(10, name='head')(x.mean((1, 2)))


def stock_flax(shape: tuple[int, ...], features: tuple[int, ...], batch: int) -> dict[str, Callable[[int], Any]]:
  """One jitted step a call, its state donated, on a batch that is there as floats; as `ours` otherwise."""
  model = StockCNN(features)
  tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
  images, labels = _data(shape, batch)
  images = jnp.asarray(images / np.float32(127.5) - 1)
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
  """The rate of the machine's matrix product of 1024 x 1024 float32, in GFLOP/s: the best of some."""
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
