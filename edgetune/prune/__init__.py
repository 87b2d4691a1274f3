"""Structured pruning."""

from edgetune.prune.cut import resize_like
from edgetune.prune.groups import Cut, Group, Member
from edgetune.prune.structured import Prune

__all__ = ["Cut", "Group", "Member", "Prune", "resize_like"]
