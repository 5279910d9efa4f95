"""Evaluate a policy in closed loop in LIBERO's simulator.

    # the newest run's checkpoint, else the committed one
    python eval.py --teleport --zero_rotation --max_steps 600
    python eval.py --ckpt runs/NAME/checkpoint.safetensors --teleport --zero_rotation \\
        --layout shifted --n_episodes 50
    # expert, oracle or blind through the same path
    python eval.py --policy oracle --teleport --zero_rotation
    # every task of a suite, see docs/suites.md
    python eval.py --task_suite libero_spatial --task_ids all --teleport
    # LIBERO-Plus's cameras, robot starts, layouts: see docs/libero_plus.md
    python eval.py --plus camera --task_suite libero_spatial --teleport --n_episodes 50
    # a task that asks for memory, see sim/variants.py
    python eval.py --policy expert --variant lift_once

Layouts: `benchmark` is LIBERO's own init states. `shifted` moves the task's objects 4-5 cm, each by
itself. `viewpoint` and `viewpoint_shifted` are these two, each episode seen from the next of the
test views of sim/settings.py. `position` takes the test positions in turn, with the same few random
layouts at each. `val`, `val_shifted` and so on are random layouts, views and positions apart from
all of these, for tuning. `verdict_...` and `moved_midway`, in which the bowl is set aside while the
robot acts, are fresh sets, and `val_verdict_...` what to tune on, see sim/layouts.py. An
interrupted run goes on with the same command.

One process owns the network and answers the simulators of all --workers; an episode's outcome does
not depend on their number.

--policy remote plays the policy of a server in openpi's protocol, see docs/your_policy.md.

--task_suite libero_spatial_swap or _object, LIBERO-PRO's suites: the same task with plate and
cookie box exchanged, or with other-looking bowls and plate, from their own init states. A
checkpoint of libero_spatial is taken as it is.
"""

import argparse
import contextlib
import json
import traceback
from pathlib import Path

import numpy as np
from tqdm import tqdm

# nothing that imports torch: every simulator's worker imports this file
import flags
from figures import plots
from harness.metrics import ERROR
from harness.records import check_stamp, newest_checkpoint, read_episodes, scored_rows
from harness.remote import ServerLost
from harness.summary import place_of, print_summary, summarise
from runtime import UserError, append_jsonl, run_script, write_json
from sim import instructions, layouts, plus, remote, settings
from sim.asked import (
    as_trained,
    cell_name,
    refuse_layout,
    refuse_unread,
    refuse_without_meaning,
    several_commits,
    stamp_of,
    where_run,
)
from sim.cameras import RENDERS
from sim.decisions import Decider, RemoteAgent
from sim.expert import EXPERTS, default_grasp
from sim.layouts import LAYOUTS
from sim.libero_env import Scene
from sim.protocol import check_protocol, references_of
from sim.rollout import (
    BlindAgent,
    OracleAgent,
    ReplayAgent,
    expert_path,
    run_episode,
    run_expert,
)
from sim.simulator import of_simulator, simulator_versions
from sim.stalled import Watch
from sim.tasks import find_task
from sim.variants import VARIANTS
from sim.workers import TIMEOUT, run_jobs
from study import suites

# flags that --help shows, in this order
FIRST = "ckpt policy layout n_episodes teleport zero_rotation max_steps workers device out"
# crashed episodes without one that ran, or errors of the policy alone, after which an evaluation
# gives up
HOPELESS = 6


