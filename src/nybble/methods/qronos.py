"""Qronos: GPTQ that corrects all of the error that earlier layers made, with next to no pull towards the float weight.

Zhang et al., arXiv 2505.11695.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(feedback=True, target=1.0, ridge=1e-6)
