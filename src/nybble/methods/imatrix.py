"""Round to nearest with scales searched under an importance matrix, llama.cpp's name for the mean square of each input.

Cheap: one pass over the calibration text, no Hessian. What an error in column k costs at the layer's output is E[x_k^2]
times its square, errors of different columns taken as independent. Source: llama.cpp, pull request 4861.
"""

from nybble.methods.steps.settings import Settings

SETTINGS = Settings(scales="search", importance=True)
