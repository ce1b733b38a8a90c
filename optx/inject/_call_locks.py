"""One call at a time of a module on which something means something else for the length of a call."""

from __future__ import annotations

import threading
import weakref

from torch import nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def lock_of(module: nn.Module) -> threading.RLock:
    """The lock that all calls of a module take; not for code that is being compiled."""
    lock = _LOCKS.get(module)
    if lock is None:
        with _MAKING:
            lock = _LOCKS.setdefault(module, threading.RLock())
    return lock