class EvalWorker:
    """Owns a scene and an agent, in a process of its pool. A job is an episode's index, or
    "protocol".

    address: of the Decider that owns the network, for a checkpoint. reference: arrays that the
    protocol is checked against, see sim/protocol.py.
    """

    def __init__(self, args, address=None, reference=None):
        self.args, self.reference = args, reference or {}
        task = find_task(args.task_suite, args.task_id)
        self.said = instructions.spoken(args, task)
        self.request = instructions.request(task, args.instruction_of)
        if args.plus:
            # an episode's index is its variant's among those of the task
            self.variants = plus.chosen(task.suite, args.plus, [task])[task.index]
            if args.policy != "blind":  # it replays the task's own layout
                task = plus.variant_task(task, self.variants[0])
        self.scene = self.scene_of(task)
        self.agent = None
        if args.policy == "checkpoint":
            self.agent = RemoteAgent(address)
        elif args.policy == "oracle":
            self.agent = OracleAgent(
                args.waypoint_stride,
                args.grid,
                args.n_height_bins,
                margin=args.margin,
                view=args.canonical_view,
            )
        elif args.policy == "remote":
            self.agent = remote.ServerAgent(args)
        elif args.policy == "blind":
            # it knows the mean position of the training demonstrations
            shift = layouts.training_shift(args.layout, args.split)
            replays = args.grasp == "planned"
            self.agent = (
                ReplayAgent(self.scene, args.grasp, shift) if replays else BlindAgent(shift)
            )

    def run(self, job):
        """A job -> its row, or {"stopped": traceback} where this program failed.

        A failure of this program is neither a result nor a crash that could be left out. An
        exception of the simulator is a crash: it is raised, and run_jobs reports it. So is a
        policy's server that dies or hangs. {"refused": sentence} where something asked for cannot
        be: no server is there, the scene has none of the layout's objects.
        """
        try:
            return self.check() if job == "protocol" else self.episode(job)
        except UserError as error:
            if job == "protocol":
                raise
            return {"refused": str(error)}
        except Exception as error:
            if job == "protocol" or of_simulator(error) or isinstance(error, ServerLost):
                raise
            return {"stopped": traceback.format_exc()}

    def check(self):
        """Check the protocol from the first episode's view -> dict of what was measured."""
        first = layouts.conditions(self.args.layout, self.args.split)[0]
        return check_protocol(self.scene, self.reference, first, self.args.plus == "layout")

    # an episode's index -> its row: place the scene, know the expert's path, act, draw
    def episode(self, job):
        args = self.args
        state, described = self.place(job)
        scene = self.scene
        event = layouts.event(args.layout, job)
        path = self.known_path(state)
        every = args.video_every if job < args.n_videos else 0
        seed = draw_seed(args.seed, job)
        if args.policy == "expert":
            row, frames, thumbs = run_expert(
                scene,
                state,
                args.max_steps,
                video_every=every,
                path=path,
                grasp=args.grasp,
                variant=args.variant,
                event=event,
            )
        elif args.policy == "remote":
            limits = args.max_steps, args.replan_steps
            row, frames, thumbs = remote.run_actions(
                scene, self.agent, state, *limits, every, path, args.variant, seed, event
            )
        else:
            watch = Watch(args.stop_stalled) if args.stop_stalled or args.trace else None
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
                seed=seed,
                watch=watch,
                event=event,
            )
            # for study.stalled
            if args.trace:
                watch.save(args.out / "traces" / f"{job:03d}.npz")
        self.draw(job, row, frames, thumbs)
        return {
            "episode": job,
            **described,
            "seed": args.seed,
            **self.said,
            **row,
        }

    def known_path(self, state):
        """The expert's path from a state (S,). None of a task that it cannot do, where the policy
        does not need it: there is then no coverage.
        """
        args = self.args
        try:
            return expert_path(self.scene, state, grasp=args.grasp, variant=args.variant)
        except UserError:
            if args.policy in ("expert", "oracle", "blind"):
                raise
            return None

    def scene_of(self, task):
        """The Scene of a Task, which says and asks for what the flags say."""
        args = self.args
        scene = Scene(
            image_size=args.image_size, clean=args.clean_scene, render=args.render, task=task
        )
        scene.ask_for(self.request)
        scene.instruction = self.said.get("instruction", scene.instruction)
        return scene

    def place(self, job):
        """Set up an episode's scene -> its init state (S,), what its row says of the place."""
        args = self.args
        if args.plus:
            variant = self.variants[job]
            task = plus.variant_task(self.scene.task, variant)
            # a layout has a scene of its own, cameras and starts of a task share one
            if self.scene.closed or task != self.scene.task:
                self.scene.close()
                self.scene = self.scene_of(task)
            return plus.place(self.scene, variant), {"init_state": 0, **variant.described()}
        state, condition = layouts.episode_state(self.scene, args.layout, job, args.split)
        return state, {
            "init_state": layouts.init_state_of(args.layout, job),
            "layout": args.layout,
            **condition.described(LAYOUTS[args.layout].setting),
        }

    def draw(self, job, row, frames, thumbs):
        """An episode's film, where it was filmed, and its strip of ten pictures."""
        if frames:
            K, E = self.scene.camera()
            film = self.args.out / "videos" / f"{job:03d}_{row['outcome']}.mp4"
            # in real time: a second has 20 control steps
            plots.write_video(frames, K, E, film, fps=20 / self.args.video_every)
            thumbs = thumbs or [f[0][::4, ::4] for f in frames]
        if thumbs:
            # evenly over the episode, its first and last decision among them
            picked = np.linspace(0, len(thumbs) - 1, min(10, len(thumbs))).astype(int)
            strip = self.args.out / "strips" / f"{job:03d}.png"
            plots.write_strip([thumbs[i] for i in picked], strip)

    def close(self):
        self.scene.close()


