"""AWQ: channels whose activations are large are scaled up before rounding, and what feeds them down, so that they err less.

Lin et al., arXiv 2306.00978. The scales are folded into norms and weights before the walk (edits.py); they are searched on
the Hessian, see steps/scaling.py. The paper's clip is what searched scales do. Alone it rounds to nearest; `awq+gptq` rounds
with feedback.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(edit="awq", scales="search", importance=True)
