"""GPTAQ: GPTQ that aims at the float layer's outputs on float inputs, a quarter of the way.

Li et al., arXiv 2504.02692 (asymmetric calibration). Here the target is exact and set before the loop, where the paper's
code adds a triangular part of it column by column; see `target` in steps/settings.py.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(feedback=True, target=0.25)
