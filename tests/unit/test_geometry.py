"""Cameras, grids, rotations and the reported numbers: the arithmetic under every result."""

import numpy as np
import pytest
import torch
from conftest import agentview, look_at
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import camera
import rot_utils
from harness import metrics

settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("quick")

SIZE, GRID, LOW, HIGH, BINS = 448, 64, 0.9, 1.3, 32
POINT = st.tuples(st.floats(-0.15, 0.15), st.floats(-0.2, 0.2), st.floats(LOW, HIGH)).map(np.array)
# never as low as a point
EYE = st.tuples(st.floats(0.5, 1.0), st.floats(-0.4, 0.4), st.floats(1.5, 1.9))
ANGLE = st.floats(-4 * np.pi, 4 * np.pi)
unit = lambda n: (
    arrays(float, n, elements=st.floats(-1, 1))
    .filter(lambda v: np.linalg.norm(v) > 0.1)
    .map(lambda v: v / np.linalg.norm(v))
)
UNIT, QUAT = unit(3), unit(4)


# -- camera


@given(POINT, EYE, st.floats(30, 75))
def test_unprojecting_a_pixel_gives_the_point_back(point, eye, fovy):
    """A point comes back from its pixel and height.

    Labels are made in one direction and decoded in the other.
    """
    K, E = camera.intrinsics(fovy, SIZE), look_at(eye, [0, 0, 1.0])
    u, v, depth = camera.project(point, K, E)
    assert depth > 0
    assert np.abs(camera.unproject(u, v, point[2], K, E) - point).max() < 1e-9


@given(st.floats(0, SIZE), st.floats(0, SIZE), st.floats(LOW, HIGH), EYE)
def test_projecting_a_point_gives_the_pixel_back(u, v, height, eye):
    """A pixel comes back from its point, which has the given height, wherever the ray descends."""
    K, E = camera.intrinsics(45, SIZE), look_at(eye, [0, 0, 1.0])
    ray = E[:3, :3] @ [(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], 1.0]
    point = camera.unproject(u, v, np.float64(height), K, E)
    assert abs(point[2] - height) < 1e-9
    if ray[2] < -0.05:  # a ray level with the camera meets the height far away or behind
        back = camera.project(point, K, E)
        np.testing.assert_allclose(back[:2], (u, v), atol=1e-6)


def test_points_project_where_a_hand_computation_says():
    """The optical axis hits the image's centre.

    Right is +u, down is +v, and the field of view ends at the border.
    """
    K, E = camera.intrinsics(90, 100), np.eye(4)
    np.testing.assert_allclose(camera.project(np.array([0, 0, 2.0]), K, E), (50, 50, 2))
    np.testing.assert_allclose(camera.project(np.array([2.0, 0, 2.0]), K, E), (100, 50, 2))
    np.testing.assert_allclose(camera.project(np.array([0, 1.0, 2.0]), K, E), (50, 75, 2))
    assert camera.project(np.array([0, 0, -1.0]), K, E)[2] < 0


def test_mujocos_camera_axes_become_opencvs():
    """MuJoCo's camera looks along its -z with y up.

    OpenCV's, which is used here, looks along +z with y down.
    """
    E = camera.extrinsics_from_mujoco([1.0, 2, 3], np.eye(3))
    np.testing.assert_array_equal(E, [[1, 0, 0, 1], [0, -1, 0, 2], [0, 0, -1, 3], [0, 0, 0, 1]])
    ahead_and_up = np.array([1.0, 2.5, 2.0])  # one metre ahead of it, half a metre above its axis
    u, v, depth = camera.project(ahead_and_up, camera.intrinsics(90, 100), E)
    assert (u, depth) == (50, 1) and v < 50


@given(st.floats(-100, 600), st.integers(2, 128), st.sampled_from([64, 112, 448]))
def test_cells_and_pixels_are_inverse(pixel, grid, size):
    """Cells and pixels are inverse, and cell i is centred on the pixels that it covers."""
    assert camera.cell_to_pixel(
        camera.pixel_to_cell(pixel, grid, size), grid, size
    ) == pytest.approx(pixel, abs=1e-9)
    assert camera.pixel_to_cell(0.0, grid, size) == pytest.approx(-0.5)
    assert camera.pixel_to_cell(float(size), grid, size) == pytest.approx(grid - 0.5)


