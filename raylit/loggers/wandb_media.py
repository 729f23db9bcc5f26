"""wandb's images, sounds and the like, which keep their content in temporary files, on their way to another host.
Worker packs, driver unpacks."""

import os
import pickle
import sys
import tempfile
from typing import Any


def reduced(media: Any) -> Any:
    """How to pickle one of wandb's media with its file in it; None: it is none."""
    package = sys.modules.get("wandb.sdk.data_types.base_types.media")
    if package is None or not isinstance(media, package.Media) or getattr(media, "_path", None) is None:
        return None
    with open(media._path, "rb") as file:
        content = file.read()
    function, arguments, state, *_ = media.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    return _restored, (function, arguments, state, content, media._extension or os.path.splitext(media._path)[1])


def _restored(function: Any, arguments: tuple[Any, ...], state: dict[str, Any], content: bytes, suffix: str) -> Any:
    handle, path = tempfile.mkstemp(suffix=suffix)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    media = function(*arguments)
    media.__dict__.update(state)
    # A temporary one is moved into the run's directory when it is logged.
    media._path, media._is_tmp = path, True
    return media
