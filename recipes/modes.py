"""Modes: a policy that knows several good actions, where a Gaussian knows one.

Part "peaks": one state, four equal peaks of reward. A Gaussian policy by SAC's losses, and mixtures of four
(`optx.PMOEHead`), routed by frequency loss (`optx.FrequencyLoss`), Gumbel-softmax, score ratio or exact sum.

Parts "control", "harder": SAC on environments of gymnasium, the same loop with one primitive and several.

Source: PMOE, arXiv 2104.09122.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import optx

from . import _modes_report
from ._modes_control import SAC, driven, environment
from ._modes_parts import adam, covered, network, reward, run_all
from ._modes_report import ENVIRONMENTS
from ._options import SEEDS, positive, rate
from ._run import Run, SettingsError, chosen, parser, settings_of
from ._side_by_side import cores

ESTIMATORS: dict[str, dict[str, Any]] = {
    "unimodal": {},
    "freq": {},
    "freq all": {"backprop": "all"},
    "freq soft": {"score": "q-alpha_logp"},
    "gumbel": {"estimator": "gumbel"},
    "gumbel hard": {"estimator": "gumbel", "hard": True},
    "score": {"estimator": "score"},
    "enumerate": {"estimator": "enumerate"},
}
CONTROL = [f"{part}: {name}" for part in ENVIRONMENTS for name in ("SAC", "SAC-PMOE")]
ARMS = (*(f"peaks: {name}" for name in ESTIMATORS), *CONTROL)


def policy(states: int, k: int, width: int, low: Any, high: Any, init: float = 1e-3) -> nn.Module:
    """An ordinary policy, whose output becomes a mixture of k by one line."""
    model = network(states, 2 * len(low), width)
    optx.attach(model, optx.PMOEHead(k=k, low=low, high=high, init=init), targets="out")
    return model


def peaks(arm: str, seed: int, args: Any) -> dict[str, Any]:
    """The bandit: the critic is the reward itself."""
    model = policy(1, 1 if arm == "unimodal" else args.k, args.width, [-1.0] * 2, [1.0] * 2, args.init)
    log_alpha = torch.tensor(args.alpha).log().requires_grad_()
    optimizer, temperature = adam(model.parameters(), args.lr), adam([log_alpha], args.lr)
    states, curve = torch.ones(args.batch, 1), {}
    for step in range(args.steps):
        losses = optx.sac_pmoe_losses(
            model(states), reward, log_alpha=log_alpha, alpha_optimizer=temperature, **ESTIMATORS[arm]
        )
        optimizer.zero_grad()
        (losses.policy + losses.freq).backward()
        optimizer.step()
        if (step + 1) % max(1, args.steps // 20) == 0:
            curve[str(step + 1)] = covered(model(torch.ones(2000, 1)))["reward"]
    return {"curve": curve, **covered(model(torch.ones(10_000, 1)))}


class Agent(SAC):
    """Soft actor-critic, whose losses are optx's; critics, targets and optimizers as ever."""

    def step(self, s: Tensor, a: Tensor, r: Tensor, then: Tensor, terminated: Tensor) -> None:
        """One batch, in the order of the authors' code: temperature, critics, policy."""
        losses = optx.sac_pmoe_losses(
            self.policy(s),
            optx.policy.least_q(s, *self.critics),
            log_alpha=self.alpha["log"],
            alpha_optimizer=self.temperature,
        )
        least = optx.policy.least_q(then, *self.targets)
        with torch.no_grad():
            y = optx.sac_pmoe_target(self.policy(then), least, self.alpha["log"].exp(), r, terminated)
        self.actor.zero_grad()
        (losses.policy + losses.freq).backward()
        self.learner.zero_grad()  # critics learn from their errors alone
        sum((q(s, a).squeeze(-1) - y).square().mean() for q in self.critics).backward()
        self.learner.step()
        self.actor.step()
        self.follow()


def control(part: str, arm: str, seed: int, args: Any) -> dict[str, Any]:
    """An environment, from the first step on."""
    name = getattr(args, ENVIRONMENTS[part])
    env = environment(name)
    states, box = env.observation_space.shape[0], env.action_space
    model = policy(states, 1 if arm == "SAC" else args.k, args.width, box.low, box.high)
    return driven(Agent(model, states, len(box.low), args), name, f"{part}: {arm}/{seed}", seed, args)


def train(key: str, args: Any) -> dict[str, Any]:
    """An arm with a seed."""
    arm, seed = key.rpartition("/")[::2]
    torch.manual_seed(int(seed))
    part, name = arm.split(": ")
    return control(part, name, int(seed), args) if part in ENVIRONMENTS else peaks(name, int(seed), args)


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "modes",
        __doc__ or "",
        steps=2000,
        seeds={"default": 5} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        k={"type": positive, "default": 4, "help": "primitives of the mixtures"},
        width={"type": positive, "default": 64, "help": "of two hidden layers, of policies and critics"},
        batch={"type": positive, "default": 64, "help": "states a step"},
        lr={"type": rate, "default": 3e-3, "help": "peaks: Adam's"},
        init={"type": rate, "default": 1.0, "help": "peaks: heads begin as U(-init, init)"},
        alpha={"type": rate, "default": 0.1, "help": "peaks: the temperature at first"},
        env={"default": "Pendulum-v1", "help": "control: a gymnasium environment of continuous actions"},
        harder_env={"default": "Reacher-v5", "help": "harder: another"},
        env_steps={"type": positive, "default": 6000, "help": "control, harder: of the environment"},
        random={"type": positive, "default": 300, "help": "control, harder: first steps, of random actions"},
        control_lr={"type": rate, "default": 1e-3, "help": "control, harder: Adam's"},
        keep={"type": positive, "default": 5, "help": "control, harder: keep a run after so many episodes"},
        workers={"type": positive, "default": cores(), "help": "runs side by side, of one thread each"},
        model={"help": "has no meaning here"},
        data={"help": "has no meaning here"},
        resume={"action": "store_true", "help": "keep the finished runs of an interrupted one"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SettingsError("modes brings its own policies and rewards; --model, --data mean nothing here.")
    arms = chosen(args.arms, ARMS)
    for part in {arm.partition(":")[0] for arm in arms} & ENVIRONMENTS.keys():
        environment(getattr(args, ENVIRONMENTS[part]))  # before anything is run
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    seeds = range(args.seed, args.seed + args.seeds)
    run_all(run, [f"{arm}/{seed}" for seed in seeds for arm in ARMS if arm in arms], train, args)
    _modes_report.report(run)


if __name__ == "__main__":
    main()
