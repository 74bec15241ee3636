"""The directory of a server: what is in it is checked, what changes is found, and nothing outside it is read."""

import os
from dataclasses import replace

import pytest

from capsules import BLOCKS, D, capsule
from kif_runtime.errors import CapsuleError, KifError
from kif_vllm.engine.library import SUFFIX, Library, Served

FRANCE, JAPAN = capsule(id="france"), capsule(id="japan")


def name(id):
    return f"{id}{SUFFIX}"


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "capsules"
    folder.mkdir()
    FRANCE.save(folder / name("france"))
    return Library(folder, Served(FRANCE.model, D, BLOCKS))


def touch(path, content):
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))


def look(library):
    """Changes as a server takes them that has room for all: ids to load, ids that are gone, problems."""
    found, gone, problems = library.changes()
    for each in found:
        library.keep(each)
    for id in gone:
        library.forget(id)
    return [each.capsule.id for each in found], gone, problems


def test_all_capsules_are_read_and_other_files_left_alone(library):
    (library.folder / "note.txt").write_text("x")
    (library.folder / f".{name('hidden')}").write_bytes(b"")
    assert [c.id for c in library.read_all()] == ["france"]


def test_one_bad_file_refuses_the_start(library):
    (library.folder / name("bad")).write_bytes(b"nonsense")
    with pytest.raises(CapsuleError, match="bad"):
        library.read_all()


def test_two_files_of_one_id_are_refused(library):
    FRANCE.save(library.folder / name("again"))
    with pytest.raises(CapsuleError, match="one id"):
        library.read_all()


@pytest.mark.parametrize("change", [{"model": "0" * 64}, {"blocks": BLOCKS + 1}])
def test_a_capsule_of_another_model_is_refused(library, change):
    replace(JAPAN, **change).save(library.folder / name("japan"))
    with pytest.raises(CapsuleError, match="japan"):
        library.read(name("japan"))


@pytest.mark.parametrize(
    "path",
    ["../france.kif.safetensors", "/etc/passwd", "france", ".france.kif.safetensors", "a/b.kif.safetensors",
     "..", "", "x\0.kif.safetensors", "..\\x.kif.safetensors/../../y.kif.safetensors"],
)  # fmt: skip
def test_a_path_is_no_name(library, path):
    with pytest.raises(CapsuleError, match="no path"):
        library.read(path)


def test_a_link_out_of_the_directory_is_refused(library, tmp_path):
    JAPAN.save(tmp_path / name("outside"))
    (library.folder / name("japan")).symlink_to(tmp_path / name("outside"))
    with pytest.raises(CapsuleError, match="link"):
        library.read(name("japan"))


def test_changes_are_found_once(library):
    library.read_all()
    assert look(library) == ([], [], [])
    JAPAN.save(library.folder / name("japan"))
    assert look(library) == (["japan"], [], [])
    (library.folder / name("france")).unlink()
    assert look(library) == ([], ["france"], [])
    assert look(library) == ([], [], [])


def test_a_change_is_found_again_until_it_is_made(library):
    library.read_all()
    JAPAN.save(library.folder / name("japan"))
    (library.folder / name("france")).unlink()
    for _ in range(2):
        found, gone, _ = library.changes()
        assert ([f.capsule.id for f in found], gone) == (["japan"], ["france"])
    assert library.postpone(found[0])
    assert not library.postpone(found[0])
    library.keep(found[0])
    library.forget("france")
    assert look(library) == ([], [], [])


def test_two_new_files_of_one_id_are_one_and_a_problem(library):
    library.read_all()
    JAPAN.save(library.folder / name("japan"))
    JAPAN.save(library.folder / name("nippon"))
    load, _, problems = look(library)
    assert (load, len(problems)) == (["japan"], 1)
    assert look(library) == ([], [], [])


def test_a_replaced_file_is_loaded_again(library):
    library.read_all()
    newer = replace(FRANCE, calibration={"note": "mined again"})
    newer.save(library.folder / name("france"))
    load, gone, _ = library.changes()
    assert [f.capsule.digest for f in load] == [newer.digest]
    assert gone == []


def test_a_renamed_file_is_no_removal(library):
    library.read_all()
    (library.folder / name("france")).rename(library.folder / name("frankreich"))
    assert look(library) == (["france"], [], [])
    assert look(library) == ([], [], [])


def test_a_bad_file_is_reported_once_and_what_was_loaded_stays(library):
    library.read_all()
    touch(library.folder / name("france"), b"half a file")
    load, gone, problems = library.changes()
    assert (load, gone, len(problems)) == ([], [], 1)
    assert library.changes() == ([], [], [])
    FRANCE.save(library.folder / name("france"), overwrite=True)
    assert look(library)[0] == ["france"]


def test_a_second_file_of_a_loaded_id_is_refused_while_the_first_is_there(library):
    library.read_all()
    replace(FRANCE, calibration={}).save(library.folder / name("usurper"))
    load, gone, problems = library.changes()
    assert (load, gone) == ([], [])
    assert "one id" in problems[0]


def test_a_directory_that_is_gone_is_an_error(library):
    (library.folder / name("france")).unlink()
    library.folder.rmdir()
    with pytest.raises(KifError, match="directory"):
        library.changes()


def test_what_is_said_of_a_bad_file_does_not_name_it(library):
    """It goes to the server's log, and a name may be a subject's."""
    library.read_all()
    touch(library.folder / name("a-subject"), b"nonsense")
    replace(JAPAN, model="0" * 64).save(library.folder / name("japan"))
    replace(FRANCE, calibration={}).save(library.folder / name("the-subject"))
    problems = library.changes()[2]
    assert [p.split(" that end")[0] for p in problems] == ["file 1 of the 4", "file 3 of the 4", "file 4 of the 4"]
    assert not [p for p in problems if any(word in p for word in ("a-subject", "the-subject", "japan", "france"))]
