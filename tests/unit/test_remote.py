"""A policy behind a socket: openpi's messages to the letter, and every way in which a server fails
is told in one sentence. The server is a real process.
"""

import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from servers import policy_server

import serve
from harness import remote
from harness.records import keeps_orientation
from harness.remote import AnswerError, Server, ServerLost, Unreachable, pack, unpack
from rot_utils import matrix_to_quat, rotvec_to_matrix
from runtime import UserError
from sim.remote import agree, libero_state, turned_by_180
from waypoint import Waypoint

# what openpi's own msgpack_numpy (openpi-client 0.1.0) makes of MESSAGE
OPENPI = bytes.fromhex(
    "84a7616374696f6e7384c40b5f5f6e6461727261795f5fc3c40464617461c410000000000000e03f000000000000f0bf"
    "c4056474797065a33c6638c4057368617065920102a16e83c40d5f5f6e7067656e657269635f5fc3c40464617461cb3f"
    "d0000000000000c4056474797065a33c6634a16284c40b5f5f6e6461727261795f5fc3c40464617461c40101c4056474"
    "797065a37c6231c4057368617065920101a670726f6d7074a2676f"
)
MESSAGE = {
    "actions": np.array([[0.5, -1.0]]),
    "n": np.float32(0.25),
    "b": np.array([[True]]),
    "prompt": "go",
}


@pytest.fixture(scope="module")
def address():
    with policy_server(metadata={"policy": "a/b c", "request": {"image_size": 96}}) as found:
        yield found


def ask(address, prompt, timeout=60.0):
    """The actions that tests/policy_server.py answers to a prompt, within seconds of its own."""
    server = Server(address, 60.0)
    try:
        server.connect()
        server.timeout = timeout  # a busy machine connects more slowly
        return remote.actions_of(server.ask({"prompt": prompt}))
    finally:
        server.close()


def test_messages_are_openpis_byte_by_byte():
    """Another codec's bytes would be read as a map of bytes by openpi's servers, not as arrays."""
    assert pack(MESSAGE) == OPENPI
    found = unpack(OPENPI)
    assert found["prompt"] == "go" and found["n"] == np.float32(0.25)
    for key in ("actions", "b"):
        np.testing.assert_array_equal(found[key], MESSAGE[key])
        assert found[key].dtype == MESSAGE[key].dtype


def test_a_message_runs_no_code():
    """An array of objects, which NumPy would unpickle, is neither taken nor sent."""
    objects = {b"__ndarray__": True, b"data": b"x" * 8, b"dtype": "|O", b"shape": (1,)}
    with pytest.raises(AnswerError):
        unpack(pack({"a": objects}))
    with pytest.raises(TypeError):
        pack({"a": np.array([object()])})


def test_a_chunk_and_a_single_action_are_taken(address):
    """(N,7) and (7,), float64 whatever was sent."""
    assert ask(address, "stay").shape == (10, 7) and ask(address, "one").shape == (1, 7)
    assert ask(address, "stay").dtype == np.float64


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("nan", "NaN or Inf"),
        ("shape", "shape (10, 6), (N, 7)"),
        ("none", "shape (0, 7)"),
        ("words", "no array of numbers"),
        ("keys", "without the key 'actions' (its keys: action)"),
        ("list", "answered a list"),
        ("bytes", "no msgpack message"),
        ("torn", "no msgpack message"),
        ("text", "failed: KeyError: 'observation/depth'"),
    ],
)
def test_an_answer_that_cannot_be_followed_is_one_sentence(prompt, words, address):
    """It is the policy's failure. Unnoticed, the robot would be sent what it cannot do."""
    with pytest.raises(AnswerError) as error:
        ask(address, prompt)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_hangs_is_lost_in_time(address):
    """After the timeout, not after the 30 minutes that an episode may take."""
    with pytest.raises(ServerLost, match="no answer for 0.3 s"):
        ask(address, "hang", timeout=0.3)


def test_a_server_that_dies_is_lost_and_then_unreachable():
    """First in the middle of an episode, then nobody is there: two different sentences."""
    with policy_server() as address:
        with pytest.raises(ServerLost, match="connection was lost"):
            ask(address, "die")
        with pytest.raises(Unreachable, match=f"--server {address}: no policy server answers"):
            ask(address, "stay")


