"""The handle of `optx.WideNet`, and what it leaves on each block.

Source: WideNet, arXiv 2107.11817.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optx._errors import MergeError, OptxError
from optx.inject._expert_copies import mean_of
from optx.inject._mixture import Mixture
from optx.inject._own_loss import Collected, LossHandle, LossPart
from optx.inject._part import Arguments
from optx.inject._served import Served
from optx.inject._shared_modules import Values, once, put
from optx.inject._trained_whole import Saved


class Depth(LossPart):
    """What a block has while it shares modules: where it is, what it had, and plain attributes of its own.

    The shared modules are in the block, where its own were; here is only who they are, so that their
    parameters are told once, by the first block.

    Args:
        path: of the block.
        collected: of the handle.
        shared: the modules by their path in the block, the same for all.
        originals: the block's own, by path.
        values: of each shared module, what this block's had otherwise.
        first: whether it tells of the shared modules.
        alike: of all blocks, their originals.
    """

    def __init__(
        self,
        path: str,
        collected: Collected,
        shared: Mapping[str, nn.Module],
        originals: Mapping[str, nn.Module],
        values: Mapping[str, Values],
        first: bool,
        alike: Sequence[Mapping[str, nn.Module]],
    ) -> None:
        super().__init__(path, collected)
        # In dicts they are no submodules: they are the block's.
        self.shared, self.originals, self.alike = dict(shared), dict(originals), list(alike)
        self.values, self.first = values, first

    @property
    def mixture(self) -> Mixture:
        """The experts and their router."""
        return next(one for one in self.shared.values() if isinstance(one, Mixture))

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Let the shared modules be this block's."""
        self.mixture.depth = self.path
        for path, values in self.values.items():
            for inner, names in values.items():
                vars(self.shared[path].get_submodule(inner)).update(names)
        return None

    def retired(self, module: nn.Module) -> Sequence[nn.Parameter]:
        """The block's own modules', which wait."""
        return [p for one in self.originals.values() for p in one.parameters()]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The shared modules', of the first block's part alone; as its own, which FSDP2 asks for, none."""
        if self.first and recurse:
            for path, module in self.shared.items():
                yield from module.named_parameters(f"{prefix}.{path}".removeprefix("."))

    def tensors(self) -> dict[str, Tensor]:
        """The same, with buffers that are saved."""
        if not self.first:
            return {}
        return {
            f"{path}.{name}": t
            for path, module in self.shared.items()
            for name, t in module.state_dict(keep_vars=True).items()
        }

    def settings_of(self, name: str) -> Sequence[Tensor]:
        """The same parameter of all blocks' own modules; an expert's is its FFN's."""
        path = next(one for one in self.shared if name.startswith(f"{one}."))
        inner = name.removeprefix(f"{path}.")
        if isinstance(self.shared[path], Mixture):
            if not inner.startswith("experts."):
                return ()
            inner = inner.split(".", 2)[2]
        return [one[path].get_parameter(inner) for one in self.alike]

    def suffixes(self) -> dict[str, str]:
        """As in the model."""
        return {name: name for name in self.tensors()}

    def exchange(self, module: nn.Module, *, share: bool) -> None:
        """Put the shared modules into the block, or its own."""
        for path, one in (self.shared if share else self.originals).items():
            put(module, path, one)

    def note(self) -> str:
        """What is shared."""
        if not self.first:
            return "shares them"
        count, k = len(self.mixture.experts), self.mixture.routing.top_k
        return f"{', '.join(self.shared)} for all: {count} experts, top {k}"


