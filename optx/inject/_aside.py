"""What stands beside one layer, and the stream that joins it to the next layer's.

Source: Inside and Alongside Adapters, arXiv 2208.09847.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from optx._errors import OptxError, ShapeError
from optx.inject._hidden_delta_options import FORMS
from optx.inject._injection import Site
from optx.inject._part import Arguments, Attached, Part, hidden_of, new_tensor, output_of, with_output
from optx.inject._sharding import anything_is_sharded

Variant = Literal["highway", "layerwise", "bottleneck"]
Form = Literal["relu", "gelu", "silu", "tanh", "linear"]

WAY_OUT = (
    "Use checkpointing with use_reentrant=False, or optx.Aside(variant='layerwise'), which has no stream."
)


@dataclass(frozen=True)
class AsideOptions:
    """The options of `optx.Aside`, which says what each means; its parts read them from here."""

    rank: int = 16
    variant: Variant = "highway"
    form: Form = "relu"
    dropout: float = 0.0
    width: int | None = None


class Beside(Part):
    """What all variants share: the layer's input as they read it, and how they add to its output."""

    def __init__(self, options: AsideOptions, path: str, width: int) -> None:
        super().__init__()
        self.path, self.width = path, width
        self.variant, self.rank = options.variant, options.rank
        self.form, self.dropout = options.form, options.dropout

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """x_l, (..., width)."""
        x = hidden_of(args, kwargs)
        if x.shape[-1] != self.width:
            raise ShapeError(
                f"Aside: {self.path!r} got hidden states of shape {tuple(x.shape)}; it was attached for a "
                f"width of {self.width}. Attach with optx.Aside(width={x.shape[-1]})."
            )
        return x

    def bend(self, h: Tensor) -> Tensor:
        """f, and dropout while training."""
        return F.dropout(FORMS[self.form](h), self.dropout, self.training)

    def join(self, output: Any, delta: Tensor) -> Any:
        """The layer's output with ``delta`` added to its tensor."""
        y = output_of(output)
        if y.shape != delta.shape:
            raise ShapeError(
                f"Aside: {self.path!r} turns hidden states of shape {tuple(delta.shape)} into "
                f"{tuple(y.shape)}; it must keep their shape. Target other modules."
            )
        return with_output(output, y + delta.to(y.dtype))

    @property
    def adds(self) -> bool:
        """Whether all it does is add: it does, and none of it depends on the layer's output."""
        return True

    def suffixes(self) -> dict[str, str]:
        """The keys name the variant: tensors of one are of no use to another."""
        return {name: f"aside.{self.variant}.{name}" for name, _ in self.named_parameters()}

    def note(self) -> str:
        """Variant, rank and f."""
        return f"{self.variant}, rank {self.rank}, {self.form}"


class Bypass(Beside):
    """S(x) = f(x W_down' + b_down) W_up' + b_up, with W_down (rank, width) and W_up (width, rank).

    W_up and the biases are zero at the start.
    """

    def __init__(self, options: AsideOptions, site: Site, width: int) -> None:
        super().__init__(options, site.path, width)
        self.W_down = nn.Parameter(_random(site.module, self.rank, width))
        self.b_down = nn.Parameter(new_tensor(site.module, self.rank))
        self.W_up = nn.Parameter(new_tensor(site.module, width, self.rank))
        self.b_up = nn.Parameter(new_tensor(site.module, width))

    def S(self, x: Tensor) -> Tensor:
        """The bottleneck, in the dtype of the activations."""
        h = self.bend(F.linear(x, self.W_down.to(x.dtype), self.b_down.to(x.dtype)))
        return F.linear(h, self.W_up.to(h.dtype), self.b_up.to(h.dtype))