def test_something_else_at_the_port_is_no_policy_server():
    """A listener that says nothing, as a server that is still loading, ends in a sentence."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Unreachable, match="no policy server answers"):
            Server(address, 0.3).connect()


def remote_args(**changed):
    """What eval.py's flags say for --policy remote."""
    flags = {"policy": "remote", "server": None, "server_timeout": 60.0, "image_size": None}
    flags["render"] = None
    return SimpleNamespace(**{**flags, "send_size": None, "label": None, **changed})


def test_a_server_is_asked_what_it_wants(address):
    """Its metadata decide what no flag says; the label is fit for a folder's name."""
    args = remote_args(server=address)
    agree(args)
    assert (args.image_size, args.send_size, args.label) == (96, 96, "a_b_c")
    assert args.wishes == {"wrist_image": True, "camera": False, "seed": False}
    args = remote_args(server=address, image_size=256, send_size=64, label="mine")
    agree(args)
    assert (args.image_size, args.send_size, args.label) == (256, 64, "mine")
    with policy_server() as silent:
        args = remote_args(server=silent)
        agree(args)
        # openpi's own evaluation
        assert (args.image_size, args.send_size, args.label) == (256, 224, "remote")


def test_a_policy_sees_pictures_drawn_as_in_its_training():
    """A server of this repository says how; eval.py refuses it of a checkpoint too."""
    with policy_server(metadata={"render": "fast"}) as address:
        args = remote_args(server=address)
        agree(args)
        assert args.render == "fast"
        with pytest.raises(UserError, match="--render exact: .* trained on --render fast"):
            agree(remote_args(server=address, render="exact"))


@pytest.mark.parametrize("wish", [{"image_size": "large"}, {"image_size": 10**6}, [1]])
def test_impossible_wishes_are_refused(wish):
    """Before any simulator starts, with the key."""
    with (
        policy_server(metadata={"request": wish}) as address,
        pytest.raises(UserError, match="metadata's 'request': "),
    ):
        agree(remote_args(server=address))


@pytest.mark.parametrize(
    ("flags", "words"),
    [({}, "--policy remote: where is it"), ({"policy": "oracle", "server": "x:1"}, "--server x:1")],
)
def test_flags_that_do_not_fit_are_refused(flags, words):
    """A server that nobody asks would look as if it had been evaluated."""
    with pytest.raises(UserError, match=words):
        agree(remote_args(**flags))


def test_state_and_image_are_liberos():
    """The angle goes up to 2 pi, as robosuite's; the image is mirrored left to right, not upside
    down: public checkpoints were trained so.
    """
    turned = rotvec_to_matrix(np.array([0.0, 3.0, 0.0]))
    quat = matrix_to_quat(turned)
    seen = SimpleNamespace(eef_pos=np.arange(3.0), gripper_qpos=np.array([0.04, -0.04]))
    for sign, angle in ((1, 3.0), (-1, 2 * np.pi - 3.0)):
        seen.eef_quat = sign * quat * np.sign(quat[3])
        state = libero_state(seen)
        np.testing.assert_allclose(state[:3], seen.eef_pos)
        np.testing.assert_allclose(state[3:6], [0, sign * angle, 0], atol=1e-9)
        np.testing.assert_allclose(state[6:], seen.gripper_qpos)
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0] = 255  # top left
    assert turned_by_180(image, 4)[0, 3].all() and turned_by_180(image, 4).sum() == 3 * 255
    assert turned_by_180(image, 2).shape == (2, 2, 3)


# -- serve.py


class Goes:
    """Sessions of a policy that goes 10 cm to one side at each decision, and counts them. more: of
    its config; variant: of its demonstrations; turn: (3,3), to which it turns.
    """

    threads = 1

    def __init__(self, variant="task", turn=None, far=0.1, **more):
        config = {"image_size": 16, "waypoint_stride": 5, **more}
        self.about = {"info": {"dataset": {"variant": variant}}, "config": config}
        self.turn, self.far = turn, far

    def open(self):
        return SimpleNamespace(count=0, seeds=[])

    def begin(self, session, seed):
        session.seeds.append(seed)

    def answer(self, requests):
        ((session, observation),) = requests
        session.count += 1
        session.image = observation.image
        point = observation.eef_pos + np.array([self.far, 0, 0])
        return [(Waypoint(point, self.turn, -1.0, point[None], np.array([-1.0])), {})]