class WideHandle(LossHandle):
    """What `optx.attach` returns for `optx.WideNet`.

    Example:
        >>> import torch, optx
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mix, self.ffn = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return x + self.ffn(x + self.mix(x))
        >>> model = torch.nn.Sequential(Block(), Block())
        >>> handle = optx.attach(model, optx.WideNet(ffn="ffn"), targets=Block)
        >>> loss = model(torch.randn(6, 8)).square().mean() + handle.loss()
        >>> len(handle.loads())  # one for each block
        2
    """

    injection: Any  # `optx.WideNet`, which this module does not know
    group: ClassVar[Mapping[str, float]] = {"lr": 0.01, "weight_decay": 0.1}

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        for one, part in self._depths():
            part.exchange(one.module, share=True)
            part.mixture.train(one.module.training)
        self.served[0].hooks.append(model.register_load_state_dict_pre_hook(self._complete))

    def _depths(self) -> list[tuple[Served, Depth]]:
        return [(one, one.part) for one in self.served if isinstance(one.part, Depth)]

    @property
    def mixture(self) -> Mixture:
        """The module that takes the FFN's place in every block: ``router`` and ``experts``."""
        return self._depths()[0][1].mixture

    # ---- the loss ---------------------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """The balance loss of the last forward, of all blocks' calls together, with its weight.

        Perfectly even use of the experts gives ``balance`` for each block. Its gradient reaches the router by
        its chances alone.

        Raises:
            OptxError: there has been no forward in training since it was taken last, or it is removed.
        """
        found = [value for values in self._take().values() for value in values]
        where = self.mixture.router.weight
        loss = torch.stack(found).sum() if found else torch.zeros((), device=where.device)
        loss = self.injection.balance * loss
        self.last_loss = loss.detach()
        return loss

    def _take(self) -> dict[str, list[Tensor]]:
        return super()._take() if self.injection.balance else {}

    def loads(self) -> dict[str, Tensor]:
        """The share of choices that each expert had in the last forward in training, by block."""
        return dict(self.mixture.loads)

    def numbers(self) -> dict[str, float | Tensor]:
        """For `Handle.metrics`: the loss as last taken, and the share of choices that found a full queue."""
        found: dict[str, float | Tensor] = {}
        if self.last_loss is not None:
            found["loss"] = self.last_loss
        if dropped := self.mixture.dropped:
            found["dropped"] = sum(dropped.values()) / len(dropped)
        return found

    # ---- tensors ----------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What there is to train of it, by its first name in the model."""
        for one, part in self._depths():
            for name, p in part.named_parameters():
                yield f"{one.path}.{name}", p
        for kept in self.saved:
            for name, p in kept.module.named_parameters():
                yield f"{kept.path}.{name}", p

    def model_state_dict(self) -> dict[str, Tensor]:
        """The whole model's, with each shared tensor once, as safetensors wants them.

        ``model.load_state_dict`` takes it as well as one that names them for every block.
        """
        self._check_alive("model_state_dict")
        return once(self.model.state_dict())

    def _complete(self, model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before a load: names of shared tensors that a state dict leaves out; and refuse another model's.

        Raises:
            OptxError: it is of the model as it was, or has other values for two blocks.
        """
        first, part = self._depths()[0]
        for path, module in part.shared.items():
            for name in module.state_dict():
                keys = [f"{prefix}{one.path}.{path}.{name}" for one, _ in self._depths()]
                given = [state[key] for key in keys if key in state]
                if any(t is not given[0] and not _same(t, given[0]) for t in given[1:]):
                    raise OptxError(
                        f"load_state_dict: {keys[0]!r} is shared by all blocks, and the state dict has "
                        "other values for some of them: it is of a model before WideNet. Load it first, "
                        "and attach then."
                    )
                state.update({key: given[0] for key in keys if given and key not in state})
        ffn, own = next(
            (path, one) for path, one in part.originals.items() if isinstance(part.shared[path], Mixture)
        )
        plain = next((key for key in own.state_dict() if f"{prefix}{first.path}.{ffn}.{key}" in state), None)
        if plain is not None:
            raise OptxError(
                f"load_state_dict: it has '{first.path}.{ffn}.{plain}', of the FFN of a model before "
                "WideNet. Load it first, and attach then."
            )

    # ---- ways back --------------------------------------------------------------------------------------

    def merge(self, *, untie: bool = False) -> None:
        """Not possible.

        Raises:
            MergeError: always: which expert computes depends on the token, so no dense FFN is equal.
        """
        raise MergeError(
            "merge: WideNet's experts depend on the token, so no dense FFN computes the same. Keep it "
            "attached, or call merge_and_unload(lossy=True), which puts the experts' mean into every block."
        )

    def merge_and_unload(self, *, untie: bool = False, lossy: bool = False) -> nn.Module:
        """Give every block a copy of the shared modules, and the mean of the experts as its FFN.

        Args:
            untie: of no use here: each block gets its own.
            lossy: has to be True: the model computes something else then, and needs training.

        Raises:
            MergeError: without ``lossy=True``.
        """
        self._check_alive("merge_and_unload")
        if not lossy:
            self.merge()
        for one, part in self._depths():
            for path, module in part.shared.items():
                own = part.originals[path]
                source = (
                    _mean_expert(module) if isinstance(module, Mixture) else dict(module.named_parameters())
                )
                with torch.no_grad():
                    for name, p in own.named_parameters():
                        p.copy_(source[name])
                put(one.module, path, own)
        self._take_off(restore=False)
        return self.model

    def remove(self) -> None:
        """Give every block its own modules back, as they were."""
        if not self._removed:
            self._take_off(restore=True)

    def _take_off(self, *, restore: bool) -> None:
        for one, part in self._depths():
            part.exchange(one.module, share=False)
            where = self.mixture.router.weight.device
            for own in part.originals.values():
                own.train(one.module.training)
                if next(own.parameters()).device != where:  # the model was moved since
                    own.to(where)
        super()._take_off(restore=restore)

    def disable(self) -> Any:
        """Let each block compute with its own modules, until `enable` or the end of a ``with``."""
        before = super().disable()
        for one, part in self._depths():
            part.exchange(one.module, share=False)
        return _Disabled(self, before)

    def enable(self) -> None:
        """Let the shared modules compute again."""
        super().enable()
        for one, part in self._depths():
            part.exchange(one.module, share=True)


class _Disabled:
    """Puts the shared modules back at the end of a ``with``."""

    def __init__(self, handle: WideHandle, before: Any) -> None:
        self._handle, self._before = handle, before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self._before.__exit__(*error)
        if not self._handle.removed:
            self._handle.enable()


def _mean_expert(mixture: Mixture) -> dict[str, Tensor]:
    every = [dict(expert.named_parameters()) for expert in mixture.experts]
    return {name: mean_of([one[name] for one in every]) for name in every[0]}


def _same(one: Any, other: Any) -> bool:
    same_memory = one.data_ptr() == other.data_ptr() and one.shape == other.shape
    return same_memory or (one.shape == other.shape and torch.equal(one, other))