def draw_seed(seed, episode):
    """Seed, 64 bits, of all that a policy draws at random in an episode. It depends on no worker
    and no other episode.
    """
    low, high, *_ = settings.random_seed("sample", seed, episode)
    return high << 32 | low


def build_parser():
    parser = flags.Parser(__doc__, FIRST)
    add_policy_flags(parser.add_argument_group("the policy"))
    remote.add_flags(parser.add_argument_group("--policy remote"))
    add_task_flags(parser.add_argument_group("what is tested"))
    add_acting_flags(parser.add_argument_group("how it acts"))
    add_running_flags(parser.add_argument_group("running and recording"))
    return parser


def add_policy_flags(group):
    add = group.add_argument
    add("--ckpt", type=Path, help="its file (the newest run's, else the committed one)")
    add(
        "--policy",
        default="checkpoint",
        choices=("checkpoint", "expert", "oracle", "blind", "remote"),
        help="whose decisions",
    )
    add("--backbone_weights", type=Path, help="local file of backbone weights")
    add("--text_weights", type=Path, help="local folder of the frozen text model, see --text")
    add("--device", default="auto", help="of the network: auto, cpu, cuda or cuda:N")
    add("--feedback", help="with a history: measured, predicted or hybrid:N (the checkpoint's)")
    sampled = "with a history: sample the waypoint"
    add("--sample", action="store_const", const=True, help=sampled)
    add("--temperature", type=flags.positive, help="of --sample")
    add(
        "--seed",
        type=flags.whole,
        default=0,
        help="with --sample: of what is drawn, by episode; else it changes nothing",
    )
    add("--grid", type=flags.at_least(2, 4096), default=64, help="oracle: image cells")
    add("--n_height_bins", type=flags.at_least(2, 4096), default=32, help="oracle: height bins")
    add("--margin", type=flags.whole, default=0, help="oracle: cells beyond each edge of the image")
    add("--canonical_view", default="", help="oracle: 'x y z scale', see train.py --help")
    add("--image_size", type=flags.pixels, help="oracle, blind: side, pixels (448); remote: 256")
    drawn = "exact, LIBERO's picture, or fast (the checkpoint's, else exact)"
    add("--render", choices=RENDERS, help=drawn)


def add_task_flags(group):
    add = group.add_argument
    add(
        "--layout",
        default="benchmark",
        choices=list(LAYOUTS),
        metavar="LAYOUT",
        help=f"where objects and camera stand: {', '.join(LAYOUTS)}",
    )
    what = "LIBERO-Plus's variants of the suite's tasks instead, one episode each"
    add("--plus", choices=plus.KINDS, help=what)
    splits = {name for names in settings.SPLITS.values() for name in names if name}
    add(
        "--split",
        choices=sorted(splits),
        help="of a setting's conditions, see sim/settings.py (as the checkpoint's data)",
    )
    add("--n_episodes", type=flags.count, help="episodes (50; position: 5 at each)")
    add("--task_suite", help="the checkpoint's own task, else libero_spatial")
    add("--task_id", type=flags.whole, help="which of the suite's tasks")
    add(
        "--task_ids",
        type=flags.several,
        metavar="all|N,N",
        help="several tasks, one after another, see docs/suites.md",
    )
    add("--instruction", metavar="WORDS", help="said instead of the task's own sentence")
    add(
        "--instruction_of",
        type=instructions.of_task,
        metavar="N|other",
        help="say this task's sentence, and count what it asks for; other: that of the scene's "
        "other object",
    )
    add(
        "--grasp",
        choices=list(EXPERTS),
        help="the expert's, for expert, oracle and coverage (as the checkpoint's data, else the "
        "task's, see collect_demos.py)",
    )
    add(
        "--variant",
        choices=VARIANTS,
        help="the task, or lift_once (the checkpoint's data's, else task)",
    )
    add(
        "--clean_scene",
        action=argparse.BooleanOptionalAction,
        help="without distractors and unused fixtures (as the checkpoint's data, else by layout)",
    )


