"""What happens between the loss and the next weights. Driver."""

import math
from typing import Any, Literal, get_args

from raylit.arguments.checks import check_count, check_switch
from raylit.errors import ConfigError
from raylit.plan import MatmulPrecisionName, Optimization, PrecisionName

_PRECISIONS: dict[str, PrecisionName] = {
    "32": "32-true",
    "64": "64-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    **{name: name for name in ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")},
}
_COMPILE_OPTIONS = ("backend", "mode", "options", "dynamic", "fullgraph", "disable")


def parse_optimization(
    *,
    accumulate_grad_batches: int | dict[int, int],
    gradient_clip_val: float | None,
    gradient_clip_algorithm: str | None,
    truncated_bptt_steps: int | None,
    track_grad_norm: float | str,
    terminate_on_nan: bool,
    detect_anomaly: bool,
    precision: int | str,
    float32_matmul_precision: MatmulPrecisionName | None,
    channels_last: bool,
    compile: bool | dict[str, Any],
) -> Optimization:
    """A clip value of 0 means none, as it always has in Lightning."""
    if gradient_clip_val is not None and not gradient_clip_val >= 0:
        raise ConfigError(f"gradient_clip_val={gradient_clip_val}: must be 0 (no clipping) or more")
    algorithm: Literal["norm", "value"] = "value" if gradient_clip_algorithm == "value" else "norm"
    if gradient_clip_algorithm not in (None, "norm", "value"):
        raise ConfigError(f"gradient_clip_algorithm={gradient_clip_algorithm!r}: must be 'norm' or 'value'")
    if truncated_bptt_steps is not None:
        check_count(1, truncated_bptt_steps=truncated_bptt_steps)
    check_switch(terminate_on_nan=terminate_on_nan, detect_anomaly=detect_anomaly, channels_last=channels_last)
    if float32_matmul_precision not in (None, *get_args(MatmulPrecisionName)):
        raise ConfigError(
            f"float32_matmul_precision={float32_matmul_precision!r}: must be 'highest', 'high' (TF32), 'medium' "
            "(bfloat16) or None (as this process has it)"
        )
    return Optimization(
        accumulation=_accumulation(accumulate_grad_batches),
        clip_val=gradient_clip_val or None,
        clip_algorithm=algorithm,
        precision=_precision(precision),
        truncated_steps=truncated_bptt_steps,
        grad_norm_order=_norm_order(track_grad_norm),
        is_ending_on_nan=terminate_on_nan,
        is_detecting_anomaly=detect_anomaly,
        matmul_precision=float32_matmul_precision,
        is_channels_last=channels_last,
        compile_options=_compile_options(compile),
    )


def _accumulation(given: int | dict[int, int]) -> tuple[tuple[int, int], ...]:
    if not isinstance(given, dict):
        check_count(1, accumulate_grad_batches=given)
        return ((0, given),)
    for epoch, window in given.items():
        is_right = all(isinstance(number, int) and not isinstance(number, bool) for number in (epoch, window))
        if not is_right or epoch < 0 or window < 1:
            raise ConfigError(
                f"accumulate_grad_batches={given!r}: must be an int, or a dict of the batches in a window by the epoch "
                "from which on it is so: {0: 1, 4: 8}"
            )
    return tuple(sorted({0: 1, **given}.items()))


def _norm_order(given: float | str) -> float | None:
    if given in (-1, "-1"):
        return None
    try:
        order = float(given)
    except (TypeError, ValueError):
        order = math.nan
    if isinstance(given, bool) or not order > 0:
        raise ConfigError(f"track_grad_norm={given!r}: must be the norm's order, 2 or 'inf' for example, or -1 (off)")
    return order


def _compile_options(given: bool | dict[str, Any]) -> dict[str, Any] | None:
    if isinstance(given, bool):
        return {} if given else None
    if not isinstance(given, dict):
        raise ConfigError(f"compile={given!r}: must be True, False or a dict of torch.compile's keywords")
    unknown = [str(name) for name in given if name not in _COMPILE_OPTIONS]
    if unknown:
        raise ConfigError(
            f"compile={given!r}: torch.compile has no {', '.join(unknown)}; it takes {', '.join(_COMPILE_OPTIONS)}"
        )
    if given.get("mode") is not None and given.get("options") is not None:
        raise ConfigError(f"compile={given!r}: torch.compile takes a mode or options, not both")
    return dict(given)


def _precision(given: int | str) -> PrecisionName:
    if str(given) not in _PRECISIONS:
        raise ConfigError(f"precision={given!r}: must be one of {', '.join(_PRECISIONS)}")
    return _PRECISIONS[str(given)]