@given(st.floats(0, 2), st.integers(2, 128), st.floats(0.5, 1.0), st.floats(0.1, 1.0))
def test_heights_and_bins_are_inverse(height, n_bins, low, span):
    """Heights and bins are inverse, and the bins span exactly [low, high]."""
    args = (low, low + span, n_bins)
    assert camera.bin_to_height(camera.height_to_bin(height, *args), *args) == pytest.approx(
        height, abs=1e-9
    )
    assert camera.height_to_bin(low, *args) == pytest.approx(-0.5)
    assert camera.height_to_bin(low + span, *args) == pytest.approx(n_bins - 0.5)


@given(st.lists(POINT, min_size=1, max_size=5), EYE)
def test_numpy_and_torch_agree(points, eye):
    """Labels (NumPy) and policies (torch) use the same geometry."""
    points = np.stack(points)
    K, E = camera.intrinsics(45, SIZE), look_at(eye, [0, 0, 1.0])
    tensors = torch.from_numpy(points), torch.from_numpy(K), torch.from_numpy(E)
    u, v, depth = camera.project(points, K, E)
    for ours, theirs in zip((u, v, depth), camera.project(*tensors)):
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-12, atol=1e-9)
    # as model.py calls it
    batched = camera.project(tensors[0][None], tensors[1][None, None], tensors[2][None, None])
    np.testing.assert_allclose(batched[0][0].numpy(), u, rtol=1e-12, atol=1e-9)
    back = camera.unproject(
        torch.from_numpy(u), torch.from_numpy(v), tensors[0][:, 2], *tensors[1:]
    )
    np.testing.assert_allclose(back.numpy(), camera.unproject(u, v, points[:, 2], K, E), atol=1e-9)


@given(POINT)
def test_quantise_error_is_bounded(point):
    """The answer of a perfect classifier is off by at most half a cell and half a bin."""
    K, E = agentview(SIZE)
    snapped = camera.quantise(point, K, E, GRID, SIZE, LOW, HIGH, BINS)
    assert abs(snapped[2] - point[2]) <= (HIGH - LOW) / BINS / 2 + 1e-9
    before, after = camera.project(point, K, E), camera.project(snapped, K, E)
    for x, y in zip(before[:2], after[:2]):
        if 0 <= x <= SIZE:
            assert abs(x - y) <= SIZE / GRID / 2 + 1e-6
    again = camera.quantise(snapped, K, E, GRID, SIZE, LOW, HIGH, BINS)
    np.testing.assert_allclose(again, snapped, atol=1e-9)


@given(st.floats(0, SIZE), st.floats(200, SIZE), st.floats(LOW, HIGH), st.floats(LOW, HIGH))
def test_ray_is_affine_in_height(u, v, low, high):
    """Along the ray of one pixel the point is affine in its height.

    So the mean height gives the mean point.
    """
    K, E = agentview(SIZE)
    at = lambda h: camera.unproject(u, v, np.float64(h), K, E)
    np.testing.assert_allclose(at((low + high) / 2), (at(low) + at(high)) / 2, atol=1e-9)
    if abs(high - low) > 0.01:
        step = (at(high) - at(low)) / (high - low)
        assert step[2] == pytest.approx(1.0, abs=1e-9)


# -- rotations


@given(QUAT)
def test_quaternions_give_the_rotation_back(quat):
    """Quaternion -> matrix -> quaternion comes back up to its sign: both signs are one rotation."""
    matrix = rot_utils.quat_to_matrix(quat)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)
    back = rot_utils.matrix_to_quat(matrix)
    assert back[3] >= 0
    assert min(np.abs(back - quat).max(), np.abs(back + quat).max()) < 1e-9


AWKWARD = st.sampled_from([0.0, 1e-12, 1e-8, 1e-4, np.pi - 1e-4, np.pi - 1e-8, np.pi])


