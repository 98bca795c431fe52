"""How testbed-smollm was trained: `python -m tests.reproduction.training.pretrained.train`."""
