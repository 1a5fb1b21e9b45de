"""Wanda pruning: weights whose magnitude times the root mean square of their input is least in their row become zero.

Sun et al., arXiv 2306.11695. Nothing makes up for what is lost (`wanda+gptq` does, with the same zeros); seconds even for large
models. `wanda:pattern=2of4` keeps two of every four, which some GPUs multiply faster.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(mask="activations")
