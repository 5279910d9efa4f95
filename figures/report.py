"""One self-contained HTML page of a run and its evaluations: no server, no network.

python -m figures.report --run runs/NAME --evals results/para_benchmark results/para_shifted --out report.html
python -m figures.report --evals results/* --markdown        # the README's table
"""

import html
import re
import tempfile
from pathlib import Path

import flags
from figures import plots
from figures.pages import STYLE, embed, figure, html_table, markdown_table, percent, rate
from harness.metrics import EARLY, within
from harness.records import read_config, read_episodes, read_metrics, read_summary
from runtime import atomic_path, run_script


def with_early_rates(folder):
    """The summary of an evaluation, with rates within EARLY steps from its episodes where it is
    older than these.
    """
    summary = read_summary(folder)
    if f"success_{EARLY}_rate" not in summary and summary["n"]:
        rows = [r for r in read_episodes(folder) if "crash" not in r]
        if len(rows) == summary["n"]:
            summary.update(
                {
                    f"{name}_{EARLY}_rate": sum(within(r, name, EARLY) for r in rows) / len(rows)
                    for name in ("success", "released")
                }
            )
    return summary


def early(summary, name):
    """The rate within EARLY steps as text before that at the end; nothing where it is not known."""
    found = summary.get(f"{name}_{EARLY}_rate")
    return "" if found is None else f"{100 * found:.0f} / "


def success_table(summaries):
    """HTML table: a row per evaluation."""
    head = [
        "policy",
        "layout",
        "n",
        f"placed and released, {EARLY} steps / end",
        f"LIBERO success, {EARLY} steps / end",
        "outcomes",
        "steps",
        "jerk (2nd difference) mm/step<sup>2</sup>",
        "3rd difference mm/step<sup>3</sup>",
        "coverage 4 / 8 / 16 px",
        "on path 4 / 8 / 16 px",
        "path length",
        "s / episode",
    ]
    rows = []
    for s in summaries:
        number = lambda key, form: "-" if s.get(key) is None else format(s[key], form)
        cells = [
            html.escape(s["model_type"]),
            html.escape(s["setting"]),
            str(s["n"]),
            early(s, "released") + rate(s["released_rate"], s["released_interval"]),
            early(s, "success") + rate(s["success_rate"], s["interval"]),
            ", ".join(f"{k} {v}" for k, v in s["outcomes"].items() if v),
            number("mean_steps", ".0f"),
            number("jerk_mm", ".3f"),
            number("third_difference_mm", ".3f"),
            *(
                " / ".join(number(f"{name}_{e}px", ".2f") for e in (4, 8, 16))
                for name in ("coverage", "on_path")
            ),
            number("path_length_ratio", ".2f"),
            f"{s['seconds_per_episode']['total']:.1f}" if s["seconds_per_episode"] else "-",
        ]
        rows.append(cells)
    return html_table(head, rows, strong=(3,))


def markdown(summaries):
    """The success table as Markdown: a row per evaluation."""
    rows = []
    for s in summaries:
        cover = " / ".join(
            "-" if s.get(f"coverage_{e}px") is None else f"{s[f'coverage_{e}px']:.2f}"
            for e in (4, 8, 16)
        )
        if s["n"]:
            rows.append(
                [
                    s["model_type"],
                    f"{s['setting']}, n = {s['n']}",
                    early(s, "released") + percent(s["released_rate"], s["released_interval"]),
                    early(s, "success") + percent(s["success_rate"], s["interval"]),
                    f"{s['mean_steps']:.0f}",
                    f"{s['jerk_mm']:.2f}",
                    cover,
                ]
            )
    return markdown_table(
        [
            "policy",
            "layout",
            f"placed and released, {EARLY} steps / end",
            f"LIBERO success, {EARLY} steps / end",
            "steps",
            "jerk (2nd difference, mm/step²)",
            "coverage 4 / 8 / 16 px",
        ],
        rows,
    )


def build(run, evals):
    """The page's HTML."""
    config = read_config(run) if run else {}
    summaries = [with_early_rates(e) for e in evals]
    page = [
        "<!doctype html><meta charset=utf-8><title>PARA on LIBERO: report</title>",
        f"<style>{STYLE}</style>",
        "<h1>PARA on LIBERO: closed-loop report</h1>",
    ]
    if config:
        data = config.get("dataset", {})
        page.append(
            f"<p class=lead>{html.escape(data.get('language', ''))} &middot; {config['args']['model_type']}, "
            f"{config['parameters']:,} parameters, {config['train_demos']} training demonstrations, backbone "
            f"{html.escape(config['backbone_identity'])}, commit {config['commit']}, seed {config['seed']}</p>"
        )
    page += [
        "<h2>Closed-loop success</h2>",
        success_table(summaries),
        "<p class=lead>Rates with Wilson 95% intervals. <b>Placed and released</b> asks for LIBERO's predicate with the gripper "
        "commanded and measured open. The benchmark's init states barely vary: <b>blind</b>, an open-loop replay of the mean "
        "layout, solves most of them. Only the shifted layout, with the objects moved 4-5 cm, shows that a policy looks.</p>",
    ]
    if run:
        page.append("<h2>Training</h2>")
        with tempfile.TemporaryDirectory() as scratch:
            curve = run / "loss.png"
            if not curve.exists() and (rows := read_metrics(run)):
                curve = Path(scratch) / "loss.png"
                plots.loss_curve(rows, curve)
            if curve.exists():
                page.append(f'<img alt="loss curve" src="{embed(curve, "image/png")}">')
        page.append("<h2>Predicted against true waypoints on validation demonstrations</h2>")
        page += [
            f'<img alt="{p.stem}" src="{embed(p, "image/png")}">'
            for p in sorted(
                p for kind in ("overlay", "rollout", "attention") for p in run.glob(f"{kind}_*.png")
            )
        ]
    for folder, s in zip(evals, summaries):
        page.append(f"<h2>{html.escape(s['model_type'])}, {html.escape(s['setting'])}</h2>")
        for video in sorted((folder / "videos").glob("*.mp4")):
            if named := re.fullmatch("([0-9]+)_(.+)", video.stem):
                page.append(figure(video, f"episode {int(named[1])}: {named[2]}"))
        if (folder / "sheet.jpg").exists():
            page.append(
                f'<img alt="contact sheet" src="{embed(folder / "sheet.jpg", "image/jpeg")}">'
            )
    page.append("<h2>Commands</h2><pre>")
    commands = ([config["dataset"].get("command", ""), config["command"]] if config else []) + [
        s["command"] for s in summaries
    ]
    page += [html.escape(c) for c in commands if c]
    page.append("</pre>")
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
                f"{s['model_type']:>8} {s['setting']:<10} placed and released {100 * s['released_rate']:5.1f}%  "
                f"LIBERO success {100 * s['success_rate']:5.1f}%  n = {s['n']}"
            )
    print(f"report: {args.out.resolve()}")


if __name__ == "__main__":
    run_script(main)
