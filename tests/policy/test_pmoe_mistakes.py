"""What a policy of several modes is given wrongly: told in one sentence, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pmoe_policies import Q, policy, states
from torch import Tensor, nn

import optx
from optx.policy import ActionMixture, enumerated_loss, gumbel_weights, least_q, score_ratio_loss

NAN, ROWS = math.nan, torch.zeros(16)
W = torch.full((3, 2), 0.5)


def value(a: Tensor) -> Tensor:
    return -a.square().sum(-1)


def sac(mixture: Any = None, q_fn: Any = value, **options: Any) -> Any:
    mixture = policy()[0](states()) if mixture is None else mixture
    return optx.sac_pmoe_losses(mixture, q_fn, **(options or {"alpha": 0.1}))


def target(alpha: Any = 0.1, reward: Any = ROWS, ended: Any = ROWS) -> Any:
    return optx.sac_pmoe_target(policy()[0](states()), value, alpha, reward, ended)


def ppo(name: str = "", wrong: Any = None, **options: Any) -> Any:
    mixture = policy()[0](states())
    actions = mixture.sample(torch.Generator().manual_seed(0))
    given = {"actions": actions, "old_log_prob": mixture.log_prob(actions), "advantages": ROWS + 1}
    given |= {name: wrong(given[name])} if name else {}
    return optx.ppo_pmoe_losses(mixture, **given, **options)


def trained() -> Tensor:
    return torch.zeros((), requires_grad=True)


def made(**changes: Any) -> ActionMixture:
    parts = {"means": torch.zeros(1, 2, 2), "log_stds": torch.zeros(1, 2, 2), "logits": torch.zeros(1, 2)}
    return ActionMixture(**{**parts, **changes})


def attached(**options: Any) -> Any:
    return optx.attach(nn.Sequential(nn.Linear(3, 4)), optx.PMOEHead(**options), targets="0")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sac(torch.zeros(16, 4)), r"sac_pmoe_losses: mixture is a Tensor; it must be the ActionMix"),
        (lambda: sac((made(), 1)), "mixture is a tuple; .* Where the policy gives more, pick it out"),
        (lambda: sac(made(means=W[:0, None], log_stds=W[:0, None], logits=W[:0, :1])), r"\(0,\): of none"),
        (lambda: sac(q_fn=None), r"q_fn is a NoneType; it must be called as q_fn\(actions\)"),
        (lambda: sac(q_fn=lambda a: 0.3), "what q_fn gave is a float; it must be a tensor"),
        (lambda: sac(alpha=True), "alpha is True; it must be a finite number of at least 0"),
        (lambda: sac(alpha=math.inf), "alpha is inf"),
        (lambda: sac(alpha="auto"), "alpha is 'auto'"),
        (lambda: sac(alpha=torch.tensor(-1.0)), r"alpha is tensor\(-1\.\)"),
        (lambda: sac(alpha=torch.tensor([NAN])), r"alpha is tensor\(nan\)"),
        (lambda: sac(alpha=0.1, target_entropy=-2.0), r"target_entropy=-2\.0 is what log_alpha= is trained"),
        (lambda: sac(log_alpha=trained(), target_entropy="auto"), "target_entropy is 'auto'; it must be"),
        (lambda: sac(log_alpha=trained(), target_entropy=NAN), "target_entropy is nan"),
        (lambda: sac(log_alpha=0.0), "log_alpha is a float; it must be a tensor"),
        (
            lambda: sac(log_alpha=trained(), alpha_optimizer=torch.optim.SGD([trained()], 1.0)),
            "alpha_optimizer doesn't have log_alpha, which would stay as it is",
        ),
        (lambda: sac(q_fn=lambda a: value(a) * NAN, alpha=0.1, estimator="gumbel"), r"scores\[0\] is nan"),
        (lambda: sac(q_fn=lambda a: value(a) * NAN, alpha=0.1, estimator="score"), r"scores\[0, 0\] is nan"),
        (lambda: sac(q_fn=least_q(states(5), Q())), r"least_q: actions have shape \(16, 4, 2\).*\(5, 3\)"),
        (lambda: least_q(states(), [Q(), Q()]), r"a critic is a list; .*least_q\(states, \*critics\)"),
        (lambda: target(torch.ones(16, 1)), r"sac_pmoe_target: alpha has shape \(16, 1\)"),
        (lambda: target(-1.0), r"sac_pmoe_target: alpha is -1\.0"),
        (lambda: target(reward=np.zeros(16)), "reward is a ndarray; it must be a tensor"),
        (lambda: target(ended=ROWS + 255), r"terminated\[0\] is 255; it must be 0 or 1"),
        (lambda: ppo("actions", lambda a: a[:, None]), r"actions has shape \(16, 1, 2\); it must be \(16, 2"),
        (lambda: ppo("actions", lambda a: a[0]), r"actions has shape \(2,\); it must be \(16, 2\)"),
        (lambda: ppo("actions", lambda a: a.numpy()), "actions is a ndarray; it must be a tensor"),
        (lambda: ppo("advantages", lambda a: a * NAN), r"advantages\[0\] is nan"),
        (lambda: ppo("old_log_prob", lambda a: a * NAN), r"old_log_prob\[0\] is nan"),
        (lambda: ppo(clip=20), r"ppo_pmoe_losses: clip is 20; it must be between 0\.0 and 1\.0"),
        (lambda: ppo(primitive=ROWS.long() + 4), r"primitive\[0\] is 4; of 4 primitives it must be 0 to 3"),
        (lambda: ppo(primitive=ROWS.long() - 1), r"primitive\[0\] is -1; of 4 primitives"),
        (lambda: ppo(primitive=ROWS.bool()), r"primitive is torch\.bool of shape \(16,\)"),
        (lambda: score_ratio_loss(W.log(), W, torch.full((3,), 2)), r"primitive\[0\] is 2; of 2 primitives"),
        (lambda: score_ratio_loss(W.log(), W * NAN, torch.ones(3).long()), r"scores\[0, 0\] is nan"),
        (lambda: enumerated_loss(W.log(), W, torch.ones(2)), r"alpha has shape \(2,\)"),
        (lambda: enumerated_loss(W.log(), W, -1.0), r"alpha is -1\.0"),
        (lambda: enumerated_loss(W[:0].log(), W[:0]), "and of one state at least"),
        (lambda: gumbel_weights(W), r"log_w has 0\.5; logarithms of weights are at most 0"),
        (lambda: optx.FrequencyLoss()(W.log(), W), r"w\[0\] is \[-0\.6931, -0\.6931\], which are no weights"),
        (lambda: optx.FrequencyLoss()(torch.tensor([-1.0, 2.0]), W[0]), r"w\[\] is \[-1\.0, 2\.0\]"),
        (lambda: optx.FrequencyLoss()(W[:0], W[:0]), r"w has shape \(0, 2\): of no state"),
        (lambda: optx.FrequencyLoss()([[0.5, 0.5]], W[:1]), "w is a list; it must be a tensor"),  # type: ignore
        (lambda: made(means=[[0.0]]), "ActionMixture: means is a list; it must be a tensor"),
        (lambda: made(logits=torch.zeros(1, 2).long()), r"logits is of torch\.int64; it takes floating"),
        (lambda: made(low=-torch.ones(1), high=torch.ones(1)), r"low has shape \(1,\); it must be \(2,\)"),
        (lambda: made(low=-1.0, high=1.0), "low is a float; it must be a tensor"),
        (lambda: made().log_prob(np.zeros((1, 2))), "actions is a ndarray"),  # type: ignore[arg-type]
        (
            lambda: policy()[0](states()).log_prob(torch.zeros(5, 2)),
            r"\(5, 2\), for states of .*\(16,\)",
        ),
        (lambda: attached(init=math.inf), r"init is inf; it must be between 0\.0 and 1000\.0"),
        (lambda: attached(high=1e39), r"low\[0\]=-1\.0 and high\[0\]=1e\+39, between which torch\.float32"),
        (lambda: attached(low=-3e38, high=3e38), "they are too close or too far"),
        (lambda: attached(low=1.0, high=1.0 + 1e-9), "has no actions: they are too close"),
    ],
)
def test_a_mistake_is_one_sentence(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(optx.OptxError, match=says):
        call()


def test_a_temperature_does_not_step_where_gradients_are_off() -> None:
    log_alpha = trained()
    optimizer = torch.optim.SGD([log_alpha], 1.0)
    with torch.no_grad(), pytest.raises(optx.OptxError, match="can't step where gradients are off"):
        sac(log_alpha=log_alpha, alpha_optimizer=optimizer)
    with pytest.raises(optx.OptxError, match=r"scores\[0, 0\] is nan"):
        sac(
            q_fn=lambda a: value(a) * NAN,
            log_alpha=log_alpha,
            alpha_optimizer=optimizer,
            estimator="enumerate",
        )
    assert log_alpha.item() == 0


def test_without_data_and_mapped_over_nothing_is_looked_at() -> None:
    assert optx.FrequencyLoss()(W.to("meta"), W.to("meta")).is_meta
    model, _ = policy(low=-2.0)
    mixture = model.to("meta")(states().to("meta"))
    assert mixture.log_prob(torch.zeros(16, 2, device="meta")).is_meta
    model, _ = policy(low=-2.0)
    mixture, actions = model(states()), torch.zeros(16, 2)
    mapped = torch.func.vmap(lambda s, a: model(s).log_prob(a))(states(), actions)
    torch.testing.assert_close(mapped, mixture.log_prob(actions))
    scores = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    each = torch.func.vmap(optx.FrequencyLoss())(mixture.w, scores)
    torch.testing.assert_close(each.mean(), optx.FrequencyLoss()(mixture.w, scores))
