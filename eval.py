"""Evaluate a policy in closed loop in LIBERO's simulator.

    python eval.py --teleport --zero_rotation --max_steps 600             # newest run's checkpoint, else the committed one
    python eval.py --ckpt runs/NAME/checkpoint.safetensors --teleport --zero_rotation --layout shifted --n_episodes 50
    python eval.py --policy oracle --teleport --zero_rotation             # expert, oracle or blind through the same path
    python eval.py --policy expert --variant lift_once                    # a task that asks for memory, see sim/variants.py

Layouts: `benchmark` is LIBERO's own init states; `shifted` moves the task's objects 4-5 cm, each by
itself; `viewpoint` and `viewpoint_shifted` are these two seen from the test views of
sim/settings.py, a view an episode in turn; `position` takes the test positions in turn, with the
same few random layouts at each. `val`, `val_shifted` and so on are random layouts, views and
positions apart from all of these, for tuning. An interrupted run goes on with the same command.

--task_suite libero_spatial_swap or _object, LIBERO-PRO's suites: the same task with plate and
cookie box exchanged, or with other-looking bowls and plate, from their own init states. A
checkpoint of libero_spatial is taken as it is.
"""

import argparse
import json
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import flags
from figures import plots
from harness.checkpoint import demos_mujoco, load_policy, newest_checkpoint, run_name
from harness.metrics import EARLY, ERROR, OUTCOMES, wilson, within
from harness.records import check_stamp, read_episodes
from runtime import (
    UserError,
    append_jsonl,
    choose_device,
    command_line,
    git_commit,
    run_script,
    write_json,
)
from sim import settings
from sim.expert import EXPERTS
from sim.libero_env import Scene, find_task, init_states, simulator, simulator_versions
from sim.protocol import check_protocol
from sim.rollout import BlindAgent, OracleAgent, PolicyAgent, expert_path, run_episode, run_expert
from sim.variants import LIFT_OUTCOMES, VARIANTS, new_expert
from sim.workers import TIMEOUT, run_jobs

# of shifts, a stream of its own: the shifted test layouts stay as published
SHIFT_SEED, VAL_SHIFT_SEED = 3_000, 90_000_000
# crashed episodes without one that ran, or errors of the policy alone, after which an evaluation
# gives up
HOPELESS = 6
SIMULATOR = ("mujoco", "robosuite", "OpenGL")
LAYOUTS = {  # -> (setting, which of its conditions)
    "benchmark": ("in_dist", "test"),
    "shifted": ("in_dist", "test"),
    "val": ("in_dist", "val"),
    "val_shifted": ("in_dist", "val"),
    "viewpoint": ("viewpoint", "test"),
    "viewpoint_shifted": ("viewpoint", "test"),
    "val_viewpoint": ("viewpoint", "val"),
    "val_viewpoint_shifted": ("viewpoint", "val"),
    "position": ("position", "test"),
    "val_position": ("position", "val"),
}


def episode_state(scene, layout, index, split=None):
    """Put the camera where an episode has it -> (its init state (S,), its settings.Condition):
    functions of layout, split and index alone."""
    (setting, part), draw, states = LAYOUTS[layout], ("val_layout", index), None
    conditions = settings.conditions(setting, part, split)
    condition = conditions[index % len(conditions)]
    if setting == "position":  # the same layouts at every position
        draw = f"{part}_position", index // len(conditions)
    elif part == "test":
        states = scene.init_states()
    state = (
        first_valid(scene, *draw, scene.common_shift(condition))
        if states is None
        else states[index % len(states)]
    )
    if layout.endswith("shifted"):
        state = scene.shifted_layout(
            state, (SHIFT_SEED if part == "test" else VAL_SHIFT_SEED) + index
        )
    scene.set_view(condition)  # last: a random layout rebuilds the model
    return state, condition


