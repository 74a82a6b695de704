"""What the tests of checkpoints share: a small state of many types, saving it, and reading it back."""

from typing import Any, NamedTuple

import flax
import jax
import ml_dtypes
import numpy as np

from cnn_jax import checkpoint


class Momentum(NamedTuple):
  count: Any
  trace: Any


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  kernel = rng.normal(size=(3, 3, 2, 4)).astype(np.float32)
  params = {'block1': {'kernel': kernel, 'bias': rng.normal(size=4).astype(ml_dtypes.bfloat16)}}
  trace = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
  trace['block1']['kernel'].flat[:3] = -0.0, np.nan, np.inf
  return State(
    step=np.int32(seed),
    params=params,
    batch_stats={},
    opt_state=(Momentum(np.uint32(7), trace), (), [np.array([True, False])]),
    ema=None,
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def save(directory, step, seed=None, keep=2, **info):
  checkpoint.save(directory, step, make_state(step if seed is None else seed), info=info, keep=keep)


def restored_step(directory, **arguments):
  """The step restored, after checking that the state is the one saved then; and the warnings."""
  warnings = []
  state, step, _ = checkpoint.restore(directory, make_state(), warn=warnings.append, **arguments)
  assert_same(state, make_state(step))
  return step, warnings
