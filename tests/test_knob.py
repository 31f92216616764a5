"""The knobs: what `load` accepts, what it refuses and how helpfully, and that `dump` writes what `load` reads."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.config import Config, Slot, SlotDefault
from flowps.errors import ConfigError
from flowps.knob import closest, dump, from_mapping, knobs, load, slot_knob

KNOBS = {knob.path: knob for knob in knobs()}
FLOAT_KNOBS = sorted(path for path, knob in KNOBS.items() if type(knob.default) is float)
LIST_KNOBS = sorted(path for path, knob in KNOBS.items() if knob.is_list)


@pytest.fixture
def write(tmp_path: Path):
    """Text → a TOML file of it."""

    def write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def in_file(path: str, value: str) -> str:
    """The TOML that sets one knob to a literal."""
    section, _, key = path.rpartition(".")
    return f"[{section}]\n{key} = {value}\n" if section else f"{key} = {value}\n"


def refusal(toml: Path | None = None, *overrides: tuple[str, list[str]]) -> str:
    """The message with which `load` refuses."""
    with pytest.raises(ConfigError) as caught:
        load(toml, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_nothing_gives_the_defaults():
    assert load() == Config()


def test_empty_file_gives_the_defaults(write):
    assert load(write("# nothing\n")) == Config()


def test_every_section_of_a_file_is_read(write):
    config = load(
        write(
            """
            model = "deepfm"
            epochs = 3
            [data]
            train = ["a/*.parquet", "b"]
            log1p = true
            [slot_default]
            dim = 8
            [net]
            hidden = [32, 16]
            [trainer]
            learning_rate = 1
            [ps]
            num_shards = 2
            [cluster]
            dashboard = ""
            [status]
            progress = "plain"
            [[slot]]
            name = "user_id"
            pooling = "mean"
            """
        )
    )
    assert (config.model, config.epochs) == ("deepfm", 3)
    assert (config.data.train, config.data.log1p) == (("a/*.parquet", "b"), True)
    assert config.net.hidden == (32, 16)
    assert config.trainer.learning_rate == 1.0
    assert isinstance(config.trainer.learning_rate, float)
    assert (config.ps.num_shards, config.cluster.dashboard, config.status.progress) == (2, "", "plain")
    assert config.slot == (Slot(name="user_id", dim=8, pooling="mean"),)


def test_slot_entries_inherit_slot_default_and_override_it(write):
    config = load(
        write(
            """
            [slot_default]
            dim = 8
            optimizer = "sgd"
            learning_rate = 0.5
            [[slot]]
            name = "a"
            [[slot]]
            name = "b"
            dim = 32
            optimizer = "adagrad"
            """
        )
    )
    assert config.slot_named("a") == Slot(name="a", dim=8, optimizer="sgd", learning_rate=0.5)
    assert config.slot_named("b") == Slot(name="b", dim=32, optimizer="adagrad", learning_rate=0.5)
    assert config.slot_named("not listed") == Slot(name="not listed", dim=8, optimizer="sgd", learning_rate=0.5)


def test_slot_default_may_come_after_the_entries_in_the_file(write):
    config = load(write('[[slot]]\nname = "a"\n[slot_default]\ndim = 4\n'))
    assert config.slot_named("a").dim == 4


def test_slot_default_from_an_override_reaches_the_entries_of_the_file(write):
    toml = write('[slot_default]\ndim = 8\n[[slot]]\nname = "a"\n[[slot]]\nname = "b"\ndim = 2\n')
    config = load(toml, [("slot_default.dim", ["64"])])
    assert [config.slot_named(name).dim for name in "abc"] == [64, 2, 64]


def test_overrides_beat_the_file_and_later_ones_beat_earlier_ones(write):
    toml = write("epochs = 2\n[data]\nbatch_size = 100\nshuffle = false\n")
    config = load(toml, [("data.batch_size", ["200"]), ("epochs", ["3"]), ("data.batch_size", ["300"])])
    assert (config.epochs, config.data.batch_size, config.data.shuffle) == (3, 300, False)


@pytest.mark.parametrize(
    ("path", "values", "expected"),
    [
        ("net.hidden", ["32", "16"], (32, 16)),
        ("net.hidden", ["[32, 16]"], (32, 16)),
        ("net.hidden", ["32"], (32,)),
        ("net.hidden", ["[]"], ()),
        ("net.hidden", [], ()),
        ("data.train", ["a.parquet", "b c.parquet"], ("a.parquet", "b c.parquet")),
        ("data.train", ['["a.parquet", "b c.parquet"]'], ("a.parquet", "b c.parquet")),
        ("data.shuffle", ["false"], False),
        ("data.log1p", ["true"], True),
        ("trainer.learning_rate", ["1e-2"], 0.01),
        ("trainer.learning_rate", ["1"], 1.0),
        ("seed", ["9223372036854775807"], (1 << 63) - 1),
        ("data.label", ["12"], "12"),
        ("data.label", ["true"], "true"),
        ("run_dir", [""], ""),
    ],
)
def test_values_as_typed_become_the_type_of_the_knob(path: str, values: list[str], expected: Any):
    config = load(None, [(path, values)])
    for part in path.split("."):
        config = getattr(config, part)
    assert config == expected
    assert type(config) is type(expected)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found", "suggested"),
    [
        ("epoch = 1", "epoch:", "epochs"),
        ("[data]\nbatchsize = 1", "data.batchsize:", "data.batch_size"),
        ("batch_size = 1", "batch_size:", "data.batch_size"),
        ("[trainer]\nin_fligth = 1", "trainer.in_fligth:", "trainer.in_flight"),
        ("[ps]\nlearning_rate = 1", "ps.learning_rate:", "learning_rate"),
        ("[slot_default]\ndims = 1", "slot_default.dims:", "slot_default.dim"),
        ('[[slot]]\nname = "a"\nlearning_rat = 1', "slot[0].learning_rat:", "slot[0].learning_rate"),
        ('[[slot]]\nname = "a"\n[[slot]]\nname = "b"\npoling = "sum"', "slot[1].poling:", "slot[1].pooling"),
    ],
)
def test_unknown_key_is_refused_with_a_suggestion(write, text: str, found: str, suggested: str):
    message = refusal(write(text))
    assert message.startswith(f"{found} no such knob; did you mean ")
    assert suggested in message.partition("did you mean ")[2]


@pytest.mark.parametrize("text", ["[zzz]\nx = 1", "zzz = 1", "zzz.x = 1"])
def test_unknown_section_or_key_without_likeness_points_to_help(write, text: str):
    assert refusal(write(text)) == "zzz: no such knob; --help lists all of them"


def test_a_name_key_in_slot_default_is_unknown(write):
    assert refusal(write('[slot_default]\nname = "a"')).startswith("slot_default.name: no such knob")


@pytest.mark.parametrize(
    ("text", "path", "found"),
    [
        ('epochs = "many"', "epochs", "'many'"),
        ("epochs = 1.5", "epochs", "1.5"),
        ("epochs = true", "epochs", "True"),
        ("epochs = 2020-01-01", "epochs", "2020"),
        ("[data]\nlabel = 1", "data.label", "1"),
        ("[data]\nshuffle = 1", "data.shuffle", "1"),
        ('[data]\nshuffle = "yes"', "data.shuffle", "'yes'"),
        ('[data]\ntrain = "a.parquet"', "data.train", "'a.parquet'"),
        ("[net]\nhidden = 3", "net.hidden", "3"),
        ('[trainer]\nlearning_rate = "0.1"', "trainer.learning_rate", "'0.1'"),
        ('[slot_default]\npooling = "max"', "slot_default.pooling", "'max'"),
        ('[status]\nprogress = "loud"', "status.progress", "'loud'"),
        ('[[slot]]\nname = "a"\ndim = "x"', "slot[0].dim", "'x'"),
        ('[[slot]]\nname = "a"\n[[slot]]\nname = 2', "slot[1].name", "2"),
    ],
)
def test_wrong_type_is_refused_with_path_value_and_the_knob_explained(write, text: str, path: str, found: str):
    message = refusal(write(text))
    assert message.startswith(f"{path}: ")
    assert f"found {found}" in message.replace("datetime.date(2020", "2020")
    knob = KNOBS.get(path) or KNOBS.get(path.replace("slot[0]", "slot_default"))
    if knob is not None:
        assert knob.description in message
        assert f"default {knob.default!r}" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("epochs", "0"),
        ("seed", "-1"),
        ("seed", "9223372036854775808"),
        ("data.batch_size", "0"),
        ("data.batch_size", "1048577"),
        ("data.dense_fill", "2e+30"),
        ("slot_default.dim", "0"),
        ("slot_default.dim", "4097"),
        ("slot_default.hash_size", "-1"),
        ("slot_default.learning_rate", "0.0"),
        ("trainer.in_flight", "0"),
        ("trainer.in_flight", "1025"),
        ("trainer.learning_rate", "-0.1"),
        ("ps.memory_share", "1.01"),
        ("ps.memory_share", "0.0"),
        ("status.interval_s", "0.0"),
        ("status.interval_s", "1e+300"),  # no thread can wait so long: threading.TIMEOUT_MAX
    ],
)
def test_out_of_range_is_refused_in_the_file_and_on_the_command_line(write, path: str, value: str):
    in_toml, typed = refusal(write(in_file(path, value))), refusal(None, (path, [value]))
    assert in_toml.startswith(f"{path}: ")
    assert typed.startswith(f"--{path}: ")
    for message in in_toml, typed:
        assert value.removesuffix(".0") in message
        assert KNOBS[path].description in message
        assert f"range {KNOBS[path].range}" in message


def test_out_of_range_inside_a_slot_entry_names_the_entry_and_explains_the_knob(write):
    message = refusal(write('[[slot]]\nname = "a"\n[[slot]]\nname = "b"\ndim = 0\n'))
    assert message.startswith("slot[1].dim: ")
    assert "found 0" in message
    assert KNOBS["slot_default.dim"].range in message


@pytest.mark.parametrize(
    ("text", "path", "knob"),
    [
        ("[net]\nhidden = [0]", "net.hidden[0]", "net.hidden"),
        ("[net]\nhidden = [8, 65537]", "net.hidden[1]", "net.hidden"),
        ("[data]\ntrain = [1]", "data.train[0]", "data.train"),
    ],
)
def test_wrong_element_of_a_list_is_refused_with_its_place_and_the_knob_explained(write, text, path, knob):
    message = refusal(write(text))
    assert message.startswith(f"{path}: ")
    assert KNOBS[knob].description in message


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("path", FLOAT_KNOBS)
def test_a_float_knob_takes_neither_nan_nor_infinity(write, path: str, value: str):
    assert refusal(write(in_file(path, value))).startswith(f"{path}: ")
    assert refusal(None, (path, [value])).startswith(f"--{path}: ")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("data = 1", "data"),
        ("slot_default = 3", "slot_default"),
        ('slot_default = 3\n[[slot]]\nname = "a"', "slot_default"),
        ("slot = 1", "slot"),
        ("slot = [1]", "slot[0]"),
        ('[slot]\nname = "a"', "slot"),
    ],
)
def test_a_value_where_a_table_belongs_is_refused(write, text: str, path: str):
    message = refusal(write(text))
    assert message.startswith(f"{path}: expected ")
    assert "found " in message


def test_an_override_inside_what_the_file_made_a_value_is_refused(write):
    assert refusal(write("data = 1"), ("data.label", ["x"])) == "data: expected a table in the TOML file, found 1"
    assert refusal(write("slot = 1"), ("slot.a.dim", ["2"])) == "slot: expected [[slot]] entries in the TOML file, found 1"


@pytest.mark.parametrize("where", ["[slot_default]", '[[slot]]\nname = "a"'])
def test_adagrad_without_anything_under_its_root_is_refused(write, where: str):
    """A gradient of exactly 0 would make the row NaN: 0 / √0."""
    assert "epsilon" in refusal(write(f"{where}\ninitial_accumulator = 0.0\nepsilon = 0.0\n"))


def test_two_entries_for_one_slot_are_refused(write):
    message = refusal(write('[[slot]]\nname = "a"\n[[slot]]\nname = "b"\n[[slot]]\nname = "a"\ndim = 2\n'))
    assert message == "slot: 2 entries are named 'a'; give each slot one [[slot]] entry"


@pytest.mark.parametrize("text", ["[[slot]]\ndim = 2", '[[slot]]\nname = ""'])
def test_a_slot_entry_without_a_name_is_refused(write, text: str):
    message = refusal(write(text))
    assert message.startswith("slot[0]")
    assert "name" in message


@pytest.mark.parametrize(("text", "line"), [("epochs = ", 1), ("a = 1\n[data\n", 2), ("a = 1\nb = 2\na = 3\n", 3)])
def test_bad_toml_is_refused_with_the_place(write, text: str, line: int):
    message = refusal(write(text))
    assert "run.toml: not valid TOML: " in message
    assert f"line {line}" in message or "end of document" in message


def test_a_missing_file_is_refused(tmp_path: Path):
    message = refusal(tmp_path / "no.toml")
    assert "no.toml: no such file" in message
    assert "--data.train" in message


def test_a_directory_is_refused(tmp_path: Path):
    assert f"{tmp_path}: cannot be read" in refusal(tmp_path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert f"{path}: cannot be read" in refusal(path)


def test_unknown_override_is_refused_with_a_suggestion():
    message = refusal(None, ("data.batchsize", ["1"]))
    assert message.startswith("--data.batchsize: no such knob; did you mean data.batch_size")
    assert refusal(None, ("data", ["1"])).startswith("--data: no such knob")
    assert refusal(None, ("slot", ["1"])).startswith("--slot: no such knob")


def test_several_values_for_one_are_refused():
    assert refusal(None, ("data.batch_size", ["1", "2"])) == "--data.batch_size: expected one value, found 2: 1 2"


@pytest.mark.parametrize(
    "path", ["data.batch_size", "trainer.learning_rate", "data.shuffle", "slot_default.pooling", "status.progress"]
)
def test_what_cannot_be_read_as_the_knobs_type_is_refused(path: str):
    message = refusal(None, (path, ["x"]))
    assert message.startswith(f"--{path}: ")
    assert "found 'x'" in message
    assert KNOBS[path].description in message


@pytest.mark.parametrize("values", [["[1, "], ["1", "x"], ["[1, 'x']"], ["1 2"]])
def test_a_list_that_is_none_is_refused(values: list[str]):
    assert refusal(None, ("net.hidden", values)).startswith("--net.hidden: ")


def test_closest_offers_at_most_three_and_none_for_nothing_alike():
    offered = closest("trainer.learning_rat", list(KNOBS))
    assert offered.startswith("; did you mean trainer.learning_rate or ")
    assert offered.count(" or ") <= 2
    assert closest("zzz", list(KNOBS)) == "; --help lists all of them"


# --- the description --------------------------------------------------------------------------------------------------


def test_knobs_are_all_leaves_but_the_slot_entries():
    def leaves(section: type[msgspec.Struct], prefix: str) -> typing.Iterator[str]:
        for field in msgspec.structs.fields(section):
            if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
                yield from leaves(field.type, f"{prefix}{field.name}.")
            elif field.name != "slot":
                yield prefix + field.name

    assert list(KNOBS) == list(leaves(Config, ""))
    assert {"model", "data.batch_size", "slot_default.dim", "status.progress"} <= set(KNOBS)


@pytest.mark.parametrize("knob", KNOBS.values(), ids=KNOBS)
def test_every_knob_has_a_description_and_a_default_in_range(knob):
    assert len(knob.description) >= 10, "say what it is for"
    assert not knob.description.endswith("."), "a phrase, not a sentence"
    assert msgspec.convert(msgspec.to_builtins(knob.default), knob.type) == knob.default


@pytest.mark.parametrize("path", sorted(p for p, k in KNOBS.items() if type(k.default) in (int, float)))
def test_every_number_has_a_lower_bound(path: str):
    assert KNOBS[path].range.startswith(("≥", ">"))


def test_a_slot_entry_has_a_name_and_weights_beside_the_knobs_of_slot_default():
    assert set(Slot.__struct_fields__) - set(SlotDefault.__struct_fields__) == {"name", "weights"}


@pytest.mark.parametrize("key", sorted(set(Slot.__struct_fields__) - {"name"}))
def test_every_knob_of_a_slot_can_be_set_for_one(key: str):
    knob = slot_knob(f"slot.a.b.{key}")
    assert knob is not None
    assert knob.path == f"slot.a.b.{key}"
    assert len(knob.description) >= 10
    default = str(knob.default).lower() if knob.is_bool else str(knob.default)
    assert load(None, [(knob.path, [default])]) == Config(slot=(Slot(name="a.b"),))


@pytest.mark.parametrize(
    "path", ["slot.a.name", "slot..dim", "slot.dim", "slot", "slot.a", "slot_default.dim", "slot_default.weights"]
)
def test_what_is_no_knob_of_a_slot(path: str):
    assert slot_knob(path) is None


def test_weights_belong_to_one_slot(write):
    config = load(write('[[slot]]\nname = "a"\nweights = "w"\n[[slot]]\nname = "b"\n'))
    assert [config.slot_named(name).weights for name in "abc"] == ["w", "", ""]
    assert refusal(write('[slot_default]\nweights = "w"')).startswith("slot_default.weights: no such knob")
    message = refusal(write('[[slot]]\nname = "a"\nweights = 1'))
    assert message.startswith("slot[0].weights: ")
    assert "the column with the weight of each value" in message


# --- dump → load ------------------------------------------------------------------------------------------------------


def values_of(annotated: Any) -> st.SearchStrategy[Any]:
    """Any value that a knob's annotation allows."""
    metas = [m for m in getattr(annotated, "__metadata__", ()) if isinstance(m, msgspec.Meta)]
    bare = annotated
    while get_origin(bare) is Annotated:
        bare = get_args(bare)[0]

    def bound(*names: str) -> Any:
        return next((getattr(m, n) for n in names for m in metas if getattr(m, n) is not None), None)

    if get_origin(bare) is Literal:
        return st.sampled_from(get_args(bare))
    if get_origin(bare) is tuple:
        return st.lists(values_of(get_args(bare)[0]), max_size=4).map(tuple)
    if bare is bool:
        return st.booleans()
    if bare is int:
        return st.integers(bound("ge"), bound("le") if bound("le") is not None else (1 << 63) - 1)
    if bare is float:
        return st.floats(
            bound("ge", "gt"), bound("le", "lt"), exclude_min=bound("gt") is not None, exclude_max=bound("lt") is not None,
            allow_nan=False, allow_infinity=False,
        )  # fmt: skip
    assert bare is str, f"teach this test about {bare}"
    return st.text(min_size=bound("min_length") or 0, max_size=12)


