"""Access to private functions of torch_xla. Worker of an XLA run.

Written against torch_xla 2.9.0.
"""

import torch_xla
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor on the XLA device is divided over the devices; else each of them has the whole."""
    return bool(torch_xla._XLAC._get_xla_sharding_spec(tensor))
