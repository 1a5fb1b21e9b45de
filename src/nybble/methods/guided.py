"""GuidedQuant: GPTQ whose statistics weigh every token by what an error there costs the model's predictions.

Kim et al., arXiv 2505.07004; with gradients of the model's own distribution (the true Fisher information) in place of
those of the labels.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(feedback=True, fisher=2)
