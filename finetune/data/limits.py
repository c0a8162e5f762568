"""The limits of SQL queries, as the config sets them."""

from __future__ import annotations

from finetune.config.schema import EvaluationSection
from finetune.sql.engines.base import Limits

LIMIT_KEYS = ("max_memory_mib", "max_temp_mib", "max_rows", "max_result_mib", "large_database_mib")
"""The keys of the section `evaluation` that `limits_of` reads; evaluation.timeout_seconds is passed with each query."""
MIB = 1 << 20


def limits_of(section: EvaluationSection) -> Limits:
    """The limits under which gold queries and predictions run."""
    large = section.large_database_mib
    return Limits(
        memory_bytes=section.max_memory_mib * MIB,
        temp_bytes=section.max_temp_mib * MIB,
        max_rows=section.max_rows,
        max_result_bytes=section.max_result_mib * MIB,
        large_database_bytes=None if large is None else int(large * MIB),
    )
