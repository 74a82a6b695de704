"""What a file is by its first bytes, for messages about files that are not images."""

import codecs
import re

BYTES = 512  # that `describe` needs

_HEIF = 'a HEIC photograph, which must be converted to JPEG or PNG first'
# Where the bytes are, the bytes, and what the file is. The first that fits counts.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
  (0, b'version https://git-lfs.github.com/spec/', 'a pointer of Git LFS (run: git lfs pull)'),
  (0, b'%PDF', 'a PDF document'),
  (0, b'%!PS', 'a PostScript file'),
  (0, b'\xc5\xd0\xd3\xc6', 'a PostScript file'),
  (4, b'ftypavi', 'an AVIF picture that the installed Pillow cannot decode'),
  (4, b'ftypmif1', _HEIF),
  (4, b'ftypmsf1', _HEIF),
  (4, b'ftyphe', _HEIF),
  (4, b'ftypcrx ', 'a raw photograph of a camera, which must be converted to JPEG or PNG first'),
  (4, b'ftyp', 'a video'),
  (8, b'AVI ', 'a video'),
  (8, b'WAVE', 'a sound'),
  (0, b'\x1aE\xdf\xa3', 'a video'),
  (0, b'ID3', 'a sound'),
  (0, b'OggS', 'a sound or a video'),
  (8, b'CR\x02', 'a raw photograph of a camera, which must be converted to JPEG or PNG first'),
  (0, b'FUJIFILMCCD-RAW', 'a raw photograph of a camera, which must be converted to JPEG or PNG first'),
  (0, b'PK\x03\x04', 'a zip archive'),
  (0, b'PK\x05\x06', 'a zip archive'),
  (0, b'\x1f\x8b', 'a gzip archive'),
  (0, b'BZh', 'a bzip2 archive'),
  (0, b'\xfd7zXZ\x00', 'an xz archive'),
  (0, b'7z\xbc\xaf\x27\x1c', 'a 7-Zip archive'),
  (0, b'Rar!\x1a\x07', 'a RAR archive'),
  (257, b'ustar', 'a tar archive'),
  (0, b'\x00\x05\x16\x07', 'a companion file of macOS without an image'),
  (0, b'\x00\x00\x00\x01Bud1', 'a settings file of the macOS Finder'),
  (0, b'8BPS', 'a Photoshop document'),
  (0, b'gimp xcf', 'a GIMP document'),
  (0, b'\xff\x0a', 'a JPEG XL picture, which must be converted to JPEG or PNG first'),
  (0, b'\x00\x00\x00\x0cJXL ', 'a JPEG XL picture, which must be converted to JPEG or PNG first'),
  (128, b'DICM', 'a DICOM file, which must be converted to PNG first'),
  (0, b'SIMPLE  =', 'a FITS file, which must be converted to PNG first'),
  (0, b'\x93NUMPY', 'a NumPy array'),
  (0, b'\x89HDF\r\n\x1a\n', 'an HDF5 file'),
  (0, b'SQLite format 3', 'an SQLite database'),
  (0, b'\x00\x00\x01\x00', 'a Windows icon'),
  (0, b'\x7fELF', 'a program'),
  (0, b'MZ', 'a program'),
  (0, b'\xd0\xcf\x11\xe0', 'a Microsoft Office document'),
)
_IMAGES = (
  (0, b'\xff\xd8', 'JPEG'),
  (0, b'\x89PNG', 'PNG'),
  (0, b'GIF8', 'GIF'),
  (0, b'BM', 'BMP'),
  (0, b'II*\x00', 'TIFF'),
  (0, b'MM\x00*', 'TIFF'),
  (8, b'WEBP', 'WEBP'),
)


def describe(head: bytes) -> str:
  """Names the kind of a file that is not a readable image, as 'a PDF document'; '' if it is unknown.

  Args:
    head: the first `BYTES` bytes of the file, or all of them.
  """
  if not head:
    return 'empty'
  for start, signature, kind in _SIGNATURES:
    if head.startswith(signature, start):
      return kind
  for start, signature, kind in _IMAGES:
    if head.startswith(signature, start):
      return f'a damaged {kind} file'
  if not head.strip(b'\0'):
    return 'filled with zero bytes, as after an interrupted copy'
  return _describe_text(head)


def _describe_text(head: bytes) -> str:
  """Names the kind of a text; '' if it is not one. The last character may be cut."""
  encoding = 'utf-16' if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else 'utf-8-sig'
  try:
    text = codecs.getincrementaldecoder(encoding)().decode(head).lstrip()
  except UnicodeDecodeError:
    return ''
  if any(ord(character) < 32 and character not in '\t\n\r\f\x1b' for character in text):
    return ''
  start = text[:BYTES].lower()
  if re.match(r'<!doctype html|<html|<head|<body|<script|<!--.*<html', start, re.DOTALL):
    return 'an HTML page, as a failed download leaves'
  if start.startswith('<svg') or (start.startswith('<?xml') and '<svg' in start):
    return 'an SVG drawing, which must be converted to PNG first'
  if start.startswith('<?xml'):
    return 'an XML document'
  return 'a JSON file' if start.startswith(('{', '[')) else 'a text file'
