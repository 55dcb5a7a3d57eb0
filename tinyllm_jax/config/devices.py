"""Settings of many devices and many processes."""

from dataclasses import dataclass

from tinyllm_jax.settings import setting


@dataclass(frozen=True)
class ParallelConfig:
    """How one run is divided among several devices; numbers are those of one device, but rounding.

    docs/parallel.md says how to choose.
    """

    strategy: str = setting(
        "mesh",
        "mesh: one program for a grid of devices, of the four sizes here; pmap: the older way, with "
        "whole weights on each device, for comparison",
        choices=("mesh", "pmap"),
    )
    data: int = setting(
        -1,
        "groups of devices that divide the rows, each with whole weights; -1 is as many as are left "
        "and can divide the rows of a pass",
        unit="groups",
        minimum=-1,
    )
    fsdp: int = setting(
        1,
        "devices that divide the rows, and the weights and moments besides; -1 is all that are left",
        unit="devices",
        minimum=-1,
    )
    tensor: int = setting(
        1,
        "devices that divide heads, hidden layers and vocabulary of the same rows; -1 is all that "
        "are left",
        unit="devices",
        minimum=-1,
    )
    expert: int = setting(
        1,
        "devices that divide the rows, and the experts besides; -1 is all that are left",
        unit="devices",
        minimum=-1,
    )

    def problems(self) -> list[str]:
        """List the rules between these settings that are broken."""
        found = [
            f"parallel.{axis}=0 leaves no device. Use 1, or -1 for all that are left."
            for axis, size in self.sizes().items()
            if size == 0
        ]
        filling = [axis for axis, size in self.sizes().items() if size == -1]
        if len(filling) > 1:
            flags = " ".join(f"--parallel.{axis} 1" for axis in filling[:-1])
            found.append(
                f"{', '.join(f'parallel.{axis}=-1' for axis in filling)}: only one size can be all "
                f"that are left. Add {flags}, or other numbers."
            )
        divided = [axis for axis in ("fsdp", "tensor", "expert") if self.sizes()[axis] != 1]
        if self.strategy == "pmap" and divided:
            flags = " ".join(f"--parallel.{axis} 1" for axis in divided)
            found.append(
                "parallel.strategy=pmap only divides rows, and parallel."
                f"{divided[0]}={self.sizes()[divided[0]]}. Use --parallel.strategy mesh, or {flags}."
            )
        return found

    def sizes(self) -> dict[str, int]:
        """Give the size of each axis of the grid, in the order of the grid."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "expert", "tensor")}


@dataclass(frozen=True)
class DistributedConfig:
    """How several processes, on one host or many, make one run; docs/parallel.md says more."""

    coordinator: str = setting(
        "",
        "HOST:PORT of process 0, where all processes meet; auto asks Slurm, Open MPI, Kubernetes or "
        "Cloud TPU for it; empty is a run of one process",
    )
    num_processes: int = setting(
        0, "processes of the run; 0 asks the cluster", unit="processes", minimum=0
    )
    process_id: int = setting(-1, "number of this process, from 0; -1 asks the cluster", minimum=-1)
    start_timeout_seconds: int = setting(
        300, "how long processes wait for each other at the start", unit="seconds", minimum=1
    )
    heartbeat_timeout_seconds: int = setting(
        30,
        "a process that was not heard of for so long is gone, and the others stop",
        unit="seconds",
        minimum=5,
    )

    def problems(self) -> list[str]:
        """List the rules between these settings that are broken."""
        found = []
        host, _, port = self.coordinator.rpartition(":")
        is_address = bool(host) and port.isdecimal() and 0 < int(port) < 65536
        if self.coordinator not in ("", "auto") and not is_address:
            found.append(
                f"distributed.coordinator={self.coordinator} is no HOST:PORT. Use the host of process "
                "0 and a free port of it, such as 10.0.0.1:12321, or auto."
            )
        if not self.coordinator and (self.num_processes or self.process_id >= 0):
            found.append(
                "distributed.num_processes and process_id say nothing without an address to meet at. "
                "Add --distributed.coordinator HOST:PORT, or auto."
            )
        if 0 < self.num_processes <= self.process_id:
            found.append(
                f"distributed.process_id={self.process_id} is not below distributed.num_processes="
                f"{self.num_processes}. Use 0 to {self.num_processes - 1}."
            )
        return found
