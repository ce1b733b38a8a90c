"""Softplus attention on CPU: blocks of whole rows, whose products are the BLAS's.

A block is some rows of some heads with all keys that they see, of about ``NUMBERS`` numbers: memory grows
with L and not with L^2, and as all keys of a row are at hand, no running maximum is needed. Formulas are
those of `softplus_rows`; three numbers a row are kept for the way back.

With w = b / sum b and dw = <dout, v>, the way back through the second sum and the power is
e = p (u / max)^(p - 1) / (max sum b) (dw - <w, dw>) where u > 0, and from there through the first sum
da = (N / D) (e - (O / N) sum e), because the sum of e u is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from optx.kernels.attention.softplus_rows import (
    FEW,
    Options,
    counts_of,
    log_scale,
    math_dtype,
    normalised,
    through_length,
    tolerance,
)

__all__ = ["backward", "forward"]

NUMBERS = 1 << 19
_MANY = 64  # rows that a product needs for its speed


class Block(NamedTuple):
    """Some rows of some heads, and how many keys from the first on they see at most."""

    number: int
    heads: slice
    rows: slice
    keys: int


class Call(NamedTuple):
    """The tensors of one call; heads that share keys stand side by side.

    Args:
        query: rows of length 1 times ln d ln N, (C, G, T, d), where C is the heads of keys of all samples.
        key: rows of length 1, (C, S, d).
        value: (C, S, e).
        counts: N (C or 1, G or 1, T, 1).
        mask: as given, or None.
        shared: heads of keys in a sample.
        options: power, causal, dropout.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    counts: Tensor
    mask: Tensor | None
    shared: int
    options: Options

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Call:
        """From tensors (B, H, T, d), (B, H', S, d) and (B, H', S, e)."""
        batch, shared = k.shape[:2]
        math = math_dtype(q.dtype)
        counts = counts_of(mask, options.causal, q, k.shape[2])[..., None]
        query = normalised(q)[0] * log_scale(counts, q.shape[-1], math)
        if counts.shape[:2] != (1, 1):
            counts = counts.expand(batch, q.shape[1], -1, -1)
            counts = counts.reshape(batch * shared, -1, *counts.shape[2:])
        key, value = normalised(k)[0], v.to(math)
        return cls(
            query.reshape(batch * shared, -1, *q.shape[2:]),
            key.reshape(-1, *k.shape[2:]),
            value.reshape(-1, *v.shape[2:]),
            counts.to(math),
            mask,
            shared,
            options,
        )

    def blocks(self) -> Iterator[Block]:
        """All rows of all heads."""
        heads, groups, rows, _ = self.query.shape
        keys = self.key.shape[1]
        step = max(1, NUMBERS // max(1, groups * keys))
        if self.options.causal:  # so that little is computed that nobody sees
            step = min(step, max(_MANY, rows // 8))
        step = min(step, max(1, rows))
        many = max(1, NUMBERS // max(1, groups * step * keys))
        number = 0
        for at in range(0, heads, many):
            for row in range(0, rows, step):
                end = min(row + step, rows)
                seen = min(end, keys) if self.options.causal else keys
                yield Block(number, slice(at, min(at + many, heads)), slice(row, end), seen)
                number += 1

    def hidden(self, block: Block) -> Tensor | None:
        """True where a key is not seen, (c or 1, G or 1, t or 1, keys)."""
        found: Tensor | None = None
        if self.mask is not None:
            rows = block.rows if self.mask.shape[2] > 1 else slice(None)
            found = ~self._of_heads(self.mask[:, :, rows, : block.keys], block)
        if self.options.causal:
            first, end = block.rows.start, block.rows.stop
            after = torch.ones(end - first, block.keys, dtype=torch.bool).triu(first + 1)
            found = after if found is None else found | after
        return found

    def _of_heads(self, mask: Tensor, block: Block) -> Tensor:
        """The block's part of a mask (B or 1, H or 1, ...)."""
        if mask.shape[:2] == (1, 1):
            return mask
        key_head = torch.arange(block.heads.start, block.heads.stop)[:, None]
        groups = self.query.shape[1]
        head = key_head % self.shared * groups + torch.arange(groups)
        if mask.shape[1] == 1:
            head = torch.zeros(1, 1, dtype=torch.int64)
        sample = key_head // self.shared if mask.shape[0] > 1 else torch.zeros(1, 1, dtype=torch.int64)
        return mask[sample, head]

    def counted(self, block: Block) -> Tensor:
        """N of the block's rows."""
        own = self.counts if len(self.counts) == 1 else self.counts[block.heads]
        return own[:, :, block.rows]

    def kept(self, block: Block, seed: Tensor, like: Tensor) -> Tensor:
        """What dropout multiplies the block's weights with, the same at each look."""
        share = 1 - self.options.dropout
        generator = torch.Generator().manual_seed(int(seed) + block.number)
        return torch.empty_like(like).bernoulli_(share, generator=generator).div_(share or 1.0)


class Scratch:
    """Memory for the numbers of a block, by name; each is made once a call."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """A contiguous tensor of some shape, with anything in it."""
        size = shape.numel()
        held = self.memory.get(name)
        if held is None or held.numel() < size:
            held = self.memory[name] = torch.empty(size, dtype=self.dtype)
        return held[:size].view(shape)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What attention gives, in v's dtype, and three numbers a row for `backward`.

    Args:
        q: (B, H, T, d).
        k: (B, H', S, d), where H' divides H.
        v: (B, H', S, e).
        mask: bool, broadcastable to (B, H, T, S), or None.
        options: power, causal, dropout.
        seed: of the dropout, one int64.

    Returns:
        (B, H, T, e), and (3, B, H, T): the sum D of softplus, the largest u (0: the row is LSSA's) and the
        sum of b.
    """
    call = Call.of(q, k, v, mask, options)
    heads, groups, rows, _ = call.query.shape
    out = torch.empty(heads, groups, rows, v.shape[-1], dtype=call.value.dtype)
    stats = torch.ones(3, heads, groups, rows, 1, dtype=out.dtype)
    scratch = Scratch(out.dtype)
    for block in call.blocks():
        a = _softplus(call, block, scratch)[1]
        total = a.sum(-1, keepdim=True).clamp_min_(torch.finfo(a.dtype).tiny)
        part = stats[:, block.heads, :, block.rows]
        part[0] = total
        w, norm = a, total
        if options.power:
            w, norm = _sharpened(call, block, a, part, scratch)
        if seed is not None:
            w = w * call.kept(block, seed, w)
        product = _flat(w) @ call.value[block.heads, : block.keys]
        out[block.heads, :, block.rows] = product.view(*a.shape[:-1], -1) / norm
    whole = (*q.shape[:3], -1)
    return out.view(whole).to(v.dtype), stats.view(3, *q.shape[:3])


def _softplus(call: Call, block: Block, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """A block's scores, and softplus of them, 0 where a key is not seen; (c, G, t, keys)."""
    query, key = call.query[block.heads, :, block.rows], call.key[block.heads, : block.keys]
    shape = torch.Size((*query.shape[:-1], block.keys))
    scores, a = scratch.take("scores", shape), scratch.take("softplus", shape)
    torch.bmm(_flat(query), key.transpose(1, 2), out=_flat(scores))
    torch._C._nn.softplus(scores, out=a)  # pyright: ignore
    hidden = call.hidden(block)
    return scores, a if hidden is None else a.masked_fill_(hidden, 0.0)


def _shares(call: Call, block: Block, a: Tensor, total: Tensor, most: Tensor, scratch: Scratch) -> Tensor:
    """u / max u."""
    counts = call.counted(block)
    u = torch.mul(a, counts / (total * most), out=scratch.take("shares", a.shape))
    return u.sub_((counts > FEW) / most).clamp_min_(0)


def _sharpened(call: Call, block: Block, a: Tensor, stats: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """b and its sum; a and its own where all of a row's weights are equal. The second and third number of
    each row go into ``stats``."""
    counts = call.counted(block)
    total = stats[0]
    most = counts * a.amax(-1, keepdim=True) / total - (counts > FEW).to(a.dtype)
    flat = most <= tolerance(counts, a.dtype)
    some = bool(flat.any())
    u = _shares(call, block, a, total, most.masked_fill(flat, 1.0) if some else most, scratch)
    b = _raised(u, call.options.power, scratch.take("power", a.shape))
    norm = b.sum(-1, keepdim=True)
    stats[1], stats[2] = most.masked_fill(flat, 0.0), norm
    if not some:
        return b, norm
    return torch.where(flat, a, b), torch.where(flat, total, norm)


def _raised(x: Tensor, power: float, out: Tensor) -> Tensor:
    """x^power, of x >= 0, which may be overwritten; by products for whole powers, which take a sixth."""
    if power != int(power) or power > 1024:
        return torch.pow(x, power, out=out)
    rest, first = int(power), True
    while True:
        if rest & 1:
            (out.copy_(x) if first else out.mul_(x))
            first = False
        rest >>= 1
        if not rest:
            return out
        x.mul_(x)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    out: Tensor,
    options: Options,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the arguments are those of `forward`, and what it gave.

    Args:
        grad: of what attention gave, (B, H, T, e).
        q: queries.
        k: keys.
        v: values.
        mask: what is seen.
        stats: three numbers a row.
        out: what attention gave.
        options: power, causal, dropout.
        seed: of the dropout.
    """
    call = Call.of(q, k, v, mask, options)
    math = call.value.dtype
    grads = [torch.zeros_like(x) for x in call[:3]]
    scratch = Scratch(math)
    shape = call.query.shape[:3]
    grad = grad.to(math).reshape(*shape, -1)
    stats = stats.reshape(3, *shape, 1)
    for block in call.blocks():
        here = (block.heads, slice(None), block.rows)
        given, part = _flat(grad[here]), stats[:, block.heads, :, block.rows]
        keys = (block.heads, slice(block.keys))
        scores, a = _softplus(call, block, scratch)
        change = scratch.take("change", a.shape)  # of the weights
        torch.bmm(given, call.value[keys].transpose(1, 2), out=_flat(change))
        w, slope = _slopes(call, block, a, part, scratch)
        kept = None if seed is None else call.kept(block, seed, w)
        grads[2][keys] += _flat(w if kept is None else w * kept).transpose(1, 2) @ given
        if kept is not None:
            change.mul_(kept)
        rise = _through_sums(call, block, (change, w, slope, part, scores))
        grads[0][here] = (_flat(rise) @ call.key[keys]).view_as(grads[0][here])
        grads[1][keys] += _flat(rise).transpose(1, 2) @ _flat(call.query[here])
    scale = log_scale(counts_of(mask, options.causal, q, k.shape[2])[..., None], q.shape[-1], math)
    return (
        through_length(grads[0].view(q.shape) * scale, q),
        through_length(grads[1].view(k.shape), k),
        grads[2].view(v.shape).to(v.dtype),
    )


def _slopes(
    call: Call, block: Block, a: Tensor, stats: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """w, and p (u / max)^(p - 1) / (max sum b), by which a change of w goes on to u; None for LSSA, and nan
    in rows that are LSSA's."""
    total, most, norm = stats
    power = call.options.power
    if not power:
        return a.div_(total), None
    u = _shares(call, block, a, total, most.masked_fill(most == 0, 1.0), scratch)
    slope, w = scratch.take("power", a.shape), scratch.take("weights", a.shape)
    seen = u > 0 if power <= 1 else None
    w.copy_(u)
    _raised(u, power - 1, slope) if power != 1 else slope.fill_(1.0)
    if seen is not None:
        slope.masked_fill_(~seen, 0.0)
    w.mul_(slope).div_(norm)
    slope.mul_(power / (most * norm))
    flat = most == 0
    return (torch.where(flat, a / total, w) if bool(flat.any()) else w), slope


def _through_sums(
    call: Call, block: Block, given: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
) -> Tensor:
    """The gradient of a block's scores, from that of the weights."""
    change, w, slope, stats, scores = given
    total, most, _ = stats
    change.sub_((change * w).sum(-1, keepdim=True))
    flat = None if slope is None else most == 0
    some = flat is not None and bool(flat.any())
    even = change / total if slope is None or some else change
    if slope is not None:
        counts = call.counted(block)
        sharp = change.mul_(slope)
        sharp.sub_(sharp.sum(-1, keepdim=True) * ((counts > FEW) / counts.clamp_min(1))).mul_(counts / total)
        even = torch.where(flat, even, sharp) if some and flat is not None else sharp
    rise = torch.sigmoid(scores, out=scores).mul_(even)
    hidden = call.hidden(block)
    return rise if hidden is None else rise.masked_fill_(hidden, 0.0)


def _flat(x: Tensor) -> Tensor:
    """(c, G, t, n) as (c, G t, n)."""
    return x.flatten(1, 2)