def episode(chunk=1, view=None, **policy):
    args = SimpleNamespace(chunk=chunk, teleport=True, zero_rotation="turn" not in policy)
    return serve.Episode(Goes(**policy), args, np.eye(4) if view is None else view)


def request(eef=(0, 0, 1), **more):
    image = np.zeros((16, 16, 3), np.uint8)
    image[0, 0] = 255
    state = np.array([*eef, 3.0, 0, 0, 0.04, -0.04])
    return {"observation/image": image, "observation/state": state, "prompt": "go", **more}


def test_a_served_policy_says_which_one_it_is(tmp_path):
    """Otherwise an evaluation would find the episodes of another one done, and report them."""
    trained = {"model_type": "para", "commit": "a", "step": 5, "seed": 0, "minutes": 1.0}
    about = {"info": trained, "config": {"image_size": 448}}
    usual = {"chunk": 1, "teleport": True, "zero_rotation": True}

    def said(folder="a", info=(), **flags):
        args = SimpleNamespace(ckpt=tmp_path / folder / "checkpoint.safetensors", **usual)
        vars(args).update(flags)
        return serve.metadata_of(args, {**about, "info": {**trained, **dict(info)}})

    others = [{"folder": "b"}, {"zero_rotation": False}, {"teleport": False}, {"chunk": 5}]
    others += [{"info": {name: 9}} for name in ("commit", "step", "seed", "minutes")]
    assert all(said() != said(**other) for other in others) and said() == said()


@pytest.mark.parametrize(
    "header, kept",
    [
        ({}, True),
        ({"dataset": {"grasp": "side"}, "turned": {"libero_spatial_0": 24.9}}, True),
        ({"dataset": {"grasp": "rim"}}, False),
        ({"dataset": {"grasp": "planned"}, "turned": {"libero_goal_1": 9.0}}, True),
        ({"dataset": {"grasp": "side"}, "turned": {"a": 3.0, "b": 71.0}}, False),
        ({"dataset": {}, "turned": {"a": 3.0, "b": 71.0}}, False),
        ({"dataset": {}, "turned": {"libero_goal_0": 80.0}}, False),
        ({"dataset": {}, "turned": {"libero_spatial_0": 8.0}}, True),
        ({"dataset": {}, "turned": {"a": 3.0, "b": 4.0}}, True),
    ],
)
def test_a_served_policy_turns_as_its_demonstrations(header, kept):
    """A hand that is kept still misses what is grasped turned."""
    assert keeps_orientation(header) == kept


def test_a_decision_is_made_only_when_it_is_due():
    """One action a request; for ten control steps it is on its way to one waypoint, as in eval.py.

    The picture arrives mirrored, and the policy sees it as the camera did.
    """
    served = episode()
    for step in range(11):
        actions = served.actions(request())
        assert actions.shape == (1, 7) and actions[0, 0] > 0 and actions[0, 6] == -1
        assert served.session.count == 1 + step // 10
    assert served.session.image[0, 15].all() and len(served.session.seeds) == 1


def test_an_episode_begins_where_the_arm_has_jumped():
    """openpi's own client says nothing between two episodes: the arm is somewhere else."""
    served = episode()
    served.actions(request(seed=5))
    served.actions(request((0.02, 0, 1), seed=6))
    assert served.session.seeds == [5]
    served.actions(request((0.3, 0, 1), seed=7))
    served.actions(request((0.3, 0, 1), reset=True, seed=8))
    served.actions({**request((0.3, 0, 1), seed=9), "prompt": "another task"})
    assert served.session.seeds == [5, 7, 8, 9]


def test_the_camera_is_the_requests_else_the_tasks():
    """A checkpoint that is asked about another scene must not look through its own camera."""
    goal = {"prompt": "Pick up the milk and place it in the basket"}
    seen = serve.observation_of(request(**goal), 16, np.eye(4))
    np.testing.assert_allclose(seen.E[:3, 3], [0.8966, 0, 0.65], atol=1e-4)
    assert (np.eye(4) == serve.observation_of(request(), 16, np.eye(4)).E).all()
    E = np.eye(4)
    E[0, 3] = 2.0
    moved = request(**goal) | {"observation/camera_extrinsics": E}
    assert serve.observation_of(moved, 16, None).E[0, 3] == 2.0


