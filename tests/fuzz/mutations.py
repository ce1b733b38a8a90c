"""Files made wrong: bytes, headers by their structure, lengths, and files of another kind."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 255, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, -(10**30)),
    *(
        0.5,
        -0.0,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "x",
        "F32",
        "F4",
        "C64",
        "BOOL",
        "../x",
        "/etc/passwd",
    ),
    *("a\0b", "\ud800", "(a+)+$", "(.*)*x", "[", "x" * 5000, [], {}, [0], [[]], {"a": {}}, [1, 2, 3], [-1]),
    *([2**40], [2**31, 2**31], [10**9] * 8, [1] * 70, {"shape": [1]}),
)


def bytes_of(data: bytes, random: Random, others: list[bytes]) -> bytes:
    """One to four accidents of bytes."""
    for _ in range(random.randint(1, 4)):
        kind, size = random.randrange(8), len(data)
        at = random.randrange(size + 1)
        some = random.randint(1, 16)
        if kind == 0 and size:
            changed = bytearray(data)
            changed[at % size] ^= 1 << random.randrange(8)
            data = bytes(changed)
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + random.randbytes(some) + data[at:]
        elif kind == 3:
            data = data[:at] + random.randbytes(some) + data[at + some :]
        elif kind == 4:
            data = data[:at] + bytes(some) + data[at + some :]
        elif kind == 5:
            data = data[:at] + b"\xff" * some + data[at + some :]
        elif kind == 6:
            data = data[:at] + data[at : at + some] + data[at:]
        else:
            other = random.choice(others)
            data = other if random.random() < 0.2 else data[:at] + other[at:]
    return data


def tree_of(value: Any, random: Random) -> Any:
    """JSON with one to three of its parts exchanged, left out, or odd."""
    box = [json.loads(json.dumps(value))]
    for _ in range(random.randint(1, 3)):
        places = list(_places(box))
        holder, key = random.choice(places)
        kind = random.randrange(8)
        if kind < 4:
            holder[key] = json.loads(json.dumps(random.choice(ODD)))
        elif kind == 4:
            holder[key] = json.loads(json.dumps(random.choice(places)[0]))
        elif kind == 5 and isinstance(holder, dict):
            holder[str(random.choice(ODD))] = holder.pop(key)
        elif kind == 6 and holder is not box:
            del holder[key]
        elif isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += random.choice((-1, 1, 7, -8, 2**31, 2**62))
        else:
            depth = random.choice((5, 60, 400))
            for _ in range(depth):
                holder[key] = [holder[key]]
    return box[0]


def _places(holder: Any, depth: int = 0) -> Any:
    keys = range(len(holder)) if isinstance(holder, list) else list(holder)
    for key in keys:
        yield holder, key
        if isinstance(holder[key], list | dict) and depth < 50:
            yield from _places(holder[key], depth + 1)


def text_of(value: Any, random: Random) -> bytes:
    """JSON as text, at times with a key twice, a number too long, or far too deep."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = "{}"
    kind = random.randrange(12)
    if kind == 0 and text.startswith("{"):
        first = next(iter(value), "a") if isinstance(value, dict) else "a"
        text = "{" + json.dumps(str(first)) + ": 0, " + text[1:]
    elif kind == 1:
        text = text.replace("1", "9" * random.choice((30, 5000)), 1)
    elif kind == 2:
        deep = random.choice((900, 20_000))
        text = text[:-1] + (', "z": ' if len(text) > 2 else '"z": ') + "[" * deep + "]" * deep + text[-1:]
    return text.encode("utf-8", "surrogatepass")


