"""Regularization: weight decay, label smoothing, dropout and augmentation.

python -m cnn_jax.sweep --config=configs/digits.py --space=experiments/spaces/regularization.py --trials=40
"""


def suggest(trial, config):
  config.optimizer.weight_decay = trial.suggest_float('weight_decay', 1e-5, 1e-2, log=True)
  config.loss.label_smoothing = trial.suggest_float('label_smoothing', 0.0, 0.2, step=0.05)
  config.model.dropout = trial.suggest_float('dropout', 0.0, 0.5, step=0.1)
  config.augment.shift = trial.suggest_int('shift', 0, 2)
  config.augment.rotate = trial.suggest_float('rotate', 0.0, 15.0, step=5.0)
