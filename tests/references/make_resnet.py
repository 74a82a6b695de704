"""Writes resnet18.npz and resnet50.npz, what torchvision's ResNets compute with small random weights.

    python -m venv /tmp/reference && /tmp/reference/bin/pip install torch==2.14.1 torchvision==0.29.1
    /tmp/reference/bin/python tests/references/make_resnet.py

Tests read the two files and do not run this. The networks have an eighth of the width, so that the files are small.
Weights and images are numbers of eight bits, which compress well; all is computed in float32.
"""

import pathlib

import numpy as np
import torch
import torchvision

WIDTH, CLASSES, SIDE, BATCH = 8, 10, 96, 2
BLOCKS = {
  'resnet18': (torchvision.models.resnet.BasicBlock, [2, 2, 2, 2]),
  'resnet50': (torchvision.models.resnet.Bottleneck, [3, 4, 6, 3]),
}


class Narrow(torchvision.models.ResNet):
  """torchvision's ResNet with `WIDTH` channels in its stem; its stages double them, as they double 64."""

  def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
    if planes == 64:
      self.inplanes = WIDTH
      self.conv1 = torch.nn.Conv2d(3, WIDTH, 7, stride=2, padding=3, bias=False)
      self.bn1 = torch.nn.BatchNorm2d(WIDTH)
    return super()._make_layer(block, planes * WIDTH // 64, blocks, stride, dilate)


def main():
  for name, (block, blocks) in BLOCKS.items():
    torch.manual_seed(0)
    network = Narrow(block, blocks)
    network.fc = torch.nn.Linear(8 * WIDTH * block.expansion, CLASSES)
    randomize(network)
    images = few_bits(torch.randn(BATCH, 3, SIDE, SIDE))
    arrays = {'images': images.permute(0, 2, 3, 1)}
    with torch.no_grad():
      arrays |= {f'weights/{key}': tensor.clone() for key, tensor in network.state_dict().items() if tensor.ndim}
    # With the running statistics: logits, and the maps of the first image.
    network.eval()
    stages = [getattr(network, f'layer{i}') for i in range(1, 5)]
    outputs = []
    for stage in stages:
      stage.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
    arrays['logits'] = network(images)
    arrays |= {f'maps/stage{i}': x[:1].permute(0, 2, 3, 1).clone() for i, x in enumerate(outputs, 1)}
    # With the statistics of the batch: logits, and the gradient of the mean of their squares.
    network.train()
    arrays['train/logits'] = logits = network(images)
    logits.square().mean().backward()
    arrays['train/gradient'] = network.conv1.weight.grad.permute(2, 3, 1, 0)
    # This network moves running statistics by a tenth; the variance of the batch is the unbiased one.
    arrays['train/running_mean'] = network.bn1.running_mean
    path = pathlib.Path(__file__).with_name(f'{name}.npz')
    np.savez_compressed(path, **{key: compact(tensor) for key, tensor in arrays.items()})
    print(f'{path.name}: {path.stat().st_size:,} bytes')


def randomize(network):
  """Draws all weights and statistics anew; of blocks' last norms too, which may start at zero."""
  for key, tensor in network.state_dict().items():
    if not tensor.ndim:  # num_batches_tracked
      continue
    if key.endswith('running_var'):
      new = 0.5 + torch.rand_like(tensor)
    elif tensor.ndim == 1 and key.endswith('weight'):
      new = 0.5 + torch.rand_like(tensor) / 2
    elif tensor.ndim == 1:
      new = torch.randn_like(tensor) / 5
    else:
      new = torch.randn_like(tensor) * (2 / tensor[0].numel()) ** 0.5
    tensor.copy_(few_bits(new))


def few_bits(tensor):
  return tensor.to(torch.float8_e4m3fn).float()


def compact(tensor):
  """float16 where it loses nothing, otherwise float32."""
  array = tensor.detach().numpy()
  half = array.astype(np.float16)
  return half if np.array_equal(half, array) else array


if __name__ == '__main__':
  main()
