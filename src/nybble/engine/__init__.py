"""Decoding text from a model folder with the kernels alone: no torch, no transformers."""

from nybble.engine.decoder import Decoder

__all__ = ["Decoder"]
