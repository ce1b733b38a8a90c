"""The modes recipe's environments: the replay, episodes that can be gone on with, and returns."""

from __future__ import annotations

import copy
import importlib.util
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optx._files import written_aside

from ._modes_parts import adam, network
from ._run import SettingsError, settings_of


class Critic(nn.Module):
    """Q(s, a)."""

    def __init__(self, states: int, actions: int, width: int) -> None:
        super().__init__()
        self.net = network(states + actions, 1, width)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """(..., 1)."""
        return self.net(torch.cat([states, actions], -1))


class SAC:
    """A policy, two critics with targets that follow, and a temperature."""

    def __init__(self, policy: nn.Module, states: int, actions: int, args: Namespace) -> None:
        self.policy = policy
        self.critics = nn.ModuleList(Critic(states, actions, args.width) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.alpha = nn.ParameterDict({"log": nn.Parameter(torch.zeros(()))})
        self.actor, self.learner, self.temperature = (
            adam(net.parameters(), args.control_lr) for net in (self.policy, self.critics, self.alpha)
        )

    def step(self, s: Tensor, a: Tensor, r: Tensor, then: Tensor, terminated: Tensor) -> None:
        """Learn from a batch."""
        raise NotImplementedError

    @torch.no_grad()
    def follow(self) -> None:
        """Let the targets follow."""
        for p, target in zip(self.critics.parameters(), self.targets.parameters(), strict=True):
            target.lerp_(p, 0.005)

    def parts(self) -> dict[str, Any]:
        """All that a run goes on from."""
        optimizers = {"actor": self.actor, "learner": self.learner, "temperature": self.temperature}
        nets = {"policy": self.policy, "q": self.critics, "targets": self.targets, "alpha": self.alpha}
        return nets | optimizers


class Replay:
    """All transitions of a run, as they are few."""

    def __init__(self, size: int, states: int, actions: int) -> None:
        self.count = 0
        self.rows = torch.zeros(size, 2 * states + actions + 2)
        self._cuts = (states, actions, 1, states, 1)

    def add(self, state: Any, action: Tensor, reward: float, then: Any, terminated: bool) -> None:
        """One more."""
        numbers = [torch.as_tensor(x, dtype=torch.float32).reshape(-1) for x in (state, action, reward, then)]
        self.rows[self.count] = torch.cat([*numbers, torch.tensor([float(terminated)])])
        self.count += 1

    def batch(self, count: int) -> tuple[Tensor, ...]:
        """States, actions, rewards, next states, and 1 where nothing follows."""
        drawn = self.rows[torch.randint(self.count, (count,))]
        s, a, r, then, terminated = drawn.split(self._cuts, -1)
        return s, a, r.squeeze(-1), then, terminated.squeeze(-1)


def environment(name: str) -> Any:
    """A gymnasium environment of continuous actions."""
    if importlib.util.find_spec("gymnasium") is None:
        raise SettingsError("modes: gymnasium is missing. python -m pip install 'optx-torch[recipes]'")
    import gymnasium

    try:
        env = gymnasium.make(name)
    except gymnasium.error.Error as error:
        raise SettingsError(f"modes: environment {name}: {error}") from None
    bounds: Any = env.action_space
    if not isinstance(bounds, gymnasium.spaces.Box) or not isinstance(
        env.observation_space, gymnasium.spaces.Box
    ):
        raise SettingsError(f"modes: environment {name}: its actions or states are no rows of numbers.")
    return env


def _episodes(env: Any, seed: int, start: int) -> Iterator[tuple[int, Any]]:
    """The first state of each episode; their numbers decide what is random in them, so that runs resume."""
    number = start
    while True:
        yield number, env.reset(seed=1_000_003 * (seed + 1) + number)[0]
        number += 1


@torch.no_grad()
def returns(policy: nn.Module, envs: Sequence[Any], seed: int) -> float:
    """The mean return of an episode in each environment, the same ones whenever asked, acting without noise.

    They go on side by side, so that the policy is called once a step.
    """
    states = [env.reset(seed=10**9 + 1000 * seed + number)[0] for number, env in enumerate(envs)]
    going, total = list(range(len(envs))), 0.0
    draws = torch.Generator().manual_seed(seed)
    while going:
        rows = torch.stack([torch.as_tensor(states[i], dtype=torch.float32) for i in going])
        actions = policy(rows).evaluation_action(generator=draws).numpy()
        ended = list[int]()
        for i, action in zip(going, actions, strict=True):
            states[i], gained, terminated, truncated, _ = envs[i].step(action)
            total += float(gained)
            if terminated or truncated:
                ended.append(i)
        going = [i for i in going if i not in ended]
    return total / len(envs)


def _work_file(args: Namespace, key: str) -> Path:
    """Where a run that goes on is kept."""
    return Path(args.out) / "work" / f"{key.replace('/', '-').replace(' ', '-').replace(':', '')}.pt"


def _keep(file: Path, state: dict[str, Any]) -> None:
    """Write it aside and rename it, with torch's random state."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        torch.save({**state, "rng": torch.get_rng_state()}, aside)


def _kept(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What `_keep` wrote, if anything; torch's random state is as it was then."""
    if not file.exists():
        return None
    state = torch.load(file, weights_only=True)
    if state["settings"] != settings:
        raise SettingsError(f"--resume: {file} is of a run with other options. Give those, or another --out.")
    torch.set_rng_state(state["rng"])
    return state


def driven(agent: SAC, name: str, key: str, seed: int, args: Namespace) -> dict[str, Any]:
    """Let an agent act and learn; what is kept every few episodes goes on from there bit for bit.

    Args:
        agent: what learns.
        name: of the environment.
        key: of the run.
        seed: of its episodes.
        args: the recipe's options.
    """
    env, tests = environment(name), [environment(name) for _ in range(10)]
    low, high = (torch.as_tensor(one) for one in (env.action_space.low, env.action_space.high))
    replay = Replay(args.env_steps, env.observation_space.shape[0], len(low))
    file = _work_file(args, key)
    curve: dict[str, float] = {}
    step = first = 0
    if (found := _kept(file, settings_of(args))) is not None:
        for name, part in agent.parts().items():
            part.load_state_dict(found[name])
        replay.rows, replay.count = found["rows"], found["count"]
        curve, step, first = found["curve"], found["step"], found["next"]
    for number, state in _episodes(env, seed, first):
        over = False
        while not over and step < args.env_steps:
            if step < args.random:
                action = low + torch.rand(len(low)) * (high - low)
            else:
                action = agent.policy(torch.as_tensor(state, dtype=torch.float32)[None]).sample()[0]
            then, gained, terminated, truncated, _ = env.step(action.numpy())
            replay.add(state, action, float(gained), then, terminated)
            state, over, step = then, terminated or truncated, step + 1
            if step > args.random:
                agent.step(*replay.batch(args.batch))
            if step % max(1, args.env_steps // 20) == 0:
                curve[str(step)] = returns(agent.policy, tests[:5], seed)
        if step >= args.env_steps:
            break
        if (number + 1) % args.keep == 0:
            parts = {name: part.state_dict() for name, part in agent.parts().items()}
            at = {
                "rows": replay.rows,
                "count": replay.count,
                "curve": curve,
                "step": step,
                "next": number + 1,
                "settings": settings_of(args),
            }
            _keep(file, {**parts, **at})
    file.unlink(missing_ok=True)
    return {"curve": curve, "return": returns(agent.policy, tests, seed + 1)}
