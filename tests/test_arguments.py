"""The command line: every knob is an option, `--help` tells all of them, and what is wrong is refused with a hint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flowps.arguments import CommandParser, parse, run_command
from flowps.config import Config
from flowps.errors import ConfigError, DataError
from flowps.knob import knobs, load
from flowps.version import __version__

KNOBS = {knob.path: knob for knob in knobs()}


def run(*argv: str) -> Config:
    return parse("python -m flowps.train", "Trains.", argv)


def refusal(*argv: str) -> str:
    """The message with which the command line is refused."""
    with pytest.raises(ConfigError) as caught:
        run(*argv)
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text("epochs = 5\n[data]\nbatch_size = 100\nlog1p = true\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def help_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as exit_:
        run("--help")
    assert exit_.value.code == 0
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_no_arguments_give_the_defaults():
    assert run() == Config()


def test_a_file_alone(toml: str):
    assert run(toml) == load(Path(toml))
    assert run(toml).epochs == 5


def test_options_beat_the_file(toml: str):
    apart, joined = ["--data.batch_size", "7", "--data.log1p", "false"], ["--data.batch_size=7", "--data.log1p=false"]
    for argv in ([toml, *apart], [toml, *joined], [*joined, toml]):
        config = run(*argv)
        assert (config.epochs, config.data.batch_size, config.data.log1p) == (5, 7, False)


def test_the_last_of_two_equal_options_wins():
    assert run("--epochs", "2", "--epochs", "3").epochs == 3


@pytest.mark.parametrize("path", KNOBS)
def test_every_knob_is_an_option_in_snake_and_kebab_case(path: str):
    knob = KNOBS[path]
    values = [str(v).lower() if knob.is_bool else str(v) for v in (knob.default if knob.is_list else [knob.default])]
    assert run(f"--{path}", *values) == Config()
    assert run(f"--{path.replace('_', '-')}", *values) == Config()


@pytest.mark.parametrize("argv", [["--data.batch-size", "7"], ["--data.batch-size=7"], ["--data.batch_size=7"]])
def test_kebab_case_is_underscore(argv: list[str]):
    assert run(*argv).data.batch_size == 7


def test_hyphens_in_values_stay():
    config = run("--run-dir=my-runs/a-b", "--data.train", "a-b_c.parquet", "--model", "my-mod:build")
    assert (config.run_dir, config.data.train, config.model) == ("my-runs/a-b", ("a-b_c.parquet",), "my-mod:build")


@pytest.mark.parametrize("argv", [["1", "2"], ["[1, 2]"]])
def test_a_list_knob_takes_several_values_or_a_toml_list(argv: list[str]):
    config = run("--net.hidden", *argv, "--epochs", "2")
    assert (config.net.hidden, config.epochs) == ((1, 2), 2)
    assert run(f"--net.hidden={argv[-1]}").net.hidden == ((2,) if len(argv) > 1 else (1, 2))


def test_a_list_knob_without_values_is_empty():
    assert run("--net.hidden", "--epochs", "2").net.hidden == ()


def test_a_switch_without_value_is_on_and_takes_true_and_false():
    assert run("--data.log1p").data.log1p is True
    assert run("--data.log1p", "--epochs", "2").data.log1p is True
    assert run("--data.shuffle", "false").data.shuffle is False
    assert run("--data.shuffle=true").data.shuffle is True


@pytest.mark.parametrize("value", ["-1", "-1.5", "-1e5", "-1e-5"])
def test_a_negative_number_is_a_value(value: str):
    assert run(f"--data.dense_fill={value}").data.dense_fill == float(value)
    assert run("--data.dense_fill", value).data.dense_fill == float(value)


def test_a_slots_knob_adds_an_entry_or_changes_the_one_of_the_file(tmp_path: Path):
    toml = tmp_path / "run.toml"
    toml.write_text('[slot_default]\npooling = "mean"\n[[slot]]\nname = "user_id"\ndim = 32\nhash_size = 9\n', encoding="utf-8")
    config = run(str(toml), "--slot.user_id.dim", "8", "--slot.ad-group.v2.init-scale=1e-3", "--slot.ad-group.v2.dim=4")
    user, group = config.slot
    assert (user.name, user.dim, user.hash_size, user.pooling) == ("user_id", 8, 9, "mean")
    assert (group.name, group.dim, group.init_scale, group.pooling) == ("ad-group.v2", 4, 1e-3, "mean")
    assert [slot.weights for slot in run(str(toml), "--slot.user_id.weights", "w").slot] == ["w"]


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["--slot.user_id.dim", "0"], "--slot.user_id.dim: expected int >= 1, found '0'"),
        (["--slot.user_id.dim", "1", "2"], "2: "),
        (["--slot.user_id.dimm", "3"], "--slot.user_id.dimm: no such knob; did you mean --slot_default.dim"),
        (["--slot.user_id.name", "a"], "--slot.user_id.name: no such knob"),
        (["--slot..dim", "3"], "--slot..dim: no such knob"),
    ],
)
def test_a_wrong_knob_of_a_slot_is_refused(argv: list[str], found: str):
    assert refusal(*argv).startswith(found)


@pytest.mark.parametrize(
    ("argv", "name", "suggested"),
    [
        (["--data.batchsize", "7"], "--data.batchsize", "--data.batch_size"),
        (["--data.batchsize=7"], "--data.batchsize", "--data.batch_size"),
        (["--batch-size", "7"], "--batch_size", "--data.batch_size"),
        (["--epoch", "7"], "--epoch", "--epochs"),
        (["--epochs", "7", "--trainer.inflight", "7"], "--trainer.inflight", "--trainer.in_flight"),
    ],
)
def test_unknown_option_is_refused_with_a_suggestion(argv: list[str], name: str, suggested: str):
    message = refusal(*argv)
    assert message.startswith(f"{name}: no such knob; did you mean ")
    assert suggested in message


@pytest.mark.parametrize("argv", [["-x"], ["--zzz"], ["--zzz=1"], ["--slot.qq", "a"]])
def test_unknown_option_without_likeness_points_to_help(argv: list[str]):
    assert refusal(*argv) == f"{argv[0].split('=')[0]}: no such knob; --help lists all of them"


def test_options_are_not_abbreviated():
    assert "no such knob" in refusal("--data.batch", "7")


def test_two_positionals_are_refused():
    message = refusal("a.toml", "b.toml")
    assert message.startswith("b.toml: one TOML file at most")
    assert "did you mean it for a knob?" in message


def test_an_option_without_its_value_is_refused():
    message = refusal("--data.batch_size")
    assert "--data.batch_size" in message
    assert "--help lists all knobs" in message


def test_several_values_for_one_are_refused(toml: str):
    assert refusal(toml, "--data.batch_size", "1", "2").startswith("2: ")


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["--data.batch_size", "many"], "--data.batch_size: expected int, found 'many'"),
        (["--data.batch-size=0"], "--data.batch_size: expected int >= 1, found '0'"),
        (["--data.log1p", "maybe"], "--data.log1p: expected bool, found 'maybe'"),
        (["--trainer.learning-rate", "nan"], "--trainer.learning_rate: expected float > 0.0, found 'nan'"),
        (["--net.hidden", "[1,"], "--net.hidden: '[1,' is not a TOML list"),
        (["no.toml"], "no.toml: no such file"),
    ],
)
def test_what_load_refuses_is_refused_here(argv: list[str], found: str):
    assert refusal(*argv).startswith(found)


@pytest.mark.parametrize("path", KNOBS)
def test_help_tells_every_knob_with_description_default_and_range(help_text: str, path: str):
    knob = KNOBS[path]
    at = help_text.index(f" --{path} ")
    entry = help_text[at : at + 400]
    assert knob.description, "no knob without a description"
    assert re.sub(r"\s+", " ", knob.description) in entry
    default = " ".join(map(str, knob.default)) if knob.is_list else str(knob.default)
    shown = default.lower() if knob.is_bool else default or "none"
    assert f"(default: {shown}" in entry
    assert knob.range in entry


def test_help_tells_what_only_a_slot_has(help_text: str):
    at = help_text.index(" --slot.NAME.weights TEXT ")
    assert "the column with the weight of each value" in help_text[at : at + 400]


def test_help_shows_sections_file_and_slot_entries(help_text: str):
    for section in {path.rpartition(".")[0] for path in KNOBS} - {""}:
        assert f"[{section}]:" in help_text
    assert "usage: python -m flowps.train [run.toml] [--section.key value ...]" in help_text
    assert "[[slot]]" in help_text


def test_version_prints_it(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        run("--version")
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == f"flowps {__version__}"


# --- commands that take up a run --------------------------------------------------------------------------------------


def command_parser() -> CommandParser:
    """With arguments of all kinds, and the knobs of the cluster."""
    parser = CommandParser("python -m flowps.score", "Scores.", lambda knob: knob.startswith(("cluster.", "ps.")))
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("data", nargs="+", metavar="DATA")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--columns", nargs="+", default=[], metavar="COLUMN")
    parser.add_argument("--overwrite", action="store_true")
    return parser


def refusal_of_command(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        command_parser().parse(argv)
    return str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        ("R", "a", "b", "O", "--overwrite", "--columns", "x", "y"), ("R", "a", "b", "--overwrite", "O", "--columns", "x", "y"),
        ("R", "--overwrite", "a", "b", "O", "--columns", "x", "y"), ("--columns", "x", "y", "--overwrite", "R", "a", "b", "O"),
        ("R", "a", "--overwrite", "b", "O", "--columns", "x", "y"),
    ],
)  # fmt: skip
def test_options_may_stand_between_the_arguments(argv: tuple[str, ...]):
    found, overrides = command_parser().parse(argv)
    assert (found.run, found.data, found.out) == (Path("R"), ["a", "b"], "O")
    assert (found.columns, found.overwrite, overrides) == (["x", "y"], True, [])


def test_a_command_takes_the_knobs_that_it_wants():
    words = (
        "R",
        "a",
        "O",
        "--ps.num-shards",
        "2",
        "--cluster.dashboard=",
        "--cluster.connect_timeout_s",
        "1e1",
        "--cluster.insecure",
    )
    found, overrides = command_parser().parse(words)
    assert found.columns == []
    config = load(None, overrides)
    assert (config.ps.num_shards, config.cluster.dashboard) == (2, "")
    assert (config.cluster.connect_timeout_s, config.cluster.insecure) == (10.0, True)


def test_what_a_command_does_not_take_is_refused():
    assert refusal_of_command("R", "a", "O", "--model", "lr") == (
        "--model: belongs to the trained model, and cannot be other than in the run"
    )
    assert refusal_of_command("R", "a", "O", "--slot.user.dim=3").startswith("--slot.user.dim: belongs to the trained model")
    assert refusal_of_command("R", "a", "O", "--colums", "x") == "--colums: no such option; did you mean --columns?"
    assert refusal_of_command("R", "a", "O", "--cluster.mod", "x").startswith("--cluster.mod: no such option; did you mean")
    assert "required: OUT" in refusal_of_command("R", "a")
    assert "required: RUN, DATA, OUT" in refusal_of_command()
    assert "expected at least one argument" in refusal_of_command("R", "a", "O", "--columns")
    with pytest.raises(ConfigError, match=r"ps\.num_shards"):
        load(None, command_parser().parse(("R", "a", "O", "--ps.num_shards", "-1"))[1])


def test_a_commands_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        command_parser().parse(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    usage = "RUN DATA [DATA ...] OUT [--columns COLUMN [COLUMN ...]] [--overwrite] [--section.key value ...]"
    assert said.splitlines()[0] == f"usage: python -m flowps.score {usage}"
    assert "--ps.num_shards N" in said
    assert "--data.batch_size" not in said
    with pytest.raises(SystemExit):
        command_parser().parse(["--version"])
    assert capsys.readouterr().out == f"flowps {__version__}\n"


def test_how_a_command_ends(capsys: pytest.CaptureFixture[str]):
    def fails(error: BaseException) -> int:
        def work() -> None:
            raise error

        return run_command(work)

    assert run_command(lambda: 3) == 0
    assert fails(DataError("a\n  b")) == 1
    assert fails(ConfigError("c")) == 2
    assert fails(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error: a b\nerror: c\nerror: interrupted\n"
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())
