"""From a curve to a token: clicks, filters and keys, and the credit map against the files."""

import json
import re

import pytest

from made_up_runs import made_up_run
from scsdpo.report import read_runs, write

RIGHT, WRONG = "✓", "\u00d7"


def records(run, kind, batch, split="train"):
    text = (run / kind / f"{split}_{batch:06}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def opened_response(page):
    """Batch, sample and verdict in the heading."""
    heading = page.locator("#response h3").inner_text()
    found = re.fullmatch(r"Step (\d+), response (\d+) of \d+: (\w+)", heading)
    return int(found[1]), int(found[2]) - 1, found[3]


def value(page, name):
    return float(page.locator(f'#inspector dd[data-value="{name}"]').inner_text().replace(",", ""))


def traced(page, run):
    """The record of the tokens that the page shows."""
    batch, sample, _ = opened_response(page)
    key = page.locator("#questions .question.open p").get_attribute("title")
    return next(
        line
        for line in records(run, "tokens", batch)
        if (line["key"], line["sample"]) == (key, sample)
    )


def test_from_the_curve_to_the_step_to_the_question_to_the_response(opened, runs):
    page = opened()
    plot = page.locator('svg[data-panel="pass-rate"]')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2)
    step = int(page.locator("#plot-pass-rate .tip > b").inner_text().split()[-1])
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2)
    page.wait_for_selector(f'#response h3:has-text("Step {step},")')
    run = runs[int(page.locator("select[name=run]").input_value())]
    question = page.locator("#questions .question").nth(1)
    key = question.locator("p").get_attribute("title")
    question.locator(".pip").nth(5).click()
    page.wait_for_selector('#response h3:has-text("response 6 of 8")')
    (line,) = (x for x in records(run, "rollouts", step) if (x["key"], x["sample"]) == (key, 5))
    assert opened_response(page)[2] == ("right" if line["success"] else "wrong")
    facts = page.locator("#response .facts-row").inner_text()
    assert f"answer {line['answer']}" in facts and f"tokens {line['n_tokens']}" in facts
    assert line["response"].splitlines()[0][:20] in page.locator("#response .plain").inner_text()
    siblings = page.locator("#response .pip").all_inner_texts()
    assert siblings == [
        RIGHT if x["success"] else WRONG for x in records(run, "rollouts", step) if x["key"] == key
    ]


def test_hovering_over_a_token_says_what_the_trace_holds(opened, runs):
    page = opened()
    trace = traced(page, runs[0])
    spans = page.locator(".tokens span")
    assert spans.count() == len(trace["ids"])
    for i in [i for i, text in enumerate(trace["text"]) if text][::4]:
        spans.nth(i).hover()
        for name in ("credit", "magnitude", "jsd", "reverse_kl", "entropy", "gap"):
            assert value(page, name) == pytest.approx(trace[name][i], rel=6e-3)
        ratio = trace["teacher_logprob"][i] - trace["logprob"][i]
        assert value(page, "ratio") == pytest.approx(ratio, rel=6e-3)
        rows = page.locator("#inspector tbody tr").all()
        assert len(rows) == len(trace["top_ids"][i])
        for c, row in enumerate(rows):
            student, teacher, credit = row.locator("td").all_inner_texts()
            for shown, true in (
                (float(student.rstrip("%")), 100 * trace["top_probs"][i][c]),
                (float(teacher.rstrip("%")), 100 * trace["top_teacher_probs"][i][c]),
            ):
                assert shown == pytest.approx(true, rel=6e-3)
            assert float(credit) == pytest.approx(trace["top_credit"][i][c], rel=6e-2)


