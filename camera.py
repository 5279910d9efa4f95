"""Pinhole cameras: project, unproject, grid cells and height bins. Works on NumPy arrays and torch
tensors alike.

Conventions: OpenCV axes (x right, y down, z forward). `K` (...,3,3) intrinsics in pixels, `E`
(...,4,4) camera-to-world extrinsics in metres. Pixel coordinates are continuous: the image spans
[0, W] x [0, H], the centre of pixel i is i + 0.5. A point seen at pixel (u, v) is exactly affine in
its world height, so (cell, height bin) names a 3D point.
"""

import math

import numpy as np


def intrinsics(fovy_deg, size):
    """K of a square image of `size` pixels with a vertical field of view in degrees. f = size / 2 /
    tan(fovy / 2).
    """
    f = 0.5 * size / math.tan(math.radians(fovy_deg) / 2)
    # square pixels, principal point in the middle of the image
    return np.array([[f, 0, size / 2], [0, f, size / 2], [0, 0, 1.0]])


def extrinsics_from_mujoco(position, rotation):
    """Camera-to-world (4,4) from MuJoCo's cam_xpos (3,) m and cam_xmat (3,3).

    MuJoCo's camera has OpenGL axes: it looks along -z with y up.
    """
    E = np.eye(4)
    E[:3, :3], E[:3, 3] = rotation, position
    # OpenGL to OpenCV axes: y and z change sign, in the camera's frame (on the right)
    return E @ np.diag([1.0, -1.0, -1.0, 1.0])


def look_at(position, target):
    """Camera-to-world (4,4) of an upright camera at `position` (3,) that looks at `target` (3,)."""
    forward = np.subtract(target, position) / np.linalg.norm(np.subtract(target, position))
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    # the camera's axes in the world are the columns: x right, y down (= z cross x), z forward
    E = np.eye(4)
    E[:3, 0], E[:3, 1], E[:3, 2], E[:3, 3] = right, np.cross(forward, right), forward, position
    return E


def lowered(E, metres):
    """Camera-to-world E (4,4) with the world's zero so many metres higher: heights become less."""
    E = np.array(E, dtype=float)
    E[2, 3] -= metres
    return E


def fault(K, E, size=None):
    """What is wrong with a camera: (message, "K" or "E"), or None.

    Checked are finite numbers, an intrinsic matrix and a rigid camera-to-world transform. size:
    (width, height) in pixels of the image that has to hold the principal point.
    """
    # without skew, as `project` takes it
    whole = K.shape == (3, 3) and np.isfinite(K).all() and np.allclose(K[2], [0, 0, 1])
    if not whole or not np.allclose([K[0, 1], K[1, 0]], 0):
        return "is no (3,3) intrinsic matrix [[fx,0,cx],[0,fy,cy],[0,0,1]] of finite numbers", "K"
    if K[0, 0] <= 0 or K[1, 1] <= 0:
        return f"has focal lengths {K[0, 0]:g} and {K[1, 1]:g}, pixels above 0 are expected", "K"
    if size is not None:
        # 1 where the principal point is the middle, as nearly in any camera
        ratios = 2 * K[0, 2] / size[0], 2 * K[1, 2] / size[1]
        # both off by one factor: the image was rescaled and K was not
        alike = abs(ratios[0] - ratios[1]) < 0.1 * abs(ratios[0]) and not 0.6 < ratios[0] < 1.6
        if alike or not all(0 < r < 2 for r in ratios):
            return (
                f"has its principal point at ({K[0, 2]:g}, {K[1, 2]:g}), which does not fit "
                f"{size[0]}x{size[1]} px: it looks like K of another image size"
            ), "K"
    if E.shape != (4, 4) or not np.isfinite(E).all() or not np.allclose(E[3], [0, 0, 0, 1]):
        return "is no (4,4) camera-to-world transform [R t; 0 1] of finite numbers", "E"
    R = E[:3, :3]
    # a mirror has determinant -1
    if not np.allclose(R @ R.T, np.eye(3), atol=1e-4) or np.linalg.det(R) < 0:
        return (
            "has a rotation that is not orthonormal with determinant 1, points would be "
            "unprojected wrongly"
        ), "E"
    return None


