"""Makes `python -m benchmarks.accelerator` run the benchmark; see `run.py`."""

from benchmarks.accelerator.run import main
from cnn_jax import command

command.run(main)
