"""Coverage-guided fuzzing: readers of foreign files return a result or raise UsageError, whatever the bytes are.

python -m tests.faults.test_atheris TARGET [CORPUS] [-max_total_time=SECONDS]    fuzzes until something else happens
"""

import importlib
import io
import os
import subprocess
import sys

import pytest

from tests.faults.tools import ROOT

SECONDS = 8


def read_image(data):
  """The first byte chooses the options, the rest is an image file."""
  from cnn_jax.data.images import load_image

  choice = data[0] if data else 0
  size, channels, resize = (0, 16)[choice & 1], (0, 1, 3, 3)[choice >> 1 & 3], ('crop', 'pad')[choice >> 3 & 1]
  options = {'size': size, 'channels': channels, 'resize': resize, 'bit_depth': (0, 8, 12, 16)[choice >> 4 & 3]}
  image = load_image(io.BytesIO(data[1:]), **options)
  assert image.ndim == 3 and str(image.dtype) == 'uint8' and image.shape[2] in (1, 3)


def image_corpus():
  """Small valid images of all formats, each with two choices of options."""
  from tests.faults.test_images import EXAMPLES

  return [bytes([choice]) + example for example in EXAMPLES for choice in (0b0110100, 0b1111)]


# For each target: the function of bytes, the modules whose branches guide the search, and the valid inputs to start from.
TARGETS = {
  'image': (read_image, ('PIL', 'cnn_jax.data.images', 'cnn_jax.data.repair', 'cnn_jax.data.depth'), image_corpus),
}


@pytest.mark.faults
@pytest.mark.parametrize('target', TARGETS)
def test_fuzzing_finds_nothing(target, tmp_path):
  pytest.importorskip('atheris')
  for number, content in enumerate(TARGETS[target][2]()):
    (tmp_path / f'{number:03}').write_bytes(content)
  command = [sys.executable, '-m', 'tests.faults.test_atheris', target, tmp_path, f'-max_total_time={SECONDS}']
  options = ['-timeout=10', '-rss_limit_mb=3000', f'-artifact_prefix={tmp_path}/found-', '-max_len=4096']
  done = subprocess.run([*map(str, command), *options], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS + 120)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  assert 'Done ' in done.stderr and 'INITED' in done.stderr


def main(argv):
  import atheris

  from cnn_jax import UsageError

  function, modules, _ = TARGETS[argv[1]]
  with atheris.instrument_imports(include=list(modules)):
    for name in modules:
      importlib.import_module(name)

  def run(data):
    try:
      function(data)
    except UsageError as error:
      assert '\n' not in str(error), error  # noqa: PT017

  atheris.Setup([argv[0], *argv[2:]], run)
  atheris.Fuzz()


if __name__ == '__main__':
  os.environ.setdefault('PYTHONWARNINGS', 'ignore')
  main(sys.argv)
