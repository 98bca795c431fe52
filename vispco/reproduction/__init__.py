"""Every claim about the search, run again: `python -m vispco.reproduction --size quick --output docs/results`."""
