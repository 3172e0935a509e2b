"""Implementations that are wrong in one realistic way each: the suite has to reject every one of them."""

from . import flaws_of_options, flaws_of_outputs
from .honest import Honest
from .registry import FLAWS

__all__ = ["FLAWS", "Honest", "flaws_of_options", "flaws_of_outputs"]
