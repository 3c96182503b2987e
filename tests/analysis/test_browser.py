"""The two pages in a real browser: nothing is fetched, nothing fails, the answer is on the first screen, nothing is wider
than the window."""

import json
import re
import shutil
import subprocess

import pytest

import analysis
import synthetic
from analysis.fit_answer import analyse_fit
from analysis.fit_evidence import gather
from analysis.fit_report import fit_report
from test_fit_report import planted

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROME is None, reason="no chromium or google-chrome on PATH")

# Errors are counted from the first line of the page on, and the rest when it has been laid out.
WATCH = "<script>window.failed = []; addEventListener('error', e => failed.push(String(e.message || e.target)), true);</script>"
MEASURE = """<script>addEventListener('load', () => { const root = document.documentElement;
const wide = [...document.querySelectorAll('table, figure, p, li')].filter(e => !e.closest('.scroll, figure')
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200));
const verdict = document.querySelector('.verdict .said').getBoundingClientRect();
parent.postMessage(JSON.stringify({
  inner: innerWidth, scroll: root.scrollWidth, wide, failed, top: verdict.top, bottom: verdict.bottom,
  fetched: performance.getEntriesByType('resource').map(e => e.name),
  pictures: [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width)}), '*'); });</script>"""
# A frame may be as narrow as a phone; a headless window may not.
FRAME = """<!doctype html><pre id="measured"></pre><script>
addEventListener('message', e => { document.getElementById('measured').textContent = e.data; });</script>
<iframe src="page.html" width="%d" height="850" style="border: 0"></iframe>"""


def look(page, tmp_path, width: int, extra: str = "") -> dict:
    html = page.read_text().replace("<head>", f"<head>{WATCH}", 1)
    (tmp_path / "page.html").write_text(html.replace("</body>", f"{extra}{MEASURE}</body>", 1))
    (tmp_path / "frame.html").write_text(FRAME % width)
    done = subprocess.run(
        [CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900",
         "--virtual-time-budget=4000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    measured = re.search(r'<pre id="measured">(.+?)</pre>', done.stdout, re.DOTALL)
    assert measured, done.stderr[-2000:]
    found = json.loads(measured[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return {**found, "console": re.findall(r"CONSOLE.*", done.stderr)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    table = planted()
    # A path as long as people have them, with nothing in it to break a line at.
    table.attrs = {"source": f"/{'long_directory_name_' * 6}/runs.csv", "notes": ()}
    found, evidence = gather(analyse_fit(table, "chinchilla", draws=60, holdout=(6.4e19,)), laws=())
    arms = {name: synthetic.FOUR_ARMS[name] for name in ("prefix_lm", "decoder_only")}
    synthetic.write(out / "study", synthetic.Study(arms=arms, baseline="decoder_only"))
    return {
        "fit": fit_report(found, out / "fit", evidence=evidence, command="lab fit " + "x" * 120),
        "study": analysis.report(out / "study"),
    }


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("page", ["fit", "study"])
def test_page_in_a_browser(pages, tmp_path, page, width):
    seen = look(pages[page], tmp_path, width)
    assert seen["fetched"] == [] and seen["failed"] == [] and seen["console"] == []
    assert seen["inner"] == width and seen["scroll"] <= width and seen["wide"] == []
    assert 0 < seen["top"] < seen["bottom"] < 850
    assert len(seen["pictures"]) >= 4 and min(seen["pictures"]) > 300


def test_the_checks_see_what_they_look_for(pages, tmp_path):
    broken = (
        "<table><tr><td><div style='width: 3000px'>wide</div></td></tr></table><img src='https://example.org/a.png'>"
        "<script>console.error('noise'); nothing.at.all;</script>"
    )
    seen = look(pages["fit"], tmp_path, 1200, extra=broken)
    assert seen["scroll"] > 1200 and seen["wide"] and seen["console"]
    assert len(seen["failed"]) == 2 and "example.org" in " ".join(seen["fetched"])
