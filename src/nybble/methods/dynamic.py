"""W8A8 with a scale for each token: a layer's inputs are rounded to int8 (largest magnitude / 127) when the token is there.

No calibration text, and no token can be cut off: the choice where integers are to be multiplied and nothing else is known.
The per-token half of LLM.int8 (Dettmers et al., arXiv 2208.07339, section 2) and of ZeroQuant (arXiv 2206.01861). Weights are
rounded to nearest; `gptq+dynamic` chooses them with feedback. Any integer format does; int8:channel is the usual one.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(activations="dynamic")
ALIASES = {"mse": {"scales": "search"}}
