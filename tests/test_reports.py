"""Reports: records as JSON, tables as text and HTML, figures whose lines are the figures."""

from __future__ import annotations

import dataclasses
import html.parser
import importlib
import json
import math
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import conv_model, dense_model

import tscnc_tf as tscnc
from tscnc_tf import _plots, _reports


class Cells(html.parser.HTMLParser):
    """The texts of a document by their tags, and the tags that were not closed."""

    def __init__(self, document):
        super().__init__()
        self.open, self.found = [], []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.found.append((self.open[-1], data))


TABLE = _reports.Table(
    "Sizes <of> all", ("name", "bytes"), [("a & b", "1"), ("<b>", "22")], ("all", "23"), ["In <B>."]
)


def test_a_table_as_text():
    assert str(TABLE).splitlines() == [
        "Sizes <of> all",
        "",
        "  name    bytes",
        " ───────────────",
        "  a & b       1",
        "  <b>        22",
        "",
        "  all        23",
        "",
        "In <B>.",
    ]


def test_a_wide_table_has_all_cells_whole():
    cells = [f"{'long' * 12}-{index}" for index in range(9)]
    table = _reports.Table("Wide", [f"column {i}" for i in range(9)], [cells], notes=["word " * 99])
    _, _, heading, _, row, _, *notes = str(table).splitlines()
    assert row.split() == cells
    assert heading.split() == [word for i in range(9) for word in ("column", str(i))]
    assert len(notes) == 3


def test_a_table_as_html_has_the_same_cells_escaped():
    document = TABLE._repr_html_()
    assert "<b>" not in document
    cells = Cells(document)
    assert cells.open == []
    assert cells.found == [
        ("caption", "Sizes <of> all"),
        *(("th", text) for text in ("name", "bytes")),
        *(("td", text) for text in ("a & b", "1", "<b>", "22")),
        *(("th", text) for text in ("all", "23")),
        ("p", "In <B>."),
    ]
    assert "tfoot" not in dataclasses.replace(TABLE, footer=None)._repr_html_()


@dataclasses.dataclass(frozen=True)
class Inner(_reports.Record):
    value: float
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Outer(_reports.Report):
    _derived = ("double",)
    _omitted = ("array",)

    rows: tuple[Inner, ...]
    array: np.ndarray

    @property
    def double(self):
        return 2 * len(self.rows)


def test_a_record_is_its_fields_and_what_it_derives_without_what_it_omits():
    record = Outer((Inner(math.inf, (2, 3)),), np.ones(3))
    expected = {"rows": [{"value": "inf", "shape": [2, 3]}], "double": 2}
    assert record.to_dict() == expected
    assert json.loads(json.dumps(_reports.jsonable({"x": record}))) == {"x": expected}
    cells = [cell for tag, cell in Cells(record.rows[0]._repr_html_()).found if tag == "td"]
    assert cells == ["value", "inf", "shape", "[2, 3]"]
    assert str(record.rows[0]) == "Inner(value=inf, shape=(2, 3))"
    assert str(record).startswith("Outer\n")


def test_versions_of_what_is_installed_and_of_what_is_not():
    found = _reports.versions("numpy", "no-such-distribution")
    assert list(found) == ["python", "numpy", "no-such-distribution"]
    assert (found["numpy"], found["no-such-distribution"]) == (np.__version__, "unknown")
    assert _reports.versions()["tensorflow"] == tf.__version__


@pytest.fixture(scope="module")
def pruned():
    """A pruned network."""
    keras.utils.set_random_seed(0)
    return tscnc.prune_now(conv_model(keras), 0.5)


@pytest.fixture(scope="module")
def robustness(pruned):
    """An evaluation of it."""
    x = np.random.default_rng(0).uniform(size=(8, 8, 8, 1)).astype("float32")
    y = np.arange(8) % 3
    return tscnc.evaluate_robustness(
        pruned, x, y, tscnc.attacks.FGSM(epsilon="8/255"), progress=False
    )


def test_reports_of_all_kinds_are_shown_as_html(pruned, robustness):
    reports = [
        tscnc.inspection.sparsity(pruned),
        tscnc.inspection.sizes(pruned),
        tscnc.inspection.condition_numbers(pruned),
        tscnc.inspection.speed_check(pruned, batch_size=2, rounds=1),
        tscnc.inspection.local_lipschitz(pruned, np.full((2, 8, 8, 1), 0.5), 0.1, steps=1),
        tscnc.pruning.report(pruned),
        tscnc.gates.report(tscnc.gates.add_gates(dense_model(keras))),
        tscnc.pruning.compact(tscnc.strip(keras.models.clone_model(dense_model(keras)))),
        robustness,
    ]
    for report in reports:
        cells = Cells(report._repr_html_())
        assert cells.open == []
        text = re.sub(r"\s", "", str(report))
        for _, cell in cells.found:
            assert re.sub(r"\s", "", cell) in text


def test_the_pruning_report_of_a_network_without_weights():
    report = tscnc.pruning.report(keras.Sequential([keras.Input((2,)), keras.layers.ReLU()]))
    assert report.rows == () and report.sparsity == report.model_sparsity == 0.0
    assert "Whole model: 0 of 0 weights are zero, 0.00 %." in str(report)


def lines(axes):
    """The data of the lines of a panel, by their labels."""
    return {line.get_label(): np.asarray(line.get_xydata()) for line in axes.lines}


