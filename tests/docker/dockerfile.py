"""docker/Dockerfile as data: its stages, what a target is built from, what it runs."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TARGETS = ("api", "sink", "worker-cpu", "worker-cuda")


@dataclass
class Stage:
    """One FROM and what follows it: (instruction, the rest of the line)."""

    name: str
    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Dockerfile:
    """All stages by name."""

    stages: dict[str, Stage]

    def lineage(self, name: str) -> list[Stage]:
        """The stages that a stage is made of, the oldest first."""
        stage = self.stages[name]
        return [*(self.lineage(stage.base) if stage.base in self.stages else []), stage]

    def all(self, name: str, instruction: str) -> list[str]:
        """What an instruction says in a stage and its ancestors, in order."""
        return [rest for stage in self.lineage(name) for word, rest in stage.lines if word == instruction]

    def exec_form(self, name: str, instruction: str) -> list[str]:
        """The last ENTRYPOINT, CMD or HEALTHCHECK as a list; only the exec form can be read."""
        rest = self.all(name, instruction)[-1]
        words: list[str] = json.loads(rest[rest.index("[") :])
        return words

    def environment(self, name: str) -> dict[str, str]:
        """What ENV sets; $PATH stays as it is written."""
        pairs = [word.partition("=") for rest in self.all(name, "ENV") for word in shlex.split(rest)]
        return {key: value for key, _, value in pairs}

    def builder(self, target: str) -> str:
        """The stage that a target's environment is copied from."""
        (copied,) = [rest for rest in self.all(target, "COPY") if rest.endswith("/opt/das /opt/das")]
        return copied.split()[0].removeprefix("--from=")

    def build_steps(self, name: str) -> Iterator[tuple[str, str]]:
        """COPY and RUN of a stage, those of a stage that it copies the sources from in their place."""
        for stage in self.lineage(name):
            for word, rest in stage.lines:
                if word == "COPY" and rest.startswith("--from="):
                    yield from self.build_steps(rest.split()[0].removeprefix("--from="))
                elif word in ("COPY", "RUN"):
                    yield word, rest


def read_dockerfile() -> Dockerfile:
    """Read docker/Dockerfile; every stage has a name."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    stages: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, text.replace("\\\n", " ").splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = stage = Stage(name=name, base=base)
        else:
            stage.lines.append((word, " ".join(rest.split()) if word == "ENV" else rest.strip()))
    return Dockerfile(stages)