def structs(section: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Any instance of a section."""
    fields = {}
    for field in msgspec.structs.fields(section):
        if field.name == "slot":
            fields["slot"] = st.lists(structs(Slot), max_size=3, unique_by=lambda slot: slot.name).map(tuple)
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            fields[field.name] = structs(field.type)
        else:
            fields[field.name] = values_of(field.type)
    return st.builds(section, **fields)


@settings(max_examples=100, deadline=None)
@given(config=structs(Config))
def test_what_dump_writes_load_reads_back(tmp_path_factory: pytest.TempPathFactory, config: Config):
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


def test_dump_writes_every_knob():
    text = dump(Config())
    for knob in KNOBS.values():
        key = knob.path.rpartition(".")[2]
        assert f"\n{key} = " in f"\n{text}", f"{knob.path} is missing"


# --- nested mappings --------------------------------------------------------------------------------------------------


def refusal_of(tree: dict[str, Any]) -> str:
    """The message with which `from_mapping` refuses."""
    with pytest.raises(ConfigError) as caught:
        from_mapping(tree)
    return str(caught.value)


def test_mappings_say_what_a_file_says(write):
    toml = (
        'model = "deepfm"\nepochs = 3\n[data]\ntrain = ["a", "b"]\nlog1p = true\n[slot_default]\ndim = 8\n[net]\nhidden = [4, 2]\n'
        '[[slot]]\nname = "user"\ndim = 32\n[[slot]]\nname = "tags"\npooling = "mean"\n'
    )
    tree = {
        "model": "deepfm", "epochs": 3, "data": {"train": ("a", "b"), "log1p": True}, "slot_default": {"dim": 8},
        "net": {"hidden": (4, 2)}, "slot": ({"name": "user", "dim": 32}, {"name": "tags", "pooling": "mean"}),
    }  # fmt: skip
    assert from_mapping(tree) == load(write(toml))
    assert [slot.dim for slot in from_mapping(tree).slot] == [32, 8]
    assert from_mapping(typing.cast("dict[str, Any]", msgspec.to_builtins(load(write(toml))))) == load(write(toml))
    assert from_mapping({}) == Config()


def test_one_value_may_stand_for_a_list_of_one_and_a_path_for_its_name():
    found = from_mapping(
        {"run_dir": Path("runs/a"), "data": {"train": "clicks/*.parquet", "test": Path("t.parquet"), "dense": ["a", "b"]},
         "net": {"hidden": 16}}
    )  # fmt: skip
    assert found.run_dir == "runs/a"
    assert (found.data.train, found.data.test, found.data.dense) == (("clicks/*.parquet",), ("t.parquet",), ("a", "b"))
    assert found.net.hidden == (16,)
    assert from_mapping({"data": {"train": [Path("a"), "b"]}}).data.train == ("a", "b")


@pytest.mark.parametrize("path", LIST_KNOBS)
def test_every_list_takes_one_value(path: str):
    section, _, key = path.rpartition(".")
    value = 3 if KNOBS[path].default and isinstance(KNOBS[path].default[0], int) else "x"
    if typing.get_args(_bare_type(path))[0] is not str:
        value = 3
    one, several = ({section: {key: found}} if section else {key: found} for found in (value, [value]))
    assert from_mapping(one) == from_mapping(several)
    assert from_mapping(one) != Config()


def _bare_type(path: str) -> Any:
    """Of a knob, without annotations."""
    found = KNOBS[path].type
    while get_origin(found) is Annotated:
        found = get_args(found)[0]
    return found


def test_what_was_given_is_left_as_it_was():
    tree = {"data": {"train": "a"}, "slot_default": {"dim": 8}, "slot": [{"name": "user"}]}
    from_mapping(tree)
    assert tree == {"data": {"train": "a"}, "slot_default": {"dim": 8}, "slot": [{"name": "user"}]}


def test_wrong_mappings_are_refused_as_a_file_is():
    assert refusal_of({"epoch": 3}).startswith("epoch: no such knob; did you mean epochs")
    assert "trainer.in_flight: expected int, found '2'" in refusal_of({"trainer": {"in_flight": "2"}})
    assert refusal_of({"trainer": 3}).startswith("trainer: expected a table, found 3")
    assert "data.train[0]: expected str, found 3" in refusal_of({"data": {"train": 3}})
    assert "slot[0].dim: expected int >= 1" in refusal_of({"slot": [{"name": "a", "dim": 0}]}).replace("`", "")
    assert "2 entries are named 'a'" in refusal_of({"slot": [{"name": "a"}, {"name": "a"}]})


def test_a_path_in_one_string_is_refused_with_what_to_write():
    assert "data.batch_size: no such knob; write nested mappings, as in {'data': {'batch_size': …}}" in refusal_of(
        {"data.batch_size": 3}
    )
    assert "{'data': {'train': …}}" in refusal_of({"data.train": "x"})
