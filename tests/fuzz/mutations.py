"""Damage to what is valid: trees of JSON values, bytes, lines.

Random bytes rarely get past a reader's first check. What is nearly valid gets everywhere. All
choices are a `Random`'s, which may be one of hypothesis that makes what it has found smaller.
"""

import copy
import json
import struct
from random import Random

# A string that `dump` replaces by lists in lists, too many for a parser that calls itself.
DEEP = "\N{BALLOT BOX}deep"
_DEEP_TEXT = "[" * 100_000 + "]" * 100_000
# Shallow enough to be parsed, deep enough for what walks over it afterwards.
_NESTED: list = []
for _ in range(300):
    _NESTED = [_NESTED]

NUMBERS = (
    0, 1, -1, 2, 3, 7, 64, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**60,
    2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(2**63), 0.5, -0.0, 1e-300, 1e-30, 1e9, 1e38,
    1e300, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "\0", "\n", "a\nb", "\x1b[31m", "\ud800", "\N{GRINNING FACE}", "..", "../x",
    "../../../etc/passwd", "/etc/passwd", "C:\\x", "~", "a/b", "%s%n", "{}", "{0.__class__}",
    "<|start|>", "<s>", "<0x41>", "true", "auto", "x" * 300, "y" * 5000, DEEP,
)  # fmt: skip
CONTAINERS = ([], [None], [[]], [0], ["a"], ["a", "a"], {}, {"": 0}, {"a": {}}, _NESTED)
ODD = (None, True, False, *NUMBERS, *TEXTS, *CONTAINERS)

_LENGTHS = (0, 1, 2, 3, 4, 7, 8, 16, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1)


def trees(pick: Random, valid: object, max_edits: int = 3) -> object:
    """A JSON value with a few places changed; those near the root are changed more often."""
    value = copy.deepcopy(valid)
    for _ in range(pick.randint(1, max_edits)):
        value = _edit(pick, value)
    return value


def _edit(pick: Random, value: object) -> object:
    if isinstance(value, dict | list) and value and pick.randint(0, 9) > 0:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[pick.randint(0, len(keys) - 1)]
        how = pick.randint(0, 11)
        if how == 0:
            del value[key]
        elif how == 1 and isinstance(value, dict):
            value[pick.choice(TEXTS)] = value.pop(key)
        elif how == 1:
            value.insert(key, copy.deepcopy(value[key]))
        elif how == 2:
            # Something of the right kind in the wrong place.
            other = keys[pick.randint(0, len(keys) - 1)]
            value[key] = copy.deepcopy(value[other])
        else:
            value[key] = _edit(pick, value[key])
        return value
    how = pick.randint(0, 3)
    if how == 0 and isinstance(value, int) and not isinstance(value, bool):
        return value + pick.choice((-1, 1, -value, value, value * 2**32))
    if how == 0 and isinstance(value, str):
        at = pick.randint(0, len(value))
        return value[:at] + pick.choice(TEXTS) + value[at:]
    if how == 1:
        return [value]
    return copy.deepcopy(pick.choice(ODD))


def dump(value: object, *, is_ascii: bool = True) -> bytes:
    """JSON text; half surrogates stay what they are, which is no UTF-8."""
    text = json.dumps(value, ensure_ascii=is_ascii)
    text = text.replace(json.dumps(DEEP, ensure_ascii=is_ascii), _DEEP_TEXT)
    return text.encode("utf-8", "surrogatepass")


def json_texts(pick: Random, valid: object, max_edits: int = 3) -> bytes:
    """A JSON text whose value, and now and then whose bytes, are damaged."""
    text = dump(trees(pick, valid, max_edits), is_ascii=pick.randint(0, 1))
    return text if pick.randint(0, 7) else bytes_like(pick, text)


def bytes_like(pick: Random, valid: bytes, fragments: tuple[bytes, ...] = ()) -> bytes:
    """Bytes with a few places changed: numbers at their limits, cuts, repetitions, fragments.

    fragments: what means something to the reader
    """
    data = bytearray(valid)
    for _ in range(pick.randint(1, 4)):
        # Half of all changes are in the first 512 bytes or the last, where headers are.
        reach = len(data) if pick.randint(0, 1) else min(512, len(data))
        at = pick.randint(0, reach)
        if pick.randint(0, 1):
            at = len(data) - at
        how = pick.randint(0, 7 if fragments else 6)
        if how == 0:
            data[at : at + 1] = bytes([pick.randint(0, 255)])
        elif how == 1:
            data[at : at + 8] = struct.pack("<Q", pick.choice(_LENGTHS))
        elif how == 2:
            data[at : at + 4] = struct.pack("<I", pick.choice(_LENGTHS) & 0xFFFFFFFF)
        elif how == 3:
            del data[at:]
        elif how == 4:
            del data[at : at + pick.randint(1, 64)]
        elif how == 5:
            data[at:at] = data[at : at + pick.randint(1, 64)] * pick.randint(1, 4)
        elif how == 6:
            data[at:at] = bytes(pick.randint(0, 255) for _ in range(pick.randint(0, 8)))
        else:
            data[at:at] = pick.choice(fragments)
    return bytes(data)


def json_lines(rows: list[dict]) -> bytes:
    """JSON Lines that are well."""
    return b"".join(dump(row) + b"\n" for row in rows)


def line_files(pick: Random, valid: list[dict]) -> bytes:
    """JSON Lines of which some are damaged, repeated, out of order, or torn."""
    lines = [dump(line) for line in valid]
    for _ in range(pick.randint(1, 3)):
        at = pick.randint(0, len(valid) - 1)
        how = pick.randint(0, 9)
        if how == 0:
            lines.insert(at, pick.choice(lines))
        elif how == 1:
            lines[at] = pick.choice((b"", b"  ", b"null", b"[1]", b"\xff", b"{", b"1e999"))
        else:
            lines[at] = json_texts(pick, valid[at])
    text = b"\n".join(lines) + b"\n" * pick.randint(0, 2)
    return text if pick.randint(0, 7) else bytes_like(pick, text)
