"""What a run's own words can hold: signs without ink, values without a break, markup."""

import json

import pytest
import yaml

from made_up_runs import made_up_run
from scsdpo.report import read_runs, write

ZERO_WIDTH, NUL, TURNED = "a\u200bb", "a\0b", "\u202eabc"
LONG = "W" * 400


def rewritten(folder, change):
    """The run with every line of its records changed."""
    for path in [*folder.glob("*.jsonl"), *folder.glob("*/*.jsonl")]:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        text = "".join(json.dumps(change(line)) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
    return folder


def renamed(levels):
    """A change that gives the made-up categories other names."""

    def change(line):
        for old, new in levels.items():
            line = {key.replace(f"val/{old}/", f"val/{new}/"): line[key] for key in line}
            if line.get("category") == old:
                line["category"] = new
        return line

    return change


def made(folder, change):
    run = rewritten(made_up_run(folder / "run", batches=41, alarm=True), change)
    path = folder / "report.html"
    write(read_runs([str(run)]), path)
    return path


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    names = {"level1": ZERO_WIDTH, "level2": NUL, "level3": TURNED, "level4": "[/math]"}
    return made(tmp_path_factory.mktemp("odd"), renamed(names))


def test_every_plot_is_alive_and_every_button_gives_its_own_data(opened, odd):
    page = opened(odd)
    cards = page.locator(".card").all()
    for card in cards:
        card.locator(".plot").focus()
        page.keyboard.press("ArrowRight")
        assert card.locator(".tip b").first.inner_text(), card.locator("h3").inner_text()
    titles = page.evaluate(
        "[...document.querySelectorAll('.data')].map((b) => panels[b.dataset.panel].title)"
    )
    assert len(set(titles)) == len(titles) == len(cards)
    for odd_name in (ZERO_WIDTH, NUL, TURNED):
        (title,) = (title for title in titles if title.startswith(f"mean@4 of {odd_name}"))
        with page.expect_download() as started:
            page.locator(".data").nth(titles.index(title)).click()
        name = started.value.suggested_filename
        assert name.isascii() and name.isprintable()


def test_categories_are_spelled_out_and_can_be_chosen(opened, odd):
    page = opened(odd)
    shown = page.locator("select[name=category] option").all_inner_texts()
    assert shown == ["any", "[/math]", "a\\u0000b", "a\\u200bb", "\\u202eabc"]
    for label in shown[1:]:
        page.select_option("select[name=category]", label=label)
        for card in page.locator("#questions .facts span:first-child").all_inner_texts():
            assert card == label


def long_values(line):
    """Every text as long as a line can be, in which nothing breaks."""
    line = renamed({f"level{n}": f"{LONG}{n}" for n in range(1, 5)})(line)
    for key in ("response", "answer", "gold", "feedback", "rule", "message", "remedy", "version"):
        if key in line:
            line[key] = LONG
    if "messages" in line:
        line["messages"] = [{"role": LONG, "content": LONG}]
    if "text" in line:
        line["text"] = [LONG for _ in line["text"]]
    if "train/pass_rate" in line:
        line[f"train/{LONG}"] = 1.0
    return line


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    run = rewritten(made_up_run(folder / "run", batches=21, alarm=True), long_values)
    (run / "environment.json").write_text(json.dumps({LONG: LONG}))
    config = {"model": {"teacher": {"class_path": LONG, "init_args": {LONG: LONG}}}, LONG: LONG}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    path = folder / "report.html"
    write(read_runs([f"{LONG}={run}"]), path)
    return path


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_values_without_a_break_do_not_widen_the_page(opened, long, width):
    page = opened(long, width=width)

    def widest():
        return page.evaluate("document.documentElement.scrollWidth")

    assert widest() <= width
    for plot in page.locator(".plot").all():
        plot.focus()
        page.keyboard.press("ArrowRight")
        assert widest() <= width, plot.get_attribute("data-panel")
    for token in page.locator(".tokens span").all()[:3]:
        token.hover()
    assert widest() <= width


@pytest.mark.parametrize("width", [360, 640, 900, 1280])
def test_no_place_among_the_tiles_is_empty(opened, odd, width):
    """The last tile of each row ends where the first row does."""
    page = opened(odd, width=width)
    boxes = [tile.bounding_box() for tile in page.locator(".tiles > div").all()]
    rows = {}
    for box in boxes:
        rows[round(box["y"])] = max(rows.get(round(box["y"]), 0), box["x"] + box["width"])
    assert len(boxes) == 5 and max(rows.values()) - min(rows.values()) < 2
