"""The recipe: what it draws stays off the tests, is the same whatever is drawn beside it, and is
what the simulator shows.
"""

import json

import numpy as np
import pytest
from helpers import SIZE, run

from collect_demos import build_parser
from formats.dataset import open_dataset
from harness.reference import protocol_references
from runtime import UserError
from sim import recipe, settings
from sim.protocol import training_frame_difference
from sim.tasks import find_task


def drawn(part, n=400, seed=0):
    """[(clean, Condition)] of the first n demonstrations."""
    found = []
    for i in range(n):
        clean = recipe.is_clean(part, seed, i)
        found.append((clean, recipe.drawn(part, seed, i, 0, clean)))
    return found


def test_bowl_and_plate_stand_anywhere_in_the_training_half():
    """Each covers its whole region, and neither tells where the other is, but that it is not
    there.
    """
    places = [c.place_of for _, c in drawn("train")]
    for name in (recipe.BOWL, recipe.PLATE):
        found = np.array([p[name] for p in places])
        low, high = np.transpose([recipe.X[name], recipe.Y["train"]])
        assert (found >= low).all() and (found <= high).all()
        # eight by eight fields, nearly all of them hit
        fields = np.floor(8 * (found - low) / (high - low)).astype(int)
        assert len(np.unique(fields, axis=0)) > 56
    # at the benchmark's place too, between ramekin and plate: a disc of 5 cm is 11% of the region
    bowls = np.array([p[recipe.BOWL] for p in places])
    assert (np.linalg.norm(bowls - recipe.USUAL[recipe.BOWL], axis=1) < 0.05).mean() > 0.06
    bowl, plate = (np.array([p[n] for p in places]) for n in (recipe.BOWL, recipe.PLATE))
    # 11.5 cm apart at least, on 26 cm, they repel each other along y: r = -0.3
    assert np.abs(np.corrcoef(bowl.T, plate.T)[:2, 2:]).max() < 0.4


def test_no_demonstration_stands_where_a_test_has_it():
    """Bowl and plate never both stand near an init state of libero_spatial or of its swap, nor on
    the test side; validation keeps to its strip.
    """
    for part in ("train", "val"):
        for _, condition in drawn(part):
            places = {n: np.array(p) for n, p in condition.place_of.items()}
            for usual, limit in recipe.HELD_OUT:
                off = [np.linalg.norm(places[n] - usual[n]) for n in (recipe.BOWL, recipe.PLATE)]
                assert max(off) >= limit
            low, high = recipe.Y[part]
            assert all(low <= places[n][1] <= high for n in (recipe.BOWL, recipe.PLATE))
    assert recipe.Y["test"][1] < recipe.Y["val"][0] and recipe.Y["val"][1] <= recipe.Y["train"][0]
    swapped = {n: recipe.SWAPPED[n] for n in (recipe.BOWL, recipe.PLATE)}
    assert recipe.held_out(swapped) and recipe.held_out(recipe.USUAL)


def test_held_out_demonstrations_are_of_both_scenes():
    """Half are clean, and so are about half of every k-th, whatever k: split_demos takes them."""
    clean = np.array([c for c, _ in drawn("train")])
    assert clean.mean() == 0.5
    for k in range(2, 9):
        assert 0.3 < clean[k - 1 :: k].mean() < 0.7, k


def test_views_keep_to_their_angles():
    """Training, validation and test views share no angle."""
    rng = np.random.default_rng(0)
    train, val = (
        np.array([(c.theta, c.phi, c.turn) for c in recipe.views(rng, part, 40, 200)])
        for part in ("train", "val")
    )
    assert train[:, 0].max() < 9 < 10.5 < val[:, 0].min() < val[:, 0].max() < 12.5
    assert np.abs(train[:, 2]).max() <= 40 and np.ptp(train[:, 2]) > 70
    assert np.histogram(train[:, 1], 8, (0, 360))[0].min() > 10


