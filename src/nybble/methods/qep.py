"""QEP: GPTQ with half of the error that earlier layers made corrected in the target.

Arai and Ichikawa, arXiv 2504.09629 (quantization error propagation).
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(feedback=True, target=0.5)
