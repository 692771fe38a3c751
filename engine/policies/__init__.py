"""Policies: who writes the next token."""

from nudging.policies.nudging import Nudging
from nudging.policies.protocol import Completion, Policy, Step, View
from nudging.policies.solo import Base, Guide

__all__ = ["Base", "Completion", "Guide", "Nudging", "Policy", "Step", "View"]
