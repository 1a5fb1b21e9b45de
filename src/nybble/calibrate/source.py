"""What `--calibrate` may name: a file, a dataset of the hub, or the model itself. No torch here."""

from __future__ import annotations

from nybble.calibrate.hub_datasets import HUB, hub_documents
from nybble.calibrate.windows import read_documents

SELF = "self"
"""What stands in the place of a text where the model is to write it."""


def read_calibration(source: str) -> list[str] | str:
    """Documents of a file or of `hub:DATASET[:CONFIG[:SPLIT]]`, or SELF as it is (a file of that name is `./self`).

    Raises as `read_documents` and `hub_documents` do.
    """
    if source == SELF:
        return SELF
    return hub_documents(source) if source.startswith(HUB) else read_documents(source)
