"""The page in a real browser: it draws, it sorts, and nothing is wrong."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from ensemble_kit.report.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Before anything else: note what goes wrong. Last: click, look, and leave a note in the page.
WATCH = """<script>
const problems = [];
addEventListener("error", (event) => problems.push(String(event.message)));
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective));
const listeners = [];
matchMedia = () => ({ addEventListener: (_, listener) => listeners.push(listener) });
console.error = console.warn = (...words) => problems.push(words.join(" "));
</script>"""
LOOK = """<script>
function canvases(root) {
  const inner = [...root.querySelectorAll("*")].filter((one) => one.shadowRoot);
  return [...root.querySelectorAll("canvas"), ...inner.flatMap((one) => canvases(one.shadowRoot))];
}
function has(canvas, wanted) {
  const { width, height } = canvas;
  if (!width || !height) return false;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  for (let i = 0; i < data.length; i += 4) if (wanted(data, i)) return true;
  return false;
}
function charts(wanted) {
  return ["path", "size"].map((name) =>
    canvases(document.getElementById("chart-" + name)).some((one) => has(one, wanted)));
}
const isPurple = (data, i) => data[i] > 200 && data[i + 1] < 50 && data[i + 2] > 200;
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
async function soon(wanted) {
  for (let tries = 0; tries < 40 && charts(wanted).includes(false); tries++) await pause(200);
  return charts(wanted);
}
addEventListener("load", async () => {
  const drawn = await soon((data, i) => data[i + 3] > 0);
  const before = charts(isPurple);
  document.documentElement.style.setProperty("--text", "rgb(255, 0, 255)");
  listeners.forEach((listener) => listener());
  const after = await soon(isPurple);
  const table = document.querySelector("#candidates table");
  const heading = [...table.querySelectorAll("th")].find((one) => one.innerText === "bf16");
  const names = () => [...table.tBodies[0].rows].map((row) => row.children[1].innerText);
  heading.querySelector("button").click();
  const falling = names();
  heading.querySelector("button").click();
  const box = document.querySelector("input[type=search]");
  box.value = "CONC";
  box.dispatchEvent(new Event("input"));
  const classes = [...document.getElementById("all-classes").tBodies[0].rows];
  const searched = classes.filter((row) => !row.hidden).map((row) => row.children[0].textContent);
  const note = { problems, searched, drawn, before, after, falling, rising: names(),
    sort: heading.ariaSort,
    wide: document.documentElement.scrollWidth, window: innerWidth };
  document.body.dataset.note = JSON.stringify(note);
});
</script>"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return found


@pytest.mark.parametrize(("width", "scheme"), [(390, 0), (1280, 1)], ids=["phone, dark", "wide"])
def test_the_charts_are_drawn_and_a_click_sorts(browser, chosen, tmp_path, width, scheme):
    path = write_report(chosen.path, tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    text = text.replace("<title>", f"{WATCH}<title>", 1).replace("</body>", f"{LOOK}</body>")
    path.write_text(text, encoding="utf-8")

    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=30000",
         f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip

    found = re.search(r'<body data-note="([^"]*)"', done.stdout)
    assert found, done.stderr
    note = json.loads(unescape(found[1]))
    by_size = sorted(chosen.selection.candidates, key=lambda one: -one.bytes)
    assert note["problems"] == []
    assert note["drawn"] == [True, True]
    assert note["before"] == [False, False]
    assert note["after"] == [True, True]  # painted again in the page's new colours
    assert note["falling"] == [one.name for one in by_size]
    assert note["rising"] == [one.name for one in reversed(by_size)]
    assert note["sort"] == "ascending"
    assert note["searched"] == ["Concert"]
    assert note["wide"] <= note["window"]  # wide tables scroll by themselves
