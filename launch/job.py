"""One job on a pod, in the words that all launchers share: which config, on which slices, by which command."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

import configs
from launch.slices import Slice, parse_slice
from moe_jax.config import RunConfig
from moe_jax.errors import UserError

MOUNT = "/bucket"
# Without a TPU, JAX must fail rather than train on the host's processor.
_ENVIRONMENT = {"JAX_PLATFORMS": "tpu,cpu", "PYTHONUNBUFFERED": "1"}


_ONLY_FOR = {
    "mount": ("gke",), "host_network": ("gke",), "service_account": ("gke", "queued"),
    "zone": ("queued", "xpk"), "project": ("queued", "xpk"), "cluster": ("xpk",),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What to run and where. Every field is plain JSON, so that a record of it rebuilds the same job."""

    launcher: str  # gke, queued or xpk
    config: str  # registered names, joined by commas
    overrides: list[str]
    name: str  # of the job, and of the run folder in the bucket
    bucket: str  # gs://bucket or gs://bucket/folder
    image: str
    topology: str
    slices: int = 1
    spot: bool = False
    reservation: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    grace_seconds: int = 300  # between SIGTERM and SIGKILL: a final save must fit
    max_restarts: int = 10  # after crashes; preemptions are not counted where the engine can tell
    service_account: str = ""  # gke
    mount: bool = False  # gke: the bucket as a folder instead of gs://
    host_network: bool = True  # gke: privileged pods, those of several slices on the host's network
    zone: str = ""  # queued, xpk
    project: str = ""  # queued, xpk
    cluster: str = ""  # xpk
    stage: str = ""  # where the run is one stage of a pipeline: its folder in that of the run

    def __post_init__(self) -> None:
        if ".json" in self.config:
            raise UserError(f"{self.config} is a file that the image lacks; register it in configs/ and name it")
        # The strictest of the three: names of JobSets become host names, xpk allows 40 characters.
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise UserError(
                f"--run {self.name!r} names machines; use at most 40 lower-case letters, digits and hyphens, "
                "a letter first and no hyphen last"
            )
        if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]*(/[^\s?#*\[\]]+)?", self.bucket):
            raise UserError(f"--bucket is {self.bucket!r}; write gs://bucket or gs://bucket/folder")
        if not re.fullmatch(r"[A-Za-z0-9][\w./:@-]*", self.image):
            raise UserError(f"--image is {self.image!r}; write registry/project/name:tag")
        if self.slices < 1 or self.grace_seconds < 1 or self.max_restarts < 0:
            raise UserError("--slices and --grace-seconds must be 1 or more, --max-restarts 0 or more")
        if self.slices > 1 and self.slice.hosts == 1 and self.launcher != "queued":
            raise UserError(
                f"--slices {self.slices}: GKE joins only slices of several hosts, and {self.topology} is one host; "
                "take a larger topology"
            )
        for name, launchers in _ONLY_FOR.items():
            given = getattr(self, name) != self.__dataclass_fields__[name].default
            if given and self.launcher not in launchers:
                option = "no-host-network" if name == "host_network" else name.replace("_", "-")
                raise UserError(f"--{option} means nothing to {self.launcher}; leave it out")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise UserError(f"--env {name!r} is no name of an environment variable")

    @property
    def slice(self) -> Slice:
        """One of its slices."""
        return parse_slice(self.topology)

    @property
    def stages(self) -> list[RunConfig]:
        """The configs with their overrides; a mistyped one is a UserError before anything is started."""
        return [configs.load(name, self._overrides) for name in self.config.split(",")]

    @property
    def _overrides(self) -> list[str]:
        """The user's, and the mesh axis that joins the slices unless they set it."""
        said = any(word.startswith("mesh.slices=") for word in self.overrides)
        return self.overrides if said or self.slices == 1 else [*self.overrides, f"mesh.slices={self.slices}"]

    @property
    def root(self) -> str:
        """The folder of that name in the bucket."""
        return f"{self.bucket.rstrip('/')}/{self.name}"

    @property
    def run(self) -> str:
        """The run folder as gs://."""
        return f"{self.root}/{self.stage}".rstrip("/")

    def on_host(self, path: str) -> str:
        """A gs:// path of the bucket as the hosts name it."""
        return path.replace(f"gs://{self.bucket_name}", MOUNT, 1) if self.mount else path

    @property
    def command(self) -> list[str]:
        """What each host runs."""
        words = ["python", "-m", "moe_jax", "train", self.config, *self._overrides]
        return [*words, "--run", self.on_host(self.run)]

    @property
    def bucket_name(self) -> str:
        """`b` of gs://b/folder."""
        return self.bucket.removeprefix("gs://").partition("/")[0]

    @property
    def env(self) -> dict[str, str]:
        """The environment of each host; what the user set wins."""
        return _ENVIRONMENT | self.environment

    @property
    def where(self) -> list[str]:
        """`--zone` and `--project` as gcloud and xpk spell them."""
        return [f"--{key}={value}" for key in ("zone", "project") if (value := getattr(self, key))]

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `Job(**data)`."""
        return dataclasses.asdict(self)


def shell(words: list[str]) -> str:
    """One line that a shell splits into exactly these words."""
    return shlex.join(words)


def kubernetes_literal(text: str) -> str:
    """`text` such that Kubernetes leaves it alone: it expands $(NAME) and $$ in commands and in environments."""
    return text.replace("$", "$$")
