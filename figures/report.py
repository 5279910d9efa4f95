"""One self-contained HTML page of a run and its evaluations: no server, no network.

python -m figures.report --run runs/NAME --evals results/para_benchmark results/para_shifted
# a table of several evaluations
python -m figures.report --evals results/para_* results/blind_* --markdown
"""

import html
import re
import tempfile
from pathlib import Path

import flags
from figures import plots
from figures.pages import STYLE, embed, figure, html_table, markdown_table, percent, rate
from harness.metrics import EARLY, within
from harness.records import read_config, read_metrics, read_summary, scored_episodes
from runtime import atomic_path, run_script

RATES = ("released", "success")
DISTANCES = (4, 8, 16)  # px
EXPLAINED = (
    "Rates with Wilson 95% intervals. <b>Placed and released</b> asks for LIBERO's predicate with "
    "the gripper commanded and measured open. The benchmark's init states barely vary: "
    "<b>blind</b>, an open-loop replay of the mean layout, solves most of them. Only the shifted "
    "layout, with the objects moved 4-5 cm, shows that a policy looks."
)


def with_early_rates(folder):
    """The summary of an evaluation. An older one has no rates within EARLY steps: they are counted
    from its episodes.
    """
    summary = read_summary(folder)
    if f"success_{EARLY}_rate" in summary or not summary["n"]:
        return summary
    rows = scored_episodes(folder).values()
    # only where every episode of the summary has its row
    if len(rows) == summary["n"]:
        for name in RATES:
            early = sum(within(r, name, EARLY) for r in rows)
            summary[f"{name}_{EARLY}_rate"] = early / len(rows)
    return summary


def early(summary, name):
    """The rate within EARLY steps as text, put before the rate at the end; "" where unknown."""
    found = summary.get(f"{name}_{EARLY}_rate")
    return "" if found is None else f"{100 * found:.0f} / "


def number(summary, key, form):
    """A number of a summary as text, "-" where it has none."""
    return "-" if summary.get(key) is None else format(summary[key], form)


def near(summary, name):
    """Shares of a path that lie near another, by distance, as text."""
    return " / ".join(number(summary, f"{name}_{px}px", ".2f") for px in DISTANCES)


def outcomes_of(summary):
    """{how episodes ended: how many}, those among them that crashed and count in no rate."""
    return {**summary["outcomes"], "crashed, not counted": summary["crashes"]}


def success_table(summaries):
    """HTML table: a row per evaluation, how often it succeeded and what an episode took."""
    head = ["policy", "layout", "n", f"placed and released, {EARLY} steps / end"]
    head += [f"LIBERO success, {EARLY} steps / end", "outcomes", "steps", "s / episode"]
    rows = []
    for s in summaries:
        seconds = s["seconds_per_episode"]
        rows.append(
            [
                html.escape(s["model_type"]),
                html.escape(s["setting"]),
                str(s["n"]),
                early(s, "released") + rate(s["released_rate"], s["released_interval"]),
                early(s, "success") + rate(s["success_rate"], s["interval"]),
                ", ".join(f"{k} {v}" for k, v in outcomes_of(s).items() if v),
                number(s, "mean_steps", ".0f"),
                f"{seconds['total']:.1f}" if seconds else "-",
            ]
        )
    return html_table(head, rows, strong=(3,))


def path_table(summaries):
    """HTML table: a row per evaluation, how smooth its paths were and how near to the expert's."""
    head = ["policy", "layout", "jerk (2nd difference), mm/step<sup>2</sup>"]
    head += ["3rd difference, mm/step<sup>3</sup>", "coverage 4 / 8 / 16 px"]
    head += ["on path 4 / 8 / 16 px", "path length"]
    rows = [
        [
            html.escape(s["model_type"]),
            html.escape(s["setting"]),
            number(s, "jerk_mm", ".3f"),
            number(s, "third_difference_mm", ".3f"),
            near(s, "coverage"),
            near(s, "on_path"),
            number(s, "path_length_ratio", ".2f"),
        ]
        for s in summaries
    ]
    return html_table(head, rows)


