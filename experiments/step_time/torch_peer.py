"""The PyTorch peer of `run.py`, which starts it in an interpreter that has PyTorch: channels_last, eager or compiled.

Answers a line `<train | inference> <steps>` with one JSON object: milliseconds a step and the peak memory so far.
"""

import json
import os
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


def main(name: str, network: list, batch: int) -> None:
  """Answers requests until the input ends."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  (height, width, channels), features = network
  model = build(channels, features).to(memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
  images = torch.rand(batch, channels, height, width).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
  labels = torch.randint(0, 10, (batch,))
  forward = torch.compile(model) if name == 'pytorch_compiled' else model

  def train(steps: int) -> None:
    model.train()
    for _ in range(steps):
      optimizer.zero_grad(set_to_none=True)
      F.cross_entropy(forward(images), labels).backward()
      optimizer.step()

  def inference(steps: int) -> None:
    model.eval()
    with torch.inference_mode():
      for _ in range(steps):
        forward(images)

  runs = {'train': train, 'inference': inference}
  for run in runs.values():
    run(3)
  print('{}', flush=True)
  for line in sys.stdin:
    work, count = line.split()
    runs[work](1)
    started = time.perf_counter()
    runs[work](int(count))
    milliseconds = 1e3 * (time.perf_counter() - started) / int(count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({'ms': milliseconds, 'peak_mb': peak}), flush=True)


def build(channels: int, features: list[int]) -> nn.Sequential:
  """The network of `jax_peer.StockCNN`."""
  layers: list[nn.Module] = []
  for i, width in enumerate(features):
    layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
    if i < len(features) - 1:
      layers.append(nn.MaxPool2d(2))
    layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    channels = width
  return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


if __name__ == '__main__':
  main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
