"""Other people's code on the engine's thread: what it raises is told and stops nobody else.

A policy's step has its guard in `Engine._advance`, where an error ends its own request; everybody who is
only told of something is called from here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVarTuple, Unpack

Ts = TypeVarTuple("Ts")

LOGGER = logging.getLogger("nudging")


def tell(listeners: Iterable[Callable[[Unpack[Ts]], object]], *news: *Ts) -> None:
    """Call every listener with `news`; what one raises goes to the log `nudging` and not to the caller."""
    for listener in listeners:
        try:
            listener(*news)
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt and SystemExit are the listener's, too
            LOGGER.error("a listener raised %r; the engine goes on", error, exc_info=error)
