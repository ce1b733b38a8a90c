"""The handle of `optx.VQLogits`: a loss by codes, what the head costs now, and the way to a plain one."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_choice, check_range
from optx._names import is_dtensor
from optx.inject import _code_loss, _code_map, _code_report
from optx.inject._code_head import CodeHead
from optx.inject._computes import weight_now
from optx.inject._followed import Resting
from optx.inject._handle import Handle
from optx.inject._part import attached
from optx.inject._served import Served
from optx.inject._trained_whole import Saved

# What transformers' models do to their logits after the head, by the config's names, and what means nothing.
_AFTER = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1, "logits_scale": 1}


class VQHandle(Handle):
    """What `optx.attach` returns for `optx.VQLogits`.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
        >>> handle = optx.attach(model, optx.VQLogits(codes=10), targets="1")
        >>> ids = torch.randint(50, (2, 6))
        >>> with handle.hidden():
        ...     hidden = model(ids)  # what the head is given
        >>> loss = handle.loss(hidden, ids)
        >>> bool((loss - torch.nn.functional.cross_entropy(model(ids).mT, ids)).abs() < 1e-5)
        True
    """

    injection: Any  # `optx.VQLogits`, which this module does not know

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        one = self.served[0]
        tied = {name: others(model, one.path, one.module, name) for name in ("weight", "bias")}
        self._tied = tied["weight"]
        module: Any = one.module
        own = {name: p for name in tied if isinstance(p := getattr(module, name), nn.Parameter)}
        self.part.resting = tuple(name for name in own if not tied[name])
        one.hooks.append(Resting(self.part.retired(module)))
        one.hooks.append(model.register_forward_pre_hook(self.part.enter))
        one.hooks.append(model.register_forward_hook(self.part.leave))

    @property
    def part(self) -> CodeHead:
        """What is on the head."""
        part = self.served[0].part
        assert isinstance(part, CodeHead)
        return part

    @property
    def codebook(self) -> nn.Parameter:
        """C, (K, d)."""
        return self.part.codebook

    @property
    def mapping(self) -> Tensor:
        """The code of each token, (V,) int32."""
        return self.part.mapping

    # ---- the loss -----------------------------------------------------------------------------------

    @contextmanager
    def hidden(self) -> Generator[None]:
        """While it lasts, the head gives what it is given: ``model(ids).logits`` are `loss`'s ``hidden``.

        Only to who asked: calls in other threads and tasks go on giving logits, but for DataParallel's, which
        are this one's. A compiled model breaks its graph at the head meanwhile.

        Raises:
            OptxError: what is attached does not act, or is not alone in what the head gives.
        """
        self._check_acts("hidden")
        with self.part.passed_on():
            yield

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        shift: bool | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of all tokens, from the codes' scores: nothing of (positions, V) is made.

        The same number and the same gradients as torch's cross_entropy of the model's logits, in float32 (or
        wider) also under autocast.

        Args:
            hidden: what the head is given, (..., d); see `hidden`.
            labels: tokens, (...), whole numbers.
            shift: whether label i is what position i is given, so that each is compared with the one before
                it, as transformers' causal models have it. None: as the model's own loss does, which is to
                shift in a class ...ForCausalLM or ...LMHeadModel; but labels of one axis never.
            ignore_index: a label that does not count.
            reduction: ``"mean"`` over the labels that count, ``"sum"`` or ``"none"``.
            label_smoothing: as torch's, over all tokens.
            z_loss: weight of the squared log of the sum of exponentials, added to each loss.

        Raises:
            OptxError: a label that is no token, shapes that don't go together, an option out of range; it is
                switched off, merged or removed; or the model, or what else is attached to the head, changes
                the logits.
        """
        self._check_acts("loss")
        check_choice("loss", "reduction", reduction, _code_loss.REDUCTIONS)
        check_range("loss", "label_smoothing", label_smoothing, 0, 1)
        check_range("loss", "z_loss", z_loss, 0)
        self._check_plain()
        part = self.part
        _check_shapes(hidden, labels, part.codebook.shape[1])
        if self._shifts(labels) if shift is None else shift:
            hidden, labels = hidden[..., :-1, :], labels[..., 1:]
        flat = labels.reshape(-1).to(hidden.device).long()
        valid = flat != ignore_index
        rows = hidden.reshape(-1, hidden.shape[-1])
        # What is ignored may be nan, which times 0 is nan, too.
        scores = part.scores(rows.where(valid[:, None], 0))
        _check_labels(flat[valid], part)
        wide = torch.promote_types(scores.dtype, torch.float32)
        with torch.autocast(scores.device.type, enabled=False):
            mass = part.masses(wide)
            tokens = flat.where(valid, 0)
            codes = part.mapping[tokens].long()
            own = mass[codes]
            if part.token_bias is not None:
                own = own - part.token_bias[tokens].to(wide)
            found = _code_loss.nll(
                scores.to(wide),
                mass,
                codes.where(valid, -100),
                own.masked_fill(~valid, 0),
                valid=valid,
                reduction=reduction,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                even=part.even(wide) if label_smoothing else None,
            )
        return found.view(labels.shape) if reduction == "none" else found

    def _shifts(self, labels: Tensor) -> bool:
        causal = type(self.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        return causal and labels.ndim > 1

    def _check_acts(self, doing: str) -> None:
        self._check_alive(doing)
        if not self.part.active:
            why = "merged into the head" if self.part.merged else "switched off"
            raise OptxError(
                f"{doing}: VQLogits is {why}, so the model does not compute by codes. "
                f"{'unmerge()' if self.part.merged else 'enable()'} it first."
            )
        one = self.served[0]
        beside = attached(one.module)
        for name, other in beside.parts.items() if beside is not None else ():
            if other.active and other is not self.part and any(map(other.overrides, ("after", "around"))):
                raise OptxError(
                    f"{doing}: {name!r} changes what {one.path!r} gives too, which the loss by codes does "
                    "not know. Use the model's own loss, of its logits, or remove that one."
                )

    def _check_plain(self) -> None:
        if not torch.compiler.is_compiling() and is_dtensor(self.part.codebook):
            raise OptxError(
                "loss: the codebook is sharded over a device mesh (FSDP2), and is whole only while the model "
                "is called. Leave the head out of fully_shard, or use the model's own loss."
            )
        config = getattr(self.model, "config", None)
        for name, nothing in _AFTER.items():
            value = getattr(config, name, nothing)
            if value is not None and value != nothing:
                raise OptxError(
                    f"loss: this {type(self.model).__name__} changes its logits after the head "
                    f"(config.{name}={value!r}), which the loss by codes does not know. Use the model's own "
                    "loss, of its logits."
                )

    # ---- the codes ----------------------------------------------------------------------------------

    @torch.no_grad()
    def remap(self, mapping: Tensor | None = None) -> int:
        """Give each token another code; the codebook stays.

        Args:
            mapping: (V,) whole numbers; None: the code closest to the token's row of the old head.

        Returns:
            How many tokens have another code now.

        Raises:
            OptxError: a mapping of another length, or with a code that there is not.
        """
        self._check_alive("remap")
        part, one = self.part, self.served[0]
        if mapping is None:
            mapping = _code_map.nearest(weight_now(one.module, one.path), part.codebook)
        if mapping.shape != part.mapping.shape or mapping.is_floating_point():
            raise OptxError(
                f"remap: mapping is {mapping.dtype} of shape {tuple(mapping.shape)}; it must be whole "
                f"numbers of shape {tuple(part.mapping.shape)}."
            )
        part.check_mapping(mapping, "remap")
        new = mapping.to(part.mapping)
        changed = int((new != part.mapping).sum())
        part.mapping.copy_(new)
        return changed

    @torch.no_grad()
    def fit_bias(self, counts: Tensor | Sequence[float]) -> None:
        """Let each token's bias be the log of its share of its code, by counts of tokens (plus one).

        It is 0 where all of a code's tokens are equally frequent, so that no chance goes from code to code.

        Args:
            counts: how often each token occurs, (V,).

        Raises:
            OptxError: there is no bias for each token, or counts are none.
        """
        self._check_alive("fit_bias")
        if self.part.token_bias is None:
            raise OptxError("fit_bias: there is no bias for each token. Attach VQLogits(token_bias=True).")
        self.part.fit_bias(self._counts("fit_bias", counts))

    def _counts(self, doing: str, counts: Tensor | Sequence[float]) -> Tensor:
        found = torch.as_tensor(counts)
        if found.shape != self.mapping.shape or not bool((found >= 0).all()) or not bool(found.any()):
            raise OptxError(
                f"{doing}: counts have shape {tuple(found.shape)}; they must be {len(self.mapping):,} "
                "numbers of at least 0, not all 0."
            )
        return found

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` gave; see `Handle.load_state_dict`.

        Raises:
            OptxError: also where the mapping has a code that there is not; nothing is changed.
        """
        for key, tensor in state_dict.items():
            if key.endswith(".mapping") and not tensor.is_floating_point():
                self.part.check_mapping(tensor, "load_state_dict")
        super().load_state_dict(state_dict)

    # ---- the way back, and words --------------------------------------------------------------------

    def materialize(self) -> nn.Linear:
        """A new plain head that computes the same, with a weight (V, d) of at most K distinct rows.

        It has a bias if tokens differ in more than their codes. The model is left as it is: put it in the
        head's place after `remove`, or use `merge_and_unload`, which writes into the head that there is.
        """
        self._check_alive("materialize")
        weight, bias = self.part.as_weights()
        old: Any = self.served[0].module.weight
        dtype = old.dtype if old.is_floating_point() else weight.dtype
        head = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, dtype)
        with torch.no_grad():
            head.weight.copy_(weight)
            if bias is not None:
                head.bias.copy_(bias)
        return head

    def gap(self, counts: Tensor | Sequence[float]) -> float:
        """What sharing scores costs at least, in nats a token, if contexts tell a code's tokens not apart.

        Args:
            counts: how often each token occurs, (V,).
        """
        self._check_alive("gap")
        return _code_report.gap(self.part, self._counts("gap", counts))

    def report(self) -> _code_report.CodeReport:
        """What was added, what it saves, and with the injection's ``counts`` what it costs at least."""
        base = super().report()
        one, counts = self.served[0], self.injection.counts
        module: Any = one.module
        head = [t for t in (module.weight, module.bias) if isinstance(t, Tensor)]
        trained = list(self.part.parameters())
        index = self.mapping.nbytes
        return _code_report.CodeReport(
            base.rows,
            base.total,
            head_numbers=sum(t.numel() for t in head),
            head_bytes=sum(t.nbytes for t in head),
            code_numbers=sum(p.numel() for p in trained),
            index_bytes=index,
            code_bytes=sum(p.nbytes for p in trained) + index,
            tied=self._tied,
            gap=None if counts is None else self.gap(counts),
        )


def others(model: nn.Module, path: str, module: nn.Module, name: str) -> tuple[str, ...]:
    """Other names of a head's weight or bias; not those of a bias that what the head is in has for it (BERT).

    Args:
        model: all of it.
        path: of the head.
        module: the head.
        name: ``"weight"`` or ``"bias"``.
    """
    own, found = getattr(module, name, None), list[str]()
    for other, p in model.named_parameters(remove_duplicate=False):
        outer = other.rpartition(".")[0]
        around = name == "bias" and (not outer or f"{path}.".startswith(f"{outer}."))
        if p is own and other != f"{path}.{name}" and not around:
            found.append(other)
    return tuple(found)


def _check_shapes(hidden: Tensor, labels: Tensor, width: int) -> None:
    if hidden.shape[-1:] != (width,) or hidden.shape[:-1] != labels.shape or hidden.ndim < 2:
        raise OptxError(
            f"loss: hidden has shape {tuple(hidden.shape)} and labels {tuple(labels.shape)}; they must be "
            f"(..., {width}), what the head is given (see handle.hidden()), and the same without the last."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise OptxError(f"loss: labels are {labels.dtype}; they must be whole numbers.")


def _check_labels(labels: Tensor, part: CodeHead) -> None:
    if torch.compiler.is_compiling():
        return
    wrong = labels[(labels < 0) | (labels >= part.used)]
    if len(wrong):
        rest = len(part.mapping) - part.used
        why = f" ({rest} more rows of the head are no tokens)" if rest else ""
        raise OptxError(
            f"loss: labels have {int(wrong[0])}, which is no token: there are {part.used:,}, 0 to "
            f"{part.used - 1}{why}. What is not to count is labelled by ignore_index."
        )
