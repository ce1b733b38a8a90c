"""HFT: in every round a random half of the matrices is trained, and the other half stays as it is.

Source: "HFT: Half Fine-Tuning for Large Language Models", arXiv 2404.18466 (ACL 2025). There is no official
code; the selection (section 3, category level) agrees with the re-implementation in gucci-j/ssu.
"""

from __future__ import annotations

import warnings
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from optx._errors import OptxError, TransformError
from optx._names import parameter_names
from optx._transform import Transform
from optx.transforms._blocks import Layer, clean_names, layers_of
from optx.transforms._half import Balance, Draw, Level, Row, Selection

if TYPE_CHECKING:
    from optx._wrap import Wrapped


class HFT(Transform):
    """Train a random half of the matrices per round and keep the other half frozen (Half Fine-Tuning).

    A round is one training stage: an instruction tuning, one task of a sequence. In each transformer block
    2 of the 4 attention matrices, half of the feed-forward matrices and half of the norms are trained; the
    embeddings, the head and the final norm always are. What was learned before survives better, and the
    frozen half takes no gradient, no optimizer state and no step time: it has ``requires_grad=False``, so
    it stays bit-identical under weight decay and momentum, and gradients set by hand (GEM's projection)
    are dropped before each step.

    Parameters that are frozen already stay so and are not drawn from. `Wrapped.remove` restores every
    flag. One HFT serves a model; put it on one optimizer if there are several.

    With DDP, wrap the model first, with ``find_unused_parameters=True``, and then the optimizer: DDP
    learns of the trainable parameters when it is made. All ranks draw the same half, without
    communication.

    Source: "HFT: Half Fine-Tuning for Large Language Models", arXiv 2404.18466.

    Args:
        model: the model that the optimizer trains; its parameter names tell blocks and categories. A
            fused matrix (GPT-2's ``c_attn``, ``qkv_proj``, ``gate_up_proj``) is drawn as one.
        ratio: the share to train (the paper's is 0.5; 0.4 to 0.6 do about as well). 1 freezes nothing, 0
            all that can be drawn. `Selection.ratio` tells what the draw came to: of 3 feed-forward
            matrices, half of the blocks train 2 and half 1; of an odd number of blocks, the smaller half 2.
        level: ``"category"`` (the paper's choice), ``"layer"`` (half of the blocks) or ``"model"``
            (half of all matrices and half of all norms, from one pool each).
        seed: of the draws. The global generators are not touched.
        rounds_every: begin a new round after so many steps; None leaves it to `next_round`.
        reset_state: at a new round, drop the base's state of all parameters (each of the paper's stages
            starts a new optimizer); False drops it only where it is frozen.
        balance: ``"count"``, or ``"params"`` to choose as many matrices as that, but with a share of
            numbers near ``ratio``: under grouped-query attention, 2 of 4 may be a quarter of them.
        blocks: a regular expression that matches the blocks' names, for models whose blocks are not
            recognised.

    Attributes:
        round: the current round, from 0.
        seed: as given, or as in the checkpoint that was loaded.

    Group keys:
        ``hft=False`` leaves a param group out: it is trained as if it were not there.

    Raises:
        OptxError: an argument out of range, or no blocks in the model.
        TransformError: a parameter of the optimizer is not in the model, or nothing would be trained.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
        >>> opt = torch.optim.AdamW(model.parameters(), lr=2e-5)
        >>> opt = optx.wrap(opt, optx.HFT(model, seed=0))
        >>> round(opt.hft.selected().ratio.count, 2)
        0.5
        >>> opt.hft.next_round().round
        1
    """

    name = "hft"

    def __init__(
        self,
        model: nn.Module,
        ratio: float = 0.5,
        level: Level = "category",
        seed: int = 0,
        rounds_every: int | None = None,
        reset_state: bool = True,
        balance: Balance = "count",
        *,
        blocks: str | None = None,
    ) -> None:
        given: Any = model
        if not isinstance(given, nn.Module):
            raise OptxError(f"HFT: model is a {type(given).__name__}; it must be the model, as HFT(model).")
        if rounds_every is not None and rounds_every < 1:
            raise OptxError(f"HFT: rounds_every is {rounds_every!r}; it must be at least 1 step, or None.")
        self.model = model
        self.rounds_every = rounds_every
        self.reset_state = reset_state
        self._draw = Draw(ratio, level, balance, int(seed))
        self._blocks = blocks
        self._steps = 0  # in this round; counted where rounds_every asks for it
        self._checksum = 0
        self._looked_at: Any = None
        self._found: list[Layer] = []
        self._flags: dict[str, bool] = {}  # requires_grad as the person left it
        self._frozen: list[Tensor] = []  # the optimizer's, in this round
        self._optimizer: Wrapped | None = None
        self._hook: Any = None
        self._layers()  # raises where there are no blocks

    @property
    def round(self) -> int:
        """The current round, from 0."""
        return self._draw.round

    @property
    def seed(self) -> int:
        """The seed of all rounds' draws."""
        return self._draw.seed

    # ---- for the person ----------------------------------------------------------------------------

    def next_round(self) -> Selection:
        """Draw a new half, between two steps. Gradients of what is now frozen are dropped.

        Returns:
            The new selection.
        """
        return self.start_round(self.round + 1)

    def start_round(self, number: int) -> Selection:
        """Begin round ``number``; a round's half depends only on it and the seed.

        ``torch.distributed.checkpoint`` loads optimizer state for trainable parameters only: begin the saved
        round before loading. ``load_state_dict`` needs no such help.
        """
        optimizer = self._bound("start_round")
        self._draw = replace(self._draw, round=number)
        self._steps = 0
        return self._enter(optimizer, self.reset_state)

    def selected(self) -> Selection:
        """What this round trains, parameter by parameter."""
        return self._select(self._bound("selected"))

    # ---- the selection -----------------------------------------------------------------------------

    def _parameters(self) -> dict[str, nn.Parameter]:
        """By clean name, each once; read anew each time, since parameter objects may be replaced."""
        named = dict(self.model.named_parameters())
        clean = clean_names(named)
        return {clean[name]: p for name, p in named.items()}

    def _layers(self) -> list[Layer]:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        clean = clean_names(named)
        first: dict[Tensor, str] = {}
        same = {clean[name]: first.setdefault(p, clean[name]) for name, p in named.items()}
        shapes = {clean[name]: tuple(p.shape) for name, p in named.items()}
        if (shapes, same) != self._looked_at:  # with 10,000 experts it takes a second
            again = {name: other for name, other in same.items() if name != other}
            self._found = layers_of(shapes, self._blocks, again)
            self._looked_at = (shapes, same)
        return self._found

    def _select(self, optimizer: torch.optim.Optimizer) -> Selection:
        params = self._parameters()
        groups = [group for group in optimizer.param_groups if not self.serves(group)]
        left_out = {p for group in groups for p in group["params"]}
        for name, p in params.items():
            self._flags.setdefault(name, p.requires_grad)
        free = {name for name, p in params.items() if self._flags[name] and p not in left_out}
        layers = self._layers()
        pool = [layer for layer in layers if free.intersection(layer.tensors)]
        trained = self._draw.of(pool)
        rows: dict[str, Row] = {}
        for layer in layers:
            for tensor in layer.tensors:
                drawn = layer.block is not None and tensor in free
                trainable = layer.name in trained if drawn else self._flags[tensor]
                numel = params[tensor].numel()
                row = Row(tensor, layer.name, layer.category, layer.block or "", numel, trainable, drawn)
                rows[tensor] = row
        return Selection([rows[name] for name in params], self.round)

    def _enter(self, optimizer: Wrapped, reset: bool) -> Selection:
        """Make the model and the optimizer's state those of this round."""
        selection = self._select(optimizer)
        params = self._parameters()
        for row in selection:
            p = params[row.name]
            p.requires_grad_(row.trainable)
            if row.drawn and not row.trainable:
                p.grad = None
        served = optimizer.served(self)
        self._frozen = [p for p in served if not p.requires_grad]
        for p in served if reset else self._frozen:
            optimizer.drop_base_state(p)
        self._checksum = zlib.crc32("\n".join(selection.trainable).encode())
        self._tell(optimizer)
        return selection

    # ---- the optimizer's side ----------------------------------------------------------------------

    def check(self, base: torch.optim.Optimizer) -> None:
        """Refuse another model's parameters, a DDP that would wait for frozen ones, and an empty half."""
        if self._optimizer is None:
            self._flags.clear()
        elif self._optimizer.base is not base:
            raise TransformError("HFT: this HFT serves an optimizer already; one HFT serves one model.")
        params, names = self._parameters(), parameter_names(base)
        optimized = {p for group in base.param_groups for p in group["params"]}
        foreign = sorted((names[id(p)], tuple(p.shape)) for p in optimized.difference(params.values()))
        if foreign:
            name, shape = foreign[0]
            raise TransformError(
                f"HFT: {name} of the optimizer, of shape {shape}, is not a parameter of the model "
                f"({len(foreign)} in all). Give HFT the model that the optimizer trains."
            )
        if isinstance(self.model, DistributedDataParallel) and not self.model.find_unused_parameters:
            raise TransformError(
                "HFT: the model is in DistributedDataParallel, which would wait for the gradients of the "
                "frozen half. Make it with find_unused_parameters=True."
            )
        if not any(row.trainable and params[row.name] in optimized for row in self._select(base)):
            raise TransformError(
                f"HFT: with ratio={self._draw.ratio} the optimizer has nothing to train: none of its "
                "parameters was drawn or is outside of the blocks. Raise ratio, or give it the embeddings."
            )

    def bind(self, optimizer: Wrapped) -> None:
        """Freeze this round's half."""
        self._optimizer = optimizer
        self._hook = optimizer.register_step_pre_hook(self._drop_gradients)
        self._enter(optimizer, reset=False)

    def _drop_gradients(self, *_: Any) -> None:
        """Before a step: a frozen weight may have got a gradient by hand, or from a graph made earlier."""
        for p in self._frozen:
            if p.grad is not None:
                p.grad = None

    def after_step(self, optimizer: Wrapped) -> None:
        """Count the step, and begin a new round where it is time."""
        if self.rounds_every is None or _is_rehearsal(optimizer):
            return
        self._steps += 1
        if self._steps >= self.rounds_every:
            self.next_round()
        else:
            self._tell(optimizer)

    def after_load(self, optimizer: Wrapped) -> None:
        """Return to the round that was saved."""
        group = optimizer.param_groups[0]
        seed, number = int(self._get(group, "seed", self.seed)), int(self._get(group, "round", self.round))
        saved = self._get(group, "selection", 0)
        self._draw = replace(self._draw, seed=seed, round=number)
        self._steps = int(self._get(group, "steps", self._steps))
        self._enter(optimizer, reset=False)
        if saved not in (0, self._checksum):
            warnings.warn(
                f"HFT: the checkpoint trained another half in round {number} than this HFT does. Give it the "
                "model, ratio, level, balance and frozen parameters of the run that saved it.",
                stacklevel=4,
            )

    def _get(self, group: dict[str, Any], key: str, default: int) -> int:
        return group.get(f"optx.{self.name}.{key}", default)

    def unwrap(self, optimizer: Wrapped) -> None:
        """Restore every ``requires_grad``."""
        for name, p in self._parameters().items():
            p.requires_grad_(self._flags.get(name, p.requires_grad))
        self._flags.clear()
        self._frozen.clear()
        self._hook.remove()
        self._optimizer = None

    def group_numbers(self) -> dict[str, float | int | bool]:
        """Round, seed, steps in this round, and a checksum of the selection."""
        return {"round": self.round, "seed": self.seed, "steps": self._steps, "selection": self._checksum}

    def _tell(self, optimizer: Wrapped) -> None:
        """Write the numbers where they are saved."""
        numbers = {f"optx.{self.name}.{key}": value for key, value in self.group_numbers().items()}
        for group in optimizer.param_groups:
            group.update(numbers)

    def _bound(self, caller: str) -> Wrapped:
        if self._optimizer is None:
            raise TransformError(
                f"HFT: {caller}() needs an optimizer: opt = optx.wrap(optimizer, HFT(model))."
            )
        return self._optimizer

    def __repr__(self) -> str:
        draw = self._draw
        return f"HFT(ratio={draw.ratio}, level={draw.level!r}, seed={draw.seed})"


def _is_rehearsal(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step was torch.distributed.checkpoint's, with lr 0 and zero gradients, to make the state."""
    if any(float(group.get("lr", 1.0)) != 0.0 for group in optimizer.param_groups):
        return False
    return not any(
        p.grad is not None and bool(p.grad.any()) for group in optimizer.param_groups for p in group["params"]
    )