def test_what_is_drawn_depends_on_seed_and_index_alone():
    """The same index gives the same layout, whatever was drawn before; another seed, index,
    attempt or part gives another. Frozen, so that a dataset can be collected again.
    """
    draw = lambda *a: recipe.drawn(*a, True)
    assert draw("train", 0, 5, 0) == draw("train", 0, 5, 0)
    others = [("train", 1, 5, 0), ("train", 0, 6, 0), ("train", 0, 5, 1), ("val", 0, 5, 0)]
    assert len({draw(*a) for a in [("train", 0, 5, 0), *others]}) == 5
    place = draw("train", 0, 0, 0).place_of
    np.testing.assert_allclose(place[recipe.BOWL], (-0.2867, 0.0567), atol=1e-4)
    np.testing.assert_allclose(place[recipe.PLATE], (-0.1277, 0.1291), atol=1e-4)


def test_another_task_is_refused():
    with pytest.raises(UserError, match="libero_goal_4; leave out --task_suite"):
        recipe.check_task(find_task("libero_goal", 4))
    assert build_parser().parse_args([]).start_spread is None


@pytest.fixture(scope="module")
def recipe_demos(tmp_path_factory):
    """Two demonstrations of the recipe -> their file."""
    folder = tmp_path_factory.mktemp("recipe")
    run(
        f"collect_demos.py --setting recipe --n_demos 2 --image_size {SIZE} --push_rate 0 "
        "--render fast --workers 1 --out recipe.hdf5",
        cwd=folder,
    )
    return folder / "recipe.hdf5"


def test_a_demonstration_is_what_was_drawn(recipe_demos):
    """One of each scene; objects stand where the attributes say, the camera is orbited, put as by
    hand and turned as they say, and it sees bowl and plate.
    """
    found = open_dataset(recipe_demos, int(SIZE))
    assert "clean_scene" not in found.attributes and found.attributes["setting"] == "recipe"
    assert sorted(bool(d.attrs["clean_scene"]) for d in found.demos) == [False, True]
    for i, demo in enumerate(found.demos):
        clean = bool(demo.attrs["clean_scene"])
        places = json.loads(demo.attrs["places"])
        asked = recipe.drawn("train", 0, i, 0, clean).place_of
        assert places.keys() == asked.keys() and len(places) == (2 if clean else 5)
        # time and robot, then the free joints in the order of the BDDL: bowls, cookies, ..., plate
        assert len(demo.states[0]) == (45 if clean else 92)
        bowl, plate = demo.states[0][10:12], demo.states[0][17:19]
        if not clean:
            plate = demo.states[0][38:40]
        for name, stands in ((recipe.BOWL, bowl), (recipe.PLATE, plate)):
            np.testing.assert_allclose(places[name], asked[name], atol=1e-4)
            np.testing.assert_allclose(stands, asked[name], atol=0.011)
        E = settings.orbit(settings.default_camera()[1], demo.attrs["theta"], demo.attrs["phi"])
        hand = {k: demo.attrs[k] for k in ("roll", "pan", "tilt", "distance")}
        assert hand["distance"] != 1 and all(hand.values())
        turned = settings.turned(settings.loosened(E, **hand), demo.attrs["turn"], [-0.66, 0.0])
        np.testing.assert_allclose(demo.E, turned, atol=1e-3)


def test_a_dataset_of_both_scenes_is_checked_in_both(recipe_demos, scene):
    """The checkpoint keeps a frame of each scene, and the one of the scene that is evaluated is
    compared, whichever comes first. A flipped one is found.
    """
    demos = open_dataset(recipe_demos, int(SIZE)).demos
    for order in (demos, demos[::-1]):
        kept = {k: v.numpy() for k, v in protocol_references(order).items()}
        widths = [len(kept[f"protocol_state{e}"]) for e in ("", "_2")]
        assert sorted(widths) == [45, 92]
        assert training_frame_difference(scene, kept) < 8
        flipped = {k: v[::-1] if "image" in k else v for k, v in kept.items()}
        with pytest.raises(RuntimeError, match="fits best upside down"):
            training_frame_difference(scene, flipped)
        with pytest.raises(RuntimeError, match="fits best upside down"):
            training_frame_difference(scene, flipped, moved=True)
        # fixtures that stand elsewhere change the picture, not which way up it is
        darker = {k: v // 2 if "image" in k else v for k, v in kept.items()}
        with pytest.raises(RuntimeError, match="fits best as it is"):
            training_frame_difference(scene, darker)
        assert training_frame_difference(scene, darker, moved=True) > 12
    assert training_frame_difference(scene, {}) is None
