"""Round to nearest: every weight gets the representable value nearest to it.

    rtn        scales from the plain range of each block (absmax; minimum and maximum when asymmetric)
    rtn:mse    scales searched for the least squared error, weighted by the mean square of each input column when
               calibration statistics are given

The floor that every other method is measured against. It needs no data and takes seconds.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings()
ALIASES = {"mse": {"scales": "search"}}
