"""The recipe of `run.py` in PyTorch, eager. `run.py` starts it in an interpreter that has PyTorch.

    python -m benchmarks.mnist_speedrun.torch_peer FOLDER cpu|cuda

The folder holds `config.json` and `data.npz`. A request is a seed; see `benchmarks.peers`.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers


def main(folder: Path, device: str) -> None:
  """Reads the data, warms up, and answers requests."""
  config = json.loads((folder / 'config.json').read_text())
  arrays = np.load(folder / 'data.npz', allow_pickle=False)
  data = {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}
  train(config, data, 0, max_steps=20)
  peers.serve(lambda seed: train(config, data, int(seed)), version=torch.__version__)


def train(
  config: dict[str, Any], data: dict[str, torch.Tensor], seed: int, max_steps: int | None = None
) -> dict[str, float]:
  """Trains one seed, and returns the `accuracy` after the last step and the `seconds` of the steps.

  Args:
    config: the config of the run, as JSON has it.
    data: `images`, `labels`, `test_images`, `test_labels`, on the device that computes.
    seed: of initialisation and order.
    max_steps: stop after so many; None: after the last epoch.
  """
  torch.manual_seed(seed)
  images, labels = data['images'], data['labels'].long()
  # Channels first, the default of PyTorch, which is faster than channels last for layers as narrow as these.
  model = network(config, images.shape[3], images.shape[1]).to(images.device)
  optimizer = torch.optim.SGD(
    model.parameters(), lr=1.0, momentum=config['optimizer']['momentum'], nesterov=config['optimizer']['nesterov']
  )
  kernels = [p for p in model.parameters() if p.ndim > 1]
  batch_size, decay = config['batch_size'], config['optimizer']['weight_decay']
  per_epoch = len(images) // batch_size
  total, step = per_epoch * config['epochs'], 0
  model.train()
  started = time.perf_counter()
  random = np.random.default_rng(seed)  # of all epochs, so that each has another order
  for _ in range(config['epochs']):
    order = torch.from_numpy(random.permutation(len(images))).to(images.device)
    for first in range(0, per_epoch * batch_size, batch_size):
      batch = order[first : first + batch_size]
      rate = learning_rate(config, step, total, per_epoch)
      optimizer.param_groups[0]['lr'] = rate
      logits = model(prepare(images[batch]))
      loss = F.cross_entropy(logits, labels[batch], label_smoothing=config['loss']['label_smoothing'])
      optimizer.zero_grad(set_to_none=True)
      loss.backward()
      with torch.no_grad():
        torch._foreach_mul_(kernels, 1 - rate * decay)
      optimizer.step()
      step += 1
      if step == max_steps:
        break
  if images.is_cuda:
    torch.cuda.synchronize()
  seconds = time.perf_counter() - started
  model.eval()
  with torch.no_grad():
    predicted = torch.cat([model(prepare(part)).argmax(1) for part in data['test_images'].split(1000)])
  return {'accuracy': float((predicted == data['test_labels']).float().mean()), 'seconds': seconds}


def network(config: dict[str, Any], channels: int, side: int) -> nn.Sequential:
  """Convolutions, each followed by a 2x2 maximum (except the last), batch norm and ReLU; then one linear layer.

  Args:
    config: as `train`.
    channels: of the images.
    side: of the images, in pixels.
  """
  layers: list[nn.Module] = []
  features = config['model']['features']
  for i, width in enumerate(features):
    convolution = nn.Conv2d(channels, width, config['model']['kernel_size'], padding='same', bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity='linear')
    with torch.no_grad():
      convolution.weight.mul_(math.sqrt(2))  # He et al. 2015: variance 2 / fan-in
    layers.append(convolution)
    if i < len(features) - 1:
      layers.append(nn.MaxPool2d(2))
      side //= 2
    layers += [nn.BatchNorm2d(width, momentum=1 - config['model']['norm_momentum']), nn.ReLU()]
    channels = width
  if config['model']['aggregate'] == 'gap':
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
  else:
    layers += [nn.Flatten(), nn.Linear(channels * side * side, 10)]
  return nn.Sequential(*layers)


def prepare(images: torch.Tensor) -> torch.Tensor:
  """uint8 (batch, height, width, channels) to float (batch, channels, height, width) in [-1, 1]."""
  return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(config: dict[str, Any], step: int, total: int, per_epoch: int) -> float:
  """The schedule `one_cycle` of `cnn_jax.optim`.

  Args:
    config: as `train`.
    step: from 0.
    total: steps of the run.
    per_epoch: steps of an epoch.
  """
  peak, warmup = config['optimizer']['learning_rate'], round(config['schedule']['warmup_epochs'] * per_epoch)
  if step < warmup:
    return peak * (1 / 25 + 24 / 25 * (1 - math.cos(math.pi * step / warmup)) / 2)
  end = config['schedule']['end']
  return peak * (end + (1 - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)


if __name__ == '__main__':
  main(Path(sys.argv[1]), sys.argv[2])
