"""Tuning from plain rounding: block by block down the sign of the slope, then all together against the float model's predictions.

Codes and scales of one block after the other move by the sign of the gradient of the squared error of what the block gives
(Cheng et al., arXiv 2309.05516, SignRound); then scales, norms and biases of all of them move down the slope of the KL against
the float model (as Chen et al., arXiv 2407.11062, train scales alone, against labels). `best` starts from better codes.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(scales="search", block_tune=200, tune=50, travel=0.0, norms=True)
