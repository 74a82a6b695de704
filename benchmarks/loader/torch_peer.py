"""The PyTorch peer of `run.py`: a DataLoader of a folder, with Pillow or with torchvision's decoder.

    python -m benchmarks.loader.torch_peer FOLDER

It answers the requests `Pillow|torchvision CORES COUNT`.
"""

import os
import pathlib
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from benchmarks import peers
from benchmarks.loader.peer import BATCH, SIZE, measure


def main(argv: Sequence[str]) -> None:
  """Lists the files, reports the versions, and answers requests."""
  paths = sorted(pathlib.Path(argv[0], 'train').rglob('*.jpg'))
  torch.set_num_threads(1)
  resize = [v2.Resize(SIZE, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(SIZE)]
  loads = {
    'Pillow': (lambda path: Image.open(path).convert('RGB'), v2.Compose([*resize, v2.PILToTensor()])),
    'torchvision': (lambda path: decode_jpeg(read_file(str(path)), ImageReadMode.RGB), v2.Compose(resize)),
  }

  def read(decoder: str, cores: int, count: int) -> None:
    # On one core, a process of its own for reading only costs.
    files = Files([paths[i % len(paths)] for i in random.sample(range(count), count)], *loads[decoder])
    for images, _ in DataLoader(files, BATCH, num_workers=cores if cores > 1 else 0):
      assert images.dtype == torch.uint8 and images.shape == (BATCH, 3, SIZE, SIZE)

  peers.serve(
    lambda decoder, cores, count: measure(lambda: read(decoder, int(cores), int(count)), int(cores), int(count)),
    torch=torch.__version__,
    torchvision=torchvision.__version__,
  )


class Files(Dataset):
  """Files and their labels.

  Args:
    paths: of the files.
    load: reads and decodes one.
    prepare: brings it to its size, as a uint8 tensor.
  """

  def __init__(self, paths: Sequence[pathlib.Path], load: Callable[[Any], Any], prepare: Callable[[Any], Any]):
    self._paths, self._load, self._prepare = paths, load, prepare

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> tuple[Any, int]:
    return self._prepare(self._load(self._paths[index])), len(os.fspath(self._paths[index].parent)) % 2


if __name__ == '__main__':
  main(sys.argv[1:])
