"""The handle of `optx.PMOEHead`: one of its primitives as the policy's plain output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optx._errors import MergeError, OptxError, as_whole, shown
from optx.inject._handle import Handle
from optx.policy._pmoe_part import Primitives


class PMOEHandle(Handle):
    """What `optx.attach` returns for `optx.PMOEHead`.

    ``remove()`` gives back the Linear of before, with the weights of before. What was trained is K policies,
    which no Linear is: one of them is, by `materialize` or `merge_and_unload`.

    Example:
        >>> import torch, optx
        >>> policy = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> handle = optx.attach(policy, optx.PMOEHead(k=4), targets="2")
        >>> states = torch.randn(16, 3)
        >>> often = policy(states).w.mean(0)  # how often each primitive acts
        >>> handle.materialize(int(often.argmax()))
        Linear(in_features=8, out_features=4, bias=True)
    """

    injection: Any  # `optx.PMOEHead`, which this module does not know

    @property
    def _part(self) -> Primitives:
        part = self.served[0].part
        assert isinstance(part, Primitives)
        return part

    def materialize(self, primitive: int | None = None) -> nn.Linear:
        """A plain nn.Linear that gives what one primitive gives: its mean, or its mean and log-deviation.

        The policy is left as it is. Log-deviations are not clamped in it, as they are in the mixture.

        Args:
            primitive: which one, from 0 on; None: the only one, of one.

        Raises:
            OptxError: there is no such primitive, or several to choose from.
        """
        return self._made("materialize", primitive)

    def _made(self, doing: str, primitive: int | None) -> nn.Linear:
        self._check_alive(doing)
        part, module = self._part, self.served[0].module
        weight, bias = part.rows(self._chosen(doing, primitive), self.injection.outputs != "mean")
        own: Any = module.weight
        made = nn.Linear(weight.shape[1], weight.shape[0], True, weight.device, own.dtype)
        with torch.no_grad():
            made.weight.copy_(weight)
            made.bias.copy_(bias)
        return made.train(module.training)

    def merge(self, *, untie: bool = False) -> None:
        """Refused: no weight of one Linear is K policies.

        Raises:
            MergeError: always.
        """
        raise MergeError(
            "merge: PMOEHead can't be merged: its primitives are several policies, and one Linear is one. "
            "materialize(primitive) gives one of them beside the head, merge_and_unload(primitive=...) "
            "leaves one in its place."
        )

    def merge_and_unload(self, *, untie: bool = False, primitive: int | None = None) -> nn.Module:
        """Write one primitive into the served Linear and take the head off: a policy of one mode.

        Args:
            untie: of no use here: a policy's output shares its weight with nothing.
            primitive: which one, from 0 on; None: the only one, of one.

        Returns:
            The policy.

        Raises:
            OptxError: there is no such primitive, or several to choose from.
            MergeError: the Linear has no bias for the primitive's; nothing is changed.
        """
        made, module = self._made("merge_and_unload", primitive), self.served[0].module
        own: Any = module
        if own.bias is None and bool(made.bias.any()):
            raise MergeError(
                f"merge_and_unload: {self.served[0].path!r} has no bias, and a primitive has. Take "
                "materialize(primitive), remove(), and put that in its place."
            )
        self.remove()
        with torch.no_grad():
            own.weight.copy_(made.weight)
            if own.bias is not None:
                own.bias.copy_(made.bias)
        return self.model

    def _chosen(self, doing: str, primitive: int | None) -> int:
        k = self._part.k
        if primitive is None:
            if k > 1:
                raise OptxError(
                    f"{doing}: there are {k} primitives; say which one by primitive=. The one that acts most "
                    "often: policy(states).w.mean(0).argmax()."
                )
            return 0
        found = as_whole(primitive)
        if found is None or not 0 <= found < k:
            raise OptxError(f"{doing}: primitive is {shown(primitive)}; it must be 0 to {k - 1}.")
        return found
