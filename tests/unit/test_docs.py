"""The README stays short, links lead to files, and figures in prose are those of results/."""

import json
import re
import subprocess

import numpy as np
import pytest
import test_flags
from helpers import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SHEET_LIMIT, PICTURE_LIMIT = 200_000, 300_000  # bytes


def anchors(text):
    """Anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S))
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def tracked(pattern):
    """Files in git that match a pattern."""
    found = subprocess.run(
        ["git", "ls-files", "-z", pattern], cwd=ROOT, capture_output=True, text=True
    )
    return [ROOT / name for name in found.stdout.split("\0") if name]


def test_the_readme_fits_on_three_screens():
    """At most 230 lines and 14 kB: longer explanations belong in docs/."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 230 and len(text.encode()) <= 14_000


def test_the_page_of_hypotheses_stays_readable():
    """At most 120 lines of 110 characters: tables belong on the pages that it links to."""
    lines = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 110


@pytest.mark.parametrize("script", ["matrix.sh", "verdict.sh"])
def test_a_scripts_last_step_finds_the_place_of_its_table(script):
    """The page that a script of hours ends with has the marks between which its table goes."""
    from study.matrix_table import MARKS

    (page,) = re.findall(r"--readme (\S+)", (ROOT / "runs" / script).read_text())
    lines = (ROOT / page).read_text().splitlines()
    assert [line for line in lines if line in MARKS] == list(MARKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page):
    """A moved file or a renamed heading leaves no dead link behind."""
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page.name}: {link}"


# LOG.md tells what was, under the names of its time
NOW = [page for page in PAGES if page.name != "LOG.md"]
EXAMPLES = {"model_mine.py", "model_linear.py", "stay.py"}  # a reader's own files


@pytest.mark.parametrize("page", NOW, ids=lambda p: p.name)
def test_pages_name_files_and_modules_that_are_there(page):
    """Files and modules named in prose and code blocks exist, not only those that are linked."""
    text = page.read_text()
    files = set(re.findall(r"(?<![\w/.-])(\w[\w/.-]*\.(?:py|sh))\b", text)) - EXAMPLES
    modules = re.findall(r"(?:python -m |`)((?:study|figures|sim|harness|nets|formats)\.\w+)", text)
    files |= {f"{name.replace('.', '/')}.py" for name in modules}
    files |= set(re.findall(r"`((?:results|checkpoints|tests|runs|docs)/[\w/.-]+)`", text))
    assert not [name for name in files if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", NOW, ids=lambda p: p.name)
def test_pages_name_flags_that_are_taken(page):
    """Flags on the pages exist: a user types them as the page has them."""
    parsers = test_flags.parsers().values()
    taken = {option for parser in parsers for option in parser._option_string_actions}
    taken |= {"--nproc_per_node"}  # torchrun's
    taken |= {"--env", "--policy", "--eval"}  # lerobot-eval's, as --env.layout
    named = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", page.read_text()))
    assert not named - taken


def test_every_page_is_in_the_sites_menu():
    """Every page of docs/ is in the site's menu, where readers find it."""
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in menu, page


def test_readmes_success_rates_are_those_of_the_table():
    """The README's small table has the numbers of results/matrix/table.json, rounded to whole
    percents.
    """
    names = {
        "PARA": "para",
        "ACT": "act",
        "A": "a_pointer",
        "A with an MLP head": "a_mlp",
        "B": "b",
        "C": "c",
        "D's volume head (v7)": "d",
        "PARA, cameras turned about the robot in training": "para_turned",
        "blind replay": "blind",
        "oracle": "oracle",
    }
    table = json.loads((ROOT / "results" / "matrix" / "table.json").read_text())
    # what other commands made counts where nothing else is there
    cells = sorted(table["cells"], key=lambda c: not c["otherwise"])
    rates = {(c["row"], c["layout"]): f"{100 * c['success']['rate']:.0f}%" for c in cells}
    text = (ROOT / "README.md").read_text()
    block = re.search(r"(?m)^\| \| (benchmark.*)\|\n\|[-|]+\n((?:\|.*\n)+)", text)
    layouts = [c.strip() for c in block[1].split("|")]
    rows = [[c.strip() for c in line.strip("|\n ").split("|")] for line in block[2].splitlines()]
    assert {row[0] for row in rows} == set(names)
    for name, *cells in rows:
        for layout, cell in zip(layouts, cells):
            assert cell == rates.get((names[name], layout), ""), (name, layout)


def test_policies_table_names_every_policy_and_its_file():
    """The README names each --model_type with a file that exists."""
    from registry import REGISTRY

    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| \[(\w+\.py)\]", (ROOT / "README.md").read_text()))
    assert set(rows) == set(REGISTRY)
    for name, file in rows.items():
        assert REGISTRY[name].policy.__module__ == file.removesuffix(".py")


def test_a_clone_stays_light():
    """Pictures are small, and checkpoints lie in checkpoints/ alone, as people also clone to
    read.
    """
    for path in tracked("results/*"):
        if path.suffix in (".png", ".jpg", ".webp"):
            assert path.stat().st_size <= (
                SHEET_LIMIT if path.stem == "sheet" else PICTURE_LIMIT
            ), path
        assert path.suffix != ".safetensors", path


def test_contact_sheet_of_noise_stays_small(tmp_path):
    """A sheet of fourteen episodes of noise, which hardly compresses, is still small enough for
    git.
    """
    from figures import plots

    rng = np.random.default_rng(0)
    (tmp_path / "strips").mkdir()
    for i in range(14):
        plots.write_strip(
            list(rng.integers(0, 256, (10, 96, 96, 3), dtype=np.uint8)),
            tmp_path / "strips" / f"{i:03d}.png",
        )
    plots.sheet_from_strips(
        tmp_path,
        [{"episode": i, "released": True, "outcome": "released", "steps": 9} for i in range(14)],
    )
    assert 20_000 < (tmp_path / "sheet.jpg").stat().st_size <= SHEET_LIMIT


def test_strips_of_a_sheet_begin_alike(tmp_path):
    """An episode that ended early has fewer frames, and they stand below the others' first ones."""
    from figures import plots

    (tmp_path / "strips").mkdir()
    for i, length in enumerate((10, 4)):
        frames = [np.full((96, 96, 3), (200, 0, 0), np.uint8)] * length
        plots.write_strip(frames, tmp_path / "strips" / f"{i:03d}.png")
    row = {"released": True, "outcome": "released", "steps": 9}
    plots.sheet_from_strips(tmp_path, [{"episode": i, **row} for i in range(2)])
    sheet = plots.readable_image(tmp_path / "sheet.jpg").astype(int)
    red = (sheet[..., 0] > 150) & (sheet[..., 1] < 60)
    first = red.argmax(axis=1)[red.any(axis=1)]
    assert first.max() - first.min() < 20  # px; a frame is 90, and JPEG blurs an edge


def test_every_root_file_is_in_the_readmes_map():
    """The README's map names every file of the root, so that newcomers find it."""
    text = (ROOT / "README.md").read_text()
    patterns = re.findall(r"`([\w*]+\.py)`", text)
    for path in ROOT.glob("*.py"):
        assert any(path.match(pattern) for pattern in patterns), path.name
    for path in ROOT.glob("*/__init__.py"):
        assert f"| `{path.parent.name}/` |" in text, path.parent.name
