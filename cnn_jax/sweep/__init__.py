"""Hyperparameter search: many ordinary runs of one config, compared on validation.

The command is `python -m cnn_jax.sweep`; see `__main__.py` and docs/sweeps.md.
"""
