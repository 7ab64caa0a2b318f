"""TensorBoard event files, without TensorFlow or PyTorch (the usual writers import PyTorch where they find it).

A file is a sequence of TFRecords (length, masked CRC, payload, masked CRC) whose payloads are `Event` messages; of
protocol buffers only the few wire types of scalars are needed.
"""

from __future__ import annotations

import io
import struct
import sys
import time

import google_crc32c
from etils import epath

from moe_jax.files import PART_BYTES, is_remote, write_bytes

_SECONDS = 60.0  # between two puts of a remote file
_SESSION_START = b"\x08\x01"  # SessionLog { status: START }


class EventFile:
    """Scalars into a new event file; TensorBoard forgets what older files hold from `first_step` on.

    A bucket cannot be appended to: there the file is put whole, once a minute and when it is closed, and a long one
    is followed by another; TensorBoard reads a folder's files in the order of their names.
    """

    def __init__(self, folder: epath.Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._remote = folder, is_remote(folder)
        self._begin(first_step)

    def _begin(self, first_step: int) -> None:
        self._path, self._put = self._folder / f"events.out.tfevents.{time.time_ns()}", time.monotonic()
        self._file = io.BytesIO() if self._remote else open(self._path, "wb")  # noqa: SIM115 (close() closes it)
        self._write(_bytes_field(3, b"brain.Event:2"))
        self._write(b"\x10" + _varint(first_step) + _bytes_field(7, _SESSION_START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One event with a point of each curve."""
        summary = b"".join(
            _bytes_field(1, _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
            for tag, value in values.items()
        )
        self._write(b"\x10" + _varint(step) + _bytes_field(5, summary))
        self._file.flush()
        if not self._remote or time.monotonic() - self._put < _SECONDS:
            return
        if self._send() and self._file.tell() > PART_BYTES:
            self._begin(step + 1)

    def close(self) -> None:
        """Close the file; on a disk every event was flushed already."""
        if self._remote:
            self._send()
        self._file.close()

    def _send(self) -> bool:
        """Whether the file was put; curves are no record, and the next put holds what this one lost."""
        assert isinstance(self._file, io.BytesIO)
        self._put = time.monotonic()
        try:
            write_bytes(self._path, self._file.getvalue())
        except Exception as error:  # what gcsfs raises is of many kinds
            print(f"TensorBoard's curves were not put ({error}); tried again in a minute", file=sys.stderr)
            return False
        return True

    def _write(self, fields: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _crc(length) + event + _crc(event))


def _crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _bytes_field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(data)) + data
