import csv
import math
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_jax.decisions import (
    CueConflictName,
    Trials,
    parse_cue_conflict_name,
    read_trials,
    trials_filename,
    write_trials,
)

HEADER = "subj,session,trial,rt,object_response,category,condition,imagename"
PEOPLE = (
    f"{HEADER}\n"
    "subject-03,1,1,0.796405076980591,oven,airplane,0,0001_s5n_s03_0_airplane_00_airplane1-oven2.png\n"
    "subject-03,1,2,NaN,na,bear,0,0002_s5n_s03_0_bear_00_bear10-dog1.png\n"
)
NETWORK = (
    f"{HEADER}\r\n"
    "AlexNet_topK_10,1,1,NaN,oven,airplane,NaN,airplane1-oven2.png\r\n"
    "AlexNet_topK_10,1,2,NaN,dog,bear,NaN,bear10-dog1.png\r\n"
)


@pytest.fixture
def trials():
    return Trials.of_network(
        "AlexNet_topK_10",
        ["oven", "dog"],
        category=["airplane", "bear"],
        imagename=["airplane1-oven2.png", "bear10-dog1.png"],
    )


def save(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("airplane1-bicycle2.png", ("airplane", 1, "bicycle", 2)),
        ("bear10-bear3.PNG", ("bear", 10, "bear", 3)),
        ("0001_s5n_dnn_0_airplane_00_airplane1-bicycle2.png", ("airplane", 1, "bicycle", 2)),
        ("0815_sif_s07_108_car_00_car7-knife12-108.png", ("car", 7, "knife", 12)),
        ("airplane1-bicycle2-108.png", ("airplane", 1, "bicycle", 2)),
        ("polar bear2-Küche1.jpeg", ("polar bear", 2, "Küche", 1)),
        ("star3-dots2", ("star", 3, "dots", 2)),
    ],
)
def test_names_of_cue_conflict_images(name, expected):
    assert parse_cue_conflict_name(name) == CueConflictName(*expected)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "oven10.png",
        "airplane-bicycle2.png",
        "airplane1-bicycle.png",
        "airplane1_bicycle2.png",
        "airplane1-bicycle2-left.png",
        "shapes/airplane1-bicycle2.png",
        "dining_table1-bicycle2.png",
        "boat-0068-sketch-23.png",
        "1-2.png",
        ".airplane1-bicycle2.png",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name!r} is not the name of a cue-conflict image"):
        parse_cue_conflict_name(name)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("0001_cl_s01_cr_oven_40_n04111531_14126.png", "n04111531_14126.png"),
        ("0001_cl_dnn_cr_oven_40_n14111531_14126.png", "n14111531_14126.png"),
        ("0002_s5n_s03_0_bear_00_bear10-dog1.png", "bear10-dog1.png"),
        ("0001_ske_dnn_0_boat_00_boat-0068-sketch-23.png", "boat-0068-sketch-23.png"),
        ("bear10-dog1.png", "bear10-dog1.png"),
    ],
)
def test_image_key(name, key):
    trials = Trials.of_network("x", ["bear"], category=["bear"], imagename=[name])
    assert trials.image_key.tolist() == [key]


def test_people_and_networks_read_alike(tmp_path, trials):
    people = read_trials(save(tmp_path / "people.csv", PEOPLE))
    assert people.subj.tolist() == ["subject-03"] * 2
    assert people.rt[0] == 0.796405076980591
    assert math.isnan(people.rt[1])
    assert people.object_response.tolist() == ["oven", "na"]
    assert people.condition.tolist() == ["0", "0"]
    network = read_trials(save(tmp_path / "network.csv", NETWORK))
    assert network == trials
    assert network.condition.tolist() == ["NaN", "NaN"]
    for attribute in ("image_key", "texture", "shape_exemplar"):
        assert getattr(people, attribute).tolist() == getattr(network, attribute).tolist()
    assert people.texture.tolist() == ["oven", "dog"]
    assert people.shape_exemplar.tolist() == ["airplane1", "bear10"]