def first_valid(scene, purpose, index, offsets):
    """The first good random layout (S,) of a purpose's index, see sim/settings.py: the same for
    every --seed. Raises RuntimeError after 60 bad ones."""
    for attempt in range(60):
        state = scene.random_layout(
            settings.random_seed(purpose, 0, index, attempt), offsets=offsets
        )
        if state is not None:
            return state
    raise RuntimeError(
        f"60 resets in a row were bad for {purpose} {index}"
        + (
            f", objects shifted by {[*offsets.values()][0]}: in a full scene they meet others, see --clean_scene"
            if offsets
            else ""
        )
    )


def use_flags(policy, args):
    """Set how a policy with a history is used: --feedback, --sample, --temperature. Raises
    UserError for one without.
    """
    for name in ("feedback", "sample", "temperature"):
        value = getattr(args, name)
        if value is None:
            continue
        if not hasattr(policy.config, name):
            raise UserError(
                f"--{name}: {type(policy).__name__} has no such choice; only policies with a history have"
            )
        setattr(policy.config, name, value)
    policy.check()


class EvalWorker:
    """Owns a scene and an agent; a job is an episode's index, or "protocol"."""

    def __init__(self, args):
        self.args = args
        self.scene = Scene(args.task_suite, args.task_id, args.image_size, args.clean_scene)
        self.extra, self.agent = {}, None
        if args.policy == "checkpoint":
            policy, _, self.extra = load_policy(args.ckpt, args.device, args.backbone_weights)
            use_flags(policy, args)
            self.agent = PolicyAgent(policy)
        elif args.policy == "oracle":
            self.agent = OracleAgent(args.waypoint_stride, args.grid, args.n_height_bins)
        elif args.policy == "blind":
            trained = settings.conditions(LAYOUTS[args.layout][0], "train", args.split)
            self.agent = BlindAgent(np.mean([(c.dx, c.dy) for c in trained], axis=0))

    def run(self, job):
        """A job -> its row, or {"stopped": traceback} where this program failed: no result, and no
        crash that could be left out. An exception of the simulator is one, and goes to run_jobs."""
        try:
            return self.episode(job)
        except Exception as error:
            if job == "protocol" or simulators(error):
                raise
            return {"stopped": traceback.format_exc()}

    def episode(self, job):
        if job == "protocol":
            return check_protocol(
                self.scene,
                self.extra,
                settings.conditions(*LAYOUTS[self.args.layout], self.args.split)[0],
            )
        args, scene = self.args, self.scene
        state, condition = episode_state(scene, args.layout, job, args.split)
        path = expert_path(scene, state, grasp=args.grasp, variant=args.variant)
        every = args.video_every if job < args.n_videos else 0
        if args.policy == "expert":
            row, frames, thumbs = run_expert(
                scene, state, video_every=every, path=path, grasp=args.grasp, variant=args.variant
            )
        else:
            row, frames, thumbs = run_episode(
                scene,
                self.agent,
                state,
                args.teleport,
                args.zero_rotation,
                args.max_steps,
                args.waypoint_stride,
                every,
                path,
                args.variant,
                seed=draw_seed(args.seed, job),
            )
        folder = Path(args.out)
        if frames:
            K, E = scene.camera()
            plots.write_video(
                frames, K, E, folder / "videos" / f"{job:03d}_{row['outcome']}.mp4", fps=20 / every
            )
            thumbs = thumbs or [f[0][::4, ::4] for f in frames]
        if thumbs:
            picked = [
                thumbs[i] for i in np.linspace(0, len(thumbs) - 1, min(10, len(thumbs))).astype(int)
            ]
            plots.write_strip(picked, folder / "strips" / f"{job:03d}.png")
        setting, part = LAYOUTS[args.layout]
        return {
            "episode": job,
            "init_state": job % 50 if part == "test" and setting != "position" else None,
            "layout": args.layout,
            **condition.described(setting),
            "seed": args.seed,
            **row,
        }

    def close(self):
        self.scene.close()


def simulators(error):
    """True for an exception of MuJoCo's, robosuite's or OpenGL's: the simulator died, whatever
    policy was tested.
    """
    return type(error).__module__.partition(".")[0] in SIMULATOR


