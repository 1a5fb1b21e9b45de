"""GPTQ: column by column, the error of each rounding is carried into the columns not yet rounded.

Frantar et al., arXiv 2210.17323. Scales of a group come from the plain range of what its columns aim at when the loop
comes to them; a column that calibration never activated keeps its rounded value (the paper's code sets it to zero). Inputs
are those of the model quantized so far, layer by layer in the order they run ("true sequential").
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(feedback=True)