def test_reading_tolerates_what_other_programs_write(tmp_path, trials):
    shuffled = (
        "imagename,note,Subj,Session,TRIAL,rt,object_response,category,condition\r\n"
        "airplane1-oven2.png,,AlexNet_topK_10,1,1,nan,oven,airplane,\r\n"
        "\r\n"
        '"bear10-dog1.png","a, b",AlexNet_topK_10,1,2,,dog,bear,nan\r\n'
    )
    assert read_trials(save(tmp_path / "a.csv", shuffled, "utf-8-sig")) == trials
    assert read_trials(str(save(tmp_path / "b.csv", NETWORK.rstrip()))) == trials


def test_a_folder_gives_all_its_tables_in_order(tmp_path, trials):
    save(tmp_path / "b.csv", NETWORK)
    save(tmp_path / "a.CSV", PEOPLE)
    save(tmp_path / ".hidden.csv", "no table")
    save(tmp_path / "readme.txt", "no table")
    (tmp_path / "folder.csv").mkdir()
    both = read_trials(tmp_path)
    assert both.subj.tolist() == ["subject-03"] * 2 + ["AlexNet_topK_10"] * 2
    assert both.select([2, 3]) == trials
    with pytest.raises(ValueError, match=r"folder\.csv: no \.csv file in this folder"):
        read_trials(tmp_path / "folder.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column subj, session"),
        (HEADER.replace("category,", "") + "\n", "line 1: no column category; expected the header"),
        (HEADER + ",Session\n", "line 1: column session twice"),
        (f"{HEADER}\na,1,1,NaN,car,car,NaN\n", "line 2: 7 values, expected 8"),
        (
            f"{HEADER}\na,1,1,NaN,car,car,NaN,x.png\na,1,2.5,NaN,car,car,NaN,x.png",
            "line 3, column trial",
        ),
        (
            f"{HEADER}\na,session-1,1,NaN,car,car,NaN,x.png",
            "column session: 'session-1', expected a whole",
        ),
        (f"{HEADER}\na,{'9' * 30},1,NaN,car,car,NaN,x.png", "column session: '999"),
        (f"{HEADER}\na,1,1,fast,car,car,NaN,x.png", "column rt: 'fast', expected seconds or NaN"),
        (f"{HEADER}\na,1,1,NaN,,car,NaN,x.png", "column object_response: '', .*\"na\" stands for"),
        (f'{HEADER}\na,1,1,NaN,car,car,NaN,"x\ny.png"', r"line 3, column imagename: 'x\\ny.png'"),
        (f'{HEADER}\na,1,1,NaN,car,car,NaN,"x', "not a CSV"),
    ],
)
def test_files_that_are_no_tables(tmp_path, text, message):
    path = save(tmp_path / "trials.csv", text)
    with pytest.raises(ValueError, match=message) as error:
        read_trials(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_binary_and_missing_files(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.csv: not UTF-8 text"):
        read_trials(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_trials(tmp_path / "none.csv")


def test_written_tables_have_the_benchmarks_form(tmp_path, trials):
    path = tmp_path / "new" / "trials.csv"
    write_trials(path, trials)
    assert path.read_bytes() == NETWORK.replace("\r\n", "\n").encode()
    people = read_trials(save(tmp_path / "people.csv", PEOPLE))
    write_trials(path, people)
    assert path.read_bytes() == PEOPLE.encode()


def test_a_failed_write_leaves_the_earlier_table(tmp_path, trials, monkeypatch):
    path = tmp_path / "trials.csv"
    write_trials(path, trials)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_trials(path, trials.select([0]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n\0"), min_size=1)
ROWS = st.lists(
    st.tuples(
        TEXT,
        st.integers(-(10**17), 10**17),
        st.integers(0, 10**9),
        st.floats(allow_infinity=False),
        TEXT,
        TEXT,
        st.one_of(TEXT, st.sampled_from(["NaN", "nan", "", "0", "1.0", "na"])),
        TEXT,
    ),
    max_size=4,
)


@given(ROWS)
@settings(deadline=None, max_examples=60)
def test_round_trip_is_exact(rows):
    names = HEADER.split(",")
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    trials = Trials(**{name: list(values) for name, values in zip(names, columns, strict=True)})
    with tempfile.TemporaryDirectory() as folder:
        path, again = pathlib.Path(folder, "a.csv"), pathlib.Path(folder, "b.csv")
        write_trials(path, trials)
        assert read_trials(path) == trials
        write_trials(again, read_trials(path))
        assert again.read_bytes() == path.read_bytes()
        with open(path, newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        assert [row["imagename"] for row in table] == trials.imagename.tolist()


def test_trials_filename():
    name = trials_filename("cue-conflict", "vit_large_patch16_224-topk-10")
    assert name == "cue-conflict_vit_large_patch16_224-topk-10_session-1.csv"
    assert trials_filename("edge", "subject-07", 2) == "edge_subject-07_session_2.csv"
    for dataset, subject in (("a/b", "x"), ("a", "../x"), ("a", "")):
        with pytest.raises(ValueError, match="expected a name without folders"):
            trials_filename(dataset, subject)


def test_columns_cannot_be_changed(trials):
    mine = np.array([1, 1])
    table = Trials(*[mine if n == "session" else getattr(trials, n) for n in HEADER.split(",")])
    mine[0] = 7  # the caller's own array stays the caller's
    assert table.session.tolist() == [1, 1]
    for array in (table.subj, table.rt, table.texture, table.image_key, table.shape_exemplar):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = array[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category": ["bear"]}, "columns of different lengths: subj 2, .*category 1"),
        ({"trial": [[1, 2]]}, r"column trial: expected one dimension, got shape \(1, 2\)"),
        ({"trial": [1.0, 2.0]}, "column trial: expected int64, got float64"),
        ({"rt": ["1", "2"]}, "column rt: expected float64, got <U1"),
        ({"condition": [0, 0]}, "column condition: expected text, got 0 in row 0"),
        ({"subj": ["a", ""]}, "column subj: row 1 is '', expected text on one line"),
        ({"imagename": ["a\nb", "c"]}, r"column imagename: row 0 is 'a\\nb'"),
    ],
)
def test_columns_are_checked(trials, changes, message):
    columns = {name: getattr(trials, name) for name in HEADER.split(",")} | changes
    with pytest.raises(ValueError, match=message):
        Trials(**columns)


def test_select_concatenate_and_equality(trials):
    second = trials.select(trials.category == "bear")
    assert second.imagename.tolist() == ["bear10-dog1.png"]
    assert len(second) == 1
    assert Trials.concatenate([trials.select([0]), second]) == trials
    assert Trials.concatenate([second, trials.select([0])]) != trials
    assert trials.select([1, 0]).trial.tolist() == [2, 1]
    assert len(trials.select([])) == 0
    assert len(trials.select(np.zeros(2, bool))) == 0
    assert trials != second
    assert trials != "trials"
    for rows in ([True], [2], [-3], [0.5], [[0]]):
        with pytest.raises(ValueError, match="a table of 2 trials"):
            trials.select(rows)
    with pytest.raises(ValueError, match="no tables"):
        Trials.concatenate([])


def test_texture_of_other_images_is_refused():
    trials = Trials.of_network("x", ["oven"], category=["oven"], imagename=["oven10.png"])
    with pytest.raises(ValueError, match=r"'oven10\.png' is not the name"):
        _ = trials.texture


@pytest.mark.real
def test_all_published_tables_can_be_read(shared, tmp_path):
    """All columns, against the csv module; people's files come back byte for byte."""
    files = sorted((shared / "raw-data").glob("*/*.csv"))
    files += sorted((shared / "raw-data-2018").glob("*/*.csv"))
    assert len(files) > 90
    total = 0
    for path in files:
        trials = read_trials(path)
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{k.lower(): v for k, v in row.items()} for row in csv.DictReader(file)]
        assert len(rows) == len(trials) > 0
        for name in HEADER.split(","):
            texts = getattr(trials, name).tolist()
            if name == "rt":
                texts = ["NaN" if math.isnan(value) else value for value in texts]
            assert list(map(str, texts)) == [row[name] for row in rows], (path, name)
        assert len(set(trials.image_key.tolist())) == len(trials)
        assert len(set(trials.subj.tolist())) == 1
        total += len(trials)
    assert total > 100_000
    people = sorted((shared / "raw-data/cue-conflict").glob("*subject*.csv"))
    for path in people:
        trials = read_trials(path)
        copy = tmp_path / trials_filename("cue-conflict", trials.subj[0])
        assert copy.name == path.name
        write_trials(copy, trials)
        assert copy.read_bytes() == path.read_bytes()
