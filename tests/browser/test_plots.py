"""Plots: what one reads off them is what the files hold, with a mouse and without."""

import csv
import json

import pytest


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def number(text):
    return float(text.replace(",", ""))


def close(shown, true):
    """Three significant digits."""
    return abs(number(shown) - true) <= 6e-3 * abs(true)


@pytest.mark.parametrize(
    "panel, name, scale", [("pass-rate", "pass_rate", 100), ("gradient-norm", "gradient_norm", 1)]
)
def test_hovering_over_a_step_says_the_steps_figures(opened, runs, panel, name, scale):
    page = opened()
    plot = page.locator(f'svg[data-panel="{panel}"]')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    for share in (0.2, 0.5, 0.93):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        tip = page.locator(f"#plot-{panel} .tip")
        step = int(tip.locator("> b").inner_text().split()[-1])
        for run, row in zip(runs, tip.locator("> div").all(), strict=True):
            known = [line[f"train/{name}"] for line in lines(run) if f"train/{name}" in line]
            smooth = known[max(0, step - 10) : step]
            assert close(row.locator("span b").inner_text(), scale * sum(smooth) / len(smooth))
            own = row.locator("small").inner_text().removeprefix(" (this batch ").rstrip(")")
            assert close(own, scale * known[step - 1])


def test_arrow_keys_read_a_plot_and_enter_opens_the_step(opened, runs):
    page = opened()
    page.locator('svg[data-panel="pass-rate"]').focus()
    for _ in range(31):
        page.keyboard.press("ArrowRight")
    rate = lines(runs[0])[31]["train/pass_rate"]
    assert page.locator("#plot-pass-rate .tip > b").inner_text() == "training step 31"
    first = page.locator("#plot-pass-rate .tip small").first.inner_text()
    assert close(first.removeprefix(" (this batch ").rstrip(")"), 100 * rate)
    assert page.locator("#announce").inner_text().startswith("training step 31: sc-sdpo")
    page.keyboard.press("Enter")
    page.wait_for_selector('#response h3:has-text("Step 31")')


def test_a_plots_data_can_be_taken_away(opened, runs):
    page = opened()
    with page.expect_download() as started:
        page.locator('.data[data-panel="response-length"]').click()
    with open(started.value.path(), newline="") as file:
        head, *rows = csv.reader(file)
    assert started.value.suggested_filename == "response-length.csv"
    assert head[:2] == ["training step", "sc-sdpo (each batch)"]
    for row, line in zip(rows, lines(runs[0])[1:], strict=True):
        assert int(row[0]) == line["step"]
        assert float(row[1]) == pytest.approx(line["train/response_length"], rel=1e-5)


def test_a_run_can_be_left_out_of_all_plots(opened):
    page = opened()
    lines_of_run = page.locator('svg[data-panel="pass-rate"] .run-1')
    assert lines_of_run.first.is_visible()
    page.locator(".run[data-run='1']").click()
    assert not lines_of_run.first.is_visible()
    page.locator('svg[data-panel="pass-rate"]').hover()
    labels = page.locator("#plot-pass-rate .tip i").all_inner_texts()
    assert labels == ["sc-sdpo", "grpo"]
