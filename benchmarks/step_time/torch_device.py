"""The device and the precision of a PyTorch peer."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch


class Device:
  """Where a peer computes, and in which precision.

  On a GPU, cuDNN chooses its algorithms by measuring them (`cudnn.benchmark`).

  Args:
    device: cpu | cuda.
    dtype: float32, or bfloat16 by `torch.autocast`, which keeps the parameters in float32.
  """

  def __init__(self, device: str = 'cpu', dtype: str = 'float32', **_: Any):
    self.name, self._dtype = device, dtype
    torch.backends.cudnn.benchmark = True

  def place(self, tensor: torch.Tensor) -> torch.Tensor:
    """Copies a tensor to the device."""
    return tensor.to(self.name)

  def autocast(self) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass."""
    return torch.autocast(self.name, torch.bfloat16) if self._dtype == 'bfloat16' else contextlib.nullcontext()

  def timed(self, *, full_precision: bool) -> Callable[[Callable[[int], None]], Callable[[int], None]]:
    """Decorates a function of steps, so that it waits for the device.

    Args:
      full_precision: whether float32 factors keep all their bits on a GPU, as in our inference. Otherwise their products
        are computed in TF32, as JAX does by default in training.
    """

    def decorate(run: Callable[[int], None]) -> Callable[[int], None]:
      @functools.wraps(run)
      def timed(steps: int) -> None:
        torch.backends.cudnn.allow_tf32 = not full_precision
        torch.backends.cuda.matmul.allow_tf32 = not full_precision
        run(steps)
        if self.name == 'cuda':
          torch.cuda.synchronize()

      return timed

    return decorate

  def peak_mb(self) -> float | None:
    """The peak memory of this process on the device, in MB of 2^20 bytes; None on the CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if self.name == 'cuda' else None
