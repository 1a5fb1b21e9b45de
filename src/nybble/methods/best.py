"""The best we know at every size: searched scales, feedback, targets for the inputs that the quantized model really has,
refinement of codes, scales and offsets, then codes and scales tuned together against the float model's predictions.

Every step can be turned off or changed (`best:tune=0`, `best:refine=1`); docs/methods.md has what each one gains.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(feedback=True, scales="search", target=1.0, refine=3, tune=300, taper=True)
