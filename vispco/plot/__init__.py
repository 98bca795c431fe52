"""Pictures: frontiers, schedules, profiles, kept tokens, the course of a search; the report."""

from .convergence import plot_convergence
from .figure import picture_kind as picture_kind, require_matplotlib as require_matplotlib
from .frontiers import plot_frontier
from .page import Overlay, write_report
from .profile import plot_profile
from .tokens import plot_tokens

__all__ = [
    "Overlay",
    "plot_convergence",
    "plot_frontier",
    "plot_profile",
    "plot_tokens",
    "write_report",
]
