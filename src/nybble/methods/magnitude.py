"""Magnitude pruning: the smallest weights of each matrix become zero, or in every run of four the smaller two. No data.

The oldest way there is (LeCun et al. 1989 improve on it); what is left is rounded to nearest. The one to beat.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(mask="magnitude")
