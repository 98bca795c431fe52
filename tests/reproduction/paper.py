"""The paper's own numbers, copied from the tables of VisPCO (arXiv 2604.15188, ACL 2026); nothing
here is ours.

Qwen2.5-VL-3B unless said otherwise; accuracies in percent, mean of eight tasks.
"""

from __future__ import annotations

SOURCE = "VisPCO, arXiv 2604.15188"
BUDGETS = (0.9, 0.7, 0.5, 0.3, 0.1)

#: {budget: {method: (mean of sampled feasible configurations, their standard deviation or None,
#: VisPCO)}}, single-layer.
AGAINST_SAMPLES = {
    0.9: {
        "fastv": (75.5, 0.7, 76.1),
        "sparsevlm": (76.0, None, 76.4),
        "fitprune": (76.2, None, 77.1),
    },
    0.7: {
        "fastv": (71.5, 4.4, 75.5),
        "sparsevlm": (71.6, None, 75.6),
        "fitprune": (71.8, None, 75.7),
    },
    0.5: {
        "fastv": (63.1, 9.5, 71.5),
        "sparsevlm": (64.5, None, 71.8),
        "fitprune": (65.4, None, 72.2),
    },
    0.3: {
        "fastv": (50.4, 8.2, 58.0),
        "sparsevlm": (50.6, None, 58.4),
        "fitprune": (50.6, None, 58.4),
    },
    0.1: {
        "fastv": (31.6, 2.4, 33.6),
        "sparsevlm": (32.2, None, 33.8),
        "fitprune": (32.6, None, 33.9),
    },
}

#: {kernel: accuracy at BUDGETS}, FastV.
KERNELS = {
    "single_layer": (76.1, 75.5, 71.5, 58.0, 33.6),
    "linear": (75.6, 75.1, 70.2, 53.2, 33.6),
    "exponential": (75.4, 74.9, 69.7, 53.0, 32.8),
    "p_sigmoid": (75.1, 74.6, 69.3, 48.8, 33.1),
    "multi_step": (76.2, 75.2, 72.1, 58.9, 33.3),
}

#: LLaVA-1.5-7B at about 2.2 T: (name, hours, MMBench, SEED, TextVQA).
SEARCHES = (
    ("VisPCO", 1, 43.6, 47.5, 81.3),
    ("random, best of 40", 12, 31.2, 36.6, 70.9),
    ("random, best of 80", 24, 42.8, 47.7, 80.1),
    ("random, best of 160", 48, 44.0, 48.1, 82.4),
)

#: Configurations of the paper's "empirical frontier" (35 positions x 20 ratios), and the hours they
#: took.
GRID, GRID_HOURS = 700, 48

#: Milliseconds to the first token at 50 % of the FLOPs: {model: (full, FastV, VisPCO)}.
FIRST_TOKEN = {
    "Qwen2.5-VL-3B": (83, 74, 76),
    "LLaVA-1.5-7B": (114, 96, 97),
    "Gemma3-4B": (94, 81, 81),
}
