"""The page of clp-engine steer in a real browser: what is moved, what is written, where the dot is."""

import re
import subprocess
import sys

import pytest
import torch
from browser import Browser, missing

from clp_engine import ConditionedPolicy, ParetoReport, SamplingParams, evaluate
from clp_engine.training.runs.run_spec import RunSpec

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def save_run(run, objectives, **options):
    """A run of the shipped summariser whose adapters are random: every weighting says something else, and scores differ."""
    from clp_engine.tasks import docsum

    policy = ConditionedPolicy.from_pretrained("docsum", objectives, rank=4, **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.3)
    policy.save_pretrained(run / "policy")
    odds = options.get("kl_conditioning") == "odds"
    config = {
        "max_completion_length": 12,
        "temperature": 0.7,
        **({"alpha_range": [0.02, 0.2]} if odds else {}),
    }
    RunSpec("docsum", tuple(objectives), task="docsum", config=config).save(run)
    evaluate(
        policy,
        {name: docsum.REWARDS[name] for name in objectives},
        docsum.load_dataset("test", limit=2),
        grid=4,
        kl=[0.02, 0.2] if odds else None,
        sampling=SamplingParams(12),
        bootstrap=5,
        progress=False,
        output_dir=run,
    )
    return run


def served(run):
    process = subprocess.Popen(
        [sys.executable, "-m", "clp_engine", "steer", str(run), "--port", "0", "--no-browser"],
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()  # loading ...
    return process, re.search(r"http://\S+", process.stdout.readline())[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two objectives and a KL coefficient that moves."""
    run = save_run(
        tmp_path_factory.mktemp("two") / "run",
        ["coverage", "brevity"],
        kl_conditioning="odds",
        min_kl=0.02,
        default_kl=0.02,
    )
    process, url = served(run)
    yield run, url
    process.kill()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    run = save_run(tmp_path_factory.mktemp("three") / "run", ["coverage", "brevity", "faithfulness"])
    process, url = served(run)
    yield run, url, process
    process.kill()


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.resize(1280, 900)
        yield browser


class Page:
    def __init__(self, browser, url):
        self.browser = browser
        browser.open(url)
        self.written()

    def written(self):
        """Wait until what the page shows is what its sliders ask for."""
        self.browser.wait(lambda: self.browser.text("#status").startswith("written"), "a completion")

    def change(self, action):
        self.browser.run("document.getElementById('status').textContent = ''")
        action()
        self.written()

    def press(self, slider, *keys):
        self.change(lambda: self.browser.press(slider, *keys))

    @property
    def own(self):
        return self.browser.text("#own")

    @property
    def base(self):
        return self.browser.text("#base")

    @property
    def dot(self):
        return [
            float(self.browser.run(f"return document.getElementById('dot').dataset.{at}"))
            for at in ("across", "up")
        ]


@pytest.fixture
def page(two, window):
    page = Page(window, two[1])
    yield page
    assert window.problems() == []


def measured(run, weights, kl):
    """Mean rewards of the report at a weighting, in the order of the objectives."""
    [point] = [
        p
        for p in ParetoReport.load(run).points
        if p.kl_coef == kl and all(abs(p.weights[name] - w) < 1e-3 for name, w in weights.items())
    ]
    return [value.mean for value in point.rewards.values()]


def test_a_slider_changes_what_the_policy_says_and_moves_the_dot_and_the_base_model_stays(page, two):
    before = page.own, page.base, page.dot
    page.press("#w0", "end")  # all weight on coverage; the other slider follows
    assert page.browser.property("#w1", "value") == "0"
    assert page.browser.text("#w0-value") == "1.00" and page.browser.text("#w1-value") == "0.00"
    assert "coverage 1.00, brevity 0.00" in page.browser.text("#own-title")
    assert page.own != before[0] and page.base == before[1] and page.dot != before[2]
    assert page.dot == pytest.approx(measured(two[0], {"coverage": 1.0, "brevity": 0.0}, 0.02))
    assert page.browser.text("#position").startswith("Measured here")
    page.press("#w0", "home")
    assert page.dot == pytest.approx(measured(two[0], {"coverage": 0.0, "brevity": 1.0}, 0.02))


def test_between_measured_points_the_dot_is_interpolated_and_the_page_says_so(page, two):
    low, high = (measured(two[0], {"coverage": w}, 0.02) for w in (1 / 3, 2 / 3))
    # It starts at equal weights, half-way between a third and two thirds.
    assert low != high and page.dot == pytest.approx([(a + b) / 2 for a, b in zip(low, high)])
    page.press("#w0", *["left"] * 10)  # 0.4: a fifth of the way
    assert page.browser.text("#w0-value") == "0.40"
    assert page.dot == pytest.approx([0.8 * a + 0.2 * b for a, b in zip(low, high)], rel=1e-4)
    assert page.browser.text("#position").startswith("Interpolated between measured points: coverage")


def test_the_kl_coefficient_moves_completion_and_dot(page, two):
    page.press("#w0", "end")
    near = page.own, page.dot
    page.press("#kl", "end")
    assert page.browser.text("#kl-value") == "0.2"
    assert page.own != near[0]
    assert page.dot == pytest.approx(measured(two[0], {"coverage": 1.0}, 0.2))
    page.press("#kl", *["left"] * 50)  # the middle of a logarithmic scale
    ends = (measured(two[0], {"coverage": 1.0}, kl) for kl in (0.02, 0.2))
    assert page.dot == pytest.approx([(a + b) / 2 for a, b in zip(*ends)])


def test_presets_set_all_sliders(page):
    page.change(lambda: page.browser.click("#presets button:nth-child(3)"))
    assert page.browser.text("#presets button:nth-child(3)") == "brevity alone"
    assert [page.browser.property(f"#w{i}", "value") for i in (0, 1)] == ["0", "1"]


def test_an_empty_text_is_an_error_that_a_screen_reader_hears_and_the_next_text_removes(page):
    page.browser.run("document.getElementById('text').value = ' '")
    page.browser.click("button.main")
    page.browser.wait(lambda: page.browser.text("#error"), "an error")
    assert "text is empty" in page.browser.text("[role=alert]")
    assert page.browser.run("return document.getElementById('text').getAttribute('aria-invalid')") == "true"
    assert page.browser.problems()  # the answer's status, 400, is on the console
    page.browser.press("#text", "Return the largest element.")
    page.change(lambda: page.browser.click("button.main"))
    assert page.browser.text("#error") == "" and page.own


def test_markup_in_a_text_or_a_completion_is_shown_and_not_run(page):
    hostile = '<img src=x onerror="window.ran = 1"><script>window.ran = 1</script>'
    page.browser.run("document.getElementById('text').value = arguments[0]", hostile)
    page.change(lambda: page.browser.click("button.main"))
    page.browser.run("showCompletion('own', {text: arguments[0], tokens: 1, cut: false})", hostile)
    assert page.own == hostile
    assert page.browser.run(
        "return [window.ran === undefined, document.querySelectorAll('#own *').length]"
    ) == [True, 0]


def test_drawing_again_gives_another_completion_and_greedy_the_first_one(page):
    greedy = page.own
    assert not page.browser.run("return document.getElementById('temperature').matches(':enabled')")
    page.change(lambda: page.browser.click("#sampled"))
    drawn = set()
    for _ in range(4):
        page.change(lambda: page.browser.click("#again"))
        drawn.add(page.own)
    assert len(drawn) > 1
    page.change(lambda: page.browser.click("#greedy"))
    assert page.own == greedy


def test_an_example_is_a_held_out_prompt(page):
    text = page.browser.property("#text", "value")
    page.change(lambda: page.browser.press("#example", "right"))
    assert page.browser.property("#text", "value") not in ("", text)


def test_a_number_that_is_none_is_named(page):
    page.browser.run("document.getElementById('length').value = ''")
    page.browser.click("button.main")
    assert page.browser.text("#error") == "most tokens: expected a number"


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window_and_every_control_has_a_name(page, width):
    page.browser.resize(width, 900)
    try:
        assert page.browser.run("return document.documentElement.scrollWidth") == width
        nodes = page.browser.command("Accessibility.getFullAXTree", {})["nodes"]
        kinds = ("slider", "button", "spinbutton", "textbox", "combobox")
        controls = [n for n in nodes if n.get("role", {}).get("value") in kinds]
        assert len(controls) > 9 and all(n["name"]["value"] for n in controls if not n["ignored"])
        picture = [n for n in nodes if n.get("role", {}).get("value") == "image"]
        assert any("Interpolated between" in n["name"]["value"] for n in picture)
    finally:
        page.browser.resize(1280, 900)


def test_all_of_it_is_reached_with_the_tab_key_in_reading_order(page):
    page.browser.run(
        "document.activeElement.blur(); window.getSelection().removeAllRanges(); window.scrollTo(0, 0)"
    )
    order = []
    for _ in range(12):
        for kind in ("rawKeyDown", "keyUp"):
            key = {"type": kind, "key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
            page.browser.command("Input.dispatchKeyEvent", key)
        order.append(
            page.browser.run("return document.activeElement.id || document.activeElement.textContent")
        )
    assert order[:8] == ["example", "text", "w0", "w1", "equal", "coverage alone", "brevity alone", "kl"]
    assert "Write" in order and "length" in order


def test_three_objectives_are_interpolated_in_their_triangle_and_any_two_can_be_drawn(three, window):
    run, url, _ = three
    page = Page(window, url)
    names = ["coverage", "brevity", "faithfulness"]
    points = ParetoReport.load(run).points
    corner = measured(run, {"coverage": 1 / 3, "brevity": 1 / 3, "faithfulness": 1 / 3}, points[0].kl_coef)
    assert page.dot == pytest.approx(corner[:2])  # a third of each is a point of the lattice
    # A linear function of w is interpolated exactly, whatever the place.
    script = """
      const points = arguments[0].map((weights) => ({weights}));
      return arguments[1].map((w) => neighbours(points, arguments[2], w).reduce(
        (sum, [p, share]) => sum.map((s, i) => s + share * p.weights[arguments[2][i]]), [0, 0, 0]));
    """
    lattice = [p.weights for p in points]
    wanted = torch.distributions.Dirichlet(torch.ones(3)).sample((20,)).double()
    wanted = [*(wanted / wanted.sum(-1, keepdim=True)).tolist(), [1, 0, 0], [0, 0.5, 0.5], [0.25, 0, 0.75]]
    for row, found in zip(wanted, window.run(script, lattice, wanted, names)):
        assert found == pytest.approx(row, abs=1e-6)
    counts = window.run(
        "return arguments[1].map((w) => neighbours(arguments[0].map((weights) => ({weights})), arguments[2], w).length)",
        lattice,
        wanted,
        names,
    )
    assert max(counts) == 3  # the corners of one small triangle
    # A grid with a hole: all points count, the near ones most.
    holes = [w for w in lattice if w["coverage"] != pytest.approx(1 / 3, abs=1e-3)]
    [found] = window.run(script, holes, [[1 / 3, 1 / 3, 1 / 3]], names)
    assert sum(found) == pytest.approx(1)
    window.run(
        "const up = document.getElementById('up'); up.value = 'faithfulness'; up.dispatchEvent(new Event('change'))"
    )
    assert page.dot == pytest.approx([corner[0], corner[2]])
    assert "faithfulness (mean reward)" in window.text("#picture")
    page.press("#w2", "end")
    assert [window.text(f"#w{i}-value") for i in range(3)] == ["0.00", "0.00", "1.00"]
    page.press("#w2", *["left"] * 40)  # what is left is shared by the others
    assert [window.text(f"#w{i}-value") for i in range(3)] == ["0.20", "0.20", "0.60"]
    assert window.problems() == []


def test_without_a_report_the_page_says_how_to_make_one(three, window, tmp_path):
    run, url, _ = three
    (run / "report.json").rename(tmp_path / "report.json")
    try:
        page = Page(window, url)
        assert page.own and f"clp-engine evaluate {run}" in window.text("#front-missing")
    finally:
        (tmp_path / "report.json").rename(run / "report.json")


def test_a_server_that_has_gone_is_said(three, window):
    """The last test here: it takes the server of `three` away."""
    _, url, process = three
    Page(window, url)
    process.kill()
    process.wait()
    window.click("button.main")
    window.wait(lambda: "is clp-engine steer still running?" in window.text("#error"), "an error")
    assert any("ERR_CONNECTION" in problem for problem in window.problems())