@given(UNIT, st.one_of(st.floats(0, np.pi), AWKWARD))
def test_rotation_vectors_give_the_rotation_back(axis, angle):
    """Axis and angle come back at every angle, also near 0 and near pi (a gripper that points
    down).
    """
    matrix = rot_utils.rotvec_to_matrix(axis * angle)
    back = rot_utils.matrix_to_rotvec(matrix)
    np.testing.assert_allclose(rot_utils.rotvec_to_matrix(back), matrix, atol=1e-9)
    if angle < np.pi - 1e-3:  # at pi both signs of the axis stand for one rotation
        np.testing.assert_allclose(back, axis * angle, atol=1e-9)
    assert np.linalg.norm(back) == pytest.approx(angle, abs=1e-7)


def test_rotations_follow_the_documented_conventions():
    """A quarter turn about z takes x to y in every notation, so none is transposed."""
    quarter = np.array([[0, -1.0, 0], [1, 0, 0], [0, 0, 1]])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(rot_utils.rotvec_to_matrix([0, 0, np.pi / 2]), quarter, atol=1e-12)
    np.testing.assert_allclose(rot_utils.quat_to_matrix([0, 0, half, half]), quarter, atol=1e-12)
    np.testing.assert_allclose(rot_utils.euler_to_matrix([0, 0, np.pi / 2]), quarter, atol=1e-12)
    np.testing.assert_allclose(rot_utils.matrix_to_quat(quarter), [0, 0, half, half], atol=1e-12)
    np.testing.assert_allclose(rot_utils.matrix_to_euler(quarter), [0, 0, np.pi / 2], atol=1e-12)


@given(st.floats(-np.pi, np.pi), st.floats(-1.5, 1.5), st.floats(-np.pi, np.pi))
def test_euler_angles_give_the_rotation_back(roll, pitch, yaw):
    """Euler -> matrix -> Euler comes back up to whole turns, away from pitch +-90 degrees,
    where it is not unique.
    """
    euler = np.array([roll, pitch, yaw])
    back = rot_utils.matrix_to_euler(rot_utils.euler_to_matrix(euler))
    assert np.abs(rot_utils.wrap_angle(back - euler)).max() < 1e-8


@given(
    arrays(float, (4, 4), elements=st.floats(-1, 1)).filter(
        lambda q: (np.linalg.norm(q, axis=1) > 0.1).all()
    )
)
def test_batched_rotations_equal_single_ones(quats):
    """The batch functions give each row the result that it has alone."""
    quats = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    matrices = rot_utils.quat_to_matrix(quats)
    euler = rot_utils.matrix_to_euler(matrices)
    for i in range(4):
        np.testing.assert_allclose(matrices[i], rot_utils.quat_to_matrix(quats[i]), atol=1e-12)
        np.testing.assert_allclose(
            rot_utils.euler_to_matrix(euler)[i], rot_utils.euler_to_matrix(euler[i]), atol=1e-12
        )
        vector = rot_utils.matrix_to_rotvec(matrices[i])
        np.testing.assert_allclose(
            rot_utils.rotvec_to_matrix(vector[None])[0], matrices[i], atol=1e-9
        )


@given(ANGLE, st.floats(-np.pi, np.pi))
def test_angles_wrap_into_half_a_turn_about_the_centre(angle, centre):
    """A wrapped angle is the same direction and lies within half a turn of the centre."""
    wrapped = rot_utils.wrap_angle(angle, centre)
    assert centre - np.pi - 1e-9 <= wrapped <= centre + np.pi + 1e-9
    assert np.abs(np.exp(1j * wrapped) - np.exp(1j * angle)) < 1e-9


def test_circular_mean_does_not_cut_at_pi():
    """Rolls scattered about +-pi have their mean at pi, not at 0."""
    mean = rot_utils.circular_mean(np.array([np.pi - 0.1, -np.pi + 0.1, np.pi - 0.2, -np.pi + 0.2]))
    assert abs(rot_utils.wrap_angle(mean - np.pi)) < 1e-9


@given(QUAT, UNIT, st.floats(0.001, np.pi - 0.001))
def test_the_angle_between_rotations_is_how_far_one_was_turned(quat, axis, angle):
    """The angle between a rotation and that rotation turned further is how far it was turned."""
    a = rot_utils.quat_to_matrix(quat)
    b = a @ rot_utils.rotvec_to_matrix(axis * angle)
    assert rot_utils.rotation_angle(a, b) == pytest.approx(angle, abs=1e-6)
    # arccos near 1 loses half the digits, and must not give NaN
    assert rot_utils.rotation_angle(a, a) < 1e-6


