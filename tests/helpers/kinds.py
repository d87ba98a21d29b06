"""Which optimizer classes stand for the others on ranks."""

from collections.abc import Mapping
from typing import Any

from zeta.core import Rule


def unlike(kinds: Mapping[str, Any]) -> tuple[str, ...]:
    """The first of each way in which the state that an owner needs, and the sums, lie over ranks."""
    return tuple({lies(kind.rule): name for name, kind in reversed(kinds.items())}.values())


def lies(rule: Rule) -> tuple[Any, ...]:
    return frozenset(rule.keeps[key] for key in rule.carried), frozenset(rule.sums.values())
