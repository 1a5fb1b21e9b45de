"""LLM.int8: int8 with a scale for each token, but elements of magnitude 6 or more are multiplied as floats.

Dettmers et al., arXiv 2208.07339. The float part takes the *dequantized int8* columns of the weight, as bitsandbytes does, so
that no float weight is kept. There a whole column goes to float when any token of the batch has an outlier in it; here every
token decides for itself, so that its result does not depend on its neighbours. `llm_int8:threshold=4` moves the limit.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(activations="outliers")
ALIASES = {"mse": {"scales": "search"}}
