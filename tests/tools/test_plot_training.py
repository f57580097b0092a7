"""tools/plot_training.py: what is read of metrics.json, and what is plotted of it."""

import json
import math
import sys
from pathlib import Path

import cv2
import pytest

from carafe_d2.errors import UserError
from tools import plot_training

ROOT = Path(__file__).parents[2]


def write(folder, entries, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "metrics.json").write_text(lines + end)
    return folder


def entry(iteration, loss, **metrics):
    return {"iteration": iteration, "total_loss": loss, "lr": 0.01, "time": 1.0, **metrics}


RUN = [entry(19, 3.0, loss_cls=2.0), entry(39, 2.0, loss_cls=1.5), entry(59, 1.5, loss_cls=1.0)]
EVALUATED = {"iteration": 50, "bbox/AP": 41.5, "segm/AP": 30.25, "bbox/AP-disc": 7.0}


def curves_in(figure):
    """For each panel its title, and the points of each line by the line's name."""
    return {
        panel.get_title(): {
            line.get_label(): list(zip(*(d.tolist() for d in line.get_data()), strict=True))
            for line in panel.get_lines()
        }
        for panel in figure.axes
        if panel.get_lines()
    }


# --- reading ------------------------------------------------------------------------------------


def test_curves_are_those_of_the_file(tmp_path):
    folder = write(tmp_path / "run", [*RUN, EVALUATED])
    curves = plot_training.read_metrics(folder)
    assert curves["total_loss"] == ([19, 39, 59], [3.0, 2.0, 1.5])
    assert curves["bbox/AP"] == ([50], [41.5])  # written after a later iteration
    assert plot_training.read_metrics(folder / "metrics.json") == curves


def test_line_cut_off_at_the_end_is_ignored(tmp_path, capsys):
    folder = write(tmp_path, RUN, end='{"iteration": 79, "total_lo')
    assert plot_training.read_metrics(folder)["total_loss"][0] == [19, 39, 59]
    assert capsys.readouterr().err == ""


def test_line_broken_by_a_resumed_training_is_named(tmp_path, capsys):
    write(tmp_path, RUN[:1], end='{"iteration": 39, "tot' + json.dumps(RUN[1]) + "\n")
    with (tmp_path / "metrics.json").open("a") as file:
        file.write(json.dumps(RUN[2]) + "\n")
    assert plot_training.read_metrics(tmp_path)["total_loss"][0] == [19, 59]
    assert f"{tmp_path}/metrics.json: line 2 is broken" in capsys.readouterr().err


def test_resumed_training_replaces_what_it_repeats(tmp_path):
    again = [entry(39, 2.5), entry(59, 1.25), entry(79, 1.0)]
    curves = plot_training.read_metrics(write(tmp_path, [*RUN, entry(79, 9.0), *again]))
    assert curves["total_loss"] == ([19, 39, 59, 79], [3.0, 2.5, 1.25, 1.0])


def test_training_begun_anew_in_the_folder_replaces_the_old_one(tmp_path):
    curves = plot_training.read_metrics(write(tmp_path, [*RUN, entry(9, 4.0), entry(29, 3.0)]))
    assert curves["total_loss"] == ([9, 29], [4.0, 3.0])


# --- plotting -----------------------------------------------------------------------------------


def test_default_panels_are_losses_learning_rate_and_ap(tmp_path):
    runs = {"run": plot_training.read_metrics(write(tmp_path, [*RUN, EVALUATED]))}
    metrics = plot_training.select(runs, plot_training.METRICS)
    assert metrics == ["total_loss", "loss_cls", "lr", "bbox/AP", "segm/AP"]
    drawn = curves_in(plot_training.plot(runs, metrics))
    assert drawn == {
        "total_loss": {"run": [(19, 3.0), (39, 2.0), (59, 1.5)]},
        "loss_cls": {"run": [(19, 2.0), (39, 1.5), (59, 1.0)]},
        "learning rate": {"run": [(19, 0.01), (39, 0.01), (59, 0.01)]},
        "box AP": {"run": [(50, 41.5)]},
        "mask AP": {"run": [(50, 30.25)]},
    }


def test_runs_share_panels_and_have_a_legend(tmp_path):
    first = plot_training.read_metrics(write(tmp_path / "a", [*RUN, EVALUATED]))
    second = plot_training.read_metrics(write(tmp_path / "b", [entry(99, math.nan)]))
    figure = plot_training.plot({"a": first, "b": second}, ["total_loss", "bbox/AP"])
    drawn = curves_in(figure)
    assert drawn["total_loss"]["a"] == [(19, 3.0), (39, 2.0), (59, 1.5)]
    ((iteration, value),) = drawn["total_loss"]["b"]
    assert iteration == 99 and math.isnan(value)
    assert drawn["box AP"] == {"a": [(50, 41.5)], "b": []}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    lines = figure.axes[0].get_lines()
    assert lines[0].get_color() != lines[1].get_color()


def test_runs_are_named_by_their_folders(tmp_path):
    paths = [write(tmp_path / name, RUN) for name in ("x/seed1", "y/seed1", "y/seed2")]
    assert plot_training.labels(paths[1:]) == ["seed1", "seed2"]
    assert plot_training.labels([paths[0], paths[2] / "metrics.json"]) == ["seed1", "seed2"]
    assert plot_training.labels(paths[:2]) == ["x/seed1", "y/seed1"]
    copy = paths[0] / "old.json"
    assert plot_training.labels([paths[0] / "metrics.json", copy]) == [
        str(paths[0] / "metrics.json"),
        str(copy),
    ]


# --- the program --------------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot_training.py", *map(str, arguments)])
    plot_training.main()


def test_program_writes_a_picture(monkeypatch, tmp_path, capsys):
    runs = [write(tmp_path / name, [*RUN, EVALUATED]) for name in ("a", "b")]
    output = tmp_path / "new" / "plot.png"
    run(monkeypatch, *runs, "--output", output, "--metrics", "bbox/*", "total_loss")
    assert capsys.readouterr().out == f"3 metrics of 2 trainings plotted to {output}\n"
    assert cv2.imread(str(output)).std() > 10


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], r"cannot read .*run: No such file"),
        ("", [], r"metrics\.json holds no metrics of a training"),
        ("[1, 2]\n{}\n7\n", [], r"metrics\.json holds no metrics of a training"),
        ("\x00\xff", [], r"metrics\.json holds no metrics of a training"),
        (None, ["--metrics", "loss"], r"no run has 'loss'; there are loss_cls, lr, time, total"),
        (None, ["--output", "OUT.nonsense"], r"cannot write .*: Format 'nonsense' is not supp"),
        (None, ["--output", "OUT/plot.png"], r"cannot write .*: (Not a directory|File exists)"),
    ],
)
def test_mistakes_get_one_clear_line(monkeypatch, tmp_path, content, arguments, message):
    (tmp_path / "OUT").touch()
    arguments = [a.replace("OUT", str(tmp_path / "OUT")) for a in arguments]
    folder = tmp_path / "run"
    if arguments:
        write(folder, RUN)
    elif content is not None:
        folder.mkdir()
        (folder / "metrics.json").write_text(content)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(monkeypatch, folder, *arguments)


def test_run_without_what_is_plotted_by_default_is_refused(tmp_path):
    runs = {"run": plot_training.read_metrics(write(tmp_path, [{"iteration": 1, "time": 2.0}]))}
    with pytest.raises(UserError, match="no run has losses, learning rate or AP; there are time"):
        plot_training.select(runs, plot_training.METRICS)
