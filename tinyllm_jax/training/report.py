"""`report.html`: one file that shows a run, with its plots inside and nothing loaded from elsewhere."""

import time
from pathlib import Path

from tinyllm_jax.data.files import write_file
from tinyllm_jax.training.reports import curves, tables
from tinyllm_jax.training.reports.page import page, switch
from tinyllm_jax.training.reports.run import Run, read_run


def write_report(folder: Path, *, goes_on: bool) -> None:
    """Write `report.html` of a run folder from the files that lie in it.

    Args:
        goes_on: The page is to load itself anew, since more is coming.
    """
    content = report_of(read_run(folder), goes_on=goes_on, now=time.time())
    write_file(folder / "report.html", content.encode(errors="backslashreplace"))


def report_of(run: Run, *, goes_on: bool, now: float) -> str:
    """Write the page of a run.

    Args:
        now: Seconds since 1970, which the page tells.
    """
    body = [
        tables.status(run, goes_on=goes_on, now=now),
        tables.key_numbers(run),
        f"<p>{tables.summarise(run.rows)}</p>",
        *tables.warning_section(run.rows),
        "<h2>Curves</h2>",
        switch(curves.axes_of(run)),
        *curves.curves(run),
        tables.evaluation_table(run),
        *curves.step_section(run),
        *curves.layer_section(run),
        *curves.expert_section(run.rows),
        *curves.other_numbers(run),
        *tables.sample_section(run),
        *tables.data_section(run),
        *tables.setting_section(run),
        *tables.environment_section(run),
    ]
    title = f"{run.name}: step {run.step:,}"
    return page(title, heading=run.name, body=body, refreshes=goes_on)
