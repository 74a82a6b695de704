"""The recipe of `run.py` in PyTorch: eager. Started by it, in an interpreter that has PyTorch.

Reads `config.json` and `data.npz` from the folder given, then a seed a line, and answers each with one JSON object.
"""

import json
import math
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def main(directory: pathlib.Path) -> None:
  """Answers seeds until the input ends."""
  config = json.loads((directory / 'config.json').read_text())
  arrays = np.load(directory / 'data.npz', allow_pickle=False)
  data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
  train(config, data, 0, 20)
  print('{}', flush=True)
  for line in sys.stdin:
    print(json.dumps(train(config, data, int(line), None)), flush=True)


def train(config: dict, data: dict[str, torch.Tensor], seed: int, max_steps: int | None) -> dict[str, float]:
  """Trains from nothing; returns the accuracy after the last step and the seconds of the steps."""
  torch.manual_seed(seed)
  model = network(config)  # layers as narrow as these are faster with channels first, PyTorch's default
  optimizer = torch.optim.SGD(
    model.parameters(), lr=1.0, momentum=config['optimizer']['momentum'], nesterov=config['optimizer']['nesterov']
  )
  kernels = [p for p in model.parameters() if p.ndim > 1]
  batch_size, decay = config['batch_size'], config['optimizer']['weight_decay']
  images, labels = data['images'], data['labels'].long()
  per_epoch = len(images) // batch_size
  total, step = per_epoch * config['epochs'], 0
  model.train()
  started = time.perf_counter()
  for _ in range(config['epochs']):
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
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
  seconds = time.perf_counter() - started
  model.eval()
  with torch.no_grad():
    found = [model(prepare(part)).argmax(1) for part in data['test_images'].split(1000)]
  return {'accuracy': float((torch.cat(found) == data['test_labels']).float().mean()), 'seconds': seconds}


def network(config: dict) -> nn.Sequential:
  """Convolution, 2x2 maximum (but in the last block), batch norm, ReLU; then all to one linear layer."""
  layers: list[nn.Module] = []
  channels, side = 1, 28
  features = config['model']['features']
  for i, width in enumerate(features):
    layers.append(nn.Conv2d(channels, width, config['model']['kernel_size'], padding='same', bias=False))
    nn.init.kaiming_normal_(layers[-1].weight, nonlinearity='linear')
    with torch.no_grad():
      layers[-1].weight.mul_(math.sqrt(2))  # He et al.: variance 2 / fan-in
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
  """uint8 (batch, 28, 28, 1) to float (batch, 1, 28, 28) in [-1, 1]."""
  return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(config: dict, step: int, total: int, per_epoch: int) -> float:
  """The one-cycle schedule of `cnn_jax.optim`."""
  peak, warmup = config['optimizer']['learning_rate'], round(config['schedule']['warmup_epochs'] * per_epoch)
  if step < warmup:
    return peak * (1 / 25 + 24 / 25 * (1 - math.cos(math.pi * step / warmup)) / 2)
  end = config['schedule']['end']
  return peak * (end + (1 - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
