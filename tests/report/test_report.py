"""The report's Python side; what the page does with it is `make test-browser`."""

import json
import math
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from made_up_runs import HOSTILE, made_up_run, write_lines
from scsdpo.__main__ import main
from scsdpo.callbacks import Report
from scsdpo.errors import ConfigurationError
from scsdpo.records import SCHEMA_VERSION
from scsdpo.report import attempts, panels, read_runs, render, svg
from scsdpo.report.configs import differences
from scsdpo.report.curves import line_panel, slug, window_panel
from scsdpo.report.evaluations import RecordedEvaluation, difference, solved_difference
from scsdpo.report.pack import content_hash, pack
from scsdpo.report.panels import Panel
from scsdpo.report.reading import Run, distinct_names, spread_out
from scsdpo.report.responses import SCHEMA, embed
from scsdpo.report.summary import summarize
from scsdpo.report.teacher import Distance, measured, too_few
from scsdpo.report.teacher import panels as distance_panels
from scsdpo.statistics import score_interval


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("made_up")
    return [str(made_up_run(base / f"method{i}", batches=21, seed=i)) for i in range(2)]


@pytest.fixture(scope="module")
def runs(folders):
    return read_runs(folders)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """With responses enough for densities."""
    base = tmp_path_factory.mktemp("traced")
    made = [made_up_run(base / f"m{i}", batches=21, seed=i, trace_every=1) for i in range(2)]
    return read_runs([str(folder) for folder in made])


@pytest.fixture(scope="module")
def page(runs):
    return render(runs)


def of_batches(values, name="pass_rate", **more):
    lines = [
        {"batch": i + 1, "step": i + 1, "time": 0.0, f"train/{name}": value}
        for i, value in enumerate(values)
    ]
    return Run(name="run", folder=None, lines=lines, **more)


def test_nothing_that_a_run_says_becomes_markup(page):
    assert page.count("</script") == page.count("<script")  # ours end, and no other
    assert HOSTILE not in page and "<img" not in page
    assert "\u202e" not in page and "\u2028" not in page


def test_the_policy_names_the_hash_of_each_script_and_style(page):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        assert f"{kind}-src {content_hash(text)}" in policy
    assert " style=" not in page and " onclick=" not in page


def test_packed_text_holds_no_sign_of_markup():
    assert re.fullmatch(r"[A-Za-z0-9+/=]*", pack({"text": HOSTILE + "\ud800", "nan": math.nan}))


def test_a_page_keeps_to_its_size_and_still_spans_the_run(runs, page):
    small = render(runs, most_bytes=170_000)
    assert len(small.encode()) <= 170_000 < len(page.encode())
    embedded = embed(runs, 150_000)
    assert 0 < len(embedded.chunks) < embedded.found and "spread over the run" in embedded.room
    for splits in embedded.index:
        batches = [entry["batch"] for entry in splits["train"]]
        assert batches == sorted(batches) and {1, 21} <= set(batches)  # first and last trace
    assert embed(runs, 10**7).room == ""


def test_any_beginning_of_a_spread_spans_it():
    order = spread_out(range(100))
    assert sorted(order) == list(range(100)) and order[:3] == [99, 0, 50]
    gaps = sorted(order[:20])
    assert max(b - a for a, b in pairwise(gaps)) <= 13
    assert spread_out([]) == [] and spread_out([7]) == [7]


def test_responses_of_another_schema_are_left_out(tmp_path):
    assert SCHEMA == SCHEMA_VERSION
    folder = made_up_run(tmp_path / "run", batches=1)
    path = folder / "rollouts" / "train_000001.jsonl"
    lines = [json.loads(line) | {"schema_version": 99} for line in path.read_text().splitlines()]
    write_lines(path, lines)
    assert embed(read_runs([str(folder)]), 10**7).responses == 0


def test_responses_of_version_1_read_as_those_of_today(tmp_path):
    folder = made_up_run(tmp_path / "run", batches=1)
    path = folder / "rollouts" / "train_000001.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["finished"] = False
    write_lines(path, lines)
    now = embed(read_runs([str(folder)]), 10**7)
    old = []
    for line in lines:
        ended = "stop" if line.pop("finished") else "length"
        names = {"output": line.pop("response"), "target": line.pop("gold"), "finish_reason": ended}
        old.append(line | names | {"schema_version": 1})
    write_lines(path, old)
    before = embed(read_runs([str(folder)]), 10**7)
    assert before == now and now.responses


