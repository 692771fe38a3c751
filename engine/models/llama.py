"""Llama 2 and 3.x (arXiv 2307.09288, 2407.21783): the common decoder as it is."""

from .standard import TENSORS, Family, describe

FAMILY = Family(describe, TENSORS)
