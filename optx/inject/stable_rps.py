"""STABLE-RPS: all weights of a network are read from one short array; ROAST and HashedNet besides.

Source: "In defense of parameter sharing for model-compression", arXiv 2310.11611, ICLR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from optx._errors import OptxError, check_above_0, check_choice, check_range, check_whole
from optx.inject import _shared_places
from optx.inject._injection import Injection, Site
from optx.inject._part import Part, new_tensor
from optx.inject._served import Served
from optx.inject._shared_handle import SharedHandle
from optx.inject._shared_keep import Keep
from optx.inject._shared_part import MAPPINGS, SharedWeight
from optx.inject._shared_scaler import MODES, GradScale
from optx.inject._trained_whole import Saved
from optx.kernels.shared.mapping import signed

_HALF_WIDTH = 0.05


@dataclass(frozen=True)
class StableRPS(Injection):
    """Read the weights of all served modules from one short array psi: W_i = scale * g(i) * psi[h(i)].

    h (which slot) and g (which sign) are hashes of the weight's number, computed where they are needed: there
    is neither an index nor a sign in memory. Each weight is made when its module computes, made again in the
    backward pass, and kept nowhere. What trains is psi, of ``compression`` times as many numbers.

    ``"fold"`` (STABLE-RPS) cuts the long vector of all weights into segments as long as psi, each rotated by
    a random amount: every slot is read by equally many weights (to one), and at ``compression=1`` by exactly
    one. ``"roast"`` hashes blocks of 16 x 16 (embeddings: 1 x 8), ``"hashed"`` each weight (HashedNet).

    Under SGD give the optimizer the gradient scaler, which makes a step as large as a dense model's, whatever
    ``init_std`` is: ``optx.wrap(optimizer, handle)``, for an optimizer made before attaching or after it
    (``handle.grad_scale()`` is the scaler alone). Adam and its kin undo any scaling of gradients: use
    ``param_scale="unit"`` there.

    Args:
        compression: length of psi per weight, in (0, 1].
        mapping: ``"fold"``, ``"roast"`` or ``"hashed"``.
        init_std: psi begins as U(-init_std, init_std): the authors' name for a half-width. None: 0.05.
        scale: of each module: ``"init"``, its weight's standard deviation over ``init_std``; ``"fan_in"``,
            1 / sqrt(fan_in) over it; or a number.
        match_std: the weights begin with the standard deviation that they had; without it with 0.577 of it,
            as in the paper (a uniform's is its half-width over the root of 3).
        param_scale: ``"unit"``: ``init_std`` is the modules' mean deviation, so that the mean scale is 1 and
            a step of Adam's moves weights as far as it moves psi.
        scaler: the mode of the gradient scaler that `optx.wrap` adds for the handle, ``"v1"`` to ``"v5"`` or
            ``"none"``. None: ``"v1"``, and ``"none"`` with ``param_scale="unit"``.
        init: ``"random"``, or ``"fit"``: psi from the weights that there are, by least squares; exact at
            ``compression=1`` under the fold.
        keep: where the modules' own weights are meanwhile. ``"memory"``: in place, frozen, so that a bare
            checkpoint's keys are all there; they take their memory, and no gradient or state. ``"file"``: in
            a temporary file, until `Handle.remove` or a merge; ``"none"``: nowhere, and `Handle.remove`
            leaves what a merge would. With these two the modules have no weight of their own, and
            ``model.state_dict()`` no key for it.
        seed: of hashes and of psi; the same in every process.

    Serves nn.Linear, transformers' Conv1D, nn.Conv1d/2d/3d and nn.Embedding; by default every linear module
    and convolution. Biases, norms and what is not served are trained as they are. Modules that share a weight
    are mapped once, and must all be served. psi lies on the first served module
    (``module.optx.stable_rps.psi``).

    Paper values:
        ``init_std=0.05``: "0.04-0.05" in the authors' code (None is this).
        ``mapping="fold"``: the paper's (the default), with the scaler ``"v1"``.
        ``compression=1`` to ``0.001``: of CIFAR's networks.

    Limits: Everything that shares psi is attached at once: another module would change the length and every
    place. Half precision serves the weights; psi is kept in float32. A gradient of psi is made per served
    module, each of psi's length, so that many small modules at a compression near 1 cost time. Backward
    passes make a module's dense gradient for a moment. ``"roast"`` and ``"hashed"`` sum on one thread of a
    CPU. Under torch.compile torch's operations do all of it, and what the compiler keeps is its own affair.
    Activation checkpointing keeps the inputs of served convolutions and embeddings. Not with Accelerate's
    offload, nor with FSDP2 block by block (psi would be gathered by its first module alone).

    Keywords: parameter sharing, weight sharing, hashing trick, HashedNet, ROAST, RPS, compression, RzLinear.

    Evidence: ``optx run share``; ``optx bench share``; ``test_shared_weights.py``, ``test_shared.py``.

    Raises:
        OptxError: an option out of range, or a compression that leaves fewer slots than one, or than a block.
        TargetError: at attach, a weight that is tied to one that is not served, constant, or derived.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> handle = optx.attach(model, optx.StableRPS(compression=0.1), targets=(torch.nn.Linear,))
        >>> handle.psi.numel()
        819
        >>> opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.1), handle)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> opt.step()
        >>> bare = handle.merge_and_unload()

    Source: arXiv 2310.11611; ROAST, arXiv 2207.10702; HashedNet, arXiv 1504.04788.
    """

    name: ClassVar[str] = "stable_rps"
    role: ClassVar[str] = "weighted"
    serves: ClassVar[str] = "Linear, Conv1D, Conv1d/2d/3d or Embedding modules"

    compression: float = 0.1
    mapping: Literal["fold", "roast", "hashed"] = "fold"
    init_std: float | None = None
    scale: Literal["init", "fan_in"] | float = "init"
    match_std: bool = False
    param_scale: Literal["std", "unit"] = "std"
    scaler: Literal["v1", "v2", "v3", "v4", "v5", "none"] | None = None
    init: Literal["random", "fit"] = "random"
    keep: Keep = "memory"
    seed: int = 0

    def __post_init__(self) -> None:
        def put(option: str, value: Any) -> None:
            object.__setattr__(self, option, value)

        check_range("StableRPS", "compression", self.compression, 0, 1)
        if isinstance(self.compression, bool) or not self.compression > 0:
            raise OptxError(f"StableRPS: compression is {self.compression!r}; it must be above 0, at most 1.")
        check_choice("StableRPS", "mapping", self.mapping, MAPPINGS)
        check_choice("StableRPS", "match_std", self.match_std, (True, False))
        check_choice("StableRPS", "param_scale", self.param_scale, ("std", "unit"))
        check_choice("StableRPS", "init", self.init, ("random", "fit"))
        check_choice("StableRPS", "keep", self.keep, ("memory", "file", "none"))
        check_choice("StableRPS", "scaler", self.scaler, (None, *MODES, "none"))
        put("seed", check_whole("StableRPS", "seed", self.seed))
        put("compression", float(self.compression))
        if isinstance(self.scale, str):
            check_choice("StableRPS", "scale", self.scale, ("init", "fan_in"))
        elif self.param_scale == "unit":
            raise OptxError(
                f'StableRPS: scale={self.scale} and param_scale="unit", which chooses it. Give one.'
            )
        else:
            put("scale", check_above_0("StableRPS", "scale", self.scale))
        if self.init_std is not None:
            if self.param_scale == "unit":
                raise OptxError(
                    f'StableRPS: init_std={self.init_std} and param_scale="unit", which chooses it. Give one.'
                )
            put("init_std", check_above_0("StableRPS", "init_std", self.init_std))
        if self.scaler is None:
            put("scaler", "none" if self.param_scale == "unit" else "v1")

    @property
    def needs_weight(self) -> bool:
        """Its shape and its spread."""
        return True

    def part(self, module: nn.Module, path: str) -> Part:
        """The part of a module that shares with no other."""
        return self.parts([Site(path, module)])[0]

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site, the first with the array."""
        for site in sites:
            _shared_places.check_site(site, self.serves)
        sigma, factor = self.init_std or _HALF_WIDTH, math.sqrt(3.0) if self.match_std else 1.0
        if isinstance(self.scale, str):
            wanted = _shared_places.deviations(sites, self.scale)
            if self.param_scale == "unit":
                sigma = _shared_places.mean_deviation(sites, wanted) * factor
            scales = [factor * one / sigma for one in wanted]
        else:
            scales = [self.scale] * len(sites)
        seed = signed(self.seed)
        every = _shared_places.places(sites, scales, self.mapping, self.compression, seed)
        like = new_tensor(sites[0].module, 0)
        psi = _shared_places.drawn(every[0].slots, sigma, seed, like)
        if self.init == "fit":
            psi = _shared_places.fitted(sites, every, psi)
        found: list[Part] = []
        for site, place in zip(sites, every, strict=True):
            weight = _shared_places.weight_at(site)
            holder: Any = found[0] if found else None
            part = SharedWeight(place, weight.shape, holder)
            part.to(weight.device)
            if not found:
                part.psi = nn.Parameter(psi)
            found.append(part)
        found[0].__dict__["replaced"] = _shared_places.weights_of(sites)
        return found

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """None; looks whether a served weight is tied to one that is not."""
        _shared_places.check_ties(model, sites)
        return []

    def transforms(self, handle: SharedHandle) -> list[GradScale]:
        """The gradient scaler, for `optx.wrap(optimizer, handle)`."""
        return [] if self.scaler == "none" else [handle.grad_scale()]

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> SharedHandle:
        """What `optx.attach` returns."""
        return SharedHandle(model, injection, served, saved)
