"""Pickling of wandb's images, sounds and other media with their files, for another host. Worker packs, driver unpacks.

Written for wandb 0.17 to 0.31, in which a Media keeps its content in a temporary file that private attributes name. A
medium without these attributes, as of a later version, is pickled as wandb does it.
"""

import os
import pickle
import sys
import tempfile
from typing import Any


def reduce_media(media: Any) -> Any:
    """Return how to pickle one of wandb's media with its file, or None for other objects and media without a file."""
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
    # A temporary file is moved into the run's directory when it is logged.
    media.__dict__.update(state, _path=path, _is_tmp=True)
    return media
