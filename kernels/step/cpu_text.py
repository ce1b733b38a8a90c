"""The parts of a generated CPU module that are the same for every program."""

from __future__ import annotations

from enum import IntEnum

from optx.kernels.step.program import Ref
from optx.kernels.step.text import variable
from optx.kernels.step.tiles import Tiles


class Args(IntEnum):
    """Positions in the argument block."""

    NEXT = 0  # atomic counter: the next chunk
    STOP = 1  # one past the last chunk
    CHUNKS = 2  # int64 rows (tensor, first element, number of elements)
    TENSORS = 3  # int64 rows of base addresses, one per role, then the tensor's number for random draws
    COLS = 4  # float64 rows, one per tensor
    NUMBERS = 5  # int64: for each tensor, the address of its group's numbers, see CpuStep.groups
    PARTIALS = 6  # float64 rows, one per chunk
    FIRST = 7  # int64: each tensor's first chunk, and one past the last
    TENSOR_LOW = 8
    TENSOR_HIGH = 9
    SUM = 10  # first + last chunk: updates go from the last chunk to the first, see CpuStep


PART = '@part(error_model="numpy")'
# A summand's products may be fused with the addition; what is stored is never touched by fast-math.
PART_SUM = '@part(error_model="numpy", fastmath={"contract"})'
CFUNC = '@cfunc(SIGNATURE, error_model="numpy", cache=True)'


def _take_chunk(backwards: bool) -> list[str]:
    return [
        "args = address(pointer)",
        "while True:",
        "    chunk = take(args)",
        f"    if chunk >= get_i64(args, {Args.STOP:d}):",
        "        break",
        *([f"    chunk = get_i64(args, {Args.SUM:d}) - chunk"] if backwards else []),
    ]


def open_chunk(backwards: bool) -> list[str]:
    """Opens a kernel that takes chunks from the counter until none is left."""
    return [
        *_take_chunk(backwards),
        f"    row = get_i64(args, {Args.CHUNKS:d}) + chunk * 24",
        "    t = get_i64(row, 0)",
        "    start = get_i64(row, 1)",
        "    n = get_i64(row, 2)",
    ]


def open_tile(backwards: bool) -> list[str]:
    """The same for kernels whose chunks are tiles of matrices; see `Tiles`."""
    names = ("t", "top", "tall", "column", "n", "block")
    row = f"    row = get_i64(args, {Args.CHUNKS:d}) + chunk * {8 * Tiles.ROW}"
    places = [f"    {name} = get_i64(row, {i})" for i, name in enumerate(names)]
    return [*_take_chunk(backwards), row, *places]


# The functions of optx.ops in Numba's words.
PRELUDE_TEXT = """

sqrt, exp, log = np.sqrt, np.exp, np.log


@part(error_model="numpy")
def where(condition, a, b):
    return a if condition else b


@part(error_model="numpy")
def maximum(a, b):
    return a if a > b else b


@part(error_model="numpy")
def minimum(a, b):
    return a if a < b else b


@part(error_model="numpy")
def sign(x):
    return np.float32(x > 0) - np.float32(x < 0)"""
PRELUDE = PRELUDE_TEXT.splitlines()

# A run of packed bits, a multiple of 8, as bytes. Loops over elements read those: one that shifted a bit out
# of its byte for each element would be no loop over vectors.
EXPAND = """

@part(error_model="numpy")
def expand(bits, n, room):
    if n == 128:
        expand_4(bits, room)
        expand_4(bits + 4, room + 32)
        expand_4(bits + 8, room + 64)
        expand_4(bits + 12, room + 96)
    else:
        for i in range(n >> 5):
            expand_4(bits + 4 * i, room + 32 * i)
        for i in range(n >> 5 << 2, n >> 3):
            expand_1(bits + i, room + 8 * i)""".splitlines()


# What moments of 8 bits and weights in two parts need besides.
FORMATS = """\
# {}
from optx.kernels.cpu_formats import (GROUP, ROOM, SPARE, decode_group, encode_group, get_code, load_split,
    put_code, put_zero, room, scales_of_groups, store_split, top_of_group)"""

# What rules with powers need besides.
POWERS = "# {}\nfrom optx.kernels.cpu_powers import fast_power"

# A tensor's last group, where it is not complete, has its codes in the spare room.
_IN_GROUPS = """
run_room = room(ROOM)
spare_room = room(SPARE)


@part(error_model="numpy")
def decode_NAME_run(codes, scales, n, floats, spare):
    whole = n & -GROUP
    for i in range(whole, n):
        put_code(spare, i - whole, get_code(codes, i))
    for at in range(0, n, GROUP):
        decode_NAME(codes + at if at < whole else spare, scales + (at >> 4), floats + 4 * at)


@part(error_model="numpy")
def encode_NAME_run(codes, scales, n, floats, spare, start, key):
    whole = n & -GROUP
    for i in range(n, n + (-n & (GROUP - 1))):
        put_zero(floats, i)
    for at in range(0, n, GROUP):
        top_NAME(floats + 4 * at, spare + (at >> 3))
    scales_NAME(spare, start, key)
    for at in range(0, n, GROUP):
        to = codes + at if at < whole else spare
        encode_NAME(floats + 4 * at, to, scales + (at >> 4), spare + (at >> 3))
    for i in range(whole, n):
        put_code(codes, i, get_code(spare, i - whole))"""


def in_groups(name: str) -> list[str]:
    """The functions that decode and encode a run of a moment, group by group."""
    return _IN_GROUPS.replace("NAME", name).splitlines()


def local(role: str) -> str:
    """A role's name in a local variable."""
    return role.replace(".", "_").replace(":", "_")


def register(role: str) -> str:
    """The local variable of a role's element."""
    if role.startswith("v:"):  # see `optx.kernels.step.cpu_tiles`
        return local(role)
    return role if role in ("w", "g") else variable(Ref("slot", role))


def tensor_kernel(name: str) -> list[str]:
    """Opens a kernel that walks over tensors."""
    low, high = f"get_i64(args, {Args.TENSOR_LOW:d})", f"get_i64(args, {Args.TENSOR_HIGH:d})"
    return [
        "",
        "",
        CFUNC,
        f"def {name}(pointer):",
        "    args = address(pointer)",
        f"    for t in range({low}, {high}):",
    ]
