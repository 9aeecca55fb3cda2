"""CRC-32C, the checksum of TFRecord files (RFC 3720, appendix B.4), and how they mask it."""

from functools import cache

import numpy as np

# Castagnoli's polynomial, lowest power in the highest bit.
_POLYNOMIAL = 0x82F63B78
# Shorter data are read byte by byte.
_SHORT = 64
_MASK_DELTA = 0xA282EAD8


def masked_crc32c(data: np.ndarray | bytes) -> int:
    """The checksum that TFRecord stores: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: np.ndarray | bytes) -> int:
    """CRC-32C of bytes or of a uint8 array.

    The checksum is linear in the bits. So words are joined in pairs, pairs in pairs of pairs, and
    so on: each time, the first half is advanced over the length of the second one.
    """
    if len(data) < _SHORT:
        crc, table = 0xFFFFFFFF, _byte_table()
        for byte in bytes(data):
            crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
        return crc ^ 0xFFFFFFFF
    # Zeros in front do not change a checksum that starts at zero. Flipping the first four bytes
    # has the same effect as starting at 0xFFFFFFFF.
    front = -len(data) % 4
    padded = np.zeros(front + len(data), np.uint8)
    padded[front:] = np.frombuffer(data, np.uint8)
    padded[front : front + 4] ^= 0xFF
    words = padded.view("<u4")
    level = 0
    while len(words) > 1:
        if len(words) % 2:
            words = np.concatenate([np.zeros(1, "<u4"), words])
        words = _advance(level, words[0::2]) ^ words[1::2]
        level += 1
    return int(_advance(0, words)[0]) ^ 0xFFFFFFFF


def _advance(level: int, words: np.ndarray) -> np.ndarray:
    """The checksums `words` after 2**level further words of zeros. `<u4 [n]`."""
    parts = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 4)
    tables = _tables(level)
    out = tables[0].take(parts[:, 0])
    for i in range(1, 4):
        out ^= tables[i].take(parts[:, i])
    return out


@cache
def _byte_table() -> list[int]:
    """The checksum of each byte: starting at zero, without the final flip."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


@cache
def _tables(level: int) -> np.ndarray:
    """What 2**level words of zeros make of each byte of a checksum: `<u4 [4, 256]`."""
    values = np.arange(256, dtype="<u4") << (8 * np.arange(4, dtype="<u4")[:, None])
    if level:
        once = _advance(level - 1, values.reshape(-1))
        return _advance(level - 1, once).reshape(4, 256)
    table = np.array(_byte_table(), "<u4")
    for _ in range(4):
        values = values >> 8 ^ table[values & 0xFF]
    return values
