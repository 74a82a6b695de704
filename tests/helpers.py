"""Helpers of several test files: running commands, runs with random weights, image files."""

import contextlib
import dataclasses
import importlib
import io
import os
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np
from PIL import Image

from cnn_jax import command, config, evaluate, models, record
from cnn_jax.data.augment import Statistics
from cnn_jax.run import Run

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Of the input of a network whose config leaves them out.
LEVELS = Statistics((127.5,), (127.5,))

# For `jax.jit(compiler_options=...)` in tests that check what a function computes: compiling takes half the time.
QUICK = {'xla_backend_optimization_level': 0}


@dataclasses.dataclass(frozen=True)
class Done:
  """How a command ended, as `subprocess.CompletedProcess` has it."""

  returncode: int
  stdout: str
  stderr: str


def call_command(module, *arguments):
  """Runs the `main` of a command in this process: the same output and status, without start-up and compilation."""
  stdout, stderr = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
    try:
      status = command.call(importlib.import_module(module).main, [str(argument) for argument in arguments])
    except SystemExit as exit:  # --help
      status = exit.code or 0
  return Done(status, stdout.getvalue(), stderr.getvalue())


def run_command(*arguments, timeout=120, **environment):
  """Runs a command of the project in a process of its own, from the top folder, as a user does."""
  return subprocess.run(
    [sys.executable, '-m', *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {name: str(value) for name, value in environment.items()},
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )


def untrained_run(image_shape=(8, 8, 1), num_classes=3, drawing=None, **model):
  """A run of a small network with random weights, statistics and bias: a property of it is one of every run."""
  settings = config.default_config()
  settings.model.update({'features': (4, 6)} | model)
  network = models.create(settings.model, num_classes)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(0.1, 0.3, x.shape).astype(x.dtype), models.init_shapes(network, image_shape)
  )
  variables['batch_stats'] = jax.tree.map(np.abs, variables['batch_stats'])
  return Run(settings, network, variables, tuple('abcdefghij'[:num_classes]), image_shape, 'none', 0, drawing)


def logits_of(run, images, batch_size=1000, views=None):
  """The logits that a run computes for images; see `evaluate.compute_logits`."""
  return evaluate.compute_logits(
    run.model, run.variables, images, config.statistics(run.config.data), batch_size, views
  )


def write_pictures(images, labels, folder):
  """Writes grey images as PNG files, FOLDER/<label>/<index>.png, and returns the folder."""
  for i, (image, label) in enumerate(zip(images, labels, strict=False)):
    (folder / str(label)).mkdir(exist_ok=True)
    Image.fromarray(image[..., 0]).save(folder / str(label) / f'{i:03}.png')
  return folder


@contextlib.contextmanager
def largest_file(num_bytes):
  """Limits the size of the files that this process writes, as a nearly full disk does."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def open_recorder(workdir, step=0, tensorboard=False, trackers=(), **arguments):
  """A `record.Recorder` with the sinks that are asked for."""
  fields = {'log.tensorboard': tensorboard, 'log.trackers': trackers}
  return record.Recorder(workdir, step=step, config=config.vary(config.default_config(), fields), **arguments)


def append_points(recorder, steps):
  """Logs a training point for each step, and a validation point for each even one."""
  for step in steps:
    values = {'loss': np.float32(1) / step, 'accuracy': 0.1 * step}
    recorder.append(step, 1 + step // 4, 'train', values, {'images_per_second': 1e4})
    if step % 2 == 0:
      recorder.append(step, 1 + step // 4, 'validation', {'accuracy': 1 / step})


# What `append_points` logs for the steps 1 to 8, as TensorBoard and trackers name it.
EVERY_POINT = sorted(
  [(f'train/{name}', step) for step in range(1, 9) for name in ('loss', 'accuracy', 'images_per_second')]
  + [('validation/accuracy', step) for step in (2, 4, 6, 8)]
)
