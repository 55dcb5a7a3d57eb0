"""The loggers: what each library needs to show the rows of `metrics.jsonl`, no step twice and none missing.

- TensorBoard: event files of the run folder, written anew from the rows at every start.
- Weights & Biases: the same run goes on; rows that it has are not sent again. Where they are others than
  it has (another setting, batches left out), and offline, where it cannot be asked, a new run gets all.
- SwanLab: alike; it knows by itself which steps it has.
- trackio: a new run gets all rows, and then the earlier one is removed.
"""

import importlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllm_jax.config import Config, LoggingConfig, config_to_table
from tinyllm_jax.data.files import write_file
from tinyllm_jax.training.loggers import Logger, Row, points

# Where a run folder says under which name a tracker knows it.
KEPT = "loggers.json"


def make_logger(name: str, config: Config, folder: Path) -> Logger:
    """Make the logger of a name, which does nothing until it begins."""
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard")
    kinds = {"wandb": Wandb, "swanlab": SwanLab, "trackio": Trackio}
    return kinds[name](config.logging, folder)


def written_at(rows: Sequence[Row]) -> list[float]:
    """Tell when rows were written, in seconds since 1970: as the next row that says so."""
    found, seconds = [], time.time()
    for row in reversed(rows):
        seconds = row.get("time", seconds)
        found.append(seconds)
    return found[::-1]


