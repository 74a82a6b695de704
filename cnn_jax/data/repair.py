"""Files that Pillow refuses although the picture is there: JPEG without its last bytes, PNG with very much text."""

import io
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_MISSING = 0.05  # the share of a JPEG's pixels that may be missing
_END = b'\xff\xd9'
_JUNK_BYTES = 2**16
_JUNK_BYTES_PER_RESTART = 512
_MAX_RESTARTS = 2**15


class TruncatedError(Exception):
  """Too much of a JPEG is missing; `share` is how much, from 0 to 1."""

  def __init__(self, share: float):
    super().__init__(f'{100 * share:.0f} % of the picture is missing')
    self.share = share


def complete_jpeg(data: bytes, decode: Callable[[bytes], np.ndarray]) -> bytes:
  """Ends a JPEG that breaks off, if at most `MAX_MISSING` of the pixels depend on the bytes that are missing.

  A decoder fills what is missing without a word. So the picture is decoded several times, each time continued by other
  bytes: the pixels that differ are those that the file does not determine. This needs the last scan to be the one that
  breaks off, which the headers of the scans show.

  Args:
    data: the file. Zero bytes at the end count as missing: they are what an interrupted copy leaves.
    decode: returns the pixels of a complete JPEG as an array (height, width, ...); it may raise anything.

  Returns:
    The file with an end.

  Raises:
    TruncatedError: more is missing.
    ValueError: the headers are incomplete, or no continuation can be decoded.
  """
  data = data.rstrip(b'\0\xff')
  frame = _parse(data)
  if frame.missing_scans:
    raise TruncatedError(1.0)
  whole = decode(data + _END)
  differs, decoded = np.zeros(whole.shape[:2], bool), 0
  rng = np.random.Generator(np.random.PCG64(0))
  for _ in range(3):
    try:
      other = decode(data + _continue(frame, rng) + _END)
    except Exception:  # whatever a decoder raises on noise
      continue
    decoded += 1
    differs |= (other != whole).reshape(*differs.shape, -1).any(axis=2)
  if not decoded:
    raise ValueError('it is cut off')
  if differs.mean() > MAX_MISSING:
    raise TruncatedError(float(differs.mean()))
  return data + _END


def strip_png_text(data: bytes) -> bytes:
  """Returns a PNG without its texts; the orientation of the camera, which may be in one, is kept if it is short."""
  kept, place = [data[:8]], 8
  while place + 12 <= len(data):
    (length,) = struct.unpack_from('>I', data, place)
    kind, end = data[place + 4 : place + 8], place + 12 + length
    keyword = data[place + 8 : place + 88].split(b'\0')[0]
    oriented = keyword in (b'Raw profile type exif', b'XML:com.adobe.xmp') and length < 2**16
    if kind not in (b'tEXt', b'zTXt', b'iTXt') or oriented:
      kept.append(data[place:end])
    place = end
  return b''.join(kept)


class _Frame(NamedTuple):
  missing_scans: bool
  restarts: int  # how many restart markers the whole picture can have
  next_restart: int  # 0..7, the number of the first one that is missing


def _parse(data: bytes) -> _Frame:
  """Reads the headers of a JPEG that breaks off in one of its scans; ITU-T T.81, annex B."""
  stream = io.BytesIO(data[2:])
  interval, blocks, last_restart = 0, 0, -1
  depths: dict[int, np.ndarray] = {}  # of each component, the lowest bit of each coefficient that has been sent
  progressive = scanned = False
  while True:
    head = stream.read(4)
    if scanned and (len(head) < 4 or head[:2] == _END):
      break
    if len(head) < 4 or head[0] != 0xFF:
      raise ValueError('it is cut off before the picture begins')
    marker, length = head[1], int.from_bytes(head[2:], 'big')
    segment = stream.read(length - 2) if length >= 2 else b''
    if len(segment) < length - 2 or length < 2:
      if scanned:
        break
      raise ValueError('it is cut off before the picture begins')
    if marker in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
      progressive = marker in (0xC2, 0xCA)
      height, width, components = struct.unpack_from('>xHHB', segment)
      blocks = -(-height // 8) * -(-width // 8)
      depths = {segment[6 + 3 * i]: np.full(64, -1) for i in range(components)}
    elif marker == 0xDD:
      (interval,) = struct.unpack_from('>H', segment)
    elif marker == 0xDA:
      scanned = True
      first, last, bits = segment[-3:] if progressive else (0, 63, 0)
      for i in range(segment[0]):
        depths[segment[1 + 2 * i]][first : last + 1] = bits & 15
      last_restart = _skip_scan(stream)
  complete = scanned and all((depth == 0).all() for depth in depths.values())
  return _Frame(not complete, min(-(-blocks // interval), _MAX_RESTARTS) if interval else 0, (last_restart + 1) % 8)


def _skip_scan(stream: io.BytesIO) -> int:
  """Moves to the marker after the coded data of a scan, and returns the number of its last restart marker, or -1."""
  data, start = stream.getbuffer(), stream.tell()
  places = np.flatnonzero(np.frombuffer(data, np.uint8)[start:-1] == 0xFF) + start
  markers = np.frombuffer(data, np.uint8)[places + 1]
  restarts = (markers & 0xF8) == 0xD0
  ends = np.flatnonzero(~restarts & (markers != 0) & (markers != 0xFF))
  end = ends[0] if len(ends) else len(places)
  stream.seek(int(places[end]) if len(ends) else len(data))
  numbers = markers[:end][restarts[:end]]
  return int(numbers[-1] & 7) if len(numbers) else -1


def _continue(frame: _Frame, rng: np.random.Generator) -> bytes:
  """Random coded data, with the restart markers that the decoder expects."""

  def noise(count: int) -> bytes:
    return rng.integers(1, 255, count, np.uint8).tobytes()  # without 255, which begins a marker

  parts = [noise(_JUNK_BYTES)]
  for number in range(frame.restarts):
    parts += [bytes([0xFF, 0xD0 + (frame.next_restart + number) % 8]), noise(_JUNK_BYTES_PER_RESTART)]
  return b''.join(parts)