def test_the_four_measures_of_a_trace_are_those_of_the_paper():
    # S = .5 then .25, T = .75 then .25: M = .625 then .25
    line = {
        "logprob": [math.log(0.5), math.log(0.25), None],
        "teacher_logprob": [math.log(0.75), math.log(0.25), None],
        "reverse_kl": [0.2, 0.4, None],
        "jsd": [0.1, 0.2, None],
    }
    expected = {
        "reverse_kl": 0.3,
        "jsd": 0.15,
        "log_teacher_over_student": math.log(1.5) / 2,
        "half_log_student_over_mixture": math.log(0.5 / 0.625) / 4,
    }
    assert measured(line) == pytest.approx(expected)
    assert measured(line | {"teacher_logprob": [None, None, None]}) == {}


def test_windows_are_fifty_batches_of_two_hundred_and_quarters_of_fewer():
    panel = Panel(name="w", title="", note="", x_label="", layers=[])
    for batches, sizes in ((1000, 50), (200, 50), (40, 10), (3, 1)):
        (layer,) = window_panel(
            [of_batches([i % 2 for i in range(batches)])], "pass_rate", panel
        ).layers
        assert len(layer.y) == batches // sizes
        assert layer.x[0] == pytest.approx((1 + sizes) / 2)
        if sizes % 2 == 0:
            assert layer.y == pytest.approx([50.0] * len(layer.y))


def test_a_long_curve_is_shown_as_means_of_its_neighbors():
    x, y = of_batches([float(i) for i in range(1000)]).curve("pass_rate")
    assert len(x) <= 400 and x[:2] == [3, 6] and y[:2] == [1.0, 4.0]
    (line,) = line_panel([of_batches([1.0, None, 3.0])], "pass_rate", "", "").layers
    assert list(line.y) == [1.0, None, 3.0]


def test_each_panel_is_well_formed_and_inside_its_box(traced):
    found = panels(traced)
    assert len({panel.name for panel in found}) == len(found) >= 30
    for panel in found:
        picture, data = svg.draw(panel)
        root = ElementTree.fromstring(picture)
        for circle in root.iter("circle"):
            assert svg.LEFT <= float(circle.get("cx")) <= svg.RIGHT
            assert svg.TOP <= float(circle.get("cy")) <= svg.BOTTOM
        assert data["layers"] and "nan" not in picture


def test_figures_for_papers_are_files(traced, tmp_path):
    from scsdpo.report.paper import save

    kinds = {type(layer): layer for panel in panels(traced) for layer in panel.layers}
    assert len(kinds) == 4
    panel = Panel(name="all", title="of each kind", note="", x_label="x", layers=[*kinds.values()])
    written = save([panel], tmp_path / "figures")
    assert {path.name for path in written} == {"all.svg", "all.png"}
    assert "of each kind" in written[0].read_text()  # letters stay letters
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    def names(*paths):
        return distinct_names([tmp_path / path for path in paths])

    assert names("runs/tiny/version_0") == ["tiny/version_0"]
    assert names("runs/a/version_0", "runs/b/version_0") == ["a", "b"]
    assert names("runs/a/version_0", "runs/a/version_1") == ["version_0", "version_1"]
    assert len(set(names("x", "x/y", "z"))) == 3


def test_a_folder_without_a_run_is_refused_with_one_that_has_it(folders, tmp_path):
    (tmp_path / "tiny" / "version_0").mkdir(parents=True)
    write_lines(tmp_path / "tiny" / "version_0" / "metrics.jsonl", [])
    with pytest.raises(ConfigurationError, match=r"did you mean .*version_0"):
        read_runs([str(tmp_path)])
    with pytest.raises(ConfigurationError, match="there is no folder"):
        read_runs([str(tmp_path / "nowhere")])
    named, other = read_runs([f"mine={folders[0]}", folders[1]])
    assert named.name == "mine" and other.name == "method1"


