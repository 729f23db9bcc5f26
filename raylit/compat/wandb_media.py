"""Pickle wandb's images, sounds and the like together with their files, to another host. Worker packs, driver unpacks.

Written against wandb 0.17 to 0.31, where a Media keeps its content in a temporary file that private attributes name.
Of one without these attributes, as of a later version, what wandb itself pickles travels.
"""

import os
import pickle
import sys
import tempfile
from typing import Any


def reduce_media(media: Any) -> Any:
    """Say how to pickle one of wandb's media with its file in it. None: it is none, or has no file."""
    package = sys.modules.get("wandb.sdk.data_types.base_types.media")
    if package is None or not isinstance(media, package.Media):
        return None
    path: str | None = getattr(media, "_path", None)
    if path is None:
        return None
    with open(path, "rb") as file:
        content = file.read()
    function, arguments, state, *_ = media.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    suffix = getattr(media, "_extension", None) or os.path.splitext(path)[1]
    return _restore_media, (function, arguments, state, content, suffix)


def _restore_media(
    function: Any, arguments: tuple[Any, ...], state: dict[str, Any], content: bytes, suffix: str
) -> Any:
    handle, path = tempfile.mkstemp(suffix=suffix)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    media = function(*arguments)
    # A temporary one is moved into the run's directory when it is logged.
    media.__dict__.update(state, _path=path, _is_tmp=True)
    return media
