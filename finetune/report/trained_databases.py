"""Which databases the scores are about that training had no example of: the bars of the report mark them.

From the manifest of the prepared data, where it lies on this machine and is the one that the run was trained on.
"""

from __future__ import annotations

from dataclasses import replace

from finetune.data import prepared
from finetune.report.bars import Group
from finetune.report.source import Source

NOT_TRAINED_ON = "not trained on"


def trained_databases(source: Source) -> frozenset[str] | None:
    """The databases of the training examples; None if that is not known, as on a machine without the prepared data, or if the
    questions are from other data, where a name may be that of another database."""
    data = source.run.data
    if not data or source.other_data:
        return None
    return prepared.trained_databases(prepared.manifest_if_same(data.path, data.manifest_sha256))


def marked(group: Group, trained: frozenset[str] | None) -> Group:
    """The bars by database, with those named that were not trained on; where that is so of all or none, one sentence says it."""
    if trained is None or not group.bars:
        return group
    unseen = {bar.name for bar in group.bars} - trained
    if len(unseen) in (0, len(group.bars)):
        which = "None of these databases was trained on." if unseen else "All of these databases were trained on."
        return replace(group, note=which)
    bars = [replace(bar, name=f"{bar.name} ({NOT_TRAINED_ON})") if bar.name in unseen else bar for bar in group.bars]
    return replace(group, bars=bars, note="The databases without a mark were trained on, with other questions.")
