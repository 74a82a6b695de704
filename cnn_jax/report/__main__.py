"""Runs the command `python -m cnn_jax.report`."""

from cnn_jax import command, report

command.run(report.main)
