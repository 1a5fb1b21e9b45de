"""Measuring a variant: quality (perplexity, KL, agreement), memory, speed, and the record that holds the figures.

`record` is the schema of a result. `record` and `memory` need no torch; `quality` and `speed` do, and are imported
where they are used.
"""
