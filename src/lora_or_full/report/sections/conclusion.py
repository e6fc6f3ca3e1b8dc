"""What may be concluded, in words, and what may not."""

from lora_or_full.report.render import Section, section
from lora_or_full.report.stats import paired
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.study import Study, shown

OF_MODE = ("mode", "lr", "rank", "frozen_dtype", "adapter")  # keys in which modes differ by design


def conclusion(study: Study, found: ArmComparison | None) -> Section:
    """Write the section that the report begins with."""
    return section(
        "conclusion", study=study, found=found, level=1 - paired.LEVEL,
        most_seeds=paired.MOST_SEEDS, **(_unlike(found) if found else {}),
    )  # fmt: skip


def _unlike(found: ArmComparison) -> dict[str, list[str]]:
    """What differs between the two arms besides the mode."""
    arms = (found.adapter, found.full)
    one, other = (arm.any.config for arm in arms)
    records = [[arm.runs[seed].record for seed in found.seeds] for arm in arms]
    return {
        "keys": [
            f"{key} ({shown(one.get(key))} and {shown(other.get(key))})"
            for key in sorted(one.keys() | other.keys())
            if key.partition(".")[0] not in OF_MODE and one.get(key) != other.get(key)
        ],
        "seeds": [
            str(own.config.seed)
            for own, full in zip(*records, strict=True)
            if own.data.train.fingerprint != full.data.train.fingerprint
        ],
        "conditions": [
            what
            for what in ("machine", "cores", "packages", "commit")
            if len({frozenset(str(getattr(r.environment, what)) for r in own) for own in records})
            > 1
        ],
    }