def test_a_chunk_slows_down_where_it_arrives():
    """Its actions foresee the arm's way: none overshoots, and it stays where it arrives."""
    served = episode(chunk=40)
    (x, *_), grippers = served.actions(request()).T[:3], served.actions(request())[:, 6]
    assert len(x) == 40 and (np.diff(x) <= 1e-12).all() and x[0] == 1 and x[-1] == 0
    gone = serve.RESPONSE * 0.05 * x[:10].sum()
    assert 0.05 < gone < 0.1 and (grippers == -1).all()


def test_a_chunk_does_not_turn_too_far():
    """Its turns foresee the hand's way too: together they are the turn that was asked for."""
    start = rotvec_to_matrix(np.array([3.0, 0, 0]))
    for degrees in (4.0, 17.2, 60.0):
        asked = np.array([0, 0, np.radians(degrees)])
        served = episode(chunk=40, turn=rotvec_to_matrix(asked) @ start)
        turns = served.actions(request())[:, 3:6]
        gone = np.degrees(serve.TURN_RESPONSE * 0.5 * turns.sum(0))
        assert 0 < gone[2] <= degrees and (np.diff(turns[:10, 2]) <= 1e-12).all()
        np.testing.assert_allclose(gone[:2], 0, atol=1e-9)


def test_staying_takes_as_long_as_in_the_demonstrations():
    """In lift_once a waypoint where the EEF is already takes a stride of control steps, as in an
    evaluation; elsewhere one.
    """
    for variant, steps in (("lift_once", 5), ("task", 1)):
        served = episode(variant=variant, far=0.0)
        for _ in range(10):
            served.actions(request())
        assert served.session.count == 10 / steps


def test_a_policy_that_is_told_needs_a_prompt():
    """Without one it would act on an unknown word."""
    told, untold = episode(text="learned"), episode(text="none")
    for silent in ({"prompt": " "}, {"prompt": None}):
        asked = {k: v for k, v in {**request(), **silent}.items() if v is not None}
        untold.actions(asked)
        with pytest.raises(serve.RequestError, match="prompt: is missing, and this policy is told"):
            told.actions(asked)
    told.actions(request())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"observation/image": None}, "observation/image: is missing"),
        ({"observation/image": np.zeros((8, 9, 3), np.uint8)}, r"\(S, S, 3\) uint8"),
        ({"observation/image": np.zeros((8, 8, 3))}, "uint8 is expected"),
        ({"observation/state": np.zeros(7)}, r"shape \(7,\), \(8\) is expected"),
        ({"observation/state": np.full(8, np.nan)}, "NaN or Inf"),
        ({"observation/camera_extrinsics": 2 * np.eye(4)}, "camera: E"),
    ],
)
def test_requests_that_mean_nothing_are_refused(changed, words):
    """With the key: units and signs are what users of a server get wrong."""
    asked = {k: v for k, v in {**request(), **changed}.items() if v is not None}
    with pytest.raises(serve.RequestError, match=words):
        episode().actions(asked)


def test_a_client_of_openpi_is_served():
    """Metadata first, then an answer each; a request that fails is answered by a text, and the
    connection ends. Two clients at a time have two episodes.
    """
    from websockets.sync.server import serve as listen

    args = SimpleNamespace(chunk=2, teleport=True, zero_rotation=True)
    answered = serve.handler(Goes(), args, {"policy": "goes"}, np.eye(4))
    with listen(answered, "127.0.0.1", 0, process_request=serve.health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.socket.getsockname()[1]}"
        one, two = (Server(address, 60.0) for _ in range(2))
        assert one.connect() == two.connect() == {"policy": "goes"}
        for client in (one, two, one):
            assert client.ask(request())["actions"].shape == (2, 7)
        with pytest.raises(AnswerError, match="observation/state: is missing"):
            one.ask({"observation/image": request()["observation/image"]})
        with pytest.raises(ServerLost):
            one.ask(request())
        assert two.ask(request())["actions"].shape == (2, 7)
        two.close()
        server.shutdown()
