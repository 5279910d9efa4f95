"""Rotations in NumPy alone, so that a robot's laptop can import it. Quaternions are (x, y, z, w); matrices act on columns."""
import numpy as np


def quat_to_matrix(quat):
    """Unit quaternions (...,4) xyzw -> rotation matrices (...,3,3)."""
    x, y, z, w = np.moveaxis(np.asarray(quat, dtype=float), -1, 0)
    rows = [[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def rotvec_to_matrix(rotvec):
    """Axis-angle vectors (...,3) in radians -> rotation matrices (...,3,3), by Rodrigues' formula."""
    rotvec = np.asarray(rotvec, dtype=float)
    angle = np.linalg.norm(rotvec, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(rotvec, -1, 0)
    o = np.zeros_like(x)
    S = np.moveaxis(np.array([[o, -z, y], [z, o, -x], [-y, x, o]]), (0, 1), (-2, -1))
    a = np.sinc(angle / np.pi)  # sin(angle) / angle, finite at 0
    b = 0.5 * np.sinc(angle / (2 * np.pi)) ** 2  # (1 - cos(angle)) / angle^2
    return np.eye(3) + a * S + b * (S @ S)


def matrix_to_quat(matrix):
    """Rotation matrix (3,3) -> unit quaternion (4,) xyzw with w >= 0, by the largest of its four components (Shepperd)."""
    m = np.asarray(matrix, dtype=float)
    trace = np.trace(m)
    squares = np.array([1 + 2 * m[0, 0] - trace, 1 + 2 * m[1, 1] - trace, 1 + 2 * m[2, 2] - trace, 1 + trace])
    i = int(np.argmax(squares))
    q = np.empty(4)
    if i == 3:
        q[:] = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], squares[3]
    else:
        j, k = (i + 1) % 3, (i + 2) % 3
        q[i], q[j], q[k], q[3] = squares[i], m[j, i] + m[i, j], m[k, i] + m[i, k], m[k, j] - m[j, k]
    q /= np.linalg.norm(q)
    return -q if q[3] < 0 else q


def matrix_to_rotvec(matrix):
    """Rotation matrix (3,3) -> axis-angle vector (3,) in radians, angle in [0, pi]."""
    q = matrix_to_quat(matrix)
    norm = np.linalg.norm(q[:3])
    return np.zeros(3) if norm < 1e-12 else q[:3] / norm * 2 * np.arctan2(norm, q[3])


def matrix_to_euler(matrix):
    """Rotation matrices (...,3,3) -> roll, pitch, yaw (...,3) in radians with R = Rz(yaw) Ry(pitch) Rx(roll)."""
    m = np.asarray(matrix, dtype=float)
    roll = np.arctan2(m[..., 2, 1], m[..., 2, 2])
    pitch = np.arctan2(-m[..., 2, 0], np.hypot(m[..., 2, 1], m[..., 2, 2]))
    return np.stack([roll, pitch, np.arctan2(m[..., 1, 0], m[..., 0, 0])], axis=-1)


def euler_to_matrix(euler):
    """Roll, pitch, yaw (...,3) in radians -> rotation matrices (...,3,3), R = Rz(yaw) Ry(pitch) Rx(roll)."""
    basis = np.eye(3)
    turn = lambda axis, angle: rotvec_to_matrix(angle[..., None] * basis[axis])
    roll, pitch, yaw = np.moveaxis(np.asarray(euler, dtype=float), -1, 0)
    return turn(2, yaw) @ turn(1, pitch) @ turn(0, roll)


def wrap_angle(angle, centre=0.0):
    """Angles in radians, wrapped into [centre - pi, centre + pi): a gripper that points down sits at roll = +-pi, and
    binning must not cut there."""
    return centre + (np.asarray(angle) - centre + np.pi) % (2 * np.pi) - np.pi


def circular_mean(angle):
    """Mean direction of angles (N,...) in radians over the first axis."""
    return np.arctan2(np.sin(angle).mean(axis=0), np.cos(angle).mean(axis=0))


def rotation_angle(a, b):
    """Angle in radians between rotations (...,3,3) and (...,3,3)."""
    cosine = (np.einsum("...ij,...ij->...", a, b) - 1) / 2
    return np.arccos(np.clip(cosine, -1, 1))
