"""The search: `gradient.py`, one budget after the other; `amortised.py`, the whole frontier in one run."""

from .shared import amortise as amortise
from .descent import search as search
