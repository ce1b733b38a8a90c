"""S4D: diagonal state spaces in the place of attention, or beside it.

Source: On the Parameterization and Initialization of Diagonal State Space Models, arXiv 2206.11893.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from optx._errors import TargetError, check_choice, check_whole
from optx._module_paths import paths_of
from optx._names import RESERVED
from optx.inject._anatomy import Wanted, of_role
from optx.inject._attention import adds_position_bias
from optx.inject._injection import Injection, Site
from optx.inject._part import Part, new_tensor
from optx.inject._s4d_call import Reader, is_causal, is_cross
from optx.inject._s4d_kernel import Disc
from optx.inject._s4d_layer import Output, S4DLayer, check_options
from optx.inject._s4d_part import Beside, InPlace
from optx.inject._s4d_start import Init
from optx.inject._weights import features, is_conv, is_linear


@dataclass(frozen=True)
class S4D(Injection):
    """Diagonal state spaces that mix a sequence, in the place of self-attention or beside it.

    Each channel has a state x' = A x + B u with a diagonal A of N / 2 conjugate pairs, y = 2 Re(C x) + D u;
    behind it come GELU and a gated linear layer. Training is a convolution by FFT, in L log L; generation
    goes step by step with a state that does not grow. `S4DLayer` is the same as a layer of one's own models.

    Args:
        mode: ``"replace"``: it computes in attention's place, whose weights rest; or ``"beside"``: it is
            added to attention's output, with zeros at the start, so that no output changes.
        d_state: N, a channel's real size.
        init: of A: ``"legs"``, ``"inv"``, ``"inv2"``, ``"lin"``; ``"real"`` and ``"random"`` to compare with.
        disc: ``"zoh"`` or ``"bilinear"``.
        dt_min: least step that a channel begins with, and
        dt_max: largest; drawn evenly on a logarithmic scale.
        train_B: the input weights are trained too.
        bidirectional: it sees what is still to come. None: as the attention says of itself (``is_causal``).
        output: behind GELU, ``"glu"`` or ``"linear"``; ``"none"``: y itself, where a linear module follows.
        dropout: behind GELU, while training.
        max_lr: learning rate of dt, A and B at most, by `param_groups`, ``handle.param_groups`` and
            ``optx.wrap(optimizer, handle)``; they are not decayed.
        width: of hidden states, if the attention module does not show it.

    Serves self-attention modules, by default all of a known family's. Padding is read off the masks that they
    are called with. transformers' DynamicCache keeps the state in the place of keys and values (beams too).

    Paper values:
        ``d_state=64, dt_min=0.001, dt_max=0.1, disc="zoh"``: Long Range Arena but for Path-X (the defaults),
            lr 0.01 and 0.001 for dt, A and B, decay 0.01 to 0.05 for the rest.
        ``init="inv"``, ``init="lin"``, ``init="legs"``: its three ways to begin.

    Limits: It does not compute what attention did: a pretrained model has to be trained again. Refused, in a
        sentence: cross-attention, packed sequences, masks that hide more than padding and the future,
        attention weights, T5 (its first layer makes the others' position bias), static and quantised caches,
        assisted generation. A sliding window is not kept. A nan or inf anywhere in a sequence makes all of
        its channel nan, steps before it too (the convolution is by FFT). Angles are float64, which Apple's
        GPUs have not. It can't be merged. The module's own call is made once, for the form of its output.

    Keywords: state space model, SSM, S4, HiPPO, LegS, Mamba, long convolution, long sequences, recurrence.

    Evidence: ``optx run sequences``; ``test_s4d.py``, ``test_s4d_layer.py``, ``test_s4d_models.py``.

    Raises:
        OptxError: an option out of range; at a call, what is refused (see Limits), or a length whose last
            angle even float64 can't tell.
        TargetError: at attach, cross-attention, an unknown width, a direction that is not known, or something
            attached to what would rest.

    Example:
        >>> import torch, optx
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.Sequential(layer)
        >>> handle = optx.attach(model, optx.S4D(d_state=16, bidirectional=True), targets=r"0\\.self_attn")
        >>> model(torch.randn(2, 30, 8)).shape
        torch.Size([2, 30, 8])
        >>> opt = torch.optim.AdamW(optx.param_groups(model, lr=0.01, weight_decay=0.05))
        >>> [(group["lr"], group["weight_decay"]) for group in opt.param_groups]
        [(0.01, 0.05), (0.001, 0.0)]

    Source: arXiv 2206.11893; state-spaces/s4.
    """

    name: ClassVar[str] = "s4d"
    role: ClassVar[str] = "attention"
    serves: ClassVar[str] = "self-attention modules"

    mode: Literal["replace", "beside"] = "replace"
    d_state: int = 64
    init: Init = "legs"
    disc: Disc = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 0.1
    train_B: bool = False
    bidirectional: bool | None = None
    output: Output = "glu"
    dropout: float = 0.0
    max_lr: float = 1e-3
    width: int | None = None

    def __post_init__(self) -> None:
        check_choice("S4D", "mode", self.mode, ("replace", "beside"))
        check_choice("S4D", "bidirectional", self.bidirectional, (None, True, False))
        check_options(
            *("S4D", self.d_state, self.init, self.disc, self.dt_min, self.dt_max),
            *(self.output, self.dropout, self.max_lr),
        )
        if self.width is not None:
            check_whole("S4D", "width", self.width, 1)

    # ---- where ------------------------------------------------------------------------------------------

    def places(self, model: nn.Module) -> Collection[str] | None:
        """Attention of a known family, without that to another sequence."""
        paths = paths_of(model)
        wanted = Wanted(type(self).__name__, self.serves, type(model).__name__, self.role)
        found = {paths.here[path] for path in of_role(paths.modules, wanted)}
        return {path for path in found if not is_cross(path, model.get_submodule(path))}

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's."""
        return self.parts([Site(path, module)])[0]

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per module; they read a mask once."""
        reader = Reader()
        kind = InPlace if self.mode == "replace" else Beside
        ways: list[tuple[int, bool]] = []
        for site in sites:
            self._check(site)
            ways.append((self._width(site), self._both_ways(site)))
        return [
            kind(site.path, self._layer(site.module, width, both), reader)
            for site, (width, both) in zip(sites, ways, strict=True)
        ]

    def _layer(self, module: nn.Module, width: int, both_ways: bool) -> S4DLayer:
        like = new_tensor(module)
        with torch.device("cpu"):  # eigenvalues are real numbers, also of a model that has none yet
            layer = S4DLayer(
                width,
                self.d_state,
                init=self.init,
                disc=self.disc,
                dt_min=self.dt_min,
                dt_max=self.dt_max,
                train_B=self.train_B,
                bidirectional=both_ways,
                output=self.output,
                dropout=self.dropout,
                max_lr=self.max_lr,
            ).float()
        if self.mode == "beside":
            silence(layer)
        return layer.to(device=like.device, dtype=like.dtype)

    def _check(self, site: Site) -> None:
        if _is_none(site.module):
            raise TargetError(
                f"attach: S4D serves {self.serves}; {site.path!r} is a {type(site.module).__name__}."
            )
        if is_cross(site.path, site.module):
            raise TargetError(
                f"attach: {site.path!r} ({type(site.module).__name__}) is cross-attention, and S4D mixes a "
                "sequence with itself. Leave it out by targets= or exclude=."
            )
        if adds_position_bias(site.module):
            raise TargetError(
                f"attach: {site.path!r} ({type(site.module).__name__}) hands a position bias on to other "
                "layers, which S4D has not. Attach to models whose layers do without, as Llama or BERT."
            )
        if self.mode == "replace":
            inner = [name for name, _ in site.module.named_modules() if RESERVED in name.split(".")]
            if inner:
                raise TargetError(
                    f"attach: something is attached to {site.path!r}, or in it ({inner[0]!r}), which would "
                    "not act with S4D in its place. Remove that first, or attach optx.S4D(mode='beside')."
                )

    def _both_ways(self, site: Site) -> bool:
        if self.bidirectional is not None:
            return self.bidirectional
        causal = is_causal(site.module)
        if causal is None:
            raise TargetError(
                f"attach: {site.path!r} ({type(site.module).__name__}) does not say whether it sees what is "
                f"still to come, as S4D has to know of {self.serves}. Pass optx.S4D(bidirectional=True) for "
                "an encoder's, False for a decoder's."
            )
        return not causal

    def _width(self, site: Site) -> int:
        if self.width is not None:
            return self.width
        for path, module in site.module.named_modules():
            if RESERVED not in path.split(".") and is_linear(module):
                return features(module)[0]
        raise TargetError(
            f"attach: {site.path!r} ({type(site.module).__name__}) has no linear module that shows the width "
            "of its hidden states. Pass optx.S4D(width=...)."
        )


def _is_none(module: nn.Module) -> bool:
    """Whether it is known to be no attention: a linear layer, or another of torch's own modules."""
    torchs = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.MultiheadAttention)
    return torchs or is_linear(module) or is_conv(module)


def silence(layer: S4DLayer) -> None:
    """Let a layer give zeros, in a way that it learns out of."""
    with torch.no_grad():
        if layer.out is None:
            layer.C.zero_()
            layer.D.zero_()
        else:  # of a gated layer the half that is gated
            layer.out.weight[: layer.width].zero_()
            layer.out.bias[: layer.width].zero_()