class Layerwise(Bypass):
    """x_{l+1} = F_l(x_l) + S_l(x_l)."""

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A way around the whole layer."""
        delta = self.S(self.read(args, kwargs))  # first, in case the layer works in place
        return self.join(call(*args, **kwargs), delta)


# ---- the stream ------------------------------------------------------------------------------------------


class Ticket:
    """What one call of one layer carries of the stream: z_l on the way in, z_{l+1} on the way out.

    It travels in the call's keyword arguments, from hook to hook, and so belongs to that call alone.
    """

    def __init__(self, z: Tensor | None) -> None:
        self.z = z


@dataclass
class Link:
    """z_l as layer l - 1 left it.

    Attributes:
        grad: whether gradients were recorded when it was computed.
    """

    z: Tensor
    grad: bool


class Stream:
    """How z gets from layer to layer: beside the tensor that one returns and the next is called with.

    So it belongs to one forward, and no other can see it: not a second one before the backward, not one in
    another thread or inside this one. Activation checkpointing that calls layer l again does so with the
    same tensor and finds the same z_l.

    torch.compile can't trace a weak dictionary, but it traces layers one after the other. There, an attribute
    does, which the next layer empties.
    """

    def __init__(self) -> None:
        self.key = f"optx_{uuid.uuid4().hex}"  # of the tickets
        self._layers: list[tuple[weakref.ref[nn.Module], weakref.ref[Streamed]]] = []  # parts hold the stream
        self._forget()

    def _forget(self) -> None:
        _keep_out_of_graphs()
        # One dictionary per layer: a layer that returns its own input gives it two places in the stream.
        self._links = [WeakTensorKeyDictionary() for _ in self._layers]
        self._traced: tuple[Tensor, Link] | None = None

    def add(self, module: nn.Module, part: Streamed) -> None:
        """The next layer."""
        self._layers.append((weakref.ref(module), weakref.ref(part)))
        self._forget()

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def layers(self) -> list[tuple[nn.Module, Streamed]]:
        """Every layer with its part, but for those that are gone."""
        pairs = ((module(), part()) for module, part in self._layers)
        return [(module, part) for module, part in pairs if module is not None and part is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {"key": self.key, "layers": self.layers}  # a copy has no part in this one's forwards

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.key = state["key"]
        self._layers = []
        for module, part in state["layers"]:
            self._layers.append((weakref.ref(module), weakref.ref(part)))
        self._forget()

    def put(self, index: int, output: Tensor, z: Tensor) -> None:
        """Layer ``index - 1`` has returned ``output``, and z_index goes with it."""
        link = Link(z, torch.is_grad_enabled())
        if torch.compiler.is_compiling():
            self._traced = (output, link)
        else:
            self._links[index][output] = link

    def take(self, index: int, x: Tensor) -> Tensor | None:
        """z_index for layer ``index``, called with ``x``; None for the first."""
        if torch.compiler.is_compiling():
            traced, self._traced = self._traced, None
            if index > 0 and traced is not None:
                return traced[1].z
        elif index == 0:
            self._go_outside()
        return self._find(index, x) if index > 0 else None

    def _find(self, index: int, x: Tensor) -> Tensor:
        """What layer ``index - 1`` put beside ``x``; also where one of the two is compiled and one is not."""
        link = self._links[index].get(x)
        if link is None and self._traced is not None and self._traced[0] is x:
            (_, link), self._traced = self._traced, None
        if link is None:
            before, here = self._paths(index)
            raise OptxError(
                f"Aside: {here!r} was called with another tensor than the one that {before!r} returned, and "
                "the stream between them is lost: it was exchanged (by reentrant or nested checkpointing, a "
                f"backward hook, or code between the layers), or a layer was skipped. {WAY_OUT}"
            )
        if x.grad_fn is not None and torch.is_grad_enabled() and not link.grad:
            before, here = self._paths(index)
            raise OptxError(
                f"Aside: {before!r} ran without recording gradients, as reentrant checkpointing does, and "
                f"none would reach the stream below {here!r}. {WAY_OUT}"
            )
        return link.z

    def _paths(self, index: int) -> tuple[str, str]:
        """Of the layer before, and of this one."""
        before, here = (self._layers[i][1]() for i in (index - 1, index))
        return before.path if before is not None else "", here.path if here is not None else ""

    def _go_outside(self) -> None:
        """Be the first hook before each layer and the last behind it, to see what goes between layers.

        Hooks that came later (another library's, FSDP2's) may exchange the tensor.
        """
        for module, part in self.layers:
            _move(module._forward_pre_hooks, part._before, to_end=False)  # pyright: ignore[reportPrivateUsage]
            _move(module._forward_hooks, part._after, to_end=True)  # pyright: ignore[reportPrivateUsage]


def _keep_out_of_graphs() -> None:
    """Mark `Stream._find` for dynamo; not at import, for that would bring dynamo and triton along."""
    if not hasattr(Stream._find, "_torchdynamo_disable"):  # pyright: ignore[reportPrivateUsage]
        Stream._find = torch.compiler.disable(Stream._find)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


class Streamed(Beside):
    """A part that knows its place in a stream. What it adds to it, `step` says.

    The arithmetic is in `around`, where the layer's weights are whole (FSDP2) and all hooks are outside; the
    hooks only pass z on. So the order in which things are attached to a layer or in it makes no difference.
    """

    stream: Stream
    index: int
    last: bool

    def step(self, x: Tensor, z: Tensor | None) -> Tensor:
        """z_{l+1} from x_l and z_l; None is zero."""
        raise NotImplementedError

    def lift(self, z: Tensor) -> Tensor:
        """What the end of the stream adds to the last layer's output."""
        raise NotImplementedError

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Find z_l."""
        ticket = Ticket(self.stream.take(self.index, hidden_of(args, kwargs)))
        return args, {**kwargs, self.stream.key: ticket}

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute z_{l+1}; the last layer's output takes it up."""
        others = {name: value for name, value in kwargs.items() if name != self.stream.key}
        ticket = kwargs.get(self.stream.key)
        if ticket is None:
            raise OptxError(
                f"Aside: {self.path!r} was run by its forward(), which passes over hooks. Call the module."
            )
        ticket.z = self.step(self.read(args, others), ticket.z)
        output = call(*args, **others)
        if self.last:
            return self.join(output, self.lift(ticket.z))
        y = output_of(output)
        if not torch.compiler.is_compiling() and ticket.z.requires_grad and anything_is_sharded():
            y, ticket.z = _Together.apply(y, ticket.z)  # pyright: ignore
            return with_output(output, y)
        return output

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Leave z_{l+1} to the next layer."""
        if not self.last:
            self.stream.put(self.index + 1, output_of(output), kwargs[self.stream.key].z)

    def note(self) -> str:
        """And its place."""
        return f"{super().note()}, {self.index + 1} of {len(self.stream)}"


class _Together(torch.autograd.Function):
    """A layer's output and what the stream carries past it, as they are, but with one place in the backward.

    FSDP2 brings a layer's weights for its backward when the gradient of the layer's output comes. The
    stream's gradient would be there first, and find none.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return y.clone(), z.view_as(z)  # FSDP2 loses its hook on a view that is written to

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return grads