def add_acting_flags(group):
    add = group.add_argument
    add("--teleport", action="store_true", help="servo to each absolute waypoint")
    add(
        "--zero_rotation",
        action=argparse.BooleanOptionalAction,
        help="keep the start's orientation (with --task_ids: in tasks whose demonstrations do)",
    )
    what = "control steps an episode may take (600; with --task_ids the suite's)"
    add("--max_steps", type=flags.count, help=what)
    add(
        "--waypoint_stride",
        type=flags.count,
        help="oracle: steps ahead; without --teleport: actions per waypoint (the checkpoint's, "
        "else 5)",
    )
    add(
        "--stop_stalled",
        action="store_true",
        help="end an episode whose state and decision repeat, as a failure, see sim/stalled.py",
    )


def add_running_flags(group):
    add = group.add_argument
    add("--out", type=flags.new_folder, help="folder of results (runs/eval/...)")
    add("--workers", type=flags.count, default=2, help="simulators at a time")
    renewed = "episodes after which a worker is replaced"
    add("--recycle", type=flags.count, default=25, help=renewed)
    hung = "seconds after which an episode, or a decision, counts as hung"
    add("--timeout", type=flags.positive, default=TIMEOUT, help=hung)
    what = "record the first N episodes (3; with --task_ids 1)"
    add("--n_videos", type=flags.whole, help=what)
    add("--video_every", type=flags.count, default=4, help="control steps between video frames")
    add("--trace", action="store_true", help="record state and decision, for study.stalled")


@contextlib.contextmanager
def network_of(args):
    """Yield the Decider with the checkpoint that the flags ask for, None for a policy without a
    network. Raises UserError for bad files, devices and choices, before any simulator starts.
    """
    if args.policy != "checkpoint":
        yield None
        return
    if args.ckpt is None:
        args.ckpt, sentence = newest_checkpoint()
        print(sentence)
    choices = {name: getattr(args, name) for name in ("feedback", "sample", "temperature")}
    made_of = (args.ckpt, args.device, args.backbone_weights, choices, args.text_weights)
    with Decider(policy_sessions, made_of, args.timeout) as network:
        yield network


def policy_sessions(*made_of):
    """The checkpoint's harness.sessions.PolicySessions. Called in the one process that imports
    torch.
    """
    from harness.sessions import PolicySessions

    return PolicySessions.load(*made_of)


def prepare(args, network=None):
    """Fill in the flags that were not given -> the checkpoint's info, {} without one.

    The checkpoint's own settings come first, then the defaults. Raises UserError for flags that do
    not fit the checkpoint or each other.
    """
    info, setting = {}, LAYOUTS[args.layout].setting
    if network:
        info = network.about["info"]
        args.device = network.about["device"]
        as_trained(args, info, network.about["config"])
    instructions.check(args, network and network.about["config"])
    remote.agree(args)
    args.waypoint_stride = args.waypoint_stride or 5
    args.max_steps = args.max_steps or 600
    args.n_videos = 3 if args.n_videos is None else args.n_videos
    args.zero_rotation = bool(args.zero_rotation)
    args.image_size = args.image_size or 448
    args.task_suite = args.task_suite or "libero_spatial"
    args.task_id = args.task_id or 0
    args.variant = args.variant or "task"
    task = find_task(args.task_suite, args.task_id)
    # refuses what it cannot say there
    request = instructions.request(task, args.instruction_of)
    args.grasp = args.grasp or default_grasp(request.task if request else task, args.variant)
    refuse_without_meaning(args)
    args.render = args.render or "exact"  # of a policy that was trained on no images
    args.split = settings.resolve_split(setting, args.split)
    if args.clean_scene is None:
        args.clean_scene = settings.clean_by_default(setting)
    if args.n_episodes is None:
        conditions = layouts.conditions(args.layout, args.split)
        args.n_episodes = 50 if setting != "position" else 5 * len(conditions)
    refuse_layout(args, task, told=request is not None)
    args.out = args.out or Path("runs/eval") / cell_name(args, info, task)
    return info


def evaluate(args):
    """One task, or several -> the exit code."""
    refuse_unread(args)
    plus.agree(args)
    with network_of(args) as network:
        if args.task_ids is not None:
            return suites.evaluate(args, network, evaluate_task)
        return evaluate_task(args, network)