def in_view(points, K, E, size):
    """True (...) where world points (...,3) are in front of the camera and inside its (width,
    height) image.
    """
    # a point in the camera's own plane divides by zero, and is not in view
    with np.errstate(all="ignore"):
        u, v, depth = project(points, K, E)
    return (depth > 0) & (u >= 0) & (u <= size[0]) & (v >= 0) & (v <= size[1])


def _rotate(R, x):
    """Matrices (...,3,3) times vectors (...,3) -> (...,3)."""
    return (R @ x[..., None])[..., 0]


def _transpose(R):
    return R.swapaxes(-1, -2)


def project(points, K, E):
    """World points (...,3) in metres -> pixels u (...), v (...) and depth (...) in metres. Depth <=
    0 is behind.
    """
    # camera coordinates (...,3): x right, y down, z forward
    c = _rotate(_transpose(E[..., :3, :3]), points - E[..., :3, 3])
    # pinhole: focal length times tangent, from the principal point
    u = K[..., 0, 0] * c[..., 0] / c[..., 2] + K[..., 0, 2]
    v = K[..., 1, 1] * c[..., 1] / c[..., 2] + K[..., 1, 2]
    return u, v, c[..., 2]


def ray(u, v, K, E):
    """World direction (...,3) of the ray of pixel (u, v), to where it is 1 m deep."""
    x = (u - K[..., 0, 2]) / K[..., 0, 0]
    y = (v - K[..., 1, 2]) / K[..., 1, 1]
    # camera vector (x, y, 1) in the world: a sum of the columns of R
    R = E[..., :3, :3]
    return R[..., :, 0] * x[..., None] + R[..., :, 1] * y[..., None] + R[..., :, 2]


def unproject(u, v, height, K, E):
    """World point (...,3) on the ray of pixel (u, v) whose world z is `height` (metres).

    The ray of a pixel level with the camera never reaches another height: the result is then
    infinite.
    """
    direction, t = ray(u, v, K, E), E[..., :3, 3]
    # camera centre + scale * direction has world z = height
    scale = (height - t[..., 2]) / direction[..., 2]
    return t + direction * scale[..., None]


def pixel_to_cell(pixel, grid, size):
    """Continuous cell coordinate of a pixel coordinate: cell i is centred at i, so the image spans
    [-0.5, grid - 0.5].
    """
    return pixel * (grid / size) - 0.5


def cell_to_pixel(cell, grid, size):
    """Pixel coordinate of a continuous cell coordinate (inverse of `pixel_to_cell`)."""
    return (cell + 0.5) * (size / grid)


def height_to_bin(height, low, high, n_bins):
    """Continuous bin coordinate: bin i is centred at i; [low, high] spans [-0.5, n_bins - 0.5]."""
    return (height - low) / (high - low) * n_bins - 0.5


def bin_to_height(index, low, high, n_bins):
    """Height in metres of a continuous bin coordinate (inverse of `height_to_bin`)."""
    return low + (index + 0.5) / n_bins * (high - low)


def quantise(point, K, E, grid, size, low, high, n_bins, margin=0):
    """Nearest point (3,) to `point` (3,) that the volume can represent.

    It is the centre of the point's image cell and height bin: what a perfect classifier would
    decode. The rest are the arguments of `project`, `pixel_to_cell` and `height_to_bin`. margin:
    cells by which the volume reaches beyond each edge of the image.
    """
    u, v, _ = project(point, K, E)
    centre = lambda x, n: np.clip(np.round(pixel_to_cell(x, n, size)), -margin, n - 1 + margin)
    # metres, after rounding to a bin and clamping to the range
    z = bin_to_height(
        np.clip(np.round(height_to_bin(point[..., 2], low, high, n_bins)), 0, n_bins - 1),
        low,
        high,
        n_bins,
    )
    # back along the ray of the cell's centre, to the height of the bin's centre
    return unproject(
        cell_to_pixel(centre(u, grid), grid, size),
        cell_to_pixel(centre(v, grid), grid, size),
        z,
        K,
        E,
    )
