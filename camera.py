"""Pinhole cameras: project, unproject, grid cells and height bins. Works on NumPy arrays and torch tensors alike.

Conventions: OpenCV axes (x right, y down, z forward). `K` (...,3,3) intrinsics in pixels, `E` (...,4,4) camera-to-world
extrinsics in metres. Pixel coordinates are continuous: the image spans [0, W] x [0, H], the centre of pixel i is i + 0.5.
A point seen at pixel (u, v) is exactly affine in its world height, so (cell, height bin) names a 3D point.
"""
import math

import numpy as np


def intrinsics(fovy_deg, size):
    """K of a square image of `size` pixels with a vertical field of view in degrees. f = size / 2 / tan(fovy / 2)."""
    f = 0.5 * size / math.tan(math.radians(fovy_deg) / 2)
    return np.array([[f, 0, size / 2], [0, f, size / 2], [0, 0, 1.0]])


def extrinsics_from_mujoco(position, rotation):
    """Camera-to-world (4,4) from MuJoCo's cam_xpos and cam_xmat, whose camera looks along -z with y up."""
    E = np.eye(4)
    E[:3, :3], E[:3, 3] = rotation, position
    return E @ np.diag([1.0, -1.0, -1.0, 1.0])


def look_at(position, target):
    """Camera-to-world (4,4) of an upright camera at `position` that looks at `target`, both (3,)."""
    forward = np.subtract(target, position) / np.linalg.norm(np.subtract(target, position))
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    E = np.eye(4)
    E[:3, 0], E[:3, 1], E[:3, 2], E[:3, 3] = right, np.cross(forward, right), forward, position
    return E


def _rotate(R, x):
    """(...,3,3) times (...,3)."""
    return (R @ x[..., None])[..., 0]


def _transpose(R):
    return R.swapaxes(-1, -2)


def project(points, K, E):
    """World points (...,3) in metres -> pixels u (...), v (...) and depth (...) in metres. Depth <= 0 is behind."""
    c = _rotate(_transpose(E[..., :3, :3]), points - E[..., :3, 3])
    u = K[..., 0, 0] * c[..., 0] / c[..., 2] + K[..., 0, 2]
    v = K[..., 1, 1] * c[..., 1] / c[..., 2] + K[..., 1, 2]
    return u, v, c[..., 2]


def ray(u, v, K, E):
    """World direction (...,3) of the ray of pixel (u, v), as long as it is at a depth of one metre."""
    x = (u - K[..., 0, 2]) / K[..., 0, 0]
    y = (v - K[..., 1, 2]) / K[..., 1, 1]
    R = E[..., :3, :3]
    return R[..., :, 0] * x[..., None] + R[..., :, 1] * y[..., None] + R[..., :, 2]


def unproject(u, v, height, K, E):
    """World point (...,3) on the ray of pixel (u, v) whose world z is `height` (metres).

    The ray of a pixel level with the camera never reaches another height: the result is then infinite.
    """
    direction, t = ray(u, v, K, E), E[..., :3, 3]
    scale = (height - t[..., 2]) / direction[..., 2]
    return t + direction * scale[..., None]


def pixel_to_cell(pixel, grid, size):
    """Continuous cell coordinate of a pixel coordinate: cell i is centred at i, so the image spans [-0.5, grid - 0.5]."""
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


def quantise(point, K, E, grid, size, low, high, n_bins):
    """Nearest representable point (3,): centre of its image cell and height bin. What a perfect classifier would decode."""
    u, v, _ = project(point, K, E)
    centre = lambda x, n: np.clip(np.round(pixel_to_cell(x, n, size)), 0, n - 1)
    z = bin_to_height(np.clip(np.round(height_to_bin(point[..., 2], low, high, n_bins)), 0, n_bins - 1), low, high, n_bins)
    return unproject(cell_to_pixel(centre(u, grid), grid, size), cell_to_pixel(centre(v, grid), grid, size), z, K, E)
