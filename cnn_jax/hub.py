"""Weights on the Hugging Face hub: `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`, through the package huggingface_hub.

Only two files of a repository are fetched: the weights and config.json, both read as data. They are kept in the hub's
own cache, so that a second run needs no network. HF_ENDPOINT sets another server.
"""

import os
import re
from typing import Any

from cnn_jax import UsageError, files

PREFIX = 'hf:'
_WEIGHTS = ('model.safetensors', 'pytorch_model.bin')  # the first one that is there


def is_name(place: str | os.PathLike) -> bool:
  """Whether a place is the name of weights on the hub, and not a path."""
  return os.fspath(place).startswith(PREFIX)


def fetch(name: str) -> str:
  """Fetches the weights of a repository.

  Args:
    name: `hf:OWNER/NAME[@REVISION]`.

  Returns:
    The path of the file, `.safetensors` or `.bin`.

  Raises:
    UsageError: the package is not installed, the server cannot be reached, or there is no such repository or no file of
      weights in it.
  """
  for file in _WEIGHTS:
    if path := _download(name, file):
      return path
  raise UsageError(f'{name} has no {" and no ".join(_WEIGHTS)}; choose another repository.')


def settings(name: str) -> dict[str, Any]:
  """What config.json of a repository says about its network.

  Args:
    name: `hf:OWNER/NAME[@REVISION]`.

  Returns:
    `architecture`, timm's name of the network, and `levels`, the mean and the standard deviation, in levels of 0 to 255,
    with which the images are to be normalised. What is missing there is missing here.

  Raises:
    UsageError: as `fetch`; or config.json is not JSON, or its statistics are not numbers.
  """
  path = _download(name, 'config.json')
  if not path:
    return {}
  values = files.read_json(path, 'choose another repository') or {}
  details = values.get('pretrained_cfg')
  details = details if isinstance(details, dict) else {}
  found: dict[str, Any] = {}
  if isinstance(architecture := values.get('architecture', details.get('architecture')), str):
    found['architecture'] = architecture
  if 'mean' in details and 'std' in details:
    found['levels'] = tuple(_levels(name, field, details[field]) for field in ('mean', 'std'))
  return found


def _levels(name: str, field: str, values: Any) -> tuple[float, ...]:
  numbers: list[Any] = values if isinstance(values, list) and len(values) in (1, 3) else [None]
  if not all(type(x) in (int, float) and 0 <= x <= 1 and (x or field == 'mean') for x in numbers):
    raise UsageError(f'{field} in config.json of {name} is not 1 or 3 numbers from 0 to 1; choose another repository.')
  return tuple(round(255 * x, 4) for x in numbers)


def _download(name: str, file: str) -> str | None:
  """The path of a file of a repository; None if the repository has no such file."""
  match = re.fullmatch(r'hf:([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?', name)
  if not match:
    raise UsageError(f'{name!r} names no repository; give hf:OWNER/NAME or hf:OWNER/NAME@REVISION.')
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError as error:
    raise UsageError(f"{name} needs the package huggingface_hub; run: pip install 'cnn_jax[hub]'") from error
  huggingface_hub.logging.set_verbosity_error()  # of what fails, one line is printed here
  try:
    return huggingface_hub.hf_hub_download(match[1], file, revision=match[2], endpoint=os.environ.get('HF_ENDPOINT'))
  except errors.LocalEntryNotFoundError as error:
    raise UsageError(
      f'{name} is not in the cache, and the hub cannot be reached; connect to the network, or fetch the file elsewhere '
      'and give its path.'
    ) from error
  except errors.EntryNotFoundError:
    return None
  except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
    raise UsageError(f'the hub has no {name}, or not for everybody; correct the name.') from error
  # Of servers and disks, of the libraries below and of the protocol.
  except Exception as error:
    reason = ' '.join(str(error).split())[:200]
    raise UsageError(f'{name} could not be fetched ({type(error).__name__}: {reason}); try again.') from error
