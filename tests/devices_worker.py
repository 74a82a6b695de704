"""Takes some steps of small networks on all devices of this process and saves the results; run by test_devices.py.

python -m tests.devices_worker OUTPUT.npz NETWORK...
"""

import sys

import jax
import numpy as np

from cnn_jax import config, distribute, evaluate, plan, train
from cnn_jax.data import Split, feed
from cnn_jax.state import eval_variables
from tests.helpers import LEVELS
from tests.networks import SIDES, SMALL

SHALLOW = ('cnn', 'resnet')
CHUNKS = ((0, 0, 6), (1, 0, 4), (1, 4, 2))  # epoch, first step, steps: also fewer than one call can take
# The recipe of the speed record, with a small rate: updates are orthogonalised in bfloat16, which magnifies rounding.
SPEED = 'speed recipe'
SPEED_FIELDS = {
  'optimizer.name': 'muon_sgd', 'optimizer.learning_rate': 1e-3, 'optimizer.momentum': 0.6,
  'optimizer.first_stage_epochs': 1.0, 'loss.reduction': 'sum', 'loss.label_smoothing': 0.2, 'augment.flip': True,
  'augment.alternate': True, 'augment.shift': 2, 'augment.padding': 'reflect', 'schedule.name': 'linear',
  'schedule.warmup_epochs': 0.0,
}  # fmt: skip
SIZES = (0, 1, 7, 8, 9, 17)  # of the sets that are evaluated
# Of one network augmentation, imbalance and evaluation are tested too, which do not depend on the network.
THOROUGH = 'cnn'
AUGMENTATION = {
  'augment.shift': 2, 'augment.flip': True, 'augment.rotate': 10.0, 'augment.erase': 0.3, 'augment.brightness': 0.2,
  'augment.contrast': 0.2, 'augment.cutmix': 0.5, 'loss.label_smoothing': 0.1, 'data.sampling': 'balanced',
  'loss.class_weights': (1, 2, 0.5, 1, 1, 3, 1, 1, 9, 1),
}  # fmt: skip


def main(output, *networks):
  saved = {'devices': jax.device_count()}
  for name in networks:
    saved |= {f'{name}/{key}': value for key, value in results(name).items()}
  np.savez(output, **saved)


def results(name):
  """The state, the metrics and logits after 12 steps, or 2 or 3, by name."""
  network = 'airbench' if name == SPEED else name
  settings = config.vary(
    config.default_config(network),
    {f'model.{field}': value for field, value in SMALL[network].items()}
    | {'batch_size': 32, 'epochs': 4, 'optimizer.learning_rate': 0.05, 'evaluation.ema_decay': 0.9}
    | {THOROUGH: AUGMENTATION, SPEED: SPEED_FIELDS}.get(name, {}),
  )
  random = np.random.default_rng(0)
  # Two steps per epoch: then the first stage is fixed, and the other half of the images is mirrored.
  n = 70 if name == SPEED else 200
  images = random.integers(0, 256, (n, SIDES[network], SIDES[network], 3), np.uint8)
  split = Split(images, random.integers(0, 10, n).astype(np.int32))
  made = plan.make_plan(settings, len(split), 10, images.shape[1:])
  train_steps = train.compile_steps(made.step, settings.seed)
  examples = feed.Resident(split, settings.batch_size, settings.seed, made.capacity, settings.data.sampling)
  state, measured = distribute.replicate(made.state), {}
  # Of a deep network with small maps, more steps would magnify the differences of rounding.
  chunks = CHUNKS if name in SHALLOW else ((0, 0, 2), (1, 0, 1)) if name == SPEED else ((0, 0, 2),)
  for epoch, offset, count in chunks:
    indices = examples.indices(epoch, offset, count)
    state, measured = train_steps(state, examples.images, examples.labels, indices, np.int32(count))
  for leaf in jax.tree.leaves(state):
    shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(shards) == jax.local_device_count()
    assert all(np.array_equal(shard, shards[0]) for shard in shards), 'the devices do not agree'
  found = {f'state{jax.tree_util.keystr(p)}': np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(state)}
  found |= {f'measured/{name}': np.asarray(values)[: chunks[-1][2]] for name, values in measured.items()}
  for n in SIZES if name == THOROUGH else ():
    found[f'logits/{n}'] = evaluate.compute_logits(made.model, eval_variables(state), images[:n], LEVELS, 8)
  return found


if __name__ == '__main__':
  main(*sys.argv[1:])
