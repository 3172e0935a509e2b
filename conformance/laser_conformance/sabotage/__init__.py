"""Implementations that are wrong in one realistic way each: the suite has to reject every one of them."""

from .flaws import FLAWS
from .honest import Honest

__all__ = ["FLAWS", "Honest"]
