"""The speed of light of single steps and requests: columns beside what was recorded, in frames, spans and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from stagetrace.exporters.session import EXPERTS_SCHEMA, REQUESTS_SCHEMA, SEGMENTS_SCHEMA, STEPS_SCHEMA, names_of

from .gap import gap_columns, spent
from .load import frame
from .speed_of_light import (
    Served,
    ceilings_for,
    least_and_bound,
    least_of_requests,
    over_time,
    own_times,
    preferred,
    served,
    window_width,
    work_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from stagetrace.exporters.session import Manifest, Session

    from .ceilings import Ceilings

    Tables = Mapping[str, pa.Table]
    Known = tuple[Served, Ceilings | None]


def _known(
    session: Session, manifest: Manifest, config: Path | None = None, calibration: Path | None = None
) -> Known | None:
    """What was served and the ceilings to compare with; None where the model is not known."""
    found = served(manifest, session.model_config, config)
    if not isinstance(found, Served):
        return None
    ceilings, _ = ceilings_for(manifest, calibration)
    kind = preferred(ceilings)
    return found, ceilings[kind] if kind else None


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
    known = _known(session, manifest, config, calibration)
    if known is None or not len(steps):
        return pd.DataFrame(index=steps.index)
    return columns_of(known[0], steps, experts, known[1])


def columns_of(found: Served, steps: pd.DataFrame, experts: pd.DataFrame, ceilings: Ceilings | None) -> pd.DataFrame:
    """The columns of `step_light`, from what is known. Pure."""
    work = work_of(found, steps, experts)
    columns = {"operations": work.operations(), "moved_bytes": work.bytes(), "link_bytes": work.bus_bytes()}
    if ceilings is not None:
        least = work.least(ceilings)
        seconds = (steps["end_ns"] - steps["begin_ns"]).clip(lower=1).to_numpy(dtype=float) / 1e9
        shares = {"mfu": least.compute, "mbu": least.memory, "link_share": least.link, "light_share": least.whole}
        columns |= {name: share / seconds for name, share in shares.items() if share is not None}
    return pd.DataFrame(columns, index=steps.index)


def step_gap(
    session: Session,
    manifest: Manifest,
    steps: pd.DataFrame,
    segments: pd.DataFrame,
    experts: pd.DataFrame,
    config: Path | None = None,
    calibration: Path | None = None,
) -> pd.DataFrame:
    """The columns of spans.STEP_GAP for each of `steps`, with their index, as far as they are known; ns, floats.

    `segments` with gap.SEGMENTS. They divide a step's own time (speed_of_light.own_times) less its least time; a part
    that could not be told apart has no column. Raises as `step_light`.
    """
    known = _known(session, manifest, config, calibration)
    begins = (steps["end_ns"] - own_times(steps)).to_numpy(dtype=np.int64)
    return _gap_of(known, manifest, steps, begins, segments, experts)


def _gap_of(
    known: Known | None,
    manifest: Manifest,
    steps: pd.DataFrame,
    begins: npt.NDArray[np.int64],
    segments: pd.DataFrame,
    experts: pd.DataFrame,
) -> pd.DataFrame:
    if known is None or known[1] is None or not len(steps):
        return pd.DataFrame(index=steps.index)
    least = work_of(known[0], steps, experts).least(known[1])
    if least.whole is None:
        return pd.DataFrame(index=steps.index)
    taken = spent(steps, begins, segments, manifest, names_of(manifest.processes))
    return gap_columns(taken, *least_and_bound(least, len(steps)))


def request_light(
    session: Session,
    manifest: Manifest,
    requests: pd.DataFrame,
    config: Path | None = None,
    calibration: Path | None = None,
) -> pd.DataFrame:
    """`least_ttft_ns` and `least_tpot_ns` of each of `requests`, with their index; none without model and ceilings.

    Raises as `step_light`.
    """
    known = _known(session, manifest, config, calibration)
    if known is None or known[1] is None or not len(requests):
        return pd.DataFrame(index=requests.index)
    return least_of_requests(known[0], requests, known[1])


def light_over_time(
    session: Session,
    manifest: Manifest,
    steps: pd.DataFrame,
    experts: pd.DataFrame,
    width_s: float | None = None,
    config: Path | None = None,
    calibration: Path | None = None,
) -> pd.DataFrame:
    """A row for each window of time in which a complete step ended, `width_s` long, else as the report chooses.

    Columns: `begin_ns` (monotonic), `width_ns`, `steps`, `busy`, `operations`, `moved_bytes`, `link_bytes` (sums) and,
    with ceilings, `mfu`, `mbu`, `link_share`, `light_share`: of the steps' own time. Raises as `step_light`.
    """
    steps = steps[steps["status"] == "complete"]
    known = _known(session, manifest, config, calibration)
    if known is None or not len(steps):
        return pd.DataFrame()
    found, ceilings = known
    width = window_width(steps) if width_s is None else max(round(width_s * 1e9), 1)
    kinds = {} if ceilings is None else {"": ceilings}
    rows = []
    for window in over_time(steps, own_times(steps), work_of(found, steps, experts), kinds, width):
        done = window.done
        row: dict[str, Any] = {
            "begin_ns": window.begin_ns,
            "width_ns": window.width_ns,
            "steps": done.count,
            "busy": window.busy,
        }
        row |= {"operations": done.operations, "moved_bytes": done.bytes, "link_bytes": done.bus_bytes}
        if kinds:
            row |= {"mfu": done.mfu(""), "mbu": done.mbu(""), "link_share": done.bus("")}
            row |= {"light_share": done.share("")}
        rows.append(row)
    return pd.DataFrame(rows)


def with_light(session: Session) -> Callable[[Tables, Manifest], Tables]:
    """What adds the columns to the tables of steps and requests among a commit's tables; commits come in order."""
    ended: dict[int, int] = {}  # by engine instance: the end of its last step

    def enrich(tables: Tables, manifest: Manifest) -> Tables:
        known = _known(session, manifest)
        if known is None:
            return tables
        steps, experts = frame(tables["steps"], STEPS_SCHEMA), frame(tables["experts"], EXPERTS_SCHEMA)
        requests = frame(tables["requests"], REQUESTS_SCHEMA)
        added = dict(tables)
        if len(steps):
            own = own_times(steps, ended)
            begins = (steps["end_ns"] - own).to_numpy(dtype=np.int64)
            segments = frame(tables["segments"], SEGMENTS_SCHEMA)
            lit = columns_of(known[0], steps, experts, known[1]).assign(own_ns=own)
            gaps = _gap_of(known, manifest, steps, begins, segments, experts)
            added["steps"] = _with_columns(tables["steps"], pd.concat([lit, gaps], axis=1))
            ended.update({int(str(key)): int(end) for key, end in steps.groupby("instance")["end_ns"].max().items()})
        if len(requests) and known[1] is not None:
            added["requests"] = _with_columns(tables["requests"], least_of_requests(known[0], requests, known[1]))
        return added

    return enrich


def _with_columns(table: pa.Table, columns: pd.DataFrame) -> pa.Table:
    for name in columns.columns:
        table = table.append_column(str(name), pa.array(columns[name].astype(float), pa.float64(), from_pandas=True))
    return table
