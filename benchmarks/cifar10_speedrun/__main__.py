"""`python -m benchmarks.cifar10_speedrun` is `python -m benchmarks.cifar10_speedrun.run`."""

from benchmarks.cifar10_speedrun.run import main
from cnn_jax import command

command.run(main)
