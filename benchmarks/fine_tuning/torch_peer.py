"""EfficientNet-Lite0 with the same weights, fine-tuned by PyTorch: eager, channels_last.

    python -m benchmarks.fine_tuning.torch_peer DATA.npz WEIGHTS.pth THREADS

`run.py` starts it in an interpreter that has PyTorch. THREADS is 0 for one per CPU. A request is a recipe of
`run.RECIPES` as JSON, a seed, and the fold to hold out, or -1 to train on all pictures and to test; see
`benchmarks.peers`. The whole network is trained. Batch norms use their running statistics and keep them, as ours do.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers, torch_efficientnet


def main(data: Path, weights: Path, threads: int) -> None:
  """Reads the data, and answers requests."""
  torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
  arrays = dict(np.load(data, allow_pickle=False))

  def answer(recipe: str, seed: str, fold: str) -> dict[str, float]:
    images, labels = (torch.from_numpy(arrays[name]) for name in ('images', 'labels'))
    if int(fold) < 0:
      test_images, test_labels = (torch.from_numpy(arrays[name]) for name in ('test_images', 'test_labels'))
    else:
      held_out = torch.from_numpy(arrays['folds'] == int(fold))
      test_images, test_labels = images[held_out], labels[held_out]
      images, labels = images[~held_out], labels[~held_out]
    model = fine_tune(json.loads(recipe), weights, images, labels, int(seed))
    return {'correct': count_correct(model, test_images, test_labels), 'n': len(test_labels)}

  peers.serve(answer, version=torch.__version__)


def fine_tune(
  recipe: dict[str, Any], weights: Path, images: torch.Tensor, labels: torch.Tensor, seed: int
) -> nn.Sequential:
  """Trains a network with a fresh head.

  Args:
    recipe: of `run.RECIPES`.
    weights: published ones; see `torch_efficientnet.load`.
    images: uint8 (n, height, width, channels).
    labels: integers (n,).
    seed: of the head, the order, the augmentation and dropout.
  """
  torch.manual_seed(seed)
  labels = labels.long()
  model = nn.Sequential(*torch_efficientnet.layers(int(labels.max()) + 1)).to(memory_format=torch.channels_last)
  torch_efficientnet.load(model, weights)
  for module in model.modules():  # dropout alone is in training mode
    module.train(isinstance(module, nn.Dropout))
  if recipe['optimizer'] == 'sgd':
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe['rate'], momentum=0.9, nesterov=True)
  else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe['rate'])
  per_epoch = -(-len(images) // recipe['batch'])
  total, warmup = recipe['epochs'] * per_epoch, per_epoch
  schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / total)) / 2)
  )
  for _ in range(recipe['epochs']):
    for batch in torch.randperm(len(images)).split(recipe['batch']):
      logits = model(augment(prepare(images[batch]), recipe['crop']))
      optimizer.zero_grad(set_to_none=True)
      F.cross_entropy(logits, labels[batch], label_smoothing=recipe['smoothing']).backward()
      optimizer.step()
      schedule.step()
  return model


def count_correct(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> int:
  """How many pictures are classified correctly by the mean of the logits of a picture and its mirror image.

  Args:
    model: for pictures from `prepare`.
    images: uint8 (n, height, width, channels).
    labels: integers (n,).
  """
  model.eval()
  correct = 0
  with torch.inference_mode():
    for some, truth in zip(images.split(50), labels.split(50), strict=True):
      x = prepare(some)
      correct += int(((model(x) + model(x.flip(3))).argmax(1) == truth).sum())
  return correct


def prepare(images: torch.Tensor) -> torch.Tensor:
  """uint8 (n, height, width, channels) to float (n, channels, height, width) in [-1, 1], channels last in memory."""
  return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def augment(x: torch.Tensor, least: float) -> torch.Tensor:
  """Random crops, resized to the size of the picture, half of them mirrored.

  Args:
    x: float (n, channels, height, width).
    least: of the area that a crop holds; its aspect ratio is from 3/4 to 4/3.
  """
  n = len(x)
  area = torch.empty(n).uniform_(least, 1)
  root = torch.empty(n).uniform_(-1, 1).mul_(math.log(4 / 3) / 2).exp_()  # of the aspect ratio
  sizes = torch.stack([area.sqrt() * root, area.sqrt() / root], 1).clamp_(max=1)  # width and height, of the picture's
  theta = torch.zeros(n, 2, 3)
  theta[:, 0, 0] = sizes[:, 0] * torch.randint(0, 2, (n,)).mul(2).sub(1)
  theta[:, 1, 1] = sizes[:, 1]
  theta[:, :, 2] = (1 - sizes) * torch.empty(n, 2).uniform_(-1, 1)
  grid = F.affine_grid(theta, list(x.shape), align_corners=False)
  made = F.grid_sample(x, grid, padding_mode='border', align_corners=False)
  return made.contiguous(memory_format=torch.channels_last)


if __name__ == '__main__':
  main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
