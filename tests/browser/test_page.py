"""The page as a whole: what it may do, how large and how fast it is, how it looks."""

import psutil
import pytest

from made_up_runs import HOSTILE, made_up_run, write_lines
from scsdpo.report import read_runs, write


def processor_seconds():
    """Of the browser so far; a machine that is busy with something else is not the page's fault."""
    children = psutil.Process().children(recursive=True)
    return sum(sum(child.cpu_times()[:2]) for child in children)


def test_a_page_of_three_runs_of_200_steps_is_small_opens_fast_and_runs_nothing_foreign(
    opened, report
):
    assert report.stat().st_size < 10e6
    before = processor_seconds()
    page = opened()
    assert processor_seconds() - before < 2
    assert page.locator("img, iframe, link[rel=stylesheet], script[src]").count() == 0
    assert page.locator("main b:text-is('ü𝛼')").count() == 0  # markup of a response
    assert "{{ 7 * 7 }}" in page.locator(".alarm").inner_text()
    assert "\\u202e" in page.locator(".alarm").inner_text()  # shown, not obeyed


def test_its_policy_forbids_scripts_styles_and_requests_of_others(opened):
    page = opened()
    assert "default-src 'none'" in page.locator("meta[http-equiv]").get_attribute("content")
    blocked = page.evaluate(
        """async () => {
            const seen = [];
            const note = (event) => seen.push(event.effectiveDirective);
            document.addEventListener("securitypolicyviolation", note);
            const script = document.createElement("script");
            script.textContent = "document.body.dataset.foreign = 1";
            document.body.append(script);
            await new Promise((done) => setTimeout(done, 50));
            return [seen, document.body.dataset.foreign ?? ""];
        }"""
    )
    assert blocked == [["script-src-elem"], ""]
    (words,) = opened.said
    assert "violates the following Content Security Policy" in words
    opened.said.clear()


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_never_wider_than_the_window_and_its_words_stand_out(opened, width, theme):
    page = opened(width=width, theme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrast = page.evaluate(CONTRAST)
    for selector, ratio in contrast.items():
        assert ratio >= 4.5, (selector, ratio)


CONTRAST = """() => {
    const light = (color) => {
        const canvas = new OffscreenCanvas(1, 1).getContext("2d");
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => {
            c /= 255;
            return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    const behind = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        if (element === document.documentElement) return "white";
        return color !== "rgba(0, 0, 0, 0)" ? color : behind(element.parentElement);
    };
    const found = {};
    for (const selector of ["h1", ".lead", "figcaption p", ".question p", ".facts", ".verdict",
                            ".inspector dt", ".tick", ".pip:not([aria-current])", "footer p"]) {
        const element = document.querySelector(selector);
        const style = getComputedStyle(element);
        const ink = element instanceof SVGElement ? style.fill : style.color;
        let paper = behind(element);
        if (paper.includes("/")) paper = behind(element.closest(".card, .question, body"));
        const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
        found[selector] = (a + 0.05) / (b + 0.05);
    }
    return found;
}"""


def test_the_theme_is_the_systems_until_one_is_chosen(opened):
    page = opened(theme="dark")
    color = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(color)
    page.locator("#theme").click()  # light
    light = page.evaluate(color)
    assert light != dark
    page.locator("#theme").click()  # dark
    assert page.evaluate(color) == dark


def test_runs_that_left_little_behind_have_a_page_too(opened, tmp_path):
    empty, short = tmp_path / "empty", made_up_run(tmp_path / "short", batches=1)
    empty.mkdir()
    write_lines(empty / "metrics.jsonl", [])
    for i, folders in enumerate(([empty], [short], [empty, short])):
        path = tmp_path / f"{i}.html"
        write(read_runs([str(folder) for folder in folders]), path)
        page = opened(path)
        assert page.locator("h1").inner_text()


def test_what_a_response_says_is_shown_as_text(opened):
    page = opened()
    shown = page.locator(".tokens").inner_text()
    assert '<img src="x" onerror="fetch(1)">' in shown
    assert HOSTILE.partition(" ")[0] in shown
