"""SmoothQuant: the range of each channel is shared out between activations and weights, and the model computes the same.

Xiao et al., arXiv 2211.10438. Scales s = max|x|^a / max|w|^(1-a) are folded into norms and weights before the walk
(edits.py); a is the option `smooth`. It pays where activations are rounded too; for weights alone take `awq`.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(edit="smoothquant")
