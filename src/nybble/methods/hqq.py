"""HQQ: no data; scales (and whole zero points) that minimise |W - Q|_p^p, p = 0.7, so that outliers do not set them.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". The original keeps a float zero point
and fits that alone; the formats here hold whole ones, see steps/fitting.py. Where there is calibration text, `imatrix` and
`gptq` do better.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(scales="hqq")