def test_zeros_are_drawn_as_they_are_reported(pruned):
    report = tscnc.inspection.sparsity(pruned)
    for figure in (report.plot(), tscnc.pruning.report(pruned).plot()):
        (axes,) = figure.axes
        widths = [bar.get_width() for bar in axes.patches]
        assert widths == [row.sparsity for row in report.rows]
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            row.name for row in report.rows
        ]
        (line,) = axes.lines
        assert set(line.get_xdata()) == {report.sparsity}


def test_spectra_are_drawn_kernel_by_kernel_with_others_beside_them(pruned):
    report = tscnc.inspection.condition_numbers(pruned)
    dense = tscnc.inspection.condition_numbers(dense_model(keras))
    figure = report.plot(label="pruned", others={"dense": dense})
    names = [row.name for row in report.rows]
    assert [axes.get_title() for axes in figure.axes] == [*names, "hidden"]
    values = tscnc.inspection.singular_values(pruned)
    for name, axes in zip(names, figure.axes, strict=False):
        drawn = lines(axes)["pruned"]
        np.testing.assert_array_equal(drawn[:, 0], np.arange(1, len(values[name]) + 1))
        np.testing.assert_array_equal(drawn[:, 1], np.maximum(values[name], _plots.SMALLEST))
        assert axes.get_yscale() == "log"
    by_title = {axes.get_title(): lines(axes) for axes in figure.axes}
    assert set(by_title["logits"]) == {"pruned", "dense"}
    assert set(by_title["conv"]) == {"pruned"}
    expected = dense.rows[1].singular_values
    np.testing.assert_array_equal(by_title["logits"]["dense"][:, 1], expected)


def test_groups_are_drawn_as_one_line():
    figure = _plots.spectra({"": {"depthwise": np.array([[3.0, 1.0], [2.0, 0.0]])}})
    (line,) = figure.axes[0].lines
    assert line.get_ydata().tolist() == [3.0, 2.0, 1.0, _plots.SMALLEST]


def test_curves_of_training_are_the_rows_of_its_metrics():
    rows = [
        {"epoch": 1, "loss": 2.0, "clean_accuracy": 0.5, "validation_accuracy": 0.4},
        {"epoch": 2, "loss": 1.0, "clean_accuracy": 0.7, "validation_accuracy": 0.6},
    ]
    rows[0] |= {"condition_number": "inf", "sparsity": 0.0}
    rows[1] |= {"condition_number": 8.0, "sparsity": 0.5}
    figure = _plots.curves(rows)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["loss", "accuracy", "condition number", "sparsity"]
    loss, accuracy, condition, sparsity = figure.axes
    np.testing.assert_array_equal(lines(loss)["loss"], [[1, 2.0], [2, 1.0]])
    np.testing.assert_array_equal(lines(accuracy)["clean accuracy"], [[1, 0.5], [2, 0.7]])
    np.testing.assert_array_equal(lines(accuracy)["validation accuracy"], [[1, 0.4], [2, 0.6]])
    np.testing.assert_array_equal(lines(condition)["condition number"], [[1, np.nan], [2, 8.0]])
    assert condition.get_yscale() == "log"
    np.testing.assert_array_equal(lines(sparsity)["sparsity"], [[1, 0.0], [2, 0.5]])


def test_a_stage_is_shown_and_draws_its_metrics(tmp_path):
    figures = {"sparsity": 0.5, "validation_accuracy": 0.75, "condition_number": "inf"}
    figures |= {"validation_robust_accuracy": 0.25, "dead_filters": 3.0}
    rows = [{"epoch": epoch, "loss": 1 / epoch, **figures} for epoch in (1, 2, 3)]
    manifest = {"stage": "prune", "chosen_epoch": 2, "files": {}}
    output = tscnc.experiments.StageOutput(tmp_path, manifest, tuple(rows))
    cells = [cell for tag, cell in Cells(output._repr_html_()).found if tag == "td"]
    assert cells[:6] == ["1", "50.00 %", "75.00 %", "25.00 %", "∞", "3"]
    drawn = output.plot().axes[0]
    expected = [[row["epoch"], row["loss"]] for row in rows]
    np.testing.assert_array_equal(lines(drawn)["loss"], expected)
    with pytest.raises(ValueError, match="has no metrics of epochs to draw"):
        tscnc.experiments.StageOutput(tmp_path, {"stage": "evaluate"}, ()).plot()


def test_robust_accuracy_is_drawn_against_sparsity_with_its_interval(robustness):
    recorded = json.loads(json.dumps(robustness.to_dict()))
    figure = tscnc.evaluation.plot_robustness({"ours": {0.9: robustness, 0.5: recorded}})
    (axes,) = figure.axes
    robust, clean = robustness.robust_accuracy, robustness.clean_accuracy
    np.testing.assert_array_equal(lines(axes)["ours, robust"], [[0.5, robust], [0.9, robust]])
    np.testing.assert_array_equal(lines(axes)["ours, clean"], [[0.5, clean], [0.9, clean]])
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == robustness.robust_interval
    assert (corners[:, 0].min(), corners[:, 0].max()) == (0.5, 0.9)
    for wrong in ([recorded], {"ours": recorded["robust"]["accuracy"]}):
        with pytest.raises(TypeError, match="evaluations must be a dict of names with dicts"):
            tscnc.evaluation.plot_robustness(wrong)


def test_figures_touch_no_global_state(pruned, tmp_path):
    figure = tscnc.inspection.sparsity(pruned).plot()
    plt = importlib.import_module("matplotlib.pyplot")
    assert plt.get_fignums() == []
    figure.savefig(tmp_path / "zeros.png")
    assert (tmp_path / "zeros.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(pruned, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[plots\]"'):
        tscnc.inspection.sparsity(pruned).plot()
