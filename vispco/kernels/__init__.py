"""Kernel functions r_i = R(i; theta): one keep ratio per layer, from a few learnable numbers.

VisPCO (arXiv 2604.15188) describes a schedule of L keep ratios by a short curve over the layer
index i, so that a gradient has few directions to look in. For ANY theta, the ratios of every
kernel are in [0, 1], never increase, and are exactly 1 before the first layer that can be pruned.
"""

from .base import Kernel as Kernel
from .curves import Exponential as Exponential, Linear as Linear, Monotone as Monotone
from .steps import MultiStep as MultiStep, PSigmoid as PSigmoid, SingleLayer as SingleLayer
