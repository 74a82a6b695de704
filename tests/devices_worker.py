"""Takes some steps on all devices of this process and saves what came of them; run by test_train.py.

python -m tests.devices_worker OUTPUT.npz
"""

import sys

import jax
import numpy as np

from cnn_jax import evaluate, train
from cnn_jax.config import default_config
from cnn_jax.data import batches
from cnn_jax.model import create_model
from cnn_jax.optim import make_optimizer, make_schedule


def main(output):
  config = default_config()
  config.batch_size = 32
  config.model.features = (8, 16)
  config.model.dropout = 0.2
  config.augment.update(
    {'shift': 2, 'flip': True, 'rotate': 10.0, 'erase': 0.3, 'brightness': 0.2, 'contrast': 0.2, 'cutmix': 0.5}
  )
  config.evaluation.ema_decay = 0.9
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (200, 12, 12, 3), np.uint8)
  labels = random.integers(0, 10, 200).astype(np.int32)
  model = create_model(config.model, 10)
  learning_rate = make_schedule(config.schedule, 0.05, 24, 6)
  tx = make_optimizer(config.optimizer, learning_rate)
  state = train.replicate(train.create_state(model, tx, config, (12, 12, 3)))
  steps = train.make_train_steps(model=model, tx=tx, learning_rate=learning_rate, config=config)
  order = np.concatenate([batches.epoch_indices(200, 32, 0, epoch) for epoch in range(4)])
  measured = {}
  for chunk in (order[:13], order[13:20]):  # of two lengths, so that a chunk is not filled
    indices = train.local_indices(np.pad(chunk, ((0, 13 - len(chunk)), (0, 0))))
    state, measured = steps(state, *train.replicate((images, labels)), indices, np.int32(len(chunk)))
  for leaf in jax.tree.leaves(state):
    shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(shards) == jax.local_device_count()
    assert all(np.array_equal(shard, shards[0]) for shard in shards), 'the devices do not agree'
  saved = {f'state{jax.tree_util.keystr(p)}': np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(state)}
  saved |= {f'measured/{name}': np.asarray(values)[:7] for name, values in measured.items()}
  for n in (0, 1, 7, 8, 9, 17):
    saved[f'logits/{n}'] = evaluate.compute_logits(model, train.eval_variables(state), images[:n], 8)
  np.savez(output, devices=jax.device_count(), **saved)


if __name__ == '__main__':
  main(sys.argv[1])