# -- metrics


def test_jerk_is_the_mean_second_difference():
    """It is 0 on a straight line at constant speed, 2 on t^2, and 0 for a path that is too
    short.
    """
    t = np.arange(10.0)
    assert metrics.jerk(np.outer(t, [1.0, -2.0, 0.5])) == pytest.approx(0, abs=1e-12)
    assert metrics.jerk(np.stack([t**2, 0 * t, 3 * t], -1)) == pytest.approx(2)
    assert metrics.jerk(np.stack([3 * t**2, 4 * t**2], -1)) == pytest.approx(10)
    assert metrics.jerk(np.zeros((2, 3))) == 0


def test_the_third_difference_is_told_apart():
    """t^2 has a second difference and no third one; t^3 has a third difference of 6.

    What is called jerk in the tables is the second, an acceleration.
    """
    t = np.arange(10.0)
    assert metrics.jerk(np.stack([t**2, 0 * t], -1), 3) == pytest.approx(0, abs=1e-9)
    assert metrics.jerk(np.stack([t**3, 0 * t], -1), 3) == pytest.approx(6)
    assert metrics.jerk(np.zeros((3, 2)), 3) == 0


def test_a_path_that_wanders_off_is_told_from_one_that_does_not():
    """A path that follows the truth and then wanders off covers it whole.

    The share of it near the truth and its length tell the difference.
    """
    truth = np.stack([np.arange(11.0), np.zeros(11)], -1)
    wandering = np.concatenate([truth, np.stack([np.full(40, 10.0), np.arange(1.0, 41)], -1)])
    assert metrics.coverage(truth, wandering, 1.0) == 1.0
    assert metrics.coverage(wandering, truth, 1.0) == 12 / 51
    assert metrics.path_length(wandering) / metrics.path_length(truth) == 5.0


def test_success_within_280_steps_is_told_from_success_at_the_end():
    """Success by step 280 follows from the step of the first success.

    In old rows a release is dated to the end of its episode.
    """
    late = {"success": True, "first_success": 281, "released": True, "steps": 290}
    assert metrics.within(late, "success")
    assert not metrics.within(late, "success", 280)
    assert metrics.within(late, "success", 281)
    assert not metrics.within(late, "released", 280)
    assert metrics.within({**late, "first_release": 280}, "released", 280)
    assert metrics.within({"success": False, "first_success": None}, "success", 280) is False


def test_coverage_is_whole_on_the_path_and_less_where_a_corner_is_cut():
    """A copy of the path covers all of it.

    One that cuts the corner of an L misses the points about the corner.
    """
    corner = np.array([(x, 0.0) for x in range(11)] + [(10.0, y) for y in range(1, 11)])
    assert metrics.coverage(corner, corner, 0.0) == 1
    # the chord from (0,0) to (10,10) is k/sqrt(2) from the point (k,0): within 2 px for k = 0, 1, 2
    # at both ends
    assert metrics.coverage(corner, corner[[0, -1]], 2.0) == pytest.approx(6 / 21)
    # a single point is a polyline too
    assert metrics.coverage(corner, corner[:1], 3.0) == pytest.approx(4 / 21)


def test_coverage_counts_the_segments_between_points():
    """The prediction is a line, not only its vertices: two ends of a straight stretch cover
    what lies between.
    """
    line = np.stack([np.linspace(0, 100, 50), np.full(50, 7.0)], -1)
    assert metrics.coverage(line, line[[0, -1]], 1e-6) == 1
    distances = metrics.distance_to_polyline([[50, 10.0], [-4, 4.0], [103, 11]], line[[0, -1]])
    np.testing.assert_allclose(distances, [3, 5, 5])


@given(
    arrays(float, (8, 2), elements=st.floats(0, 100)),
    arrays(float, (5, 2), elements=st.floats(0, 100)),
    st.floats(0, 50),
    st.floats(0, 50),
)
def test_coverage_grows_with_eps(truth, predicted, a, b):
    """A wider tolerance never covers less, and coverage is a fraction."""
    narrow, wide = (metrics.coverage(truth, predicted, e) for e in sorted((a, b)))
    assert 0 <= narrow <= wide <= 1
    assert metrics.coverage(truth, predicted, 200.0) == 1
