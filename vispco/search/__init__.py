"""The search: `gradient.py`, one budget after the other; `amortised.py`, the whole frontier in one run."""

from .amortised import amortise as amortise
from .gradient import search as search
