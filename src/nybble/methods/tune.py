"""Tuning from plain rounding: codes and scales move down the slope of the KL against the float model.

Cheng et al., arXiv 2309.05516 (SignRound), with all layers together and the float model's predictions as the aim, where
the paper takes block after block and its outputs.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(scales="search", tune=300)
