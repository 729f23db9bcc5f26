"""Freed memory goes back to the system at once: what is gathered and let go of must not pile up. Worker, CPU only."""

import ctypes

_M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: what is at least that large has pages of its own, which go with it."""
_EAGER_BYTES = 2**20
_USUAL_BYTES = 32 * 2**20
"""Up to which glibc raises its threshold by itself as large memory comes and goes."""


def free_eagerly(*, is_eager: bool) -> None:
    """Freed memory otherwise stays in holes between what is in use. Pages that come anew each time cost the system's
    clearing them. Nothing where malloc is not glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _EAGER_BYTES if is_eager else _USUAL_BYTES)
