"""Which examples are in which step: a pure function of (seed, epoch), so there is no state to save."""

import numpy as np


def epoch_indices(num_examples: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
  """Order of one epoch.

  A fresh permutation each epoch; the remainder, another one each epoch, sits out.

  Args:
    num_examples: size of the split.
    batch_size: examples per step, over all devices.
    seed: non-negative.
    epoch: counted from 0.

  Returns:
    int32 (num_examples // batch_size, batch_size): row s holds the examples of step s of the
    epoch; no example appears twice.
  """
  steps = num_examples // batch_size
  # PCG64 by name: `default_rng` may choose another generator in a later NumPy.
  rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
  order = rng.permutation(num_examples).astype(np.int32)
  return order[: steps * batch_size].reshape(steps, batch_size)
