"""SparseGPT: column by column, weights that cost least become zero and the columns not yet seen make up for them.

Frantar and Alistarh, arXiv 2301.00774: the loop of `gptq` with zeros in it, so that with an integer format pruning and rounding
are one. The threshold is that of 128 columns, over the rows that are worked on together; `sparsegpt:pattern=2of4` keeps two of
every four.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(feedback=True, mask="feedback")