class Highway(Streamed, Bypass):
    """z_{l+1} = z_l + S_l(x_l + z_l); the output is x_L + z_L."""

    def step(self, x: Tensor, z: Tensor | None) -> Tensor:
        """z_{l+1}, of the shape of x_l."""
        return self.S(x) if z is None else z + self.S(x + z)

    def lift(self, z: Tensor) -> Tensor:
        """z_L."""
        return z


class Narrow(Streamed):
    """z_{l+1} = z_l + f(x_l D_l' + z_l C_l'), in R^rank; the output is x_L + z_L U'.

    D (rank, width). C (rank, rank), zero at the start, and not in the first layer, where it would have
    nothing to act on. U (width, rank), zero at the start, in the last layer.
    """

    def __init__(self, options: AsideOptions, site: Site, width: int, *, first: bool, last: bool) -> None:
        super().__init__(options, site.path, width)
        self.D = nn.Parameter(_random(site.module, self.rank, width))
        self.C = None if first else nn.Parameter(new_tensor(site.module, self.rank, self.rank))
        self.U = nn.Parameter(new_tensor(site.module, width, self.rank)) if last else None

    def step(self, x: Tensor, z: Tensor | None) -> Tensor:
        """z_{l+1}, (..., rank)."""
        h = F.linear(x, self.D.to(x.dtype))
        if z is None or self.C is None:
            return self.bend(h)
        return z + self.bend(h + F.linear(z, self.C.to(z.dtype)))

    def lift(self, z: Tensor) -> Tensor:
        """z_L U'."""
        assert self.U is not None
        return F.linear(z, self.U.to(z.dtype))


def _random(module: nn.Module, rows: int, columns: int) -> Tensor:
    """Uniform in ±1/sqrt(columns), as LoRA's A."""
    tensor = new_tensor(module, rows, columns)
    return tensor.uniform_(-(columns**-0.5), columns**-0.5)


def _move(hooks: Any, hook: Callable[..., Any], *, to_end: bool) -> None:
    """Put a hook at one end of a module's hooks, unless only other streams' hooks are further out."""
    order = reversed(hooks.items()) if to_end else iter(hooks.items())
    outermost = True
    for number, other in order:
        if other == hook:
            if not outermost:
                hooks.move_to_end(number, last=to_end)
            return
        outermost = outermost and isinstance(getattr(other, "__self__", None), Streamed | Attached)
