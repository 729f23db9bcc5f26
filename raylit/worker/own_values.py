"""What a rank has logged in an epoch, without the other ranks. Worker."""

from collections.abc import Iterable

from raylit.worker import metric_objects
from raylit.worker.metric_entry import FUNCTION, Entry, applied, epoch_across, stacked, total_and_weight


def own_value(entry: Entry) -> float | None:
    """Over the batches so far; None: there is none. Waits for the device, changes nothing."""
    entry.fold()
    reduction = entry.spec.reduction
    if entry.object is not None and entry.segments:
        with metric_objects.detached(entry.object):
            segments = [[entry.segments[index]] for index in sorted(entry.segments)]
            return metric_objects.computed(entry.name, entry.object, segments)
    if entry.object is not None:
        return metric_objects.computed(entry.name, entry.object, None)
    if entry.total is None or reduction == FUNCTION:
        return None
    if callable(reduction):
        return applied(reduction, entry.total.tolist())
    total, weight = total_and_weight(entry)
    return epoch_across(stacked([total]), stacked([weight]), reduction)


def own_values(entries: Iterable[Entry]) -> dict[str, float]:
    """By the names that the epoch's values go by."""
    values = {entry: value for entry in entries if entry.on_epoch and (value := own_value(entry)) is not None}
    published = [entry.spec.published(entry.name, value, suffix="epoch") for entry, value in values.items()]
    return {name: metric.value for named in published for name, metric in named.items()}
