"""Other people's trainers: one obvious line in each of them.

    optx.integrations.transformers    Trainer and TRL's trainers: optimizer(...), OptxCallback(handle)
    optx.integrations.accelerate      adapters_only(accelerator, handle), metrics(accelerator, handle)
    optx.integrations.lightning       OptxCallback(handle), adapters_only(module, handle)

A module is imported when it is first asked for, and the library that it serves with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optx.integrations import accelerate as accelerate
    from optx.integrations import lightning as lightning
    from optx.integrations import transformers as transformers

_ROOMS = ("accelerate", "lightning", "transformers")


def __getattr__(name: str) -> Any:
    # Not `from optx.integrations import ...`, which asks for the attribute first, that is, this function.
    if name == "accelerate":
        import optx.integrations.accelerate as room
    elif name == "lightning":
        import optx.integrations.lightning as room
    elif name == "transformers":
        import optx.integrations.transformers as room
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_ROOMS)}.")
    return room


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