def draw_seed(seed, episode):
    """Seed of all that a policy draws at random in an episode: it knows no worker and no other
    episode.
    """
    low, high, *_ = settings.random_seed("sample", seed, episode)
    return high << 32 | low


def summarise(rows, args, info):
    """Per-episode rows -> the cell's summary."""
    scored = [r for r in rows if "crash" not in r]
    n, wins, freed = (
        len(scored),
        sum(r["success"] for r in scored),
        sum(r["released"] for r in scored),
    )
    early, freed_early = (
        sum(within(r, key, EARLY) for r in scored) for key in ("success", "released")
    )
    rate = lambda count: count / n if n else None
    values = lambda key: [r[key] for r in scored if r.get(key) is not None]
    mean = lambda key: round(float(np.mean(values(key))), 4) if values(key) else None
    lifting = args.variant == "lift_once"
    return {
        "model_type": info.get("model_type", args.policy),
        "policy": args.policy,
        "variant": args.variant,
        "setting": f"{args.layout}, {args.variant}" if lifting else args.layout,
        "split": args.split,
        "clean_scene": args.clean_scene,
        "task_suite": args.task_suite,
        "task_id": args.task_id,
        "n": n,
        "crashes": len(rows) - n,
        "max_steps": args.max_steps,
        "success_rate": rate(wins),
        "interval": wilson(wins, n),
        "released_rate": rate(freed),
        "released_interval": wilson(freed, n),
        f"success_{EARLY}_rate": rate(early),
        f"success_{EARLY}_interval": wilson(early, n),
        f"released_{EARLY}_rate": rate(freed_early),
        f"released_{EARLY}_interval": wilson(freed_early, n),
        "outcomes": {
            o: sum(r["outcome"] == o for r in scored)
            for o in (*(LIFT_OUTCOMES if lifting else OUTCOMES), ERROR)
        },
        **({"lifts": dict(sorted(Counter(r["lifts"] for r in scored).items()))} if lifting else {}),
        "mean_steps": mean("steps"),
        "jerk_mm": mean("jerk_mm"),
        "third_difference_mm": mean("third_difference_mm"),
        **{
            f"{name}_{e}px": mean(f"{name}_{e}px")
            for name in ("coverage", "on_path")
            for e in (4, 8, 16)
        },
        "path_length_ratio": mean("path_length_ratio"),
        "seconds_per_episode": {
            k: round(float(np.mean([r["seconds"][k] for r in scored])), 3)
            for k in scored[0]["seconds"]
        }
        if scored
        else None,
        "workers": args.workers,
        "seed": args.seed,
        "command": command_line(),
        "commit": git_commit(),
        "checkpoint": str(args.ckpt) if args.ckpt else None,
        "trained": {
            k: info.get(k)
            for k in (
                "command",
                "commit",
                "seed",
                "step",
                "minutes",
                "train_demos",
                "backbone_identity",
            )
        }
        if info
        else None,
    }


