"""How the testbed's models were trained: `python -m tests.reproduction.training.train`."""