def test_the_command_writes_a_page_and_says_where(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scsdpo", "report", *folders, "-o", str(tmp_path / "a.html")])
    assert main() == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "a.html")]
    assert "2 runs" in (tmp_path / "a.html").read_text()
    monkeypatch.setattr(sys, "argv", ["scsdpo", "report", str(tmp_path), "--out", str(tmp_path)])
    assert main() == 2
    assert "RUN" in capsys.readouterr().err


def test_fit_ends_with_a_report_of_what_it_ran_on(qwen3, tmp_path, capsys):
    from runs import data, module, trainer

    trainer(tmp_path, callbacks=[Report()]).fit(module(qwen3), data())
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "environment.json").read_text())["ranks"] == "1"
    assert f"<b>torch</b> {version('torch')}" in page
    assert 'id="responses"' in page


def test_the_python_of_the_docs_runs(folders, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "RUN").symlink_to(folders[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/report.md", "exec"), scope := {})
    assert scope["html"].startswith("<!doctype html>") and "pass-rate" in scope["figures"]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"batch": 1, "step": 1}\n{"batch": 2, "st')
    (run,) = read_runs([str(tmp_path)])
    assert [line["batch"] for line in run.lines] == [1]


def evaluation(scores):
    solved = {key: score > 0 for key, score in scores.items()}
    return RecordedEvaluation(figures={}, scores=scores, solved=solved)


def test_differences_are_paired_by_question_and_refused_between_other_questions():
    before, after = evaluation({"a": 0.0, "b": 0.5}), evaluation({"b": 0.75, "a": 0.25})
    estimate = difference(after, before)
    assert estimate.value == pytest.approx(0.25)
    assert estimate.low < 0 < 0.25 < estimate.high  # two that gained the same tell nothing
    assert solved_difference(after, before).value == 0.5
    assert difference(after, evaluation({"a": 0.0, "c": 0.5})) is None
    assert solved_difference(after, evaluation({"a": 0.0})) is None


def test_only_what_differs_between_configurations_is_listed(runs):
    assert dict(differences(runs)) == {
        "seed_everything": ["0", "1"],
        "model.weighting.power": ["0.0", "0.5"],
    }


def distances_of(right, wrong):
    values = {"reverse_kl": 0.5, "jsd": 0.1}
    return [
        Distance(run=0, correct=i < right, pass_rate=0.5, values=values)
        for i in range(right + wrong)
    ]


def test_a_density_takes_twenty_responses(runs):
    assert too_few(distances_of(20, 0)) == []
    assert too_few(distances_of(4, 30)) == [
        "Of 4 right there is no density: it takes 20 responses."
    ]
    names = [panel.name for panel in distance_panels(distances_of(3, 4), runs)]
    assert names == ["reverse-kl-by-pass-rate", "jsd-by-pass-rate"]
    density, *_ = distance_panels(distances_of(4, 30), runs)
    assert [layer.label for layer in density.layers] == ["wrong (30)"]


def test_names_of_figures_are_told_apart_and_are_names_of_files():
    odd = ["a/b", "a b", "a\u200bb", "a\0b", "../../x", "W" * 400, "ü"]
    slugs = [slug(f"val/{name}/mean@4") for name in odd]
    assert len(set(slugs)) == len(odd)
    for name in slugs:
        assert re.fullmatch(r"[\w.+-]{1,100}", name, re.ASCII), name
    run = of_batches([0.5])
    run.lines[0].update({"train/a_b": 1.0, "train/a-b": 2.0})
    names = [panel.name for panel in panels([replace(run, folder=Path("nowhere"))])]
    assert "a-b" in names and "a-b-2" in names


def test_nothing_wrong_is_not_said_beside_a_figure_that_fell(folders):
    run = read_runs(folders[:1])[0]
    run.config["health"] = {"rules": None}
    first, last = ("val/mean@4", run.validations[0]), ("val/mean@4", run.validations[-1])
    quiet = "None of the health rules found anything wrong."
    for change, said in ((0.1, True), (-0.1, False)):
        last[1][last[0]] = first[1][first[0]] + change
        words = summarize([run]).words
        assert (quiet in words) is said
        assert any("that mean@4 fell is no figure of theirs" in each for each in words) is not said


def test_figures_of_turns_have_a_section_with_a_line_a_turn(tmp_path):
    folders = [
        str(made_up_run(tmp_path / f"m{i}", batches=21, seed=i, turns=i < 2)) for i in range(3)
    ]
    shown = {panel.name: panel for panel in panels(read_runs(folders))}
    assert {"turns", "calls", "failed-calls", "observation-tokens", "out-of-turns"} <= set(shown)
    assert {"turn-reward-0", "turn-reward-1", "turn-length-0", "turn-length-1"} <= set(shown)
    assert "turn-reward-2" not in shown and "turn-1-reward" not in shown
    rewards = shown["turn-reward-0"]
    assert [layer.label for layer in rewards.layers] == ["turn 1", "turn 2"]
    assert rewards.layers[0].y[0] == 0.25 and rewards.floor is None
    assert shown["failed-calls"].layers[0].y[0] == pytest.approx(20 * (1 - 1 / 21))
    alone = {panel.name for panel in panels(read_runs(folders[:1]))}
    assert {"turn-reward", "turn-length"} <= alone


def test_episodes_of_runs_before_they_were_recorded_are_responses(tmp_path):
    folder = made_up_run(tmp_path / "run", batches=1)
    for path in (folder / "rollouts").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(
            path, [{k: v for k, v in x.items() if k not in ("turns", "stopped")} for x in lines]
        )
    assert embed(read_runs([str(folder)]), 10**7).responses == 16


def solve_run(folder, successes, answers):
    folder.mkdir()
    write_lines(folder / "metrics.jsonl", [{"batch": 1, "step": 0, "time": 0.0, "train/reward": 0}])
    rows = zip(successes, answers, strict=True)
    lines = [{"attempt": i, "success": s, "answer": a} for i, (s, a) in enumerate(rows, start=1)]
    write_lines(folder / "attempts.jsonl", lines)
    return str(folder)


def test_attempts_at_a_question_become_discovery_curves(tmp_path):
    a = solve_run(tmp_path / "a", [False, False, True], ["1", "1", "2"])
    b = solve_run(tmp_path / "b", [False] * 6, ["1", None, "2", "3", "3", "4"])
    c = solve_run(tmp_path / "c", [True], ["7"])
    discovered, answers = attempts.panels(read_runs([a, b, c]))
    dots, line = discovered.layers
    # c is solved by its first attempt, a by its third, b never in six.
    assert line.x == [1, 2, 3, 4, 5, 6] and line.y == pytest.approx(
        [100 * s / 3 for s in (1, 1, 2, 2, 2, 2)]
    )
    assert [round(x) for x in dots.x] == [1, 2, 4, 6]
    low, high = score_interval([1.0, 0.0, 0.0]).low, score_interval([1.0, 0.0, 0.0]).high
    assert (dots.low[0], dots.high[0]) == pytest.approx((100 * low, 100 * high))
    assert [layer.y for layer in answers.layers] == [[1, 1, 2], [1, 1, 2, 3, 3, 4], [1]]
    # Of one run there is no share, and a run that trained has no attempts.
    (alone,) = attempts.panels(read_runs([b]))
    assert alone.name == "answers"
    page = render(read_runs([a, b]))
    assert 'data-panel="discovery"' in page and "Attempts at a question" in page


def test_a_run_that_trained_has_no_attempts(runs, page):
    assert attempts.panels(runs) == [] and "Attempts at a question" not in page


def test_nothing_is_said_of_more_attempts_than_an_unsolved_run_has_made(tmp_path):
    a = solve_run(tmp_path / "a", [False] * 20 + [True], ["1"] * 21)
    b = solve_run(tmp_path / "b", [False] * 8, ["1"] * 8)
    discovered, _ = attempts.panels(read_runs([a, b]))
    assert discovered.layers[1].x == list(range(1, 9)) and set(discovered.layers[1].y) == {0}


def test_discovery_counts_up_to_k():
    curve = attempts.discovery([1, 4, None, 9], [1, 3, 4, 8, 9])
    assert [(k, share) for k, share, *_ in curve] == [
        (1, 0.25), (3, 0.25), (4, 0.5), (8, 0.5), (9, 0.75)
    ]  # fmt: skip
    assert all(low <= share <= high for _, share, low, high in curve)
