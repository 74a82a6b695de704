"""Hides the passwords of database URLs in text that is printed or recorded."""

import re

_IN_NETLOC = re.compile(r'(//[^\s/:@]*:)[^@\n]*@(?:\S*@)?')  # USER:PASSWORD@HOST; the password may hold any character
_IN_QUERY = re.compile(r'([?&](?:ssl)?password=)[^&\s]*', re.IGNORECASE)


def mask(text: str) -> str:
  """Replaces every password of a URL in a text by `***`.

  Args:
    text: an argument, a URL or a message, which need not hold a URL.
  """
  return _IN_QUERY.sub(r'\1***', _IN_NETLOC.sub(r'\1***@', text))