def print_summary(s):
    """The summary as a user reads it."""
    percent = lambda rate, interval: (
        f"{100 * rate:.1f}% (95% {100 * interval[0]:.0f}-{100 * interval[1]:.0f}%)"
    )
    print(
        f"\n{s['model_type']} on {s['task_suite']} task {s['task_id']}, {s['setting']} layout, n = {s['n']}"
        + (f", {s['crashes']} crashed and not scored" if s["crashes"] else "")
        + (
            f", {s['outcomes'][ERROR]} failed by an error of the policy"
            if s["outcomes"][ERROR]
            else ""
        )
    )
    if not s["n"]:
        return
    if s["variant"] == "lift_once":
        print(f"  lifted once, then stayed out  {percent(s['success_rate'], s['interval'])}")
        print(
            "  lifts in an episode           "
            + ", ".join(f"{k} in {v}" for k, v in s["lifts"].items())
        )
    else:
        for name, key, rate, interval in (
            ("success (LIBERO's predicate)", "success", "success_rate", "interval"),
            ("placed and released", "released", "released_rate", "released_interval"),
        ):
            early = percent(s[f"{key}_{EARLY}_rate"], s[f"{key}_{EARLY}_interval"])
            print(
                f"  {name:<30}{early} in {EARLY} steps, {percent(s[rate], s[interval])} in {s['max_steps']}"
            )
    print(
        "  outcomes                      " + ", ".join(f"{k} {v}" for k, v in s["outcomes"].items())
    )
    print(
        f"  steps {s['mean_steps']:.0f}, jerk (mean second difference of the path) {s['jerk_mm']:.3f} mm/step^2, "
        f"mean third difference {s['third_difference_mm']:.3f} mm/step^3"
    )
    if s["path_length_ratio"] is not None:
        near = lambda name: ", ".join(f"{s[f'{name}_{e}px']:.3f} at {e} px" for e in (4, 8, 16))
        print(
            f"  of the expert's path near the executed one {near('coverage')}; of the executed path near the expert's "
            f"{near('on_path')}; {s['path_length_ratio']:.2f} times as long"
        )
    print(
        "  seconds per episode           "
        + ", ".join(f"{k} {v:.2f}" for k, v in s["seconds_per_episode"].items())
    )


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--ckpt",
        type=Path,
        help="checkpoint.safetensors (the newest run's, else the committed one)",
    )
    parser.add_argument(
        "--policy", default="checkpoint", choices=("checkpoint", "expert", "oracle", "blind")
    )
    parser.add_argument("--backbone_weights", type=Path, help="local file of backbone weights")
    parser.add_argument("--teleport", action="store_true", help="servo to each absolute waypoint")
    parser.add_argument("--zero_rotation", action="store_true", help="keep the start's orientation")
    parser.add_argument(
        "--max_steps", type=flags.count, default=600, help="control steps an episode may take"
    )
    parser.add_argument(
        "--feedback",
        help="policies with a history: measured, predicted or hybrid:N (the checkpoint's)",
    )
    parser.add_argument(
        "--sample",
        action="store_const",
        const=True,
        help="policies with a history: sample the waypoint",
    )
    parser.add_argument("--temperature", type=flags.positive, help="of --sample")
    parser.add_argument("--layout", default="benchmark", choices=list(LAYOUTS))
    parser.add_argument(
        "--split",
        choices=sorted({s for names in settings.SPLITS.values() for s in names if s}),
        help="how a setting's conditions are split, see sim/settings.py (as the checkpoint's data)",
    )
    parser.add_argument("--n_episodes", type=flags.count, help="episodes (50; position: 5 at each)")
    parser.add_argument("--task_suite", help="the checkpoint's own task, else libero_spatial")
    parser.add_argument("--task_id", type=flags.whole)
    parser.add_argument(
        "--grasp",
        choices=list(EXPERTS),
        help="the expert's grasp, for expert, oracle and coverage (the checkpoint's data's, else side)",
    )
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        help="the task, or lift_once (the checkpoint's data's, else task)",
    )
    parser.add_argument(
        "--clean_scene",
        action=argparse.BooleanOptionalAction,
        help="without distractors and unused fixtures (as the checkpoint's data, else by layout)",
    )
    parser.add_argument("--workers", type=flags.count, default=2)
    parser.add_argument(
        "--recycle", type=flags.count, default=25, help="episodes after which a worker is replaced"
    )
    parser.add_argument(
        "--timeout",
        type=flags.positive,
        default=TIMEOUT,
        help="seconds after which an episode counts as hung",
    )
    parser.add_argument(
        "--waypoint_stride",
        type=flags.count,
        default=5,
        help="oracle: steps ahead; without --teleport: actions per waypoint",
    )
    parser.add_argument(
        "--grid", type=flags.at_least(2, 4096), default=64, help="oracle: image cells"
    )
    parser.add_argument(
        "--n_height_bins", type=flags.at_least(2, 4096), default=32, help="oracle: height bins"
    )
    parser.add_argument("--image_size", type=flags.pixels, default=448)
    parser.add_argument(
        "--n_videos", type=flags.whole, default=3, help="record the first N episodes"
    )
    parser.add_argument(
        "--video_every", type=flags.count, default=4, help="control steps between video frames"
    )
    parser.add_argument("--out", type=flags.new_folder, help="folder of results (runs/eval/...)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--seed",
        type=flags.whole,
        default=0,
        help="with --sample: of what is drawn, by episode; else it changes nothing",
    )
    return parser


