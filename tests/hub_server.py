"""A server on loopback that answers as the Hugging Face hub does, for tests."""

import contextlib
import hashlib
import http.server
import threading

COMMIT = 40 * 'a'


@contextlib.contextmanager
def serve(repositories):
  """Serves files until the context ends.

  Args:
    repositories: {'owner/name': {file: bytes}}.

  Yields:
    (the address for HF_ENDPOINT, the list of the paths that were asked for).
  """
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
      self._answer(body=False)

    def do_GET(self):
      self._answer(body=True)

    def log_message(self, *_):
      pass

    def _answer(self, body):
      asked.append(self.path)
      repository, _, rest = self.path.strip('/').partition('/resolve/')
      revision, _, file = rest.partition('/')
      files = repositories.get(repository)
      error, data = '', b''
      if files is None:
        error = 'RepoNotFound'
      elif revision not in ('main', COMMIT):
        error = 'RevisionNotFound'
      elif file not in files:
        error = 'EntryNotFound'
      else:
        data = files[file]
      self.send_response(404 if error else 200)
      if error:
        self.send_header('X-Error-Code', error)
      else:
        self.send_header('ETag', f'"{hashlib.sha256(data).hexdigest()}"')
      if error != 'RepoNotFound':
        self.send_header('X-Repo-Commit', COMMIT)
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      if body:
        self.wfile.write(data)

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}', asked
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
