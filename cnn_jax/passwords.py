"""Hides passwords, keys and tokens in text that is printed or recorded."""

import os
import re
import urllib.parse
from collections.abc import Collection, Sequence

# Words that other letters may precede, as in `sslpassword`, and words that stand alone or after a separator.
_GLUED = r'pass(?:word|wd|phrase)|secret|tokens?|(?:api|access|secret|private|account|signing)[_-]?keys?'
_ALONE = r'pass|passcode|pwd|credentials?|authorization|auth|signature|sig'
_NAME = rf'(?:[a-z0-9]+[_.-])*(?:[a-z0-9]*?(?:{_GLUED})|{_ALONE})'  # WANDB_API_KEY, X-Amz-Signature
_IS_NAME = re.compile(_NAME, re.IGNORECASE)

# Each matches what stays, as the group `kept`, and then the secret.
_PATTERNS = [
  re.compile(pattern, re.IGNORECASE)
  for pattern in (
    r'(?P<kept>//[^\s/:@]*:)(?P<secret>[^@\n]*(?:@\S*)?)@',  # USER:PASSWORD@HOST; the password may hold any character
    r'(?P<kept>//)(?P<secret>[\w.~%-]{20,})@',  # TOKEN@HOST
    # NAME=VALUE or "NAME": "VALUE"
    rf"""(?P<kept>(?<![a-z0-9]){_NAME}(?:["']?\s?=\s?|["']:\s?))(?P<secret>"[^"]*"|'[^']*'|[^&;,\s"']+)""",
    rf"""(?P<kept>(?<![a-z0-9])(?:{_GLUED}):\s?)(?P<secret>"[^"]*"|'[^']*')""",
    rf'(?P<kept>(?<!\S)--?{_NAME}\s+)(?P<secret>[^\s-]\S*)',  # --NAME VALUE
    r'(?P<kept>\b(?:bearer|basic)\s+)(?P<secret>[\w.~+/=-]{8,})',  # a header of HTTP
    # Forms of tokens that say what they are.
    r'(?P<kept>\b)(?P<secret>(?:gh[pousr]_|github_pat_|glpat-|hf_|sk-|xox[abprs]-|akia|asia)[\w-]{16,}|eyj[\w-]+\.eyj[\w.-]+)',
  )
]


def mask(text: str, known: Collection[str] = ()) -> str:
  """Replaces every secret in a text by `***`.

  Secrets are recognised by their place (the password of a URL, the value of a name such as `password` or `api_key`) and
  by the forms of well-known tokens. The values of environment variables with such names are replaced anywhere.

  Args:
    text: an argument, a URL or a message.
    known: more secrets to replace anywhere; from `find`.
  """
  for secret in sorted({*known, *_of_environment()}, key=len, reverse=True):
    text = text.replace(secret, '***')
  for pattern in _PATTERNS:
    text = pattern.sub(lambda found: f'{found["kept"]}***{"@" if found[0].endswith("@") else ""}', text)
  return text


def mask_arguments(arguments: Sequence[str]) -> list[str]:
  """Replaces every secret in a command line by `***`.

  Args:
    arguments: of a process; a secret may follow its name as an argument of its own.
  """
  known = find(arguments)
  masked, name = [], ''
  for argument in arguments:
    flag, equals, _ = argument.partition('=')
    if _is_option(name) and not argument.startswith('--'):
      masked.append('***')
    elif equals and _is_option(flag):
      masked.append(f'{flag}=***')
    else:
      masked.append(mask(argument, known))
    name = argument
  return masked


def find(arguments: Sequence[str]) -> set[str]:
  """The secrets in a command line, also as they are without the quoting of URLs.

  Args:
    arguments: of a process.
  """
  found = set()
  for name, argument in zip(['', *arguments], arguments, strict=False):
    flag, equals, value = argument.partition('=')
    if _is_option(name) and not argument.startswith('--'):
      found.add(argument)
    elif equals and _is_option(flag):
      found.add(value)
    else:
      found |= {match['secret'].strip('\'"') for pattern in _PATTERNS for match in pattern.finditer(argument)}
  # A driver may take a password for an address, and then name a part of it.
  found |= {part for secret in found for part in re.split('[@/?#:]', secret)}
  found |= {urllib.parse.unquote(secret) for secret in found} | {urllib.parse.unquote_plus(secret) for secret in found}
  return {secret for secret in found if len(secret) >= 4}


def _is_option(argument: str) -> bool:
  return argument.startswith('-') and _IS_NAME.fullmatch(argument.lstrip('-')) is not None


def _of_environment() -> set[str]:
  paths = ('PWD', 'OLDPWD')
  return {v for name, v in os.environ.items() if len(v) >= 8 and name not in paths and _IS_NAME.fullmatch(name)}