def prepare(args):
    """Fill in what was not given, from the checkpoint -> its info."""
    args.device = choose_device(args.device)
    info, (setting, part) = {}, LAYOUTS[args.layout]
    if args.policy == "checkpoint":
        if args.ckpt is None:
            args.ckpt, sentence = newest_checkpoint()
            print(sentence)
        # bad files are refused before workers start
        policy, info, _ = load_policy(args.ckpt, "cpu", args.backbone_weights)
        use_flags(policy, args)
        args.image_size, args.waypoint_stride = (
            policy.config.image_size,
            policy.config.waypoint_stride,
        )
        trained_on = info.get("dataset", {})
        args.task_suite, args.grasp = (
            args.task_suite or trained_on.get("task_suite"),
            args.grasp or trained_on.get("grasp"),
        )
        args.variant = args.variant or trained_on.get("variant")
        args.task_id = int(trained_on.get("task_id", 0)) if args.task_id is None else args.task_id
        if args.clean_scene is None and "clean_scene" in trained_on:
            args.clean_scene = trained_on["clean_scene"] == "True"
        if trained_on.get("setting") == setting and trained_on.get("split"):
            args.split = args.split or trained_on["split"]
            if args.split != trained_on["split"]:
                raise UserError(
                    f"--split {args.split}: {args.ckpt} was trained on split {trained_on['split']}, so that training "
                    "conditions could be among those tested; leave the flag out, or train on that split"
                )
        print(
            f"{args.ckpt}: {info['model_type']}, step {info.get('step')}, backbone {info['backbone_identity']}"
        )
    args.task_suite, args.task_id, args.grasp = (
        args.task_suite or "libero_spatial",
        args.task_id or 0,
        args.grasp or "side",
    )
    args.variant = args.variant or "task"
    # the oracle has no memory, and would let go where it grasped
    if args.policy in ("blind", "oracle") and args.variant != "task":
        raise UserError(
            f"--policy {args.policy}: it has no plan for --variant {args.variant}; use expert or a checkpoint"
        )
    new_expert(args.grasp, args.variant)  # refuses a pair that it does not know
    args.split = settings.resolve_split(setting, args.split)
    args.clean_scene = (
        settings.clean_by_default(setting) if args.clean_scene is None else args.clean_scene
    )
    if args.n_episodes is None:
        args.n_episodes = (
            50 if setting != "position" else 5 * len(settings.conditions(setting, part, args.split))
        )
    task = find_task(args.task_suite, args.task_id)
    available = len(init_states(task))
    if args.n_episodes < 1 or args.layout == "benchmark" and args.n_episodes > available:
        raise UserError(
            f"--n_episodes {args.n_episodes}: {task.key} has {available} benchmark init states, use 1 to {available}"
        )
    name = info.get("model_type", args.policy)
    run = f"{run_name(args.ckpt)}_" if args.ckpt else ""
    split = "" if args.split == settings.SPLITS[setting][0] else f"_{args.split}"
    kind = "" if args.variant == "task" else f"_{args.variant}"
    args.out = args.out or Path("runs/eval") / f"{run}{name}_{task.key}_{args.layout}{split}{kind}"
    return info


