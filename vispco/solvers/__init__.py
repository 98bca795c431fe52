"""How a search starts and goes on: descent, a shared predictor, refinement by a surrogate."""