@pytest.mark.parametrize("signal", ["credit", "jsd", "ratio"])
def test_colors_follow_the_signal_that_is_chosen(opened, runs, signal):
    page = opened()
    trace = traced(page, runs[0])
    page.locator(f'[data-signal="{signal}"]').click()
    ratio = [t - s for t, s in zip(trace["teacher_logprob"], trace["logprob"], strict=True)]
    values = ratio if signal == "ratio" else trace[signal]
    sizes = sorted(map(abs, values))
    top = sizes[-(-99 * len(sizes) // 100) - 1]
    ends = page.locator("#scale span").all_inner_texts()
    assert float(ends[1]) == pytest.approx(top, rel=6e-3)
    for i, true in enumerate(values):
        share = max(-1.0, min(1.0, true / top))
        name = page.locator(".tokens span").nth(i).get_attribute("class")
        found = re.search(r"\bt(-?\d+)\b", name)
        assert abs((int(found[1]) if found else 0) - 10 * share) <= 0.51


def test_filters_leave_what_they_say(opened, runs):
    page = opened()
    batch, _, _ = opened_response(page)
    kept = records(runs[0], "rollouts", batch)
    passing = page.locator("#questions .pip:not(.dim)")
    assert passing.count() == len(kept)
    page.select_option("select[name=verdict]", "wrong")
    wrong = sum(not line["success"] for line in kept)
    assert passing.all_inner_texts() == [WRONG] * wrong
    assert f"{wrong} of {len(kept)} responses" in page.locator("#strip-now").inner_text()
    page.locator("input[name=traced]").check()
    both = sum(line["traced"] and not line["success"] for line in kept)
    assert passing.count() == both
    page.locator("#filters [type=reset]").click()
    page.wait_for_function("document.querySelector('select[name=verdict]').value === ''")
    page.fill("input[name=text]", kept[0]["key"].rpartition("/")[0])
    assert passing.count() == len(kept)
    page.fill("input[name=text]", "that nobody said")
    assert passing.count() == 0
    page.fill("input[name=text]", "")
    page.select_option("select[name=split]", "val")
    page.wait_for_selector('#response h3:has-text("Step 200")')
    assert "pass rate" in page.locator("#questions .facts").first.inner_text()
    page.select_option("select[name=category]", "level1")
    assert set(page.locator("#questions .facts span:first-child").all_inner_texts()) == {"level1"}


def test_a_filter_dims_the_steps_in_which_nothing_passes(opened):
    page = opened()
    page.select_option("select[name=run]", "2")
    page.locator("input[name=traced]").check()
    page.wait_for_function("document.querySelectorAll('#strip .match, #strip .now').length === 20")


def test_everything_is_reached_from_the_keyboard(opened, runs):
    page = opened()
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "strip":
            break
    else:
        pytest.fail("the strip is not reached")
    batch, _, _ = opened_response(page)
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(f'#response h3:has-text("Step {batch - 1},")')
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f'#response h3:has-text("Step {batch},")')
    before = opened_response(page)
    page.keyboard.press("j")
    page.wait_for_function(
        "(old) => document.querySelector('#response h3').innerText !== old",
        arg=f"Step {before[0]}, response {before[1] + 1} of 8: {before[2]}",
    )
    page.keyboard.press("k")
    page.wait_for_selector(f'#response h3:has-text("response {before[1] + 1} of 8")')
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "tokens":
            break
    else:
        pytest.fail("the tokens are not reached")
    trace = traced(page, runs[0])
    page.keyboard.press("Home")
    assert value(page, "credit") == pytest.approx(trace["credit"][0], rel=6e-3)
    page.keyboard.press("ArrowRight")
    assert value(page, "credit") == pytest.approx(trace["credit"][1], rel=6e-3)
    page.keyboard.press("Enter")
    assert page.locator(".tokens .pinned").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".tokens .pinned").count() == 0
    page.keyboard.press("n")
    sizes = sorted(map(abs, trace["credit"]))
    top = sizes[-(-99 * len(sizes) // 100) - 1]
    large = [i for i, v in enumerate(trace["credit"]) if i > 1 and abs(v) >= 0.3 * top]
    assert value(page, "credit") == pytest.approx(trace["credit"][large[0]], rel=6e-3)


def test_an_address_leads_to_a_response(opened):
    page = opened()
    page.locator("#questions .pip").nth(9).click()
    page.wait_for_selector('#response h3:has-text("response 2 of 8")')
    place = page.evaluate("location.hash")
    again = opened(place=place)
    assert opened_response(again) == opened_response(page)
    assert again.evaluate("location.hash") == place


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """A page of a run of episodes, and its folder."""
    base = tmp_path_factory.mktemp("episodes")
    run = made_up_run(base / "run", batches=21, turns=True)
    write(read_runs([str(run)]), base / "report.html")
    return base / "report.html", run


def test_a_traced_episode_shows_who_said_what_and_the_credit_of_each_turn(opened, episodes):
    path, run = episodes
    page = opened(path)
    trace = traced(page, run)
    parts = page.locator("#response .tokens .part")
    assert [w.inner_text() for w in parts.locator("small b").all()] == [
        "policy", "tool look_up", "policy",
    ]  # fmt: skip
    for k, place in ((0, 0), (1, 2)):
        own = [i for i, turn in enumerate(trace["turn"]) if turn == k]
        shown = (
            parts.nth(place).locator("span").evaluate_all("(all) => all.map((s) => s.dataset.i)")
        )
        assert list(map(int, shown)) == own
        label, number = parts.nth(place).locator("output").inner_text().rsplit(" ", 1)
        total = sum(trace["credit"][i] for i in own)
        assert label == "credit" and float(number) == pytest.approx(total, rel=6e-3)
    # The tool's answer is text, and no token of it can be looked at.
    world = parts.nth(1)
    assert "reward of the turn 0.25" in world.inner_text() and "too late" in world.inner_text()
    assert "3 results </script><img" in world.inner_text()
    assert not world.locator("span, img, output").count()
    page.locator('.signals button[data-signal="entropy"]').click()
    mean = [trace["entropy"][i] for i, turn in enumerate(trace["turn"]) if turn == 1]
    said = parts.nth(2).locator("output").inner_text()
    assert said.endswith(" a token")
    assert float(said.split()[-3]) == pytest.approx(sum(mean) / len(mean), rel=6e-3)
    page.locator(".tokens").focus()
    page.keyboard.press("End")  # keys go on through all turns
    assert page.locator("#inspector small").inner_text().startswith(f"token {len(trace['ids'])} of")


def test_an_episode_without_a_trace_shows_its_parts(opened, episodes):
    path, run = episodes
    page = opened(path)
    page.locator("#questions .question.open .pip").nth(7).click()
    page.wait_for_selector('#response h3:has-text("response 8 of 8")')
    batch, sample, _ = opened_response(page)
    key = page.locator("#questions .question.open p").get_attribute("title")
    (line,) = (
        x for x in records(run, "rollouts", batch) if (x["key"], x["sample"]) == (key, sample)
    )
    parts = page.locator("#response .plain .part").all_inner_texts()
    assert len(parts) == len(line["turns"]) == 3
    for shown, turn in zip(parts, line["turns"], strict=True):
        assert turn["text"].strip()[:12].split()[0] in shown
    assert not page.locator("#response .plain img").count()
