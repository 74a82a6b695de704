"""A process that stays warm and reads hostile workdirs and exports, one call after another, under observation.

It reads a JSON object per line, {"call": module or 'cnn_jax.load' or 'cnn_jax.export.load', "arguments": [...]}, and
answers with one: {"status", "stdout", "stderr", "events"}. `events` lists what Python did in the call that a command
which only reads must not do: starting programs, connecting, unpickling, and writing outside of the allowed folders.
"""

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import traceback

from tests.helpers import ROOT

_LIMIT = 24 * 2**30  # bytes of address space: a call that wants more fails before the machine does
_FORBIDDEN = {
  'os.system', 'os.exec', 'os.fork', 'os.posix_spawn', 'subprocess.Popen', 'socket.connect', 'pickle.find_class',
  'ctypes.dlopen', 'urllib.Request', 'os.chmod', 'os.chown', 'os.link', 'os.symlink', 'shutil.rmtree', 'os.truncate',
}  # fmt: skip
_CHANGING = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir'}


class Reader:
  """Starts the process when it is needed, and again after one that hung or died.

  Args:
    allowed: folders in which calls may write.
    timeout: seconds per call.
  """

  def __init__(self, allowed, timeout=20):
    self._allowed, self._timeout, self._process = [str(path) for path in allowed], timeout, None

  def call(self, name, *arguments):
    """Makes a call; returns the answer, in which "status" is 'hang' or 'died' if there was none."""
    if self._process is None or self._process.poll() is not None:
      self._process = subprocess.Popen(
        [sys.executable, '-m', 'tests.faults.warm', *self._allowed],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
      )  # fmt: skip
      self._process.stdout.readline()  # it has imported everything
    self._process.stdin.write(json.dumps({'call': name, 'arguments': [str(x) for x in arguments]}) + '\n')
    self._process.stdin.flush()
    import select

    ready, _, _ = select.select([self._process.stdout], [], [], self._timeout)
    line = self._process.stdout.readline() if ready else ''
    if not line:
      self.close()
      return {'status': 'died' if ready else 'hang', 'stdout': '', 'stderr': '', 'events': []}
    return json.loads(line)

  def close(self):
    if self._process is not None:
      self._process.kill()
      self._process.wait()
      self._process.stdin.close()
      self._process.stdout.close()
      self._process = None


def main(allowed):
  from cnn_jax import evaluate, export, predict, report  # noqa: F401

  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what native code prints must not become an answer
  resource.setrlimit(resource.RLIMIT_AS, (_LIMIT, _LIMIT))
  events, watching = [], [False]

  def inside(path):
    try:
      path = os.path.realpath(os.fsdecode(path))
    except (TypeError, ValueError):
      return True  # a file descriptor
    return path == os.devnull or any(
      (path + os.sep).startswith(os.path.realpath(folder) + os.sep) for folder in allowed
    )

  def watch(event, arguments):
    if not watching[0]:
      return
    forbidden = event in _FORBIDDEN and arguments[0] is not None  # ctypes.CDLL(None) is this process
    if event in _CHANGING:
      forbidden = not all(inside(path) for path in arguments if isinstance(path, str | bytes))
    if event == 'open':
      writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
      forbidden = writes and not inside(arguments[0])
    if forbidden:
      events.append(f'{event}{arguments!r}'[:300])

  sys.addaudithook(watch)
  print('ready', file=answers, flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    events.clear()
    watching[0] = True
    answer = _call(asked['call'], asked['arguments'])
    watching[0] = False
    print(json.dumps(answer | {'events': list(events)}), file=answers, flush=True)


def _call(name, arguments):
  import numpy as np

  import cnn_jax
  from cnn_jax import command, export
  from tests.helpers import call_command

  try:
    if name not in ('cnn_jax.load', 'cnn_jax.export.load'):
      done = call_command(name, *arguments)
      return {'status': done.returncode, 'stdout': done.stdout[: 10**6], 'stderr': done.stderr[: 10**6]}
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
      try:
        if name == 'cnn_jax.load':
          model = cnn_jax.load(*arguments)
          model.predict(np.zeros(model.run.image_shape, np.uint8))
        else:
          model = export.load(*arguments)
          model(np.zeros((1, *model.image_shape), np.uint8))
      except cnn_jax.UsageError as error:
        command.fail(error)
        return {'status': 2, 'stdout': '', 'stderr': stderr.getvalue()}
    return {'status': 0, 'stdout': '', 'stderr': stderr.getvalue()}
  except BaseException:
    return {'status': 1, 'stdout': '', 'stderr': traceback.format_exc()[-3000:]}


if __name__ == '__main__':
  main(sys.argv[1:])
