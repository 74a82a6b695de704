"""The learning rate, and the two settings whose best values depend on it: momentum and weight decay.

python -m cnn_jax.sweep --config=configs/digits.py --space=experiments/spaces/learning_rate.py --trials=30
"""

# The values of --sampler=grid. The other samplers use the whole ranges below.
GRID = {
  'learning_rate': (0.01, 0.03, 0.1, 0.3, 1.0),
  'momentum': (0.8, 0.9, 0.95),
  'weight_decay': (5e-5, 5e-4, 5e-3),
}


def suggest(trial, config):
  config.optimizer.learning_rate = trial.suggest_float('learning_rate', 3e-3, 3.0, log=True)
  config.optimizer.momentum = trial.suggest_float('momentum', 0.8, 0.98)
  config.optimizer.weight_decay = trial.suggest_float('weight_decay', 1e-5, 1e-2, log=True)
