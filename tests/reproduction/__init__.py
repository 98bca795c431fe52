"""Every claim about the search, run again: `python -m tests.reproduction --size quick --output
docs/results`.
"""
