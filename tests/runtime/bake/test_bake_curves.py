"""The training log as a picture."""

import json
import xml.etree.ElementTree as ET

import pytest

from kif_runtime.bake.curves import drawing, read
from kif_runtime.errors import BakingError

ROWS = [
    {"step": 0, "forget": 9, "retain": 9},
    {"step": 0, "validation": {"forget": 1.0, "retain": 0.0}},
    {"step": 0, "terms": {"forget": 1.0, "retain": 0.1}},
    {"step": 1, "terms": {"forget": 0.5, "retain": -0.2}},
    {"step": 2, "validation": {"forget": 0.4, "retain": 0.01}},
]


def written(folder, rows, more=""):
    path = folder / "training.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    return path


def test_every_value_is_a_point_of_its_curve(tmp_path):
    path = written(tmp_path, ROWS)
    terms, ratios = read(path)
    assert terms == {"forget": [(0, 1.0), (1, 0.5)], "retain": [(0, 0.1), (1, -0.2)]}
    assert ratios == {"forget": [(0, 1.0), (2, 0.4)], "retain": [(0, 0.0), (2, 0.01)]}
    picture = ET.fromstring(drawing(path))
    lines = [line.get("points").split() for line in picture.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in lines] == [2, 2, 2, 2]
    heights = [[float(point.split(",")[1]) for point in points] for points in lines]
    assert heights[0][0] < heights[0][1]  # a smaller loss is lower on the page


def test_a_run_that_was_killed_counts_as_it_ran_last(tmp_path):
    again = [*ROWS, {"step": 1, "terms": {"forget": 0.25, "retain": 0.2}}]
    path = written(tmp_path, again, '{"step": 2, "te')
    assert read(path)[0]["forget"] == [(0, 1.0), (1, 0.25)]


def test_without_a_step_there_is_nothing_to_draw(tmp_path):
    assert drawing(written(tmp_path, ROWS[:2])) is None
    with pytest.raises(BakingError, match="cannot be read"):
        drawing(tmp_path / "none.jsonl")
