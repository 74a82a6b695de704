"""Networks for photographs in this project, and in ONNX Runtime after our own export; peers of `photographs.py`.

    python -m benchmarks.step_time.photographs_jax_peer ours|onnx efficientnet_lite0|resnet18|resnet50 8 [OPTIONS]

The arguments are the peer, the network and the images per step. OPTIONS is JSON: `dtype`, of the arithmetic; `size`, the
pixels a side; `fixed_statistics`, whether batch norms use their running statistics in training, as fine-tuning does.
Requests are `WORK STEPS`, where WORK is a key of `photographs.WORKS`; see `benchmarks.peers`.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.step_time.jax_peer import device_mb
from benchmarks.step_time.photographs import CLASSES, NETWORKS, SIZE, timed
from cnn_jax import command, distribute, evaluate, models, plan, train
from cnn_jax import config as config_lib
from cnn_jax.config import default_config, vary
from cnn_jax.data import augment

MAX_STEPS = 8  # of one request

Run = Callable[[int], Any]


def main(argv: list[str]) -> None:
  """Answers requests; what a request needs is compiled when it comes for the first time."""
  name, network, count, *rest = argv
  options = json.loads(rest[0]) if rest else {}
  command.prepare_backend()
  side = options.get('size', SIZE)
  images = np.random.default_rng(0).integers(0, 256, (int(count), side, side, 3), np.uint8)
  fields = {
    'model.dtype': options.get('dtype', 'float32'),
    'model.fixed_statistics': options.get('fixed_statistics', True),
  }

  @functools.cache
  def run_of(work: str) -> Run:
    run = onnx_inference(network, images) if name == 'onnx' else ours(network, work, images, fields)
    run(1)
    return run

  peers.serve(lambda work, steps: timed(run_of(work.replace('_', ' ')), int(steps)) | {'device_mb': device_mb()})


def ours(network: str, work: str, images: np.ndarray, fields: Mapping[str, Any]) -> Run:
  """Inference by `evaluate.eval_step`, or training by `plan.make_plan` with batches gathered from uint8 images.

  Args:
    network: a key of `NETWORKS`.
    work: a key of `photographs.WORKS`.
    images: uint8 (batch, height, width, 3).
    fields: of the config, to set.
  """
  batch = len(images)
  about = NETWORKS[network]
  frozen = {'last stage': about.frozen, 'last stage, kept maps': about.frozen, 'head': about.stages}.get(work, 0)
  name, *of_model = about.model
  config = vary(
    default_config(name),
    {
      **{f'model.{field}': value for field, value in of_model},
      **fields,
      'model.frozen_stages': frozen,
      'fine_tuning.views': int(work == 'last stage, kept maps'),
      'batch_size': batch,
      'data.image_size': images.shape[1],
      'data.channels': 3,
      'optimizer.learning_rate': 1e-4,
      'optimizer.weight_decay': 0.0,
      'schedule.name': 'constant',
      'schedule.warmup_epochs': 0.0,
    },
  )
  if work == 'inference':
    model = models.create(config.model, CLASSES)
    variables = models.init(model, jax.random.key(0), images.shape[1:])
    one_batch, statistics = jnp.asarray(images), config_lib.statistics(config.data)
    return lambda count: jax.block_until_ready(
      [evaluate.eval_step(model, variables, one_batch, statistics) for _ in range(count)]
    )
  made = plan.make_plan(config, MAX_STEPS * batch, CLASSES, images.shape[1:], max_steps=MAX_STEPS)
  train_steps = train.compile_steps(made.step, config.seed)
  examples = np.zeros((batch, *made.boundary.shape), np.float16) if made.boundary else images
  data = distribute.replicate((examples, np.arange(batch, dtype=np.int32) % CLASSES))
  state = distribute.replicate(made.state)
  order = np.random.default_rng(0).integers(0, batch, (MAX_STEPS, jax.device_count(), batch), np.int32)

  def run(count: int) -> None:
    nonlocal state
    state, measured = train_steps(state, *data, order, np.int32(count))
    jax.block_until_ready((state, measured))

  return run


def onnx_inference(network: str, images: np.ndarray) -> Run:
  """Inference of the exported network in ONNX Runtime, with one thread per CPU."""
  import onnxruntime

  from cnn_jax.jaxpr_to_onnx import convert

  name, *fields = NETWORKS[network].model
  config = vary(default_config(name), {f'model.{field}': value for field, value in fields})
  model, statistics = models.create(config.model, CLASSES), config_lib.statistics(config.data)
  variables = models.init(model, jax.random.key(0), images.shape[1:])

  def probabilities(images):
    return jax.nn.softmax(models.infer(model, variables, augment.normalize(images, statistics))[0])

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = len(os.sched_getaffinity(0))
  session = onnxruntime.InferenceSession(
    convert(probabilities, images.shape[1:]).SerializeToString(), options, providers=['CPUExecutionProvider']
  )
  return lambda count: [session.run(None, {'images': images}) for _ in range(count)]


if __name__ == '__main__':
  main(sys.argv[1:])