# settings -> episodes -> summary; the answer is the exit code, 1 without any episode
def evaluate_task(args, network):
    info = prepare(args, network)
    where = {**where_run(info), "render": args.render}
    asked = stamp_of(args, info)
    check_stamp(args.out, asked)
    write_json(args.out / "settings.json", asked)
    rows = [row for _, row in sorted(run_episodes(args, network, where, info).items())]
    summary = {**summarise(rows, args, info), **where, "versions": simulator_versions()}
    summary.update(several_commits(rows, args.out))
    if args.policy == "remote":
        summary["model_type"] = args.label
        summary["remote"] = {name: getattr(args, name) for name in remote.NAMES}
    write_json(args.out / "summary.json", summary)
    plots.sheet_from_strips(args.out, rows)
    print_summary(summary)
    print(f"  {args.out}/summary.json, episodes.jsonl, sheet.jpg, videos/")
    return 1 if not summary["n"] else 0


def run_episodes(args, network, where, info):
    """Run the episodes that the folder does not hold yet -> {episode: row} of all. Each row is
    written as soon as its episode ends. where: what every row says; info: of the checkpoint, or {}.
    """
    # crashed episodes of an earlier run are tried again
    rows = {
        r["episode"]: r
        for r in scored_rows(read_episodes(args.out, place_of(args)))
        if r["episode"] < args.n_episodes
    }
    jobs = [i for i in range(args.n_episodes) if i not in rows]
    # of a folder whose check failed, or was never made, too
    checked = not jobs and (args.out / "protocol.json").is_file()
    if args.policy == "remote" and rows and not jobs:
        print(f"{args.out}: all of {args.label}'s episodes are there, none is played")
    bar = tqdm(
        total=args.n_episodes,
        initial=len(rows),
        desc=f"{args.policy} {place_of(args)}",
        unit="episode",
    )
    # the protocol is the first job: a wrong one ends the evaluation before much is simulated
    served = ()
    if network:
        task = find_task(args.task_suite, args.task_id)
        served = (network.address, references_of(task, info, network.about["reference"]))
    for outcome in run_jobs(
        [] if checked else ["protocol", *jobs],
        EvalWorker,
        (args, *served),
        args.workers,
        args.recycle,
        timeout=args.timeout,
        before_start=network.ensure if network else lambda: None,
    ):
        if outcome.job == "protocol":
            note_protocol(outcome, args.out)
            continue
        # written before the check whether to give up: its sentence points to the file
        rows[outcome.job] = row = {**row_of(outcome, args), **where}
        append_jsonl(args.out / "episodes.jsonl", row)
        give_up_if_hopeless(list(rows.values()), args.out)
        scored = [r["success"] for r in scored_rows(rows.values())]
        bar.set_postfix_str(f"success {sum(scored)}/{len(scored)}", refresh=False)
        bar.update()
    bar.close()
    return rows


def note_protocol(outcome, folder):
    """Write what the protocol's check measured. Raises UserError where it failed."""
    if outcome.error:
        (folder / "protocol.json").unlink(missing_ok=True)
        raise UserError(
            "the evaluation's protocol check failed, nothing is scored: "
            f"{outcome.error.strip().splitlines()[-1]}"
        )
    tqdm.write("protocol ok: " + json.dumps(outcome.result))
    write_json(folder / "protocol.json", outcome.result)


def row_of(outcome, args):
    """The row of an episode, or of one that crashed. Raises UserError where this program failed,
    which is neither.
    """
    row = outcome.result or {
        "episode": outcome.job,
        "layout": place_of(args),
        "seed": args.seed,
        "crash": outcome.error.strip().splitlines()[-1],
        "traceback": outcome.error,
    }
    if "refused" in row:
        raise UserError(row["refused"])
    if "stopped" in row:
        tqdm.write(row["stopped"])
        raise UserError(
            f"episode {outcome.job} failed in this program, not in the simulator, so nothing is "
            f"summarised: {row['stopped'].strip().splitlines()[-1]}; "
            "once that is mended the same command goes on"
        )
    return row


def give_up_if_hopeless(rows, folder):
    """Raise UserError once HOPELESS episodes all crashed, or all ended in a policy's error."""
    episodes, scored = folder / "episodes.jsonl", scored_rows(rows)
    if not scored and len(rows) >= HOPELESS:
        raise UserError(
            f"the first {len(rows)} episodes all crashed, the last with {rows[-1]['crash']} "
            f"(tracebacks: {episodes})"
        )
    if len(scored) >= HOPELESS and all(r["outcome"] == ERROR for r in scored):
        raise UserError(
            f"the first {len(scored)} episodes all ended in an error of the policy, the last: "
            f"{scored[-1]['error']} (tracebacks: {episodes}); mend it, then remove {folder}"
        )


if __name__ == "__main__":
    run_script(lambda: evaluate(build_parser().parse_args()))