class TensorBoard:
    """Event files, which `tensorboard --logdir RUN` shows.

    Args:
        folder: Where they are; those of earlier starts are removed.
    """

    name = "tensorboard"

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None

    def begin(self, rows: Sequence[Row], config: Config, key: str) -> None:
        """Write all rows into a new file."""
        del config, key
        self.close()
        for path in self._folder.glob("events.out.tfevents.*"):
            path.unlink()
        writers = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._writer = writers.EventFileWriter(str(self._folder))
        # A TensorBoard that is looking forgets what it has seen of the earlier files.
        protos = importlib.import_module("tensorboard.compat.proto.event_pb2")
        start = protos.SessionLog(status=protos.SessionLog.START)
        self._writer.add_event(protos.Event(step=0, wall_time=time.time(), session_log=start))
        self.write(rows)
        self.flush()

    def write(self, rows: Sequence[Row]) -> None:
        """Add the numbers and texts of rows."""
        event, summary, tensor, shape, types = (
            importlib.import_module(f"tensorboard.compat.proto.{name}_pb2")
            for name in ("event", "summary", "tensor", "tensor_shape", "types")
        )
        plugin = summary.SummaryMetadata.PluginData(plugin_name="text")
        text = summary.SummaryMetadata(plugin_data=plugin)
        one = shape.TensorShapeProto(dim=[shape.TensorShapeProto.Dim(size=1)])

        def as_tensor(text: str) -> Any:
            return tensor.TensorProto(
                dtype=types.DT_STRING, string_val=[text.encode()], tensor_shape=one
            )

        assert self._writer is not None
        for row, seconds in zip(rows, written_at(rows), strict=True):
            numbers, texts = points(row)
            values = [summary.Summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()]
            values += [
                summary.Summary.Value(tag=tag, metadata=text, tensor=as_tensor(each))
                for tag, each in texts.items()
            ]
            self._writer.add_event(
                event.Event(
                    step=row["step"], wall_time=seconds, summary=summary.Summary(value=values)
                )
            )

    def flush(self) -> None:
        """Wait until all is in the file."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Tracker:
    """What the services for runs have in common: a run there, under an id that the run folder keeps."""

    name = ""
    mode_variable = ""

    def __init__(self, settings: LoggingConfig, folder: Path):
        self._settings, self._folder = settings, folder.resolve()
        self._run: Any = None
        self._has_until = -1  # the last step that the service has already

    def begin(self, rows: Sequence[Row], config: Config, key: str) -> None:
        """Go on with the run there is, if its numbers are these, or begin one with all of them."""
        self.close()
        earlier = self._kept().get(self.name)
        goes_on = self._may_go_on() and earlier is not None and earlier["key"] == key and bool(rows)
        if earlier is not None and goes_on:
            new = earlier
        else:
            number = earlier["number"] + 1 if earlier else 1
            group = earlier["group"] if earlier else uuid.uuid4().hex[:8]
            new = {"id": uuid.uuid4().hex[:8], "number": number, "group": group, "key": key}
        name = self._settings.name or self._folder.name
        shown = f"{name}-{new['number']}" if new["number"] > 1 else name
        self._run, self._has_until = self._start(new, shown, config, goes_on=goes_on)
        kept = {**self._kept(), self.name: new}
        write_file(self._folder / KEPT, json.dumps(kept, indent=1).encode())
        self.write(rows)
        if earlier is not None and not goes_on:
            self._remove(earlier)

    def write(self, rows: Sequence[Row]) -> None:
        """Send the numbers of rows that the service has not."""
        for row in rows:
            if row["step"] > self._has_until:
                self._send(row["step"], *points(row))

    def flush(self) -> None:
        """Do nothing: the library sends by itself."""

    def close(self) -> None:
        """Wait until everything is sent, and end."""
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()

    def _kept(self) -> dict[str, dict[str, Any]]:
        path = self._folder / KEPT
        return json.loads(path.read_text()) if path.is_file() else {}

    def _is_offline(self) -> bool:
        """Tell whether the settings, or the library's own variable, keep everything here."""
        return self._settings.offline or os.environ.get(self.mode_variable, "online") != "online"

    def _may_go_on(self) -> bool:
        """Tell whether the service can be asked what it has."""
        return not self._is_offline()

    def _start(
        self, run: dict[str, Any], name: str, config: Config, *, goes_on: bool
    ) -> tuple[Any, int]:
        """Open a run, and tell the last step that it has, -1 if none."""
        raise NotImplementedError

    def _send(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        """Send what belongs to a step, after what belongs to earlier ones."""
        raise NotImplementedError

    def _remove(self, run: dict[str, Any]) -> None:
        """Remove a run that another has replaced, where that can be done."""


class Wandb(Tracker):
    """Weights & Biases."""

    name = "wandb"
    mode_variable = "WANDB_MODE"

    def _start(
        self, run: dict[str, Any], name: str, config: Config, *, goes_on: bool
    ) -> tuple[Any, int]:
        wandb = importlib.import_module("wandb")

        opened = wandb.init(
            project=self._settings.project,
            name=name,
            id=run["id"],
            group=run["group"],
            dir=str(self._folder),
            config=config_to_table(config),
            mode="offline" if self._settings.offline else None,
            resume="allow" if goes_on else None,
            # The terminal is the run's own: both libraries would keep all that it shows.
            settings=wandb.Settings(console="off"),
        )
        # `step` is that of the next call of `log`; wandb drops what comes for earlier ones.
        return opened, opened.step - 1 if goes_on else -1

    def _send(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        self._run.log({**numbers, **texts}, step=step)


class SwanLab(Tracker):
    """SwanLab. Offline its `mode="offline"` keeps what `swanlab sync` sends."""

    name = "swanlab"
    mode_variable = "SWANLAB_MODE"

    def _start(
        self, run: dict[str, Any], name: str, config: Config, *, goes_on: bool
    ) -> tuple[Any, int]:
        swanlab = importlib.import_module("swanlab")

        online = {} if self._is_offline() else {"id": run["id"], "resume": "allow"}
        opened = swanlab.init(
            project=self._settings.project,
            name=name,
            group=run["group"],
            log_dir=str(self._folder / "swanlog"),
            config=config_to_table(config),
            mode="offline" if self._settings.offline else None,
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),
            **online,
        )
        del goes_on  # it knows, for each number, which steps it has, and leaves those out
        return opened, -1

    def _send(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        swanlab = importlib.import_module("swanlab")

        shown = {name: swanlab.Text(text) for name, text in texts.items()}
        self._run.log({**numbers, **shown}, step=step)


class Trackio(Tracker):
    """trackio, whose runs lie on this machine unless its own variables name a Space or a server."""

    name = "trackio"

    def _may_go_on(self) -> bool:
        """Always begin anew: a run that goes on would keep rows that come again twice."""
        return False

    def _start(
        self, run: dict[str, Any], name: str, config: Config, *, goes_on: bool
    ) -> tuple[Any, int]:
        del goes_on
        trackio = importlib.import_module("trackio")

        opened = trackio.init(
            project=self._settings.project,
            name=name,
            group=run["group"],
            config=config_to_table(config),
            resume="never",
            embed=False,
            auto_log_cpu=False,
        )
        run |= {"id": opened.id, "name": opened.name, "project": opened.project}
        return opened, -1

    def _send(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        self._run.log({**numbers, **texts}, step=step)

    def _remove(self, run: dict[str, Any]) -> None:
        trackio = importlib.import_module("trackio")

        try:
            runs = trackio.Api().runs(run["project"])
        except ValueError:  # the earlier run was killed before it had written anything
            return
        for other in runs:
            if other.id == run["id"]:
                other.delete()