def markdown(summaries):
    """The success table as Markdown: a row per evaluation."""
    head = [
        "policy",
        "layout",
        f"placed and released, {EARLY} steps / end",
        f"LIBERO success, {EARLY} steps / end",
        "steps",
        "jerk (2nd difference, mm/step²)",
        "coverage 4 / 8 / 16 px",
    ]
    rows = [
        [
            s["model_type"],
            f"{s['setting']}, n = {s['n']}",
            early(s, "released") + percent(s["released_rate"], s["released_interval"]),
            early(s, "success") + percent(s["success_rate"], s["interval"]),
            f"{s['mean_steps']:.0f}",
            f"{s['jerk_mm']:.2f}",
            near(s, "coverage"),
        ]
        for s in summaries
        if s["n"]
    ]
    return markdown_table(head, rows)


def described(config):
    """What a run trained, as the page's first paragraph."""
    language = html.escape(config.get("dataset", {}).get("language", ""))
    return (
        f"<p class=lead>{language} &middot; {config['args']['model_type']}, "
        f"{config['parameters']:,} parameters, {config['train_demos']} training demonstrations, "
        f"backbone {html.escape(config['backbone_identity'])}, commit {config['commit']}, "
        f"seed {config['seed']}</p>"
    )


def training(run):
    """A run's loss curve and its pictures, as parts of the page."""
    parts = ["<h2>Training</h2>"]
    with tempfile.TemporaryDirectory() as scratch:
        curve = run / "loss.png"
        # a run that was stopped has no picture yet: draw what there is
        if not curve.exists() and (rows := read_metrics(run)):
            curve = Path(scratch) / "loss.png"
            plots.loss_curve(rows, curve)
        if curve.exists():
            parts.append(image("loss curve", curve, "image/png"))
    parts.append("<h2>Predicted against true waypoints on validation demonstrations</h2>")
    kinds = ("overlay", "rollout", "attention")
    pictures = sorted(p for kind in kinds for p in run.glob(f"{kind}_*.png"))
    return parts + [image(p.stem, p, "image/png") for p in pictures]


def image(name, path, kind):
    return f'<img alt="{name}" src="{embed(path, kind)}">'


def films(folder, summary):
    """An evaluation's videos and contact sheet, as parts of the page."""
    title = f"{summary['model_type']}, {summary['setting']}"
    parts = [f"<h2>{html.escape(title)}</h2>"]
    for video in sorted((folder / "videos").glob("*.mp4")):
        # NUMBER_OUTCOME.mp4
        if named := re.fullmatch("([0-9]+)_(.+)", video.stem):
            parts.append(figure(video, f"episode {int(named[1])}: {named[2]}"))
    if (folder / "sheet.jpg").exists():
        parts.append(image("contact sheet", folder / "sheet.jpg", "image/jpeg"))
    return parts


def build(run, evals):
    """The page's HTML, and the evaluations' summaries."""
    config = read_config(run) if run else {}
    summaries = [with_early_rates(e) for e in evals]
    page = [
        "<!doctype html><meta charset=utf-8><title>PARA on LIBERO: report</title>",
        f"<style>{STYLE}</style>",
        "<h1>PARA on LIBERO: closed-loop report</h1>",
        *([described(config)] if config else []),
        "<h2>Closed-loop success</h2>",
        success_table(summaries),
        f"<p class=lead>{EXPLAINED}</p>",
        "<h2>Paths</h2>",
        path_table(summaries),
    ]
    if run:
        page += training(run)
    for folder, summary in zip(evals, summaries):
        page += films(folder, summary)
    commands = [s["command"] for s in summaries]
    if config:
        # in order: collection, training, evaluations
        commands = [config["dataset"].get("command", ""), config["command"], *commands]
    page += ["<h2>Commands</h2><pre>", *(html.escape(c) for c in commands if c), "</pre>"]
    return "\n".join(page), summaries


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("--run", type=Path, help="training run folder")
    parser.add_argument("--evals", type=Path, nargs="+", required=True, help="evaluation folders")
    parser.add_argument("--out", type=flags.new_file(".html", ".htm"), default=Path("report.html"))
    parser.add_argument(
        "--markdown", action="store_true", help="only print the success table as Markdown"
    )
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.markdown:
        print(markdown([with_early_rates(e) for e in args.evals]))
        return
    page, summaries = build(args.run, args.evals)
    with atomic_path(args.out) as scratch:
        scratch.write_text(page)
    for s in summaries:
        if s["n"]:
            print(
                f"{s['model_type']:>8} {s['setting']:<10} "
                f"placed and released {100 * s['released_rate']:5.1f}%  "
                f"LIBERO success {100 * s['success_rate']:5.1f}%  n = {s['n']}"
            )
    print(f"report: {args.out.resolve()}")


if __name__ == "__main__":
    run_script(main)