def where_run(info):
    """What every row and the summary say of the simulator: versions and renderer, and of a
    checkpoint the MuJoCo version that its demonstrations were simulated with. Prints a warning
    where that is another major.minor than runs here."""
    found, ours = {"simulator": simulator()}, simulator_versions()["mujoco"]
    if info:
        theirs = found["demos_mujoco"] = demos_mujoco(info)
        if theirs is None or theirs.split(".")[:2] != ours.split(".")[:2]:
            print(
                f"warning: the checkpoint's demonstrations were simulated with MuJoCo {theirs or 'of an unknown version'}, "
                f"here runs {ours}: objects may rest and slide otherwise, see docs/premise.md"
            )
    return found


def evaluate(args):
    info = prepare(args)
    where = where_run(info)
    asked = {
        k: str(v)
        for k, v in vars(args).items()
        if k
        not in (
            "out",
            "workers",
            "recycle",
            "timeout",
            "n_episodes",
            "n_videos",
            "video_every",
            "device",
        )
    }
    asked["trained"] = (
        f"{info.get('commit')} step {info.get('step')} seed {info.get('seed')} {info.get('minutes')}"
    )
    asked["mujoco"] = simulator_versions()["mujoco"]
    stamp, episodes = args.out / "settings.json", args.out / "episodes.jsonl"
    check_stamp(args.out, asked)
    write_json(stamp, asked)
    done = {
        r["episode"]: r
        for r in read_episodes(args.out, args.layout)
        if "crash" not in r and r["episode"] < args.n_episodes
    }
    jobs = [i for i in range(args.n_episodes) if i not in done]
    bar = tqdm(
        total=args.n_episodes,
        initial=len(done),
        desc=f"{args.policy} {args.layout}",
        unit="episode",
    )
    rows, protocol = dict(done), None
    for outcome in run_jobs(
        ["protocol", *jobs] if jobs else [],
        EvalWorker,
        (args,),
        args.workers,
        args.recycle,
        timeout=args.timeout,
    ):
        if outcome.job == "protocol":
            if outcome.error:
                raise UserError(
                    f"the evaluation's protocol check failed, nothing is scored: {outcome.error.strip().splitlines()[-1]}"
                )
            protocol = outcome.result
            tqdm.write("protocol ok: " + json.dumps(protocol))
            write_json(args.out / "protocol.json", protocol)
            continue
        row = outcome.result or {
            "episode": outcome.job,
            "layout": args.layout,
            "seed": args.seed,
            "crash": outcome.error.strip().splitlines()[-1],
            "traceback": outcome.error,
        }
        if "stopped" in row:
            tqdm.write(row["stopped"])
            raise UserError(
                f"episode {outcome.job} failed in this program, not in the simulator, so nothing is summarised: "
                f"{row['stopped'].strip().splitlines()[-1]}; once that is mended the same command goes on"
            )
        row = {**row, **where}
        append_jsonl(episodes, row)
        rows[outcome.job] = row
        scored = [r for r in rows.values() if "crash" not in r]
        if not scored and len(rows) >= HOPELESS:
            raise UserError(
                f"the first {len(rows)} episodes all crashed, the last with {row['crash']} (tracebacks: {episodes})"
            )
        if len(scored) >= HOPELESS and all(r["outcome"] == ERROR for r in scored):
            raise UserError(
                f"the first {len(scored)} episodes all ended in an error of the policy, the last: {scored[-1]['error']} "
                f"(tracebacks: {episodes}); mend it, then remove {args.out}"
            )
        bar.set_postfix_str(
            f"success {sum(r['success'] for r in scored)}/{len(scored)}", refresh=False
        )
        bar.update()
    bar.close()
    summary = {
        **summarise([rows[i] for i in sorted(rows)], args, info),
        **where,
        "versions": simulator_versions(),
    }
    write_json(args.out / "summary.json", summary)
    plots.sheet_from_strips(args.out, [rows[i] for i in sorted(rows)])
    print_summary(summary)
    print(f"  {args.out}/summary.json, episodes.jsonl, sheet.jpg, videos/")
    return 1 if not summary["n"] else 0


if __name__ == "__main__":
    run_script(lambda: evaluate(build_parser().parse_args()))
