"""Learning rate and batch size: does the best learning rate grow with the batch size?

python -m cnn_jax.sweep --config=configs/digits.py --space=experiments/spaces/learning_rate_batch_size.py \\
  --sampler=grid --pruner=none --trials=28
"""

GRID = {'learning_rate': (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)}


def suggest(trial, config):
  config.batch_size = trial.suggest_categorical('batch_size', (16, 32, 64, 128))
  config.optimizer.learning_rate = trial.suggest_float('learning_rate', 1e-3, 3.0, log=True)
