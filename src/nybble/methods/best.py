"""The best we know at every size: all that paid in our experiments, one after the other.

Searched scales, feedback, targets for the inputs that the quantized model really has, refinement of codes, scales and
offsets, then codes and scales of all layers tuned together against the float model's predictions, 150 steps for up to 3 bits,
none for more. A step runs eight windows through the model and back: on large models `best:tune=0` is the quick part.

Every step can be turned off or changed (`best:tune=0`, `best:refine=1`); docs/log.md has what each one gained.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(feedback=True, scales="search", target=1.0, refine=3, tune=150, travel=0.013, tune_bits=3)
