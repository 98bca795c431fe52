"""One command for a GPU: what pruning saves where models are served.

    python -m benchmarks.gpu --output DIR

See docs/10-benchmarks.md.
"""
