"""What `mkdocs build` does besides: pages made of the code, and links of docs/ that lead out of it.

The knobs come from `flowps.knob`, the words from the docstring of `flowps`, the changes from CHANGELOG.md. Files of examples/
are part of the site, and so are the descriptions of what goes over the network: `../examples/…`, which is right for who reads docs/
itself, leads there too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # mkdocs reads this file by its path

from docstring import escaped, rows_of, table  # noqa: E402

import flowps  # noqa: E402
from flowps.config import Checkpoint, Cluster, Config, Data, Net, Ps, Slot, SlotDefault, Status, Trainer  # noqa: E402
from flowps.knob import Knob, knobs, slot_knob  # noqa: E402
from workflows.pipeline import Pipeline  # noqa: E402

_SECTIONS = {"": Config, "data": Data, "slot_default": SlotDefault, "net": Net, "trainer": Trainer, "ps": Ps, "cluster": Cluster,
             "checkpoint": Checkpoint, "status": Status}  # fmt: skip


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and the examples."""
    made = {
        "reference/knobs.md": knobs_page(),
        "reference/pipeline.md": pipeline_page(),
        "reference/words.md": words_page(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    of_site = [*(ROOT / "examples").rglob("*"), *(ROOT / "flowps").rglob("*.proto"), *(ROOT / "workflows" / "deploy").glob("*")]
    for path in sorted(of_site):
        if path.is_file() and "__pycache__" not in path.parts:
            name = str(path.relative_to(ROOT))
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls, inclusion=InclusionLevel.INCLUDED))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links out of docs/ as the site has them."""
    if page.file.src_uri.startswith("examples/"):
        return re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    return re.sub(r"\]\(\.\./(examples|flowps|workflows)/", r"](\1/", markdown)


def knobs_page() -> str:
    """All knobs as Markdown, a table for each section of a run's TOML file."""
    own = [key for key in Slot.__struct_fields__ if key not in SlotDefault.__struct_fields__ and key != "name"]
    of_slot = [knob for key in own if (knob := slot_knob(f"slot.NAME.{key}")) is not None]
    parts = [
        "# Knobs",
        "Every setting of a run. In a TOML file they stand in the tables below, on a command line each is `--section.knob value`, "
        'in Python nested dictionaries take them: `{"trainer": {"in_flight": 1}}`. What is unknown, of another type or out of '
        "range is refused before the run begins. `python -m flowps.train --help` prints the same list.",
    ]
    for section, found in groupby(knobs(), lambda knob: knob.path.rpartition(".")[0]):
        about = (_SECTIONS[section].__doc__ or "").strip()
        title = f"`[{section}]`" if section else "The run"
        parts += [f"## {title} {{#{section or 'run'}}}", *([about] if section else []), _knob_table(found)]
        if section == "slot_default":
            parts += [
                "## `[[slot]]` {#slot}",
                (Slot.__doc__ or "").strip() + " On the command line: `--slot.user_id.dim 32`. Besides the knobs of "
                "`[slot_default]` it has a `name`, and:",
                _knob_table(of_slot),
            ]
    return "\n\n".join(parts) + "\n"


def pipeline_page() -> str:
    """All that a pipeline's file may say, likewise."""
    parts = [
        "# A pipeline's file",
        "What `python -m workflows.retrain` and `python -m workflows.schedule` read ([guide](../retraining.md)). What is unknown, "
        "of another type or out of range is refused before anything is done.",
    ]
    sections = {"": Pipeline, **{field.name: field.type for field in msgspec.structs.fields(Pipeline)}}
    for section, found in groupby(sorted(knobs(Pipeline), key=_section), _section):
        about = (sections[section].__doc__ or "").strip()
        parts += [f"## {f'`[{section}]`' if section else 'The file'} {{#{section or 'file'}}}", about, _knob_table(found)]
    return "\n\n".join(parts) + "\n"


def _section(knob: Knob) -> str:
    return knob.path.rpartition(".")[0]


def words_page() -> str:
    """The words of `flowps/__init__.py`."""
    blocks = (flowps.__doc__ or "").strip().split("\n\n")
    return "\n\n".join(["# The words", *(table(rows) if (rows := rows_of(block)) else block for block in blocks[1:])]) + "\n"


def _knob_table(found: Iterable[Knob]) -> str:
    lines = ["| knob | default | range | meaning |", "|---|---|---|---|"]
    for knob in found:
        default = "" if knob.default in ((), "") else f"`{_toml(knob.default)}`"
        default = "must be given" if knob.default is msgspec.NODEFAULT else default
        cells = (f"`{knob.path.rpartition('.')[2]}`", default, _range(knob), escaped(knob.description))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _range(knob: Knob) -> str:
    if " | " in knob.range:
        return ", ".join(f"`{choice}`" for choice in knob.range.split(" | "))
    spaced = re.sub(r"\d{5,}", lambda number: f"{int(number[0]):,}".replace(",", " "), knob.range)
    return re.sub(r"^≥ (\S+), ≤ (.+)$", r"\1 … \2", spaced)


def _toml(value: Any) -> str:
    """A default as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else f"{value:_}" if isinstance(value, int) and value >= 10_000 else str(value)
