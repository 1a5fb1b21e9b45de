"""From what a person calls a model to a folder on disk."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nybble.errors import InputError

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
PATTERNS = ("*.json", "*.safetensors", "*.txt", "tokenizer.model", "*.jinja")
ANSWER_SECONDS = 5.0
"""How long the hub may take to say whether it has a model."""


def resolve(model: str | Path, download: bool) -> Path:
    """The folder of a local model or of a hub name (`gpt2`, `org/name`).

    With `download` a hub name is fetched (weights as safetensors only); without, only the local cache is looked at.
    Raises InputError when there is no such folder and the hub cannot be reached or has no such model.
    """
    path = Path(model)
    if path.exists() or isinstance(model, Path) or not HUB_NAME.fullmatch(model) or model.count("/") > 1:
        return path
    from huggingface_hub import HfApi, snapshot_download  # takes a quarter of a second, so only here
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = not download or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        if not offline:
            # snapshot_download asks the same without a time limit: a network that swallows packets would hang it
            try:
                HfApi().model_info(model, timeout=ANSWER_SECONDS)
            except HfHubHTTPError:
                raise
            except Exception:  # of the HTTP library, which is not ours to name: timeout, no route, a broken proxy
                offline = True
        return Path(snapshot_download(model, allow_patterns=list(PATTERNS), local_files_only=offline))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"no folder {model!r} here, and the hub model of that name is not in the local cache: "
            "that needs the network, or give the path of a model folder"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise InputError(f"the hub refused model {model!r} ({status}); check the name, log in, or give a folder") from error
    except Exception as error:  # it was there a moment ago: a connection that broke, a full disk, a bad answer
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"cannot fetch hub model {model!r} ({reason}); it needs the network, or give a folder") from error
