"""Lines of a .zst file. Unlike the library's own reader, it detects a file that was cut off, and accepts the windows of
`zstd --long=28` and above."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from deepseek_jax.config import ConfigError

LARGEST_WINDOW = 2**31  # bytes, of `zstd --long=31`: the format's tools accept no more
_READ = 1 << 16  # compressed bytes at once: few, since those of a hostile file may expand 30,000 times


def decompressed(file: BinaryIO) -> io.BufferedReader:
    """The content of a .zst file, which is closed with it.

    Raises:
      ConfigError: the package zstandard is missing.
      EOFError, ValueError, zstandard.ZstdError: (while it is read) the file is cut off, its window too large, or it is
        damaged.
    """
    try:
        import zstandard
    except ImportError:
        file.close()
        raise ConfigError(f"{file.name} needs a decompressor: pip install zstandard") from None
    return io.BufferedReader(_Frames(file, zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)))


class _Frames(io.RawIOBase):
    """The frames of a file, one after the other."""

    def __init__(self, file, decompressor):
        self._file, self._decompressor = file, decompressor
        self._frame: Any = None
        self._made = memoryview(b"")
        self._rest = b""  # compressed bytes after the last frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._made:
            data = self._rest or self._file.read(_READ)
            if not data:
                if self._frame is not None:
                    raise EOFError("ends inside its compressed text: the file was cut off")
                return 0
            self._made, self._rest = memoryview(self._decompress(data)), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._made))
        buffer[:count], self._made = self._made[:count], self._made[count:]
        return count

    def _decompress(self, data):
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            return self._frame.decompress(data)
        except Exception as error:
            if "too much memory" in str(error):
                raise ValueError(f"its zstd window is larger than {LARGEST_WINDOW >> 30} GiB; compress it again with "
                                 "--long=31 or less") from None
            raise

    def close(self) -> None:
        self._file.close()
        super().close()
