"""LDLT: layers whose weights are functions of free matrices, so that together they are L-Lipschitz.

Source: "LDLT L-Lipschitz Network", arXiv 2512.05915.
"""

# Letters are those of the paper.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from optx._errors import OptxError, TargetError, check_above_0, check_choice
from optx.inject._computes import derived
from optx.inject._injection import Injection, Site
from optx.inject._own_call import has_own_call
from optx.inject._part import Part
from optx.inject._served import Served
from optx.inject._trained_whole import Saved
from optx.lipschitz import _ldlt_slopes
from optx.lipschitz._ldlt_handle import LDLTHandle
from optx.lipschitz._ldlt_part import LDLTWeight


@dataclass(frozen=True)
class LDLT(Injection):
    """Make a chain of layers L-Lipschitz in l2 from its input to its output, whatever a step does to it.

    Each layer trains a free matrix V and a scale a in its weight's place. The weights are smooth functions of
    them, made together once in a forward pass: a layer's own by a Cholesky factor of V V^T + exp(a) I, and by
    the factor of the layer before. They make LipSDP's matrix of the chain positive semidefinite by its block
    LDL^T, so only the constant of the whole is bounded, and a layer may have a norm above 1. Biases train as
    before.

    ``handle.certificate()`` computes that matrix's least eigenvalue from the weights as they are. Of a
    classifier whose whole is the chain, an answer holds for all inputs nearer in l2 than (largest logit - the
    next) / (sqrt(2) L): the share that is right and has this above eps is the certified accuracy. Nothing
    else can be attached to the layers: what it adds would be outside of the certificate.

    Args:
        L: the constant, above 0; or ``"auto"``: the smallest that keeps the layers' weights, and a
            thousandth.
        residual: the form y = A x + B w_n + b, the chain's input added to its output. A is a served Linear
            on the skip, or, for a branch of two layers at L >= 1, nothing: y = x + B w_1 + b, at L = 1 SLL's
            layer.
        activation: what is between layers, where the model can't be traced or slopes leave [0, 1]: a name, or
            the least and the greatest slope, as ``(0.01, 1.0)``. None: it is looked up in the model. Slopes
            other than [0, 1] are counted with exactly.
        init: ``"raw"``: V begins as the layer's weight, so that the chain does not compute what it did;
            ``"keep"``: as what gives the layer's weight. None: ``"keep"`` for ``L="auto"``, else ``"raw"``.

    Serves nn.Linear and nn.Conv1d/2d/3d (zero or circular padding), which must be named. Between them there
    may be ReLU, LeakyReLU, ELU, tanh, sigmoid, softplus and their like, dropout, and from convolutions to
    Linear a flatten; anything else (norms, pools, attention, GELU) is refused by name. Dropout is counted:
    the certificate says the constant while it acts.

    A convolution keeps its kernel, for an image of any size: its V V^T is replaced by a diagonal above it,
    its kernel's overlaps summed (AOL's bound), which makes it a little more contractive than it need be. It
    is certified, and looser than a Linear's. ``certificate(shape=...)`` unrolls it for a size.

    Paper values:
        ``L=1.0``: the paper's (the default).
        alpha = exp(a) begins at 1, and V by Kaiming's uniform, as a new nn.Linear's weight does.

    Limits: A chain lies on one device, whole: no FSDP2 by layers, no offload. Activation checkpointing around
    single layers of it fails in torch; around the chain it works. Its weights take the time of a few products
    of their size, whatever the batch: on one core forward and backward of 256-256-256-10 take 2.0 times the
    plain chain's at a batch of 1024, 2.9 at 512 and 5 at 256. In half precision, rounding of weights is not
    in the certificate. Float32 turns to float64 where the factors need it, and under torch.compile always.
    ``"keep"`` finds multipliers by norms, one a layer, so that its smallest L is above LipSDP's.

    Keywords: Lipschitz constant, certified robustness, LMI, LipSDP, spectral normalisation, orthogonal
        layers, SLL, AOL, Cayley, sandwich layers, 1-Lipschitz.

    Evidence: ``optx run certify``; ``test_ldlt.py``, ``test_ldlt_forms.py``, ``test_ldlt_kept.py``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, layers that are no chain, a thing between them that voids the certificate, or
            weights that no chain of this L has; names the smallest L.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> handle = optx.attach(model, optx.LDLT(L=1.0), targets=["0", "2"])
        >>> opt = optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3), handle)
        >>> x, y = torch.randn(64, 4), torch.randn(64, 4)
        >>> bool(((model(x) - model(y)).norm(dim=1) <= (x - y).norm(dim=1)).all())
        True
        >>> handle.certificate().holds
        True

    Source: arXiv 2512.05915; the residual form is derived anew, as the released code's is wrong.
    """

    name: ClassVar[str] = "ldlt"
    role: ClassVar[str] = ""
    serves: ClassVar[str] = "Linear, Conv1d, Conv2d or Conv3d modules of one chain"

    L: float | Literal["auto"] = 1.0
    residual: bool = False
    activation: str | tuple[float, float] | None = None
    init: Literal["raw", "keep"] | None = None

    def __post_init__(self) -> None:
        check_choice("LDLT", "residual", self.residual, (True, False))
        check_choice("LDLT", "init", self.init, (None, "raw", "keep"))
        if isinstance(self.L, str):
            check_choice("LDLT", "L", self.L, ("auto",))
            if self.init == "raw":
                raise OptxError(
                    "LDLT: L is 'auto', the smallest that keeps the weights, and init is 'raw', which keeps "
                    "none. Give a number, or leave init out."
                )
        else:
            object.__setattr__(self, "L", check_above_0("LDLT", "L", self.L))
        if self.activation is not None:
            _ldlt_slopes.named(self.activation)
            if not isinstance(self.activation, str):
                low, high = self.activation
                object.__setattr__(self, "activation", (float(low), float(high)))

    @property
    def keeps(self) -> bool:
        """Whether the layers begin with the weights that they had."""
        return self.init == "keep" or self.L == "auto"

    @property
    def needs_weight(self) -> bool:
        """Its values."""
        return True

    def places(self, model: nn.Module) -> Collection[str] | None:
        """None: a chain has to be named.

        Raises:
            TargetError: always.
        """
        raise TargetError(
            "attach: LDLT can't know which layers are to be a chain. Name them: "
            'attach(model, optx.LDLT(L=1.0), targets=["fc1", "fc2", "fc3"]).'
        )

    def part(self, module: Any, path: str) -> Part:
        """V and a of one layer."""
        conv = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if type(module) is not nn.Linear and not conv:
            raise TargetError(f"attach: LDLT serves {self.serves}; {path!r} is a {type(module).__name__}.")
        if by := derived(module):
            raise TargetError(f"attach: LDLT: {path}.weight is made by {by} already. Leave it out.")
        if has_own_call(module):
            raise TargetError(f"attach: LDLT: {path!r} has a forward of its own, which may not be linear.")
        if not module.weight.is_floating_point() or not module.weight.numel():
            raise TargetError(f"attach: LDLT: {path}.weight has no floating-point numbers. Leave it out.")
        if conv and module.padding_mode not in ("zeros", "circular"):
            raise TargetError(
                f"attach: LDLT: {path!r} pads by {module.padding_mode!r}, which counts some inputs several "
                "times; 'zeros' and 'circular' are served."
            )
        return LDLTWeight(module, path, self.keeps)

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per layer; the handle connects them."""
        seen: dict[int, str] = {}
        for site in sites:
            weight: Any = getattr(site.module, "weight", None)
            if id(weight) in seen:
                raise TargetError(
                    f"attach: LDLT: {seen[id(weight)]!r} and {site.path!r} share one weight, and each place "
                    "in a chain has one of its own. Untie them first."
                )
            seen[id(weight)] = site.path
        return super().parts(sites)

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> LDLTHandle:
        """What `optx.attach` returns."""
        return LDLTHandle(model, injection, served, saved)