def safetensors(data: bytes, random: Random, others: list[bytes]) -> bytes:
    """By its header, nine times in ten; its strings that are JSON themselves are opened too."""
    if random.random() < 0.3:
        return bytes_of(data, random, others)
    length = struct.unpack("<Q", data[:8])[0]
    header: Any = json.loads(data[8 : 8 + length])
    told = header.get("__metadata__", {})
    inner = next((key for key in ("optx", "optx.signature") if key in told), None)
    if inner is not None and random.random() < 0.7:
        changed = tree_of(json.loads(told[inner]), random)
        told[inner] = text_of(changed, random).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = text_of(tree_of(header, random), random)
    told_length = len(text) if random.random() < 0.9 else random.choice((0, 2**63, 2**40, len(text) + 1))
    body = data[8 + length :]
    if random.random() < 0.2:
        body = bytes_of(body, random, others)
    return struct.pack("<Q", told_length) + text + body


@functools.cache
def _bomb() -> bytes:
    return zlib.compress(b" " * 300_000_000, 1)


def compeft(data: bytes, random: Random, others: list[bytes]) -> bytes:
    """With sums that are right again, so that what is behind them is reached."""
    if random.random() < 0.2:
        return bytes_of(data, random, others)
    magic, version, length, _ = struct.unpack("<8sII8s", data[:24])
    table: Any = json.loads(zlib.decompress(data[24 : 24 + length]))
    rest, payloads = data[24 + length :], list[bytes]()
    for row in table["tensors"]:
        payloads.append(rest[: row[3]])
        rest = rest[row[3] + 4 :]
    if random.random() < 0.5:
        at = random.randrange(len(payloads))
        payloads[at] = bytes_of(payloads[at], random, others)
        if random.random() < 0.9:
            table["tensors"][at][3] = len(payloads[at])
    else:
        table = tree_of(table, random)
    header = zlib.compress(text_of(table, random))
    if random.random() < 0.02:
        header = _bomb()
    digest = hashlib.blake2b(struct.pack("<II", version, len(header)) + header, digest_size=8).digest()
    body = b"".join(payload + struct.pack("<I", zlib.crc32(payload)) for payload in payloads)
    return struct.pack("<8sII8s", magic, version, len(header), digest) + header + body


def table(data: bytes, random: Random, others: list[bytes]) -> bytes:
    """A JSON file."""
    if random.random() < 0.3:
        return bytes_of(data, random, others)
    return text_of(tree_of(json.loads(data), random), random)


_YAML = (
    *(
        "&a",
        "*a",
        "<<: *a",
        "&a [*a]",
        "{a: *a}",
        "!!set {x}",
        "!!binary aGk=",
        "2026-13-01",
        "2026-01-01",
        "? ",
    ),
    *(
        "- - - -",
        "[" * 30,
        "[" * 3000,
        "{a: " * 2000,
        "---",
        "...",
        "!!python/object:os.system {}",
        "0x" + "f" * 2000,
    ),
    *(
        "1" + ":59" * 500,
        "1e999",
        ".nan",
        ".inf",
        "null",
        "yes",
        "'",
        '"',
        "|",
        ">",
        "%YAML 9.9",
        "@",
        "`",
        "\t",
    ),
    *(
        "filter: (a+)+$",
        "value: [",
        "density: -1",
        "weight: 10000000000000000000000000",
        "lora: x",
        "\x00",
        "é",
    ),
)


def yaml(data: bytes, random: Random, others: list[bytes]) -> bytes:
    """Lines and words exchanged, and bytes."""
    if random.random() < 0.2:
        return bytes_of(data, random, others)
    lines = data.decode().split("\n")
    for _ in range(random.randint(1, 4)):
        at, kind = random.randrange(len(lines)), random.randrange(6)
        line, odd = lines[at], random.choice(_YAML)
        if kind == 0:
            lines[at] = f"{line.partition(':')[0]}: {odd}"
        elif kind == 1:
            lines.insert(at, odd)
        elif kind == 2:
            lines[at] = f"{line}{odd}"
        elif kind == 3:
            lines[at] = " " * random.randrange(8) + line.strip()
        elif kind == 4:
            lines.insert(at, random.choice(lines))
        elif len(lines) > 1:
            del lines[at]
    return "\n".join(lines).encode("utf-8", "replace")


Mutate = Callable[[bytes, Random, list[bytes]], bytes]
