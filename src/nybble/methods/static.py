"""W8A8 with one grid for all tokens: the range of a layer's inputs is found on calibration text and stored with the weight.

    static                       the clipping range of the least squared error
    static:observer=minmax       everything that calibration met
    static:observer=percentile   99.99 % of it
    static:observer=entropy      the least KL between the histograms before and after (TensorRT)
    static:no-lopsided           the same step on both sides of zero, whatever the inputs

What runtimes with fixed integer graphs need. One grid for all columns and tokens is the coarsest there is: inputs with a few
giant columns lose their small ones, which smoothquant mends (`smoothquant+static`, arXiv 2211.10438). Observers after Wu et
al., arXiv 2004.09602, section 3.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(activations="static")
ALIASES = {"mse": {"scales": "search"}}
