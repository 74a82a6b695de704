"""The PyTorch peer of `run.py`: eager or compiled, channels_last, one thread per CPU.

    python -m benchmarks.step_time.torch_peer pytorch|pytorch_compiled '[[28, 28, 1], [32, 64, 128]]' 128 [OPTIONS]

The arguments and the requests `train STEPS` and `inference STEPS` are those of `jax_peer.py`; OPTIONS also has `device`,
`cpu` or `cuda`, see `torch_device`.
"""

import json
import os
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers
from benchmarks.step_time.torch_device import Device


def main(argv: Sequence[str]) -> None:
  """Warms up, reports the version of PyTorch, and answers requests."""
  name, network, size, *rest = argv
  (height, width, channels), features = json.loads(network)
  batch = int(size)
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  device = Device(**(json.loads(rest[0]) if rest else {}))
  model = build(channels, features).to(device.name, memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
  images = torch.rand(batch, channels, height, width).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
  images, labels = device.place(images), device.place(torch.randint(0, 10, (batch,)))
  forward = torch.compile(model) if name == 'pytorch_compiled' else model

  @device.timed(full_precision=False)
  def train(steps: int) -> None:
    model.train()
    for _ in range(steps):
      optimizer.zero_grad(set_to_none=True)
      with device.autocast():
        loss = F.cross_entropy(forward(images), labels)
      loss.backward()
      optimizer.step()

  @device.timed(full_precision=True)
  def inference(steps: int) -> None:
    model.eval()
    with torch.inference_mode(), device.autocast():
      for _ in range(steps):
        forward(images)

  runs = {'train': train, 'inference': inference}
  for run in runs.values():
    run(3)
  peers.serve(
    lambda work, steps: peers.time_steps(runs[work], int(steps)) | {'device_mb': device.peak_mb()},
    version=torch.__version__,
  )


def build(channels: int, features: Sequence[int]) -> nn.Sequential:
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
  main(sys.argv[1:])
