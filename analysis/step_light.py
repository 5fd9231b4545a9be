"""The speed of light of single steps: columns that frames and spans of steps have beside what was recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa

from stagetrace.exporters.session import EXPERTS_SCHEMA, STEPS_SCHEMA

from .ceilings import least_times
from .load import frame
from .speed_of_light import Served, ceilings_for, preferred, served, work_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from stagetrace.exporters.session import Manifest, Session

    from .ceilings import Ceilings

    Tables = Mapping[str, pa.Table]


def step_light(
    session: Session,
    manifest: Manifest,
    steps: pd.DataFrame,
    experts: pd.DataFrame,
    config: Path | None = None,
    calibration: Path | None = None,
) -> pd.DataFrame:
    """The columns of spans.STEP_LIGHT for each of `steps`, with their index; of one rank.

    Shares are of a step's whole duration: where steps overlap, they share the device. What needs a ceiling that is not
    known is left out; all is where the model is not known. Raises ConfigError and CalibrationError when what was named
    cannot be read.
    """
    found = served(manifest, session.model_config, config)
    if not isinstance(found, Served) or not len(steps):
        return pd.DataFrame(index=steps.index)
    ceilings, _ = ceilings_for(manifest, calibration)
    kind = preferred(ceilings)
    return columns_of(found, steps, experts, ceilings[kind] if kind else None)


def columns_of(found: Served, steps: pd.DataFrame, experts: pd.DataFrame, ceilings: Ceilings | None) -> pd.DataFrame:
    """The columns of `step_light`, from what is known. Pure."""
    work, _ = work_of(found, steps, experts)
    columns = {"operations": work.operations(), "moved_bytes": work.bytes(), "link_bytes": work.bus_bytes()}
    if ceilings is not None:
        least = least_times(work.works, work.collectives, ceilings)
        seconds = (steps["end_ns"] - steps["begin_ns"]).clip(lower=1).to_numpy(dtype=float) / 1e9
        shares = {"mfu": least.compute, "mbu": least.memory, "light_share": least.whole}
        columns |= {name: share / seconds for name, share in shares.items() if share is not None}
    return pd.DataFrame(columns, index=steps.index)


def with_light(session: Session) -> Callable[[Tables, Manifest], Tables]:
    """What adds the columns to the table of steps among a commit's tables."""

    def enrich(tables: Tables, manifest: Manifest) -> Tables:
        steps, experts = tables["steps"], tables["experts"]
        found = step_light(session, manifest, frame(steps, STEPS_SCHEMA), frame(experts, EXPERTS_SCHEMA))
        for name in found.columns:
            steps = steps.append_column(name, pa.array(found[name], pa.float64()))
        return {**tables, "steps": steps}

    return enrich
